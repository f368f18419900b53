"""What is said of a run that continues with another configuration."""

import json
import math
import zlib
from pathlib import Path
from typing import Any

import pytest
import yaml

import mythos.checkpoints.config_changes
import mythos.trainer
from mythos.checkpoints.config_changes import config_changes, consequences
from mythos.checkpoints.preflight import check_continued
from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.trainer import Trainer
from tests.runs import documents, tiny
from tests.trainers import run
from tests.trainers import saved as saved_step

pytestmark = pytest.mark.usefixtures("no_plots")

STEPS = {"train__steps": 1000, "depth__curriculum": {"shape": "none"}}


def said(tmp_path: Path, before: dict[str, Any], after: dict[str, Any], step: int = 500) -> str:
    saved = tiny(tmp_path, **STEPS | before).model_dump(mode="json")
    config = tiny(tmp_path, **STEPS | after)
    return check_continued(config, saved, config_changes(config, saved), step, "runs/tiny/step") or ""


def test_every_difference_is_named(tmp_path):
    after = {"optim__weight_decay": 0.2, "optim__betas": [0.9, 0.99], "log__every": 5, "train__dtype": "bfloat16"}
    lines = said(tmp_path, {"eval__prompts": ["A"]}, after | {"eval__prompts": []}).splitlines()
    assert lines[0].startswith(
        "the configuration differs from that of checkpoint runs/tiny/step, which stays in the run"
    )
    assert lines[0].endswith("config.step-00000500.yaml:")
    assert set(lines[1:]) == {
        "  optim.weight_decay 0.1 -> 0.2",
        "  optim.betas [0.9, 0.95] -> [0.9, 0.99]",
        "  log.every 1 -> 5",
        '  train.dtype "float32" -> "bfloat16"',
        "  eval.prompts [A] -> []",
    }


def test_nothing_is_said_of_the_same_configuration(tmp_path):
    assert said(tmp_path, {}, {}) == ""
    directories = {
        "run__name": "other",
        "run__dir": "elsewhere",
        "run__resume": "runs/tiny/step",
        "run__on_change": "fail",
        "checkpoint__dir": "elsewhere/checkpoints",
    }
    assert said(tmp_path, {}, directories) == ""


def test_sources_of_a_mixture_are_named(tmp_path):
    def mixture(**weights: float) -> dict[str, Any]:
        sources = {name: {"kind": "embedded", "weight": weight} for name, weight in weights.items()}
        return {"data__kind": "mixture", "data__path": None, "data__sources": sources}

    text = said(tmp_path, mixture(web=3.0, math=1.0), mixture(web=2.0, math=1.0))
    assert "  data.sources.web.weight 3.0 -> 2.0\n" in text and text.count("->") == 1
    assert "data order: sources are read in other shares from here" in text
    text = said(tmp_path, mixture(web=3.0), mixture(web=3.0, math=1.0))
    assert "  data.sources.math.weight absent -> 1.0\n" in text
    assert "  data.sources.math.weight 1.0 -> absent\n" in said(tmp_path, mixture(web=3, math=1), mixture(web=3)) + "\n"


def test_a_learning_rate_is_computed(tmp_path):
    """Half way of a cosine from the peak to a tenth of it, without warmup."""
    cosine = {"optim__warmup": 0.0, "optim__min_lr": 0.1, "optim__schedule": "cosine"}
    share = 0.1 + 0.9 * (1 + math.cos(math.pi * 500 / 999)) / 2
    text = said(tmp_path, cosine | {"optim__lr": 3e-3}, cosine | {"optim__lr": 1e-2})
    assert "  optim.lr 0.003 -> 0.01\n" in text
    assert f"learning rate: the next step takes {1e-2 * share:.3g}, unchanged it would take {3e-3 * share:.3g}" in text


def test_a_longer_cosine_is_named_with_its_values(tmp_path):
    text = said(tmp_path, {}, {"train__steps": 2000})
    assert "  train.steps 1000 -> 2000\n" in text
    assert "the schedule took 1,000 steps in the checkpoint and takes 2,000 here" in text
    assert "depth: " not in text and "batch: " not in text


def test_another_batch_is_named(tmp_path):
    text = said(tmp_path, {}, {"train__global_batch": 4})
    assert "batch: a step takes 4 x 32 = 128 tokens, it took 8 x 32 = 256. Compare losses by tokens" in text
    text = said(tmp_path, {}, {"data__sequence_length": 16})
    assert "8 x 16 = 128 tokens, it took 8 x 32 = 256" in text
    assert "validation: losses before and after are of different sequences" in text


