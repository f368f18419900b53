"""Two processes: stops while the model is measured, and folders that checkpoints cannot use, reported by all ranks."""

import errno
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from mythos.checkpoints.ownership import LOCK
from mythos.checkpoints.stored_checkpoint import complete_checkpoints
from mythos.distributed.run_lock import RunLock
from mythos.errors import MythosError
from mythos.evaluation import in_training
from mythos.files import storage
from mythos.files.storage import step_of
from mythos.trainer import Trainer
from mythos.training.metrics import read_metrics
from tests.distributed.pool import RankPool
from tests.runs import measurements, tiny

MODES = ["ddp", "fsdp"]


def rank() -> int:
    return int(os.environ["RANK"])


def trainer_on(directory: Path, name: str, mode: str, **changes: Any) -> Trainer:
    tasks = directory / "science.jsonl"
    usual: dict[str, Any] = {
        "data__streams": 2,
        "train__steps": 6,
        "train__micro_batch": 2,
        "eval__every": 3,
        # Not a multiple of two: one rank has fewer rows than the other.
        "eval__batches": 5,
        "eval__samples": 2,
        "eval__tasks": [str(tasks)],
        "parallel__mode": mode,
        "run__dir": str(directory / name),
    }
    return Trainer(tiny(directory, **{**usual, **changes}))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, pool: RankPool) -> Path:
    """Where runs of both modes have trained undisturbed."""
    path = tmp_path_factory.mktemp("stops")
    questions = [{"query": f"The river {n}", "choices": ["crosses", "finds"], "gold": n % 2} for n in range(5)]
    (path / "science.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    tiny(path)  # writes the corpus, once
    for mode in MODES:
        pool.run(train, path, f"whole-{mode}", mode, ranks=2)
    return path


def train(directory: Path, name: str, mode: str) -> None:
    trainer_on(directory, name, mode).run()


def stop_while(directory: Path, name: str, mode: str, what: str, asked: int) -> tuple[int, list[int], float]:
    trainer = trainer_on(directory, name, mode)
    target, function = {
        "validation": (in_training, "validation_metrics"),
        "tasks": (in_training, "choice_metrics"),
        "samples": (in_training, "generate"),
    }[what]
    original, began = getattr(target, function), []

    def disturbed(*arguments: Any, **options: Any) -> Any:
        if not began:
            began.append(time.monotonic())
            if rank() == asked:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)
        return original(*arguments, **options)

    setattr(target, function, disturbed)
    try:
        trainer.run()
    finally:
        setattr(target, function, original)
    seconds = time.monotonic() - began[0] if began else 0.0
    return trainer.step, [step_of(path) for path in complete_checkpoints(trainer.run_dir / "checkpoints")], seconds


@pytest.mark.parametrize(
    ("mode", "what", "asked"),
    [
        ("ddp", "validation", 1),
        ("ddp", "tasks", 0),
        ("ddp", "samples", 0),
        ("fsdp", "validation", 0),
        ("fsdp", "samples", 1),
    ],
)
def test_a_stop_on_one_rank_interrupts_all(pool: RankPool, directory: Path, mode: str, what: str, asked: int) -> None:
    name = f"{mode}-{what}"
    for step, saved, seconds in pool.run(stop_while, directory, name, mode, what, asked, ranks=2, timeout=60):
        assert step == 3 and saved == [3] and seconds < 20
    last = read_metrics(directory / name / "metrics.jsonl")[-1]
    assert last["step"] == 3 and not any(key.startswith("val/") for key in last)
    pool.run(train, directory, name, mode, ranks=2)
    expected, actual = measurements(directory / f"whole-{mode}"), measurements(directory / name)
    assert [record["step"] for record in actual] == [1, 2, 3, 4, 5, 6]
    for record, other in zip(expected, actual, strict=True):
        mine, whole = ({k: v for k, v in r.items() if not k.startswith("straggler/")} for r in (other, record))
        assert mine == whole


# --- places of checkpoints


def begin(directory: Path, name: str, spoil: str) -> str:
    """The MythosError of a start."""
    place = directory / {"owned": "shared"}.get(spoil, spoil)
    with pytest.MonkeyPatch.context() as patch:
        if spoil == "no permission" and rank() == 1:

            def refused(path: Path, content: bytes, **_: bool) -> None:
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))

            patch.setattr(storage, "write_whole", refused)
        if spoil == "not shared":  # one path, and another disk on each machine
            init = storage.LocalStorage.__init__
            patch.setattr(storage.LocalStorage, "__init__", lambda self, root: init(self, root / str(rank())))
        with pytest.raises(MythosError) as caught:
            Trainer(config_of(directory, name, str(place)))
    return str(caught.value)


def config_of(directory: Path, name: str, place: str) -> Any:
    return tiny(directory, train__steps=3, parallel__mode="ddp", run__dir=str(directory / name), checkpoint__dir=place)


def save_into_shared(directory: Path) -> None:
    Trainer(config_of(directory, "first", str(directory / "shared"))).run()


def test_another_runs_place_is_refused_on_all_ranks(pool: RankPool, directory: Path) -> None:
    pool.run(save_into_shared, directory, ranks=2)
    for message in pool.run(begin, directory, "second", "owned", ranks=2):
        assert f"another run, the run tiny in {directory / 'first'}" in message
    pool.run(save_into_shared, directory, ranks=2)  # its own run goes on


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("no permission", r"cannot be written there: rank 1: .*Permission denied"),
        ("not shared", r"rank 0 does not see files that rank 1 writes there.*must share"),
    ],
)
def test_unusable_folders_are_reported_on_all_ranks_before_training(
    pool: RankPool, directory: Path, spoil: str, message: str
) -> None:
    texts = pool.run(begin, directory, f"start {spoil}", spoil, ranks=2)
    assert texts[0] == texts[1]
    assert re.search(message, texts[0])


def test_a_place_in_use_is_refused_on_all_ranks(pool: RankPool, directory: Path) -> None:
    (directory / "in use").mkdir()
    with RunLock(directory / "in use", file=LOCK):
        texts = pool.run(begin, directory, "start in use", "in use", ranks=2)
    assert texts[0] == texts[1]
    assert f"{directory / 'in use'} is in use by process {os.getpid()}" in texts[0] and "checkpoint.dir" in texts[0]
