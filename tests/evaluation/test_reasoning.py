"""Accuracy on tasks compared with the model on one sequence at a time, and complete runs on tasks."""

import contextlib
import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mythos.cli import main
from mythos.config.data import TaskConfig
from mythos.config.loading import config_from_dict
from mythos.config.sections import Config
from mythos.data.tasks import TaskSet, task_set
from mythos.distributed.ranks import Ranks, World
from mythos.errors import MythosError
from mythos.evaluation.execution import Execution
from mythos.evaluation.reasoning import AccuracyMap, accuracy_map, task_metrics, usual_difficulties
from mythos.model.config import ModelConfig
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.model.state import initial_state
from mythos.planning.plan import plan
from mythos.reports.evaluation_plots import draw_accuracy_maps
from mythos.reports.recorded import run_names
from mythos.trainer import Trainer
from mythos.training.depth_schedule import DepthSchedule
from mythos.training.metrics import read_metrics
from tests.noise import name_generator
from tests.trainers import assert_identical, run, take_step

pytestmark = pytest.mark.usefixtures("no_plots")

TASK = TaskConfig(symbols=4, difficulty=(1, 3))
SETTINGS: dict[str, Any] = {
    "model": {
        "dim": 32,
        "attention": "gqa",
        "n_heads": 2,
        "n_kv_heads": 2,
        "head_dim": 16,
        "ffn_dim": 48,
        "core_ffn": "dense",
        "coda_layers": 0,
        "loops": 2,
        "lora_rank": 0,
        "context_length": 64,
    },
    "data": {
        "kind": "reasoning",
        "task": {"symbols": 4, "difficulty": [1, 3]},
        "streams": 4,
        "sequence_length": 5,
        "workers": 0,
    },
    "depth": {"follow": "difficulty"},
    "train": {"steps": 4, "global_batch": 24, "micro_batch": 8, "dtype": "float32", "device": "cpu"},
    "eval": {"every": 2, "batches": 3, "loops": [1, 2]},
    "checkpoint": {"every": 2},
    "log": {"every": 1},
}


def settings(directory: Path, **changes: Any) -> dict[str, Any]:
    """A configuration of a small run; `train__steps=2` changes a field."""
    values = json.loads(json.dumps({**SETTINGS, "run": {"name": "task", "dir": str(directory / "run")}}))
    for path, value in changes.items():
        section, field = path.split("__")
        values.setdefault(section, {})[field] = value
    return values


def tiny(directory: Path, **changes: Any) -> Config:
    return config_from_dict(settings(directory, **changes))


def build(noise: int = 1, **changes: Any) -> RecurrentDepthTransformer:
    """A small model with seeded noise in every weight."""
    config = ModelConfig(**{**SETTINGS["model"], "vocab_size": TASK.vocabulary, **changes})
    model = RecurrentDepthTransformer(config).initialize(0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=name_generator(noise, name)), alpha=0.3)
    return model


def alone(model: RecurrentDepthTransformer, data: TaskSet, loops: Callable[[int], int]) -> tuple[float, float]:
    """Mean loss of answer tokens and share of right answers, one sequence at a time."""
    losses, right = [], 0
    for ids, targets, difficulty in zip(data.ids, data.targets, data.difficulties.tolist(), strict=True):
        with torch.no_grad():
            logits = model(ids[None], loops=loops(difficulty)).logits[0]
        places = [place for place, target in enumerate(targets.tolist()) if target != -100]
        losses += [F.cross_entropy(logits[place], targets[place]).item() for place in places]
        right += all(logits[place].argmax() == targets[place] for place in places)
    return sum(losses) / len(losses), right / len(data.ids)


# --- validation


