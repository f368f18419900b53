"""Passes that differ: routers and norms that depend on the loop, scaled branches; against their written formulas."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.model.layers import LoopNorm, loop_rows
from mythos.model.moe import LoopBiasRouter, LoopEmbeddingRouter, MixtureOfExperts
from mythos.model.rdt import RecurrentDepthTransformer
from tests.model.conftest import scrambled
from tests.model.slow_decode import slow_decode
from tests.model.test_recurrence import assert_same_gradients, gradients, inputs

LOOPS = 4
SLOTS = torch.tensor([5, 3, 1])
"""Loop indices of three rows; the first is beyond the trained ones."""
OPTIONS: list[dict[str, Any]] = [
    {"router_loop": "bias", "loop_norm": "adaptive", "residual_scale": 0.25, "router_bias_per_loop": True},
    {"router_loop": "embedding", "loop_norm": "adaptive", "residual_scale": 0.5, "block_norm": "peri"},
]


def x_of_rows(seed: int = 0) -> Tensor:
    return torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def assert_same_results(actual: Tensor, expected: Tensor, parameters: list[Tensor]) -> None:
    """Values and gradients of all parameters, to 1e-5."""
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), parameters) for y in (actual, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_rows_of_a_table_beyond_its_last_are_the_last():
    table = torch.arange(8.0).view(4, 2).requires_grad_()
    expected = table[[3, 3, 1]].unsqueeze(1)
    assert torch.equal(loop_rows(table, SLOTS), expected)
    with torch.no_grad():
        assert torch.equal(loop_rows(table, SLOTS), expected)


@pytest.mark.parametrize("slots", [SLOTS, SLOTS[1:2]], ids=["a loop for each row", "one for all"])
def test_norm_follows_its_formula(small, slots):
    norm, x = scrambled(LoopNorm(small())), x_of_rows()
    rows = slots.clamp(max=LOOPS - 1).tolist() * (3 // len(slots))
    expected = []
    for row, t in zip(x, rows, strict=True):
        normed = row / (row.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight
        expected.append((1 + norm.loop_scale[t]) * normed + norm.loop_shift[t])
    assert_same_results(norm(x, slots), torch.stack(expected), [x, *norm.parameters()])
    with torch.no_grad():
        torch.testing.assert_close(norm(x, slots), torch.stack(expected), rtol=1e-5, atol=1e-5)


def naive_gates(module: MixtureOfExperts, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Gates and experts of tokens x (N, D) in loop index t."""
    router, t = module.router, min(t, LOOPS - 1)
    if isinstance(router, LoopBiasRouter):
        logits = x @ router.weight.T + router.loop_bias[t]
    else:
        assert isinstance(router, LoopEmbeddingRouter)
        logits = (x + x * router.loop_embedding[t]) @ router.weight.T
    affinity = 1 / (1 + torch.exp(-logits))
    balance = router.bias if router.bias.ndim == 1 else router.bias[t]
    chosen = torch.argsort(affinity + balance, dim=-1, descending=True)[:, : router.chosen]
    gates = affinity.gather(1, chosen)
    return gates / gates.sum(1, keepdim=True), chosen


