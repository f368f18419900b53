"""Whole runs on several ranks: their records against one process's, and what one rank's trouble does to all."""

import json
import math
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos import trainer
from mythos.checkpoints.stored_checkpoint import complete_checkpoints
from mythos.config.loading import load_config
from mythos.data.stream import Batch
from mythos.distributed.parallel import choose_micro_batch
from mythos.errors import MythosError, TransientError
from mythos.files.storage import step_of
from mythos.model.layers import local_part
from mythos.model.rdt import RDTOutput
from mythos.trainer import StepResult, Trainer
from mythos.training.metrics import read_metrics
from tests.distributed.pool import RankPool
from tests.runs import measurements, tiny
from tests.trainers import fail_at, no_drawing

CHANGES: dict[str, Any] = {
    "data__streams": 4,
    "data__on_error": "skip",
    "train__global_batch": 8,
    "train__micro_batch": 4,
    "train__steps": 6,
    "optim__eps": 1e-5,
    "eval__batches": 5,
    "eval__every": 3,
    "eval__samples": 1,
    "checkpoint__every": 2,
    "log__every": 1,
}
ROOT = Path(__file__).parents[2]
MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp": (2, {"parallel__mode": "ddp", "data__workers": 1}),
    "fsdp": (4, {"parallel__mode": "fsdp"}),
}


def trainer_on(directory: Path, name: str, **changes: Any) -> Trainer:
    return Trainer(tiny(directory, **{**CHANGES, **changes}, run__dir=str(directory / name)))


def run(directory: Path, name: str, changes: dict[str, Any]) -> dict[str, torch.Tensor]:
    trainer = trainer_on(directory, name, **changes)
    trainer.run()
    return (
        {key: value.clone() for key, value in trainer.model.state_dict().items()}
        if trainer.layout.mode == "ddp"
        else {}
    )


@pytest.fixture(scope="module", autouse=True)
def plots() -> Iterator[None]:
    """What the processes of the pool do instead of drawing, in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "draw_plots", no_drawing)
        yield


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has trained, on a corpus with documents that cannot be used."""
    directory = tmp_path_factory.mktemp("runs")
    corpus = Path(tiny(directory).data.path)
    lines = corpus.read_text().splitlines()
    corpus.write_text("\n".join(line if n % 10 else json.dumps({"text": None}) for n, line in enumerate(lines)))
    run(directory, "single", {})
    return directory


@pytest.mark.parametrize("mode", MODES)
def test_records_equal_those_of_one_process(pool: RankPool, single: Path, mode: str) -> None:
    """Every metric reduced over the ranks: loss, depths, validation, experts, what the data left out."""
    ranks, changes = MODES[mode]
    pool.run(run, single, mode, changes, ranks=ranks)
    expected, actual = measurements(single / "single"), measurements(single / mode)
    assert expected[-1]["data/skipped_documents"] > 0
    for record, other in zip(expected, actual, strict=True):
        straggling = {key for key in other if key.startswith("straggler/")}
        # Positions that halt would let processes that share the model run different numbers of passes.
        alone = {key for key in record if mode == "fsdp" and key.startswith("val/auto_")}
        assert straggling and other.keys() - straggling == record.keys() - alone
        for key in record.keys() - alone:
            assert other[key] == pytest.approx(record[key], rel=1e-5), key
    assert {path.name for path in (single / mode).iterdir()} == {path.name for path in (single / "single").iterdir()}
    assert len(list((single / mode / "samples").iterdir())) == 2


def run_on_text(directory: Path, name: str) -> None:
    """debug.yaml's model on English text; at a third of its learning rate rounding errors do not grow."""
    data = ["data.kind=files", f"data.path={directory / 'sections.jsonl'}", "data.validation.fraction=0.1"]
    short = ["train.steps=30", "eval.every=0", "eval.batches=1", "eval.loops=[1]", "eval.samples=0", "data.workers=0"]
    settings = [f"run.dir={directory / name}", *data, *short, "optim.lr=1e-3", "train.dtype=float32"]
    Trainer(load_config(ROOT / "configs/debug.yaml", settings)).run()


