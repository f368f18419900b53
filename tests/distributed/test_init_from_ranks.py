"""Runs of several processes that start from the weights of another run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from mythos.checkpoints.stored_model import tensors_of
from mythos.config.loading import config_from_dict
from mythos.errors import MythosError
from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.runs import settings, tiny
from tests.trainers import run, take_step

CHANGES: dict[str, Any] = {"data__streams": 4, "train__global_batch": 8, "train__micro_batch": 2}
CHANGES |= {"model__n_experts": 6, "optim__eps": 1e-5}  # experts that 4 ranks cannot share evenly
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp on 2": (2, {"parallel__mode": "ddp"}),
    "fsdp on 2": (2, {"parallel__mode": "fsdp"}),
    "hsdp 2 x 2": (4, {"parallel__mode": "hsdp", "parallel__shard": 2}),
}


def first_steps(directory: Path, name: str, changes: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights that a run starts from, and the losses of three steps."""
    values = settings(directory, train__init_from=str(directory / "source"), **CHANGES, **changes)
    values["run"] = {"name": name, "dir": str(directory / name)}
    values["model"] = {"loops": 5}
    del values["tokenizer"]
    trainer = Trainer(config_from_dict(values))
    start = {
        key: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
        for key, tensor in tensors_of(trainer.model).items()
    }
    losses = [take_step(trainer).loss.item() for _ in range(3)]
    trainer.resources.close()
    return start, losses


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    trainer = tmp_path_factory.mktemp("init_from")
    run(tiny(trainer, run__dir=str(trainer / "source"), optim__lr=0.02, **CHANGES))
    return trainer


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_starts_and_goes_on_as_one_process_does(pool: RankPool, directory: Path, layout: str) -> None:
    weights, losses = first_steps(directory, f"alone beside {layout}", {})
    ranks, changes = LAYOUTS[layout]
    for start, actual in pool.run(first_steps, directory, layout, changes, ranks=ranks):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in start.items())
        torch.testing.assert_close(actual, losses, rtol=1e-5, atol=0)


def test_all_processes_refuse_what_cannot_be_started_from(pool: RankPool, directory: Path) -> None:
    with pytest.raises(MythosError, match=r"model\.dim: 32 in the model, 64 here"):
        pool.run(refused, directory, ranks=2)


def refused(directory: Path) -> None:
    Trainer(tiny(directory, train__init_from=str(directory / "source"), model__dim=64, model__preset="mythos_nano"))