def test_other_depths_are_named(tmp_path):
    text = said(tmp_path, {}, {"depth__mean": 5, "depth__backprop": 4})
    assert "depth: sequences now run 5 loops on average (poisson, at most 10), gradient through the last 4" in text
    assert "they ran 3 loops on average (poisson, at most 6), gradient through the last 2" in text
    assert "val/loss is measured at 5 loops (it was at 3)" in text
    # A linear ramp from 1 to 3 over all 1,000 steps is at 2 in the middle.
    ramp = {"depth__curriculum": {"shape": "linear", "over": 1.0, "start": 1}}
    text = said(tmp_path, {}, ramp)
    assert "gradient through the last 2 (in the next step 2, and 2); they ran 3 loops" in text


def test_meaning_is_left_out_where_nothing_is_left_to_train(tmp_path):
    text = said(tmp_path, {}, {"depth__mean": 5}, step=1000)
    assert "  depth.mean null -> 5.0" in text and "depth: " not in text


def test_fields_that_the_checkpoint_does_not_know_had_their_defaults(tmp_path):
    saved = tiny(tmp_path, **STEPS).model_dump(mode="json")
    del saved["run"]["on_change"], saved["optim"]["schedule_steps"], saved["data"]["validation"], saved["log"]
    changed = tiny(tmp_path, **STEPS | {"optim__schedule_steps": 7})
    fields = {change.field: (change.before, change.after) for change in config_changes(changed, saved)}
    assert fields == {
        "optim.schedule_steps": (None, 7),
        "data.validation.fraction": (0.01, 0.2),
        "log.every": (10, 1),
    }


def test_text_files_of_a_run_of_0_1_were_paragraphs_and_are(tmp_path):
    """That version stored no data.txt, whose default is another one."""
    (tmp_path / "book.txt").write_text("\n\n".join(documents()))
    book = {"data__path": str(tmp_path / "book.txt"), "train__steps": 1, "data__txt": "paragraph"}
    trainer = run(tiny(tmp_path, **book))
    step = saved_step(trainer, 1)
    meta = json.loads((step / "meta.json").read_text())
    assert meta["config"]["data"].pop("txt") == "paragraph"
    content = json.dumps(meta).encode()
    (step / "meta.json").write_bytes(content)
    (step / "committed").write_text(json.dumps({"meta_crc32": zlib.crc32(content)}))
    del book["data__txt"]
    continued = Trainer(tiny(tmp_path, **book | {"train__steps": 2}))
    assert continued.config.data.txt == "paragraph"
    assert [str(change) for change in continued.changes] == ["train.steps 1 -> 2"]
    (kept,) = trainer.run_dir.glob("config.step-*.yaml")
    assert "txt" not in yaml.safe_load(kept.read_text())["data"], "as it was stored"


def test_a_resume_looks_for_differences_once(tmp_path, monkeypatch):
    run(tiny(tmp_path, train__steps=1))
    calls = []

    def counted(config, saved):
        calls.append(saved)
        return config_changes(config, saved)

    for module in (mythos.trainer, mythos.checkpoints.config_changes):
        monkeypatch.setattr(module, "config_changes", counted)
    Trainer(tiny(tmp_path, train__steps=2))
    assert len(calls) == 1 and list((tmp_path / "run").glob("config.step-00000001.yaml"))


def test_values_that_this_version_refuses_are_still_compared(tmp_path):
    saved = tiny(tmp_path, **STEPS).model_dump(mode="json")
    saved["depth"]["sampling"] = "zipf"
    del saved["log"]["every"]
    config = tiny(tmp_path, **STEPS | {"log__every": 10, "train__steps": 2000})
    changes = config_changes(config, saved)
    assert {str(change) for change in changes} == {'depth.sampling "zipf" -> "poisson"', "train.steps 1000 -> 2000"}
    (line,) = consequences(config, saved, 10, changes)
    assert line.startswith("depth.sampling: this version does not accept the checkpoint's value, so it cannot say")
    assert line.endswith("after step 10") and consequences(config, saved, 2000, changes) == []


def test_a_moved_schedule_is_named_beside_fields_that_this_version_does_not_know(tmp_path):
    """A field of another version that no schedule depends on hides nothing."""
    saved = tiny(tmp_path, **STEPS).model_dump(mode="json")
    known = tiny(tmp_path, **STEPS | {"train__steps": 2000})
    expected = consequences(known, saved, 500, config_changes(known, saved))
    saved["model"]["windows"], saved["novel"] = 3, {"a": {"b": 1}}
    changes = config_changes(known, saved)
    texts = {str(change) for change in changes}
    assert texts == {"train.steps 1000 -> 2000", "model.windows 3 -> absent", "novel.a.b 1 -> absent"}
    lines = consequences(known, saved, 500, changes)
    assert lines == expected and lines[0].startswith("the schedule took 1,000 steps in the checkpoint and takes 2,000")


