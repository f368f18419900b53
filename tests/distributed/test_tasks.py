"""A reasoning task on several processes: the losses, weights and accuracies of one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.evaluation.test_reasoning import tiny

CHANGES: dict[str, Any] = {
    "data__task": {"symbols": 4, "difficulty": [1, 3], "queries": 2},
    "data__sequence_length": 7,
    "train__micro_batch": 5,
    "optim__eps": 1e-5,  # an element's first update is lr x sign otherwise, and rounding decides signs near zero
}


def train(directory: Path, mode: str) -> tuple[list[float], dict[str, float], dict[str, Tensor]]:
    """Three steps: losses, what validation then finds, weights."""
    trainer = Trainer(tiny(directory, run__dir=str(directory / mode), parallel__mode=mode, **CHANGES))
    losses = []
    for _ in range(3):
        batch, problem = trainer.read_ahead()
        assert batch is not None, problem
        losses.append(trainer.train_step(batch).loss.item())
        trainer.step += 1
    metrics = trainer.validate()
    state = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for name, tensor in trainer.state().items()
    }
    trainer.resources.close()
    return losses, metrics, state


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[list[float], dict[str, float], Any]]:
    directory = tmp_path_factory.mktemp("tasks")
    return directory, train(directory, "single")


@pytest.mark.parametrize("mode", ["ddp", "fsdp"])
def test_equals_one_process(pool: RankPool, single: tuple[Path, tuple[Any, ...]], mode: str) -> None:
    directory, (losses, metrics, weights) = single
    for their_losses, their_metrics, their_weights in pool.run(train, directory, mode, ranks=2):
        torch.testing.assert_close(their_losses, losses, rtol=1e-5, atol=0)
        assert their_metrics == pytest.approx(metrics, rel=1e-4)
        for name, weight in their_weights.items():
            torch.testing.assert_close(weight, weights[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: n + m)
