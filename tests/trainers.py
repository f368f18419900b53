"""What tests of the trainer have in common: runs, steps, and comparison bit by bit."""

import shutil
from pathlib import Path

import torch
from torch import Tensor

from mythos.checkpoints import checkpoint
from mythos.config.sections import Config
from mythos.data.stream import Batch
from mythos.errors import MythosError
from mythos.trainer import StepResult, Trainer


def no_drawing(run_dir: Path, mean_depth: float) -> list[Path]:
    """Replaces `draw_plots`, which takes as long as a small run: leaves an empty folder."""
    (run_dir / "plots").mkdir(exist_ok=True)
    return []


def run(config: Config) -> Trainer:
    trainer = Trainer(config)
    trainer.run()
    return trainer


def take_step(trainer: Trainer) -> StepResult:
    """One step as the loop of a run takes it."""
    batch, problem = trainer.read_ahead()
    assert batch is not None, problem
    result = trainer.train_step(batch)
    trainer.step += 1
    return result


def fail_at(trainer: Trainer, step: int, problem: str) -> None:
    """Let the loader raise MythosError for the batch of a step, counted from 0."""
    original = trainer.loader.next_batch

    def failing() -> Batch:
        if trainer.step == step:
            raise MythosError(problem)
        return original()

    trainer.loader.next_batch = failing


def saved(trainer: Trainer, step: int) -> Path:
    return trainer.run_dir / "checkpoints" / f"step-{step:08d}"


def copy_of(trainer: Trainer, folder: Path) -> Path:
    """The newest checkpoint in a run directory of its own."""
    shutil.copytree(saved(trainer, 4), folder / "checkpoints" / "step-00000004")
    shutil.copy(trainer.run_dir / "config.yaml", folder / "config.yaml")
    shutil.copytree(trainer.run_dir / "tokenizer", folder / "tokenizer")
    return folder / "checkpoints" / "step-00000004"


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    return checkpoint.training_state(trainer.model, trainer.optimizer)


def assert_identical(one: Trainer, other: Trainer) -> None:
    """Weights, router biases and optimizer state, bit by bit."""
    expected = state_of(one)
    for name, tensor in state_of(other).items():
        assert torch.equal(tensor, expected[name]), name