@pytest.mark.parametrize("task", [TASK, TaskConfig(symbols=4, queries=2, difficulty=(1, 3))])
def test_metrics_equal_sequences_run_alone(task: TaskConfig) -> None:
    model = build()
    data = task_set(task, [3, 2, 1], 8, 7, "validation")
    world = World(torch.device("cpu"), Ranks(), Ranks())
    execution = Execution(7, world, contextlib.nullcontext())
    following = task_metrics(model, data, execution, depths=[1, 4], main_depth=None)
    named = {"": lambda difficulty: difficulty, "@1": lambda _: 1, "@4": lambda _: 4}
    assert set(following) == {f"val/{what}{at}" for what in ("loss", "accuracy") for at in named}
    for at, loops in named.items():
        loss, accuracy = alone(model, data, loops)
        assert following[f"val/loss{at}"] == pytest.approx(loss, rel=1e-5)
        assert following[f"val/accuracy{at}"] == accuracy
    assert len({round(following[f"val/loss{at}"], 4) for at in named}) == 3, "depths must differ"
    fixed = task_metrics(model, data, execution, depths=[1, 4], main_depth=2)
    assert fixed["val/loss"] == fixed["val/loss@2"] == pytest.approx(alone(model, data, lambda _: 2)[0], rel=1e-5)
    assert fixed["val/loss@4"] == following["val/loss@4"]


# --- training


