"""A step is saved before its validation, and a stop request interrupts every measurement."""

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mythos.checkpoints.stored_checkpoint import complete_checkpoints
from mythos.config.sections import Config
from mythos.evaluation import in_training
from mythos.trainer import Trainer
from mythos.training.metrics import read_metrics
from tests.runs import measurements, tiny
from tests.trainers import assert_identical, run, saved

pytestmark = pytest.mark.usefixtures("no_plots")

QUESTIONS = [{"query": f"The river {n}", "choices": ["crosses", "finds", "follows"], "gold": n % 3} for n in range(6)]


class Killed(Exception):
    pass


def settings(directory: Path, **changes: Any) -> Config:
    (directory / "science.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    usual = {
        "train__steps": 6,
        "eval__every": 3,
        "eval__samples": 2,
        "eval__tasks": [str(directory / "science.jsonl")],
        "checkpoint__every": 3,
        "train__micro_batch": 2,
    }
    return tiny(directory, **{**usual, **changes})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Trainer:
    return run(settings(tmp_path_factory.mktemp("undisturbed")))


def during(trainer: Trainer, what: str, step: int, action: Callable[[], None]) -> None:
    """Call an action during a measurement of a step: at the second micro-batch, in the tasks, or in a sample."""
    calls: list[int] = []
    functions = {"tasks": "choice_metrics", "halting": "adaptive_metrics", "samples": "generate"}
    target, name = (trainer.model, "read_depths") if what == "validation" else (in_training, functions[what])
    original = getattr(target, name)

    def disturbed(*arguments: Any, **options: Any) -> Any:
        if trainer.step == step and not trainer.model.training:
            calls.append(1)
            if len(calls) == (2 if what == "validation" else 1):
                action()
        return original(*arguments, **options)

    setattr(target, name, disturbed)
    trainer.resources.callback(setattr, target, name, original)


def request_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)  # let the receiving thread run


def kill() -> None:
    raise Killed


@pytest.mark.parametrize(("what", "step"), [("validation", 3), ("halting", 6), ("tasks", 3), ("samples", 6)])
def test_kill_while_measuring_loses_no_step(tmp_path, undisturbed, what, step):
    config = settings(tmp_path, checkpoint__asynchronous=False)
    trainer = Trainer(config)
    during(trainer, what, step, kill)
    with pytest.raises(Killed):
        trainer.run()
    assert complete_checkpoints(trainer.run_dir / "checkpoints")[-1] == saved(trainer, step)
    continued = Trainer(config)
    assert continued.step == step
    continued.run()
    assert measurements(trainer.run_dir) == measurements(undisturbed.run_dir)
    assert_identical(undisturbed, continued)


@pytest.mark.parametrize(
    ("what", "step", "every"),
    [("validation", 3, 0), ("validation", 6, 3), ("halting", 3, 3), ("tasks", 6, 0), ("samples", 3, 0)],
)
def test_stop_while_measuring_saves_and_resumes_exactly(tmp_path, undisturbed, capsys, what, step, every):
    config = settings(tmp_path, checkpoint__every=every)
    trainer = Trainer(config)
    during(trainer, what, step, request_stop)
    trainer.run()
    printed = "".join(capsys.readouterr())
    assert f"SIGTERM. Stopped after step {step}, which is saved: {saved(trainer, step)}" in printed
    assert "Its validation was interrupted" in printed
    # The step's own numbers are written, without those of the unfinished validation.
    last = read_metrics(trainer.run_dir / "metrics.jsonl")[-1]
    assert last["step"] == step and last["loss"] > 0 and not any(key.startswith("val/") for key in last)
    assert not (trainer.run_dir / "samples" / f"step-{step:08d}.txt").exists()
    continued = run(config)
    assert measurements(trainer.run_dir) == measurements(undisturbed.run_dir)
    assert [record["step"] for record in read_metrics(trainer.run_dir / "metrics.jsonl")] == list(range(1, 7))
    assert_identical(undisturbed, continued)


def test_stop_before_a_validation_leaves_it_to_the_next_start(tmp_path, undisturbed):
    config = settings(tmp_path)
    trainer = Trainer(config)
    original = trainer.train_step

    def stopped(batch: Any) -> Any:
        if trainer.step == 2:
            request_stop()
        return original(batch)

    trainer.train_step = stopped
    trainer.validate = lambda: pytest.fail("validated in spite of the stop")
    trainer.run()
    assert complete_checkpoints(trainer.run_dir / "checkpoints") == [saved(trainer, 3)]
    run(config)
    assert measurements(trainer.run_dir) == measurements(undisturbed.run_dir)


def test_stop_is_served_within_a_micro_batch(tmp_path):
    trainer = Trainer(settings(tmp_path, eval__batches=50))
    read_depths, began = trainer.model.read_depths, []

    def slow(*arguments: Any) -> Any:
        if not began:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
            began.append(time.monotonic())
        time.sleep(0.2)  # 50 of these would take ten seconds
        return read_depths(*arguments)

    trainer.model.read_depths = slow
    trainer.run()
    assert trainer.step == 3 and time.monotonic() - began[0] < 5


def test_measuring_draws_nothing_from_the_generators(tmp_path):
    """A checkpoint has the generators' state before validation, so validation must not change later draws."""
    trainer = Trainer(settings(tmp_path))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    read_depths = trainer.model.read_depths
    trainer.model.read_depths = lambda *inputs, **options: (torch.rand(9), read_depths(*inputs, **options))[1]
    trainer.validate()
    assert torch.equal(torch.rand(3), expected)
    trainer.resources.close()