def test_a_change_can_be_refused(tmp_path):
    with pytest.raises(MythosError) as error:
        said(tmp_path, {}, {"optim__lr": 1e-2, "run__on_change": "fail"})
    text = str(error.value)
    assert text.startswith(
        "run.on_change is fail, and the configuration differs from that of checkpoint runs/tiny/step:"
    )
    assert "\n  optim.lr 0.003 -> 0.01\n" in text and text.endswith("set run.on_change=warn to continue with them.")


# --- a schedule of another length

COSINE = {"optim__lr": 1e-3, "optim__schedule": "cosine", "optim__min_lr": 0.1, "optim__warmup": 0.0}
WSD = {"optim__lr": 1e-3, "optim__schedule": "wsd", "optim__decay": 0.2, "optim__min_lr": 0.1}


def changed(tmp_path: Path, step: int, before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """The warning about the schedule of a run that was saved with some fields and continues with others."""
    depth = {"depth__curriculum": {"shape": "none"}}
    saved = tiny(tmp_path, **depth | COSINE | before).model_dump(mode="json")
    return schedule_warning(tiny(tmp_path, **depth | COSINE | after), saved, step)


def schedule_warning(config: Config, saved: dict[str, Any], step: int) -> str | None:
    lines = consequences(config, saved, step, config_changes(config, saved))
    return next((line for line in lines if line.startswith("the schedule took")), None)


def test_more_steps_move_the_learning_rate(tmp_path: Path) -> None:
    """A cosine that had come to its end, 0.1 of the peak, is half way through one of twice the length, at 0.55."""
    warning = changed(tmp_path, 1000, {"train__steps": 1000}, {"train__steps": 2000})
    half = 1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * 1000 / 1999)) / 2)
    assert f"{half:.3g}" == "0.00055"
    assert warning is not None
    assert warning.startswith("the schedule took 1,000 steps in the checkpoint and takes 2,000 here")
    assert "at step 1,000 this moves the learning rate from 0.0001 to 0.00055. Set optim.schedule_steps=1000" in warning
    assert "depth" not in warning  # which stays what it is


def test_more_steps_move_depths(tmp_path: Path) -> None:
    ramp = {"shape": "linear", "over": 0.5, "start": 1}
    ramps = {"depth__mean": 9, "depth__backprop": 5, "depth__curriculum": ramp, "depth__backprop_curriculum": ramp}
    warning = changed(tmp_path, 500, ramps | {"train__steps": 1000}, ramps | {"train__steps": 2000})
    assert warning is not None
    assert "the mean depth from 9 to 5, the loops with gradient from 5 to 3" in warning


def test_more_steps_move_the_difficulty_of_a_task(tmp_path: Path) -> None:
    task = {"data__kind": "reasoning", "data__path": None, "data__task": {"difficulty": [1, 4], "ramp": 1.0}}
    task |= {"data__sequence_length": 64, "depth__backprop": None, "depth__follow": "difficulty"}
    warning = changed(tmp_path, 80, task | {"train__steps": 100}, task | {"train__steps": 200})
    assert warning is not None
    assert "the mean depth from 2.5 to 1.5, the highest difficulty from 4 to 2" in warning


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        (1000, {"train__steps": 1000}, {"train__steps": 2000, "optim__schedule_steps": 1000}),  # what is advised
        (1000, {"train__steps": 1000}, {"train__steps": 1000}),
        (700, {"train__steps": 1000} | WSD, {"train__steps": 2000} | WSD),  # the plateau of both
        (500, {"train__steps": None, "train__tokens": 1000 * 256}, {"train__steps": 1000}),  # said another way
        (500, {"train__steps": 1000}, {"train__steps": 1000, "optim__lr": 1e-4}),  # changed on purpose
        (500, {"train__steps": 1000}, {"train__steps": 500}),  # nothing is left to train
    ],
)
def test_nothing_is_said_where_nothing_moves(tmp_path, step, before, after):
    assert changed(tmp_path, step, before, after) is None


def test_checkpoints_of_earlier_versions_have_no_length_of_the_schedule(tmp_path: Path) -> None:
    saved = tiny(tmp_path, train__steps=1000).model_dump(mode="json")
    del saved["optim"]["schedule_steps"]
    assert schedule_warning(tiny(tmp_path, train__steps=1000), saved, 10) is None
    assert "took 1,000 steps" in str(schedule_warning(tiny(tmp_path, train__steps=3000), saved, 10))