def test_losses_on_text_equal_those_of_one_process(pool: RankPool, tmp_path: Path) -> None:
    """30 steps with 1 to 6 loops, against one process: docs/reliability.md promises 1e-6."""
    sections = [part for page in sorted((ROOT / "docs").glob("*.md")) for part in page.read_text().split("\n## ")]
    (tmp_path / "sections.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in sections))
    run_on_text(tmp_path, "single")
    pool.run(run_on_text, tmp_path, "ddp", ranks=2)
    single, ddp = ([record["loss"] for record in measurements(tmp_path / name)] for name in ("single", "ddp"))
    assert len(single) == 30 and single[-1] < single[0] - 0.5
    assert ddp == pytest.approx(single, rel=1e-6)


# --- one rank's trouble


def rank() -> int:
    return int(os.environ["RANK"])


def at_step(trainer: Trainer, step: int, action: Any) -> None:
    """Call an action on this rank right before the training step of that number (counted from 0)."""
    original = trainer.train_step

    def train_step(batch: Batch) -> StepResult:
        if trainer.step == step:
            action()
        return original(batch)

    trainer.train_step = train_step


def run_signalled(directory: Path, number: int) -> tuple[int, list[int]]:
    trainer = trainer_on(directory, f"signal-{number}", checkpoint__every=0)
    if rank() == 1:
        at_step(trainer, 2, lambda: (os.kill(os.getpid(), number), time.sleep(0.2)))
    trainer.run()
    return trainer.step, [step_of(path) for path in complete_checkpoints(trainer.run_dir / "checkpoints")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_on_one_rank_stops_and_saves_all(pool: RankPool, single: Path, number: int) -> None:
    for step, saved in pool.run(run_signalled, single, number, ranks=2):
        assert step == 3 and saved == [3]
    pool.run(run, single, f"signal-{number}", {"checkpoint__every": 0}, ranks=2)
    for record, other in zip(measurements(single / "single"), measurements(single / f"signal-{number}"), strict=True):
        assert other["loss"] == pytest.approx(record["loss"], rel=1e-5)


def run_out_of_time(directory: Path) -> tuple[int, list[int]]:
    trainer = trainer_on(directory, "time", train__max_time="3s", checkpoint__every=0)
    at_step(trainer, 2, lambda: time.sleep(3))
    trainer.run()
    return trainer.step, [step_of(p) for p in complete_checkpoints(trainer.run_dir / "checkpoints")]


def test_time_limit_stops_and_saves_all(pool: RankPool, single: Path) -> None:
    for step, saved in pool.run(run_out_of_time, single, ranks=2):
        assert step <= 3 and saved == [step]


def run_without_data(directory: Path) -> tuple[str, int]:
    trainer = trainer_on(directory, "data", checkpoint__every=0)
    if rank() == 1:
        fail_at(trainer, 4, "shard x cannot be reached")
    with pytest.raises(TransientError) as caught:
        trainer.run()
    return str(caught.value), trainer.step


def test_missing_data_on_one_rank_saves_and_stops_all(pool: RankPool, single: Path) -> None:
    for message, step in pool.run(run_without_data, single, ranks=2):
        assert message.startswith("shard x cannot be reached (rank 1)\nStopped after step 4, which is saved: ")
        assert step == 4
    pool.run(run, single, "data", {}, ranks=2)
    for record, other in zip(measurements(single / "single"), measurements(single / "data"), strict=True):
        assert other["loss"] == pytest.approx(record["loss"], rel=1e-5)


def run_spoilt(directory: Path, where: str, changes: dict[str, Any]) -> tuple[list[float], int]:
    trainer = trainer_on(directory, where + str(len(changes)), **changes)
    if rank() == 1 and where == "loss":
        forward = trainer.forward

        def spoilt(*inputs: Any) -> RDTOutput:
            output = forward(*inputs)
            return output._replace(loss=output.loss * math.inf) if trainer.step == 2 else output

        trainer.forward = spoilt
    if rank() == 1 and where == "gradient":
        finish = trainer.parallel.finish_gradients

        def spoil() -> None:
            finish()
            if trainer.step == 2:
                trainer.model.norm.weight.grad.fill_(math.nan)

        trainer.parallel.finish_gradients = spoil
    trainer.run()
    weights = [local_part(p).detach().double().sum().item() for p in trainer.model.parameters()]
    return weights, int(trainer.skipped)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_spoilt_step_of_one_rank_is_skipped_by_all(pool: RankPool, single: Path, where: str) -> None:
    (weights, skipped), (others, as_often) = pool.run(run_spoilt, single, where, {}, ranks=2)
    assert weights == others and all(math.isfinite(weight) for weight in weights)
    assert skipped == as_often == 1


def test_spoilt_step_is_skipped_by_ranks_that_divide_the_experts(pool: RankPool, single: Path) -> None:
    """The rank whose loss is infinite sends such gradients to the experts of the other."""
    everyone = pool.run(run_spoilt, single, "loss", {"parallel__mode": "fsdp", "parallel__expert": 2}, ranks=2)
    for weights, skipped in everyone:
        assert all(math.isfinite(weight) for weight in weights) and skipped == 1
    last = [*read_metrics(single / "loss2" / "metrics.jsonl")][-1]
    assert 1 <= last["moe/rank_load_max_over_mean@1"] <= 2, "the load of the busier of two ranks over their mean"


def choose(directory: Path, name: str) -> int:
    """Micro-batches of more than 2 rows run out of memory on rank 1, the second of two that hold 8 each."""
    trainer = trainer_on(directory, name, train__micro_batch=4, parallel__mode=name)
    trainer.config = trainer.config.model_copy(
        update={"train": trainer.config.train.model_copy(update={"micro_batch": "auto", "global_batch": 16})}
    )
    forward = trainer.model.forward

    def scarce(ids: torch.Tensor, *inputs: Any, **options: Any) -> RDTOutput:
        if len(ids) > 2 and rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return forward(ids, *inputs, **options)

    trainer.model.forward = scarce
    chosen = choose_micro_batch(trainer.config, trainer.parallel)
    trainer.resources.close()
    return chosen


def test_micro_batch_that_fits_on_every_rank(pool: RankPool, single: Path) -> None:
    assert pool.run(choose, single, "ddp", ranks=2) == [2, 2]
    with pytest.raises(MythosError, match=r"got auto, and parallel.mode is fsdp; .* Give a number"):
        pool.run(choose, single, "fsdp", ranks=2)


def run_slowly(directory: Path) -> None:
    trainer = trainer_on(directory, "slow", parallel__mode="ddp")
    if rank() == 1:
        forward = trainer.forward

        def slow(*inputs: Any) -> RDTOutput:
            time.sleep(0.3)
            return forward(*inputs)

        trainer.forward = slow
    trainer.run()


def test_slow_rank_is_named(pool: RankPool, single: Path) -> None:
    pool.run(run_slowly, single, ranks=2)
    for record in read_metrics(single / "slow" / "metrics.jsonl")[1:]:  # at first all are slow
        # 0.15 s on a quiet machine: of two ranks, the median lies in the middle.
        assert record["straggler/rank"] == 1 and record["straggler/seconds"] > 0.03


# Last, because they cost the processes.


def run_beside_a_lost_rank(directory: Path, how: str) -> str:
    # Saved at once, or the newest checkpoint may not be complete when the rank is lost.
    changes: dict[str, Any] = {"checkpoint__asynchronous": False}
    changes |= {"parallel__timeout": 3, "data__patience": 1, "parallel__stall_after": 1}
    changes |= {"parallel__mode": "hsdp", "parallel__shard": 2} if how == "hanging" else {}
    trainer = trainer_on(directory, how, **changes)
    if rank() == 1:
        at_step(trainer, 3, lambda: os.kill(os.getpid(), signal.SIGKILL if how == "dead" else signal.SIGSTOP))
    started = time.monotonic()
    with pytest.raises(TransientError) as caught:
        trainer.run()
    (directory / how / "message").write_text(str(caught.value))
    assert time.monotonic() - started < 12
    return "ended"


@pytest.mark.parametrize("how", ["dead", "hanging"])
def test_lost_rank_ends_the_others_within_the_timeout(pool: RankPool, single: Path, how: str) -> None:
    with pytest.raises(RuntimeError):  # of the pool: rank 1 never answers
        pool.run(
            run_beside_a_lost_rank, single, how, ranks=4 if how == "hanging" else 2, timeout=20, lost=how == "hanging"
        )
    message = (single / how / "message").read_text()
    # All ranks but the lost one, rank 1, write it; the last to notice wins.
    assert re.match(r"rank [023] lost the other processes in step 4: ", message) and "(" in message
    assert message.endswith("step-00000002")
    if how == "hanging":
        stacks = (single / how / "stacks" / "rank-00000.txt").read_text()
        assert "rank 0 has made no progress" in stacks and "train_step" in stacks
