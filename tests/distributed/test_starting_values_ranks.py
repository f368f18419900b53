"""Starting values on several processes: those of one process, and only what a process holds is drawn."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from mythos.model import layers
from mythos.model.layers import initialize, random_stream, truncated_normal
from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.runs import tiny

SHAPE = (6, 10, 9)
LAYOUTS: dict[str, tuple[int, tuple[int, ...], list[Placement], list[int]]] = {
    "experts on 2": (2, (2,), [Shard(0)], [3, 3]),
    "experts on 4, the last has none": (4, (4,), [Shard(0)], [2, 2, 2, 0]),
    "rows on 2": (2, (2,), [Shard(1)], [6, 6]),
    "columns on 4, unevenly": (4, (4,), [Shard(2)], [6, 6, 6, 6]),
    "copies of experts": (4, (2, 2), [Replicate(), Shard(0)], [3, 3, 3, 3]),
    "experts, and rows within": (4, (2, 2), [Shard(0), Shard(1)], [3, 3, 3, 3]),
    "experts twice": (4, (2, 2), [Shard(0), Shard(0)], [2, 1, 2, 1]),
}
"""Ranks, their mesh, where the stack is, and how many matrices each rank draws."""


class Stack(nn.Module):
    """A stack of experts' matrices that counts how many are drawn."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.stack = nn.Parameter(value)
        self.initializers = {"stack": self.draw}
        self.drawn: list[tuple[int, ...]] = []

    def draw(self, weight: Tensor, generator: Any) -> None:
        self.drawn.append(tuple(weight.shape))
        truncated_normal(SHAPE[1])(weight, generator)


def draw_on_ranks(shape: tuple[int, ...], placements: list[Placement]) -> tuple[Tensor, list[tuple[int, ...]]]:
    torch.distributed.init_process_group("gloo")
    mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))
    stack = Stack(distribute_tensor(torch.full(SHAPE, torch.nan), mesh, placements))
    initialize(stack, 5)
    assert isinstance(stack.stack, DTensor)
    return stack.stack.full_tensor().detach(), stack.drawn


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_draws_its_own_experts(pool: RankPool, layout: str) -> None:
    expected = torch.empty(SHAPE)
    for expert, matrix in enumerate(expected):
        truncated_normal(SHAPE[1])(matrix, random_stream(5, "stack", expert))
    ranks, shape, placements, counts = LAYOUTS[layout]
    for (whole, drawn), count in zip(pool.run(draw_on_ranks, shape, placements, ranks=ranks), counts, strict=True):
        assert torch.equal(whole, expected)
        assert drawn == [SHAPE[1:]] * count


MATRIX = (10, 9)
MATRICES: dict[str, tuple[int, tuple[int, ...], list[Placement], list[int]]] = {
    "rows on 2": (2, (2,), [Shard(0)], [45, 45]),
    "rows on 4, unevenly": (4, (4,), [Shard(0)], [27, 27, 27, 9]),
    "columns on 2": (2, (2,), [Shard(1)], [90, 90]),
    "copies of rows": (4, (2, 2), [Replicate(), Shard(0)], [45] * 4),
}
"""Ranks, their mesh, where the matrix is, and how many numbers each rank draws."""


def draw_matrix_on_ranks(shape: tuple[int, ...], placements: list[Placement]) -> tuple[Tensor, int, int]:
    torch.distributed.init_process_group("gloo")
    drawn: list[int] = []
    fill = layers._fill_truncated_normal

    def counted(std: float, weight: Tensor, generator: Any) -> None:
        drawn.append(weight.numel())
        fill(std, weight, generator)

    mesh = DeviceMesh("cpu", torch.arange(torch.Size(shape).numel()).view(shape))
    with patch.multiple(layers, _fill_truncated_normal=counted, DRAWN_AT_ONCE=20):
        linear = layers.Linear(MATRIX[1], MATRIX[0])
        linear.weight = nn.Parameter(distribute_tensor(torch.full(MATRIX, torch.nan), mesh, placements))
        initialize(linear, 5)
    assert isinstance(linear.weight, DTensor)
    return linear.weight.full_tensor().detach(), sum(drawn), max(drawn)


@pytest.mark.parametrize("layout", MATRICES)
def test_a_rank_draws_its_own_rows(pool: RankPool, layout: str) -> None:
    expected = torch.empty(MATRIX)
    truncated_normal(MATRIX[1])(expected, random_stream(5, "weight"))
    ranks, shape, placements, counts = MATRICES[layout]
    results = pool.run(draw_matrix_on_ranks, shape, placements, ranks=ranks)
    for (whole, drawn, at_once), count in zip(results, counts, strict=True):
        assert torch.equal(whole, expected)
        assert drawn == count and at_once <= 20


MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "ddp on 2": (2, {"parallel__mode": "ddp"}),
    "fsdp on 2": (2, {"parallel__mode": "fsdp"}),
    "fsdp on 4": (4, {"parallel__mode": "fsdp"}),  # 6 experts: by the rows of their matrices
    "hsdp 2 x 2": (4, {"parallel__mode": "hsdp", "parallel__shard": 2}),
    "ep 2 x fsdp 2, shared 2": (4, {"parallel__mode": "fsdp", "parallel__expert": 2, "parallel__shared": 2}),
}


def start(directory: Path, name: str, changes: dict[str, Any]) -> dict[str, Tensor]:
    trainer = Trainer(
        tiny(directory, run__dir=str(directory / name), data__streams=4, model__n_experts=6, depth__mean=2, **changes)
    )
    state = trainer.model.state_dict()
    whole = {key: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for key, t in state.items()}
    trainer.resources.close()
    return whole


@pytest.mark.parametrize("mode", MODES)
def test_a_model_starts_the_same_on_all_layouts(pool: RankPool, tmp_path: Path, mode: str) -> None:
    expected = start(tmp_path, "single", {})
    ranks, changes = MODES[mode]
    for weights in pool.run(start, tmp_path, mode, changes, ranks=ranks):
        assert weights.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in weights.items())
