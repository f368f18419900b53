"""Checkpoints saved under one layout and continued under another, data included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.runs import tiny

CHANGES: dict[str, Any] = {
    "data__streams": 4,
    "data__sequence_length": 16,
    "train__global_batch": 8,
    "train__micro_batch": 2,
    "train__steps": 6,
    "model__n_experts": 6,  # which 4 ranks cannot share evenly
    "model__router_bias_rate": 0.01,
    "optim__lr": 3e-3,
    "optim__eps": 1e-5,
}
SAVED_AFTER, STEPS = 3, 6

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ddp on 2": (2, {"parallel__mode": "ddp"}),
    "fsdp on 2": (2, {"parallel__mode": "fsdp"}),
    "ddp on 4": (4, {"parallel__mode": "ddp"}),
    "fsdp on 4": (4, {"parallel__mode": "fsdp"}),
    "hsdp 2 x 2": (4, {"parallel__mode": "hsdp", "parallel__shard": 2}),
}

Steps = tuple[list[float], list[dict[int, Tensor]]]
"""The losses of some steps, and the rows of ids of each by their global number."""


def take_steps(trainer: Trainer, until: int, save: bool = False) -> Steps:
    losses, rows = [], []
    while trainer.step < until:
        batch, problem = trainer.read_ahead()
        assert batch is not None, problem
        losses.append(trainer.train_step(batch).loss.item())
        rows.append(dict(zip(batch.rows.tolist(), batch.ids, strict=True)))
        trainer.step += 1
        trainer.tokens += trainer.config.tokens_per_step
    if save:
        trainer.position = trainer.loader.state_dict()
        trainer.validate()  # which leaves FSDP's root gathered
        trainer.save(wait=False)
    return losses, rows


def train_and_save(directory: Path, name: str, changes: dict[str, Any]) -> tuple[Path, Steps]:
    """Save after three steps, in the background, and take two more meanwhile."""
    trainer = Trainer(tiny(directory, run__dir=str(directory / name), **CHANGES, **changes))
    take_steps(trainer, SAVED_AFTER, save=True)
    after = take_steps(trainer, STEPS)
    trainer.checkpoints.wait()
    trainer.resources.close()
    assert trainer.checkpoints.newest is not None
    return Path(trainer.checkpoints.newest), after


MUON: dict[str, Any] = {"optim__name": "muon"}


def test_muon_continues_what_other_layouts_saved(pool: RankPool, tmp_path: Path) -> None:
    """Four ranks hold parts of the experts' momentum, two hold some experts each, one all."""
    tiny(tmp_path)
    ranks, changes = LAYOUTS["fsdp on 4"]
    everyone = pool.run(train_and_save, tmp_path, "muon", MUON | changes, ranks=ranks)
    path, (losses, _) = everyone[0]
    for layout in ("fsdp on 4", "fsdp on 2", "single"):
        ranks, changes = LAYOUTS[layout]
        actual, _ = joined(pool.run(continued, tmp_path, f"muon to {layout}", path, MUON | changes, ranks=ranks))
        torch.testing.assert_close(actual, losses, rtol=1e-6, atol=0, msg=lambda m, n=layout: f"{n}: {m}")
        assert layout != "fsdp on 4" or actual == losses, "the same layout must round alike"


def continued(directory: Path, name: str, saved: Path, changes: dict[str, Any]) -> Steps:
    trainer = Trainer(tiny(directory, run__dir=str(directory / name), run__resume=str(saved), **CHANGES, **changes))
    assert trainer.step == SAVED_AFTER
    after = take_steps(trainer, STEPS)
    trainer.resources.close()
    return after


def joined(everyone: list[Steps]) -> Steps:
    """The steps as a whole, from every rank's."""
    losses = everyone[0][0]
    assert all(rank[0] == losses for rank in everyone), "ranks must agree on the loss"
    return losses, [
        {row: ids for of_rank in step for row, ids in of_rank.items()}
        for step in zip(*(r[1] for r in everyone), strict=True)
    ]


@pytest.fixture(scope="module")
def saved(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[Path, Steps]]]:
    directory = tmp_path_factory.mktemp("resharding")
    tiny(directory)  # writes the corpus
    checkpoints = {}
    for name, (ranks, changes) in LAYOUTS.items():
        everyone = pool.run(train_and_save, directory, name, changes, ranks=ranks)
        checkpoints[name] = everyone[0][0], joined([after for _, after in everyone])
    return directory, checkpoints


@pytest.mark.parametrize("layout", LAYOUTS)
def test_continues_what_any_layout_saved(
    pool: RankPool, saved: tuple[Path, dict[str, tuple[Path, Steps]]], layout: str
) -> None:
    directory, checkpoints = saved
    ranks, changes = LAYOUTS[layout]
    for origin, (path, (losses, rows)) in checkpoints.items():
        if origin != layout and "single" not in (layout, origin) and not origin.startswith("fsdp"):
            continue  # nothing new: checkpoints of DDP are whole as a single process's, HSDP's shards are FSDP's on 2
        if origin != layout and layout.startswith("hsdp") and origin != "single":
            continue
        name = f"{origin} to {layout}"
        actual = joined(pool.run(continued, directory, name, path, changes, ranks=ranks))
        torch.testing.assert_close(actual[0], losses, rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")
        assert origin != layout or actual[0] == losses, f"{name}: the same layout must round alike"
        for step, expected in zip(actual[1], rows, strict=True):
            assert step.keys() == expected.keys() and len(step) == 8
            assert all(torch.equal(step[row], ids) for row, ids in expected.items()), name
