"""Muon on matrices that processes share in every way, or share the work on, against Muon in one process."""

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from mythos.training.muon import Muon, Sharing, newton_schulz
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
    mesh: DeviceMesh | None, placements: list[Placement], elements: int = 2**20, ranks: int = 1
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
    optimizer = Muon(groups, torch.float32, elements, ranks=ranks, lr=0.1, weight_decay=0.2)
    for step in range(3):
        for place, (name, weight) in enumerate(weights.items()):
            weight.grad = draw(name, 100 * step + place)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(float(step == 1)), torch.tensor(1.0 + step)
        optimizer.step()
    momenta = {f"{n}, momentum": optimizer.state[weight]["momentum_buffer"] for n, weight in weights.items()}
    wholes = {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for n, t in (weights | momenta).items()}
    exchanges = optimizer.exchanges
    if optimizer.sharing is not None:
        assert not exchanges
        return wholes, [len(share) for share in optimizer.sharing.shares], [len(optimizer.sharing.rounds)]
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


def on_copies(ranks: int, elements: int) -> tuple[dict[str, Tensor], int, list[int], list[int]]:
    """As under DDP: all ranks have all gradients. Also counts the matrices that this rank makes orthogonal."""
    torch.distributed.init_process_group("gloo")
    worked = 0

    def counted(matrices: Tensor) -> Tensor:
        nonlocal worked
        worked += len(matrices)
        return newton_schulz(matrices)

    with patch("mythos.training.muon.newton_schulz", counted):
        wholes, shares, rounds = train(None, [], elements, ranks)
    return wholes, worked, shares, rounds


@pytest.mark.parametrize(("ranks", "elements"), [(2, 2**20), (4, 2**20), (4, 1), (4, 100)])
def test_copies_share_the_work(pool: RankPool, ranks: int, elements: int) -> None:
    """Three steps equal one process's, the copies stay the same to the bit, and each does its part alone."""
    expected, _, _ = train(None, [])
    everyone = pool.run(on_copies, ranks, elements, ranks=ranks)
    matrices = sum(shape[0] ** (len(shape) - 2) * parts for shape, _, parts in SHAPES.values())
    for rank, (wholes, worked, shares, rounds) in enumerate(everyone):
        for name, value in expected.items():
            torch.testing.assert_close(wholes[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
            assert torch.equal(wholes[name], everyone[0][0][name])
        assert sum(shares) == matrices and worked == 3 * shares[rank]
        assert (rounds == [1]) == (elements == 2**20), "rows of matrices one after the other, where room is short"


def test_shares_cost_alike() -> None:
    """No rank has more than the mean and one matrix more: those of a large model's layer, over 8 ranks."""
    shapes = [(2048, 2048)] * 5 + [(1024, 2048), (512, 2048), (96, 256), (16, 1024, 512)]
    parts = {torch.empty(shape, device="meta"): 1 for shape in shapes}
    sharing = Sharing(parts, 8, torch.bfloat16, 2**20)
    matrices = [shape[-2:] for shape in shapes for _ in range(shape[0] if len(shape) == 3 else 1)]
    costs = [4 * min(shape) ** 2 * max(shape) + 2 * min(shape) ** 3 for shape in matrices]
    loads = [sum(costs[index] for index in share) for share in sharing.shares]
    assert sorted(index for share in sharing.shares for index in share) == list(range(len(costs)))
    assert max(loads) <= sum(costs) / 8 + max(costs)
    for size, taken in zip(sharing.bytes, sharing.rounds, strict=True):
        assert size == 8 * 2 * max(sum(rows.size for rows in some) for some in taken) <= 2 * 2**20
    for rank, share in enumerate(sharing.shares):
        sent = [rows for taken in sharing.rounds for rows in taken[rank]]
        whole = [(index, row) for index in share for row in range(matrices[index][0])]
        assert [(rows.matrix, row) for rows in sent for row in range(rows.start, rows.stop)] == whole
