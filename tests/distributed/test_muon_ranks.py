"""Muon on matrices that four processes share in every way, against Muon on the whole ones."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from mythos.muon import Muon
from tests.distributed.pool import RankPool

SHAPES: dict[str, tuple[tuple[int, ...], int, int]] = {
    "rows": ((8, 5), 0, 1),
    "columns": ((5, 8), 1, 1),
    "rows that leave the last rank less": ((7, 3), 0, 1),
    "fewer rows than ranks": ((3, 8), 0, 1),
    "gate and up": ((8, 6), 0, 2),
    "gate and up, cut across": ((6, 8), 1, 2),
    "whole experts": ((8, 3, 4), 0, 1),
    "experts, fewer than ranks": ((3, 6, 5), 0, 1),
    "experts' inputs": ((5, 8, 6), 1, 2),
    "experts' outputs": ((5, 3, 8), 2, 2),
}
"""Shape, the dimension that is cut, and the matrices side by side."""


def train(
    mesh: DeviceMesh | None, placements: list[Placement], elements: int = 2**20
) -> tuple[dict[str, Tensor], list[int], list[int]]:
    """Three steps, the second skipped; weights and momenta, and of each exchange how many matrices this rank takes."""

    def draw(name: str, seed: int) -> Tensor:
        shape, dim, _ = SHAPES[name]
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return value if mesh is None else distribute_tensor(value, mesh, [*placements, Shard(dim)])

    weights = {name: nn.Parameter(draw(name, place)) for place, name in enumerate(SHAPES)}
    groups: list[dict[str, Any]] = [
        {"params": [weight], "momentum": 0.9, "parts": SHAPES[name][2]} for name, weight in weights.items()
    ]
    optimizer = Muon(groups, torch.float32, elements, lr=0.1, weight_decay=0.2)
    for step in range(3):
        for place, (name, weight) in enumerate(weights.items()):
            weight.grad = draw(name, 100 * step + place)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(step == 1)), torch.tensor(1.0 + step)
        optimizer.step()
    momenta = {f"{n}, momentum": optimizer.state[weight]["momentum_buffer"] for n, weight in weights.items()}
    wholes = {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for n, t in (weights | momenta).items()}
    exchanges = optimizer.exchanges
    return wholes, [len(exchange.mine) for exchange in exchanges], [len(exchange.pieces) for exchange in exchanges]


def on_ranks(copies: int, elements: int) -> tuple[dict[str, Tensor], list[int], list[int]]:
    torch.distributed.init_process_group("gloo")
    mesh = DeviceMesh("cpu", torch.arange(4).view(copies, -1) if copies > 1 else torch.arange(4))
    return train(mesh, [Replicate()] if copies > 1 else [], elements)


@pytest.mark.parametrize(("copies", "elements", "exchanges"), [(1, 2**20, 1), (1, 1, 8), (2, 2**20, 1), (4, 2**20, 0)])
def test_equals_whole_matrices(pool: RankPool, copies: int, elements: int, exchanges: int) -> None:
    expected, _, _ = train(None, [])
    everyone = pool.run(on_ranks, copies, elements, ranks=4)
    for wholes, mine, in_all in everyone:
        for name, value in expected.items():
            torch.testing.assert_close(wholes[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
        assert len(mine) == exchanges and sum(in_all) == (16 if exchanges else 0), "whole ones stay where they are"
    for taken, total in zip(zip(*(mine for _, mine, _ in everyone), strict=True), everyone[0][2], strict=True):
        assert sum(taken) == copies * total and max(taken) - min(taken) <= 1, "no two ranks do the same"
