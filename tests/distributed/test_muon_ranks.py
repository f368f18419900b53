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


def train(mesh: DeviceMesh | None, placements: list[Placement]) -> tuple[dict[str, Tensor], int, int]:
    """Three steps, the second skipped; whole weights and momenta, and how many matrices are whole on this rank."""

    def draw(name: str, seed: int) -> Tensor:
        shape, dim, _ = SHAPES[name]
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return value if mesh is None else distribute_tensor(value, mesh, [*placements, Shard(dim)])

    weights = {name: nn.Parameter(draw(name, place)) for place, name in enumerate(SHAPES)}
    groups: list[dict[str, Any]] = [
        {"params": [weight], "momentum": 0.9, "parts": SHAPES[name][2]} for name, weight in weights.items()
    ]
    optimizer = Muon(groups, torch.float32, lr=0.1, weight_decay=0.2)
    for step in range(3):
        for place, (name, weight) in enumerate(weights.items()):
            weight.grad = draw(name, 100 * step + place)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(step == 1)), torch.tensor(1.0 + step)
        optimizer.step()
    momenta = {f"{n}, momentum": optimizer.state[weight]["momentum_buffer"] for n, weight in weights.items()}
    wholes = {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for n, t in (weights | momenta).items()}
    exchange = optimizer.exchange
    return wholes, *((len(exchange.mine), len(exchange.pieces)) if exchange else (0, 0))


def on_ranks(copies: int) -> tuple[dict[str, Tensor], int, int]:
    torch.distributed.init_process_group("gloo")
    mesh = DeviceMesh("cpu", torch.arange(4).view(copies, -1) if copies > 1 else torch.arange(4))
    return train(mesh, [Replicate()] if copies > 1 else [])


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_equals_whole_matrices(pool: RankPool, copies: int) -> None:
    expected, _, _ = train(None, [])
    everyone = pool.run(on_ranks, copies, ranks=4)
    for wholes, _, _ in everyone:
        for name, value in expected.items():
            torch.testing.assert_close(wholes[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    taken, in_all = [mine for _, mine, _ in everyone], everyone[0][2]
    assert in_all == (0 if copies == 4 else 16), "what is whole on a rank stays there"
    assert sum(taken) == copies * in_all and max(taken) - min(taken) <= 1, "no two ranks do the same"