def test_a_step_is_that_of_its_answers_alone(tmp_path: Path) -> None:
    """Loss and gradient of a step equal those of one sequence at a time, with as many loops as its difficulty."""
    trainer = Trainer(tiny(tmp_path, train__steps=50))
    take_step(trainer)  # output projections start at zero, which makes all depths equal
    batch = trainer.loader.streams.share(0, 1).next_batch(6)
    assert (batch.targets != -100).sum(1).tolist() == [1] * 24
    loops = trainer.schedule.plan(1).loops
    assert set(loops) == {1, 2, 3}
    model = RecurrentDepthTransformer(trainer.config.model)
    model.load_state_dict({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    total = torch.zeros(())
    for row, (ids, targets) in enumerate(zip(batch.ids, batch.targets, strict=True)):
        state = initial_state(trainer.config.model, [row], 5, seed=0, step=1, device=torch.device("cpu"))
        logits = model(ids[None, :-1], loops=loops[row], state=state).logits[0]
        total = total + F.cross_entropy(logits, targets, ignore_index=-100) / 24
    total.backward()
    result = take_step(trainer)
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
    assert result.loss.item() == pytest.approx(total.item(), rel=1e-5)
    assert result.grad_norm.item() == pytest.approx(norm.item(), rel=1e-4)
    trainer.resources.close()


def test_loops_follow_the_difficulty_of_the_data(tmp_path: Path) -> None:
    """Each row's loops equal the number of hops to its answer."""
    config = tiny(tmp_path, data__task={"symbols": 11, "difficulty": [2, 4]}, data__sequence_length=12)
    schedule, streams = DepthSchedule(config), Trainer(config).loader.streams
    for step in range(5):
        batch, loops = streams.next_batch(schedule.slots), schedule.plan(step).loops
        assert schedule.plan(step).backprop == 4
        for row in range(24):
            pairs = dict(divmod(token - 12, 11) for token in batch.ids[row, :11].tolist())
            symbol = batch.ids[row, 11].item() - 1
            for _ in range(loops[row]):
                symbol = pairs[symbol]
            assert symbol == batch.targets[row, 11].item() - 1


def test_a_run_resumes_exactly_and_tells_accuracy(tmp_path: Path) -> None:
    whole = run(tiny(tmp_path / "whole"))
    config = tiny(tmp_path / "parts")
    halfway = Trainer(config)
    for _ in range(2):
        take_step(halfway)
        halfway.tokens += halfway.config.tokens_per_step
        halfway.position = halfway.loader.state_dict()
    halfway.save(wait=True)
    halfway.resources.close()
    assert_identical(whole, run(config))
    records = read_metrics(tmp_path / "whole" / "run" / "metrics.jsonl")
    assert "val/bits_per_byte" not in records[-1]
    assert 0 <= records[-1]["val/accuracy"] <= 1
    assert {"val/loss", "val/loss@1", "val/loss@2", "val/accuracy@1", "val/accuracy@2"} <= records[-1].keys()
    assert not (tmp_path / "whole" / "run" / "tokenizer").exists()
    assert not (tmp_path / "whole" / "run" / "samples").exists()
    with pytest.raises(MythosError, match="another task"):
        Trainer(tiny(tmp_path / "parts", data__task={"symbols": 4, "difficulty": [1, 2]}))


def test_dry_run_knows_the_vocabulary(tmp_path: Path) -> None:
    config = tiny(tmp_path)
    assert config.model.vocab_size == TASK.vocabulary == 1 + 4 + 16
    assert "without the vocabulary" not in plan(config)
    assert config.depth_mean == 2 and config.depth_maximum == config.depth_backprop == 3


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data__task": {"difficulty": [3, 1]}}, r"data.task.difficulty: got \[3, 1\]"),
        ({"data__sequence_length": 4}, "data.sequence_length, data.task.difficulty: got 4, and hops of difficulty 3"),
        ({"data__task": {"symbols": 4, "modulus": 5}}, "data.task.name, data.task.modulus: got hops and 5"),
        ({"data__task": {"symbols": 4, "queries": 5}, "data__sequence_length": 9}, "data.task.queries"),
        ({"data__task": {"tell": "number", "difficulty": [1, 65]}, "data__sequence_length": 14}, "up to 64"),
        ({"data__kind": "embedded", "depth__follow": "none"}, "data.kind, data.task: got embedded and a task"),
        ({"data__path": "a.txt"}, "data.kind, data.path: got reasoning"),
        ({"data__mask_documents": True}, "data.kind, data.mask_documents"),
        ({"model__vocab_size": 2, "data__task": {"symbols": 12}, "data__sequence_length": 13}, "model.vocab_size"),
        ({"depth__follow": "none"}, "data.task.tell, depth.follow: got nothing and none; .* number or marks"),
        (
            {"data__task": {"ask": "steps"}, "data__sequence_length": 13},
            "data.task.name, data.task.ask: got hops and steps; .* hops with tell: marks",
        ),
        (
            {"data__task": {"ask": "windows"}, "data__sequence_length": 13},
            "data.task.name, data.task.ask: got hops and windows",
        ),
        (
            {
                "data__task": {"name": "permutations", "ask": "windows"},
                "data__sequence_length": 13,
                "depth__follow": "none",
            },
            "data.task.ask, depth.follow: got windows and none; .* end or steps",
        ),
        (
            {"data__task": {"name": "permutations", "letters": 7}, "data__sequence_length": 13},
            "data.task.letters, data.task.group: got 7 and S3, which has 6 elements; lower the first",
        ),
        ({"data__task": {"letters": 2}, "data__sequence_length": 13}, "letters is for the task permutations only"),
        ({"depth__mean": 4}, "depth.follow, depth.mean: got difficulty and 4.0; .* set the second to null"),
        ({"depth__sampling": "uniform"}, "depth.follow, depth.sampling: .* set the second to poisson"),
        ({"depth__curriculum": {"shape": "linear"}}, "got difficulty and {shape: linear, over: 0.25, start: 1.0};"),
        ({"depth__backprop": 3, "data__task": {"symbols": 4, "difficulty": [3, 1]}}, "got .3, 1.; the fewest"),
        ({"depth__backprop": 9, "data__task": {"symbols": 4, "difficulty": [0, 3]}}, "got .0, 3.; allowed"),
        ({"depth__backprop": 4}, "got 4, and a sequence runs at most 3 loops"),
    ],
)
def test_what_contradicts_is_refused(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(MythosError, match=named) as caught:
        tiny(tmp_path, **changes)
    assert ": 1 problem in" in str(caught.value)


def test_what_refusals_advise_is_accepted(tmp_path: Path) -> None:
    tiny(tmp_path, depth__mean=None, depth__maximum=None, depth__sampling="poisson", depth__curriculum=None)
    tiny(tmp_path, depth__follow="none", data__task={"symbols": 4, "tell": "number"}, data__sequence_length=6)
    tiny(tmp_path, depth__follow="none", data__task={"symbols": 4, "difficulty": [2, 2]})
    tiny(tmp_path, depth__follow="none", data__task={"name": "addition"}, data__sequence_length=12)
    for ask, follow in (("end", "none"), ("steps", "none"), ("windows", "difficulty")):
        task = {"name": "permutations", "ask": ask, "difficulty": [1, 3]}
        tiny(tmp_path, depth__follow=follow, data__task=task, data__sequence_length=8)


def test_loops_follow_only_where_there_are_some(tmp_path: Path) -> None:
    with pytest.raises(
        MythosError, match=r"depth.follow, data.kind, model.injection: got difficulty, reasoning and none"
    ):
        tiny(tmp_path, model__injection="none", model__loops=1, eval__loops=[1])
    with pytest.raises(MythosError, match=r"depth.follow, data.kind, model.injection"):
        config_from_dict({"depth": {"follow": "difficulty"}, "train": {"steps": 1}})


# --- the report


def test_every_entry_of_a_map_equals_a_run_by_itself() -> None:
    model, task = build(noise=7), TaskConfig(symbols=4, queries=3, difficulty=(1, 3))
    with torch.no_grad():
        model.embedding.weight[5:] *= 0.1  # then answers are mostly symbols and often right by chance
    accuracies = accuracy_map(
        model, task, name="noise", step=7, difficulties=[1, 4], loops=[1, 3, 5], sequences=300, length=7
    )
    for difficulty in accuracies.difficulties:
        data = task_set(TASK, [difficulty], 300, 7, f"report/{difficulty}")
        for loops in accuracies.loops:
            with torch.no_grad():
                logits = model(data.ids, loops=loops).logits
            answers = logits[:, 4].argmax(-1)
            assert accuracies.at(difficulty, loops) == (answers == data.targets[:, 4]).double().mean().item()
    assert all(0.1 < value < 0.9 for row in accuracies.accuracy for value in row)
    assert len({value for row in accuracies.accuracy for value in row}) > 3, "depths must differ"


def test_usual_difficulties_reach_six_times_the_hardest() -> None:
    assert usual_difficulties(TaskConfig(difficulty=(1, 5))) == [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30]
    assert usual_difficulties(TaskConfig(difficulty=(4, 10))) == [4, 5, 6, 7, 8, 9, 10, 12, 16, 20, 30, 40, 60]
    assert usual_difficulties(TaskConfig(difficulty=(30, 32), tell="number")) == [30, 31, 32, 38, 51, 64]


def test_a_map_is_written_whole(tmp_path: Path) -> None:
    accuracies = AccuracyMap("one", "hops", 9, (1, 2), [1, 2, 3], [1, 2], 10, [[1.0, 0.5], [0.25, 1.0], [0.0, 0.125]])
    written = table, values = accuracies.write(tmp_path / "new" / "map-0.1")
    assert [path.name for path in written] == ["map-0.1.csv", "map-0.1.json"]
    picture = draw_accuracy_maps([accuracies], tmp_path / "one.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["difficulty"]), int(r["loops"]), float(r["accuracy"])) for r in rows] == [
        (d, t, accuracies.at(d, t)) for d in (1, 2, 3) for t in (1, 2)
    ]
    read = json.loads(values.read_text())
    assert read["accuracy"] == accuracies.accuracy and read["trained"] == [1, 2]
    assert [line.split() for line in accuracies.table().splitlines()[1:]] == [
        ["1*", "100.0%", "50.0%"],
        ["2*", "25.0%", "100.0%"],
        ["3", "0.0%", "12.5%"],
    ]
    assert draw_accuracy_maps([accuracies, accuracies], tmp_path / "both.png").stat().st_size > picture.stat().st_size


def test_report_of_a_looped_and_a_fixed_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny(tmp_path / "looped", train__steps=1))
    assert "of the sequences have every answer right at as many loops as steps" in capsys.readouterr().out
    fixed = {"model__injection": "none", "model__loops": 1, "depth__follow": "none", "eval__loops": [1]}
    fixed |= {"data__task": {"symbols": 4, "difficulty": [1, 3], "tell": "number"}, "data__sequence_length": 6}
    run(tiny(tmp_path / "fixed", train__steps=1, **fixed))
    capsys.readouterr()
    runs = [str(tmp_path / name / "run") for name in ("looped", "fixed")]
    assert main(["reasoning", *runs, "--sequences", "64", "--difficulties", "1,2,6"]) == 0
    printed = capsys.readouterr().out
    assert "with as many loops as steps: 1: " in printed and "side-by-side.png" in printed
    looped, own = (json.loads((Path(path) / "reasoning" / "step-00000001.json").read_text()) for path in runs)
    assert looped["loops"] == [1, 2, 6] and own["loops"] == [1]
    assert looped["difficulties"] == own["difficulties"] == [1, 2, 6]
    assert (tmp_path / "looped" / "run" / "reasoning" / "side-by-side.png").is_file()
    # Both have the name run, as directory and as run.name.
    out = tmp_path / "out"
    assert main(["reasoning", *runs, "--sequences", "8", "--difficulties", "1", "--out", str(out)]) == 0
    stems = ("run", "run-2")
    assert {file.name for file in out.iterdir()} == {
        "side-by-side.png",
        *(f"{stem}.{kind}" for stem in stems for kind in ("png", "csv", "json")),
    }
    assert [json.loads((out / f"{stem}.json").read_text())["name"] for stem in stems] == list(stems)
    (tmp_path / "file").touch()
    assert main(["reasoning", runs[0], "--sequences", "8", "--difficulties", "1", "--out", str(tmp_path / "file")]) == 1
    assert f"error: {tmp_path / 'file'} cannot be written: " in capsys.readouterr().err
    # Without a run directory, the files do not go two folders above the checkpoint.
    monkeypatch.chdir(out)
    shutil.copytree(Path(runs[0]) / "checkpoints" / "step-00000001", out / "a" / "b" / "step-00000001")
    assert main(["reasoning", "a/b/step-00000001", "--sequences", "8", "--difficulties", "1"]) == 0
    assert {file.name for file in (out / "reasoning").iterdir()} == {"a.png", "a.csv", "a.json"}
    # Further measurements do not replace the first.
    before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
    assert main(["reasoning", *runs, "--sequences", "8", "--difficulties", "2", "--out", str(out)]) == 0
    assert {file: file.read_bytes() for file in before} == before
    new = {file.name for file in out.iterdir() if file.is_file()} - {file.name for file in before}
    assert new == {"side-by-side-2.png"} | {
        f"run{end}.{kind}" for end in ("-3", "-2-2") for kind in ("png", "csv", "json")
    }
    capsys.readouterr()
    assert main(["sweep", runs[0]]) == 1
    assert "`mythos reasoning`" in capsys.readouterr().err
    for option in ("--loops", "--most"):
        assert main(["sweep", runs[1], option, "2"]) == 1
        assert f"error: {option}: got 2; a fixed-depth model" in capsys.readouterr().err