@pytest.mark.parametrize("per_loop", [False, True])
@pytest.mark.parametrize("name", ["bias", "embedding"])
def test_routers_follow_their_formula(small, name, per_loop):
    module = scrambled(MixtureOfExperts(small(router_loop=name, router_bias_per_loop=per_loop)))
    module.router.bias.copy_(torch.randn(module.router.bias.shape, generator=torch.Generator().manual_seed(2)) * 0.2)
    x = x_of_rows()
    gates, experts = module.router(x.flatten(0, 1), SLOTS)
    expected = [naive_gates(module, row, t) for row, t in zip(x, SLOTS.tolist(), strict=True)]
    assert torch.equal(experts, torch.cat([chosen for _, chosen in expected]))
    assert_same_results(gates, torch.cat([weights for weights, _ in expected]), [x, *module.router.parameters()])
    # In decoding all tokens are in one loop.
    alone = torch.cat([module.router(row, slot)[1] for row, slot in zip(x, SLOTS.split(1), strict=True)])
    assert torch.equal(alone, experts)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_forward_pass_equals_every_position_run_alone(model, options):
    built = model(**options)
    for block in built.recurrence.blocks:
        bias = block.ffn.router.bias
        bias.copy_(torch.randn(bias.shape, generator=torch.Generator().manual_seed(3)) * 0.1)
    ids = torch.randint(0, 128, (1, 6), generator=torch.Generator().manual_seed(4))
    expected, _ = slow_decode(built, ids[0].tolist(), [6] * 6)
    with torch.no_grad():
        torch.testing.assert_close(built(ids, loops=6).logits[0], expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["selective", "loop", "all"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_checkpointing_changes_nothing(model, options, mode):
    built = model(**options)
    ids, targets, state = inputs(built)
    losses, all_gradients = [], []
    for checkpointing in ("none", mode):
        built.recurrence.checkpointing = checkpointing
        output = built(ids, targets, loops=[5, 3, 3, 1], backprop=2, state=state)
        output.loss.backward()
        losses.append(output.loss.item())
        all_gradients.append(gradients(built))
    assert losses[0] == losses[1]
    assert_same_gradients(all_gradients[1], all_gradients[0])


@pytest.mark.parametrize("mode", ["none", "selective"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_passes_have_the_same_gradients(model, options, mode):
    built = model(**options, core_layers=1)
    ids, targets, state = inputs(built)
    expected = built(ids, targets, loops=3, state=state).loss
    expected.backward()
    reference = gradients(built)
    built.recurrence.checkpointing = mode
    torch.compiler.reset()
    built.recurrence.compile(backend="aot_eager_decomp_partition")
    loss = built(ids, targets, loops=3, state=state).loss
    loss.backward()
    torch.compiler.reset()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(built), reference)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_at_the_start_norms_change_nothing_and_routers_choose_other_experts(small, options):
    plain, differing = (
        RecurrentDepthTransformer(small(**fields)).initialize(0) for fields in ({}, {"loop_norm": "adaptive"})
    )
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        assert torch.equal(plain(ids, loops=6).logits, differing(ids, loops=6).logits)
    overlaps = {}
    for name in ("none", options["router_loop"]):
        built = RecurrentDepthTransformer(small(router_loop=name, router_loop_start=1.0)).initialize(0)
        readouts = built.read_depths(ids, ids, [1, 2, 3, 4])
        overlaps[name] = sum(readout.depth_overlap.item() for readout in readouts[1:]) / 3
    assert overlaps.pop("none") > 0.8 and overlaps.popitem()[1] < 0.7


def test_bias_of_each_loop_moves_against_the_load_of_that_loop(small):
    built = RecurrentDepthTransformer(small(router_bias_per_loop=True, router_bias_rate=0.01)).initialize(0)
    load = torch.zeros(2, LOOPS, 8, dtype=torch.int64)
    load[0, 1, 2], load[1, 3] = 8, torch.tensor([0, 0, 1, 2, 2, 3, 4, 4])
    built.rebalance(load)
    first, second = (block.ffn.router.bias for block in built.recurrence.blocks)
    expected = torch.full((8,), 0.01)
    expected[2] = -0.01
    assert torch.equal(first[1], expected)
    assert not first[[0, 2, 3]].any() and not second[:3].any(), "loops that no token ran"
    torch.testing.assert_close(second[3], 0.01 * torch.tensor([1.0, 1, 1, 0, 0, -1, -1, -1]))


def test_scaled_branches_are_added(model):
    """With a scale of s, the core adds s times what it adds with projections that are s times as large."""
    scaled, reference = model(residual_scale=0.25), model()
    ids, targets, state = inputs(scaled)
    with torch.no_grad():
        for block in reference.recurrence.blocks:
            for weight in (block.attention.out.weight, block.ffn.down, block.ffn.shared.down.weight):
                weight.mul_(0.25)
        reference.recurrence.adapter.up.weight.mul_(0.25)
        torch.testing.assert_close(
            scaled(ids, targets, loops=3, state=state).loss, reference(ids, targets, loops=3, state=state).loss
        )
        assert abs(scaled(ids, targets, loops=3).loss - model()(ids, targets, loops=3).loss) > 1e-3


def test_naive_norm_of_torch_agrees(small):
    """At zero tables the norm is torch's."""
    norm, x = LoopNorm(small()).requires_grad_(False), x_of_rows()
    torch.nn.init.ones_(norm.weight)
    for table in (norm.loop_scale, norm.loop_shift):
        table.zero_()
    torch.testing.assert_close(norm(x, SLOTS), F.rms_norm(x, (32,), eps=1e-6), rtol=1e-5, atol=1e-5)