def test_runs_are_called_as_their_directories() -> None:
    paths = ["a/lr0.1/", "b/lr0.2", "c/lr0.1/checkpoints/step-00000004", "d/lr0.1-2", "e/lr0.1"]
    assert run_names(paths) == ["lr0.1", "lr0.2", "lr0.1-2", "lr0.1-2-2", "lr0.1-3"]


def test_report_refuses_what_it_cannot_ask(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "config.yaml").touch()
    assert main(["reasoning", str(tmp_path), "--device", "cuda"]) == 1
    assert capsys.readouterr().err == "error: --device is cuda, but torch finds no CUDA GPU: set --device=auto or cpu\n"
    assert main(["reasoning", str(tmp_path / "nothing")]) == 1
    assert "error: " in capsys.readouterr().err
    bad = (
        ("--loops", "0", "'0'"),
        ("--loops", "1,-2", "'1,-2'"),
        ("--difficulties", "a", "'a'"),
        ("--sequences", "0", "0"),
    )
    for option, value, message in bad:
        assert main(["reasoning", str(tmp_path), option, value]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {option}: got {message}; give ") and error.count("\n") == 1
    task = {"symbols": 4, "difficulty": [1, 3], "tell": "number"}
    run(tiny(tmp_path, train__steps=1, data__task=task, data__sequence_length=6))
    capsys.readouterr()
    assert main(["reasoning", str(tmp_path / "run"), "--difficulties", "65", "--sequences", "8"]) == 1
    assert "up to 64" in capsys.readouterr().err
