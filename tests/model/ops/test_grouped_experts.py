"""Experts' weights that loops share: gradients formed for many loops at once, against plain autograd."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from mythos.model.ops import grouped_experts
from mythos.model.ops.grouped_experts import (
    ROWS,
    ExpertWeights,
    grouped_outer,
    grouped_product,
    run_experts,
    run_experts_operator,
    train_experts,
    train_experts_backward,
)

EXPERTS, DIM, HIDDEN, CHOSEN = 5, 8, 6, 2


def random_inputs(loops: int, tokens: int = 70) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, DIM, generator=generator)
    parameters = [torch.randn(EXPERTS, DIM, 2 * HIDDEN, generator=generator) / DIM**0.5]
    parameters.append(torch.randn(EXPERTS, HIDDEN, DIM, generator=generator) / HIDDEN**0.5)
    gates = torch.rand(loops, tokens, CHOSEN, generator=generator)
    # Expert 3 is never chosen.
    allowed = torch.tensor([1.0, 1, 1, 0, 1]).expand(loops * tokens, -1)
    experts = torch.multinomial(allowed, CHOSEN, generator=generator).view(loops, tokens, CHOSEN)
    return [x, *parameters], gates, experts, torch.randn(tokens, DIM, generator=generator)


def one_by_one(x, gate_up, down, gates, experts):
    rows = []
    for token, weights, chosen in zip(x, gates, experts, strict=True):
        row = torch.zeros(DIM)
        for weight, expert in zip(weights, chosen.tolist(), strict=True):
            gate, up = (token @ gate_up[expert]).chunk(2)
            row = row + weight * ((F.silu(gate) * up) @ down[expert])
        rows.append(row)
    return torch.stack(rows)


def run(leaves, gates, experts, direction, loops, apply) -> list[torch.Tensor]:
    """The result of some loops one after another, and the gradients of everything."""
    leaves, gates = [leaf.clone().requires_grad_() for leaf in leaves], gates.clone().requires_grad_()
    x = leaves[0]
    for loop in range(loops):
        x = (x + apply(x, leaves[1], leaves[2], gates[loop], experts[loop])) / 2
    (x * direction).sum().backward()
    return [x.detach(), *(leaf.grad for leaf in leaves), gates.grad]


@pytest.mark.parametrize("kept", [0, 1, 10**9], ids=["one loop at a time", "as much as the gradient", "all loops"])
def test_shared_weights_equal_autograd(kept: int) -> None:
    leaves, gates, experts, direction = random_inputs(loops=4)
    shared: list[ExpertWeights] = []

    def ours(x, gate_up, down, gates, experts):
        if not shared:
            shared.append(ExpertWeights(gate_up, down, torch.float32))
            if kept != 1:
                shared[0].gradient.room = kept
        return run_experts(x, gates, experts, shared[0])

    actual = run(leaves, gates, experts, direction, 4, ours)
    expected = run(leaves, gates, experts, direction, 4, one_by_one)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert (actual[2][3] == 0).all(), "an expert without tokens"
    assert not shared[0].gradient.take(), "handed over"


@pytest.mark.parametrize("kept", [0, 10**9], ids=["one loop at a time", "all loops"])
def test_choices_that_are_left_out(kept: int) -> None:
    """A choice of expert E costs and adds nothing; the others as if it had a gate of zero, which gets no gradient."""
    leaves, gates, experts, direction = random_inputs(loops=3)
    left_out = torch.rand(experts.shape, generator=torch.Generator().manual_seed(1)) < 0.4
    left_out[0, :5] = True  # tokens without any expert
    slots = (~left_out).sum((1, 2)).tolist()
    multiplied = []

    def ours(x, gate_up, down, gates, experts):
        if not multiplied:
            shared = ExpertWeights(gate_up, down, torch.float32)
            shared.gradient.room = kept
            multiplied.append(shared)
        loop = len(multiplied) - 1
        multiplied.append(loop)
        chosen = experts.masked_fill(left_out[loop], EXPERTS)
        result = run_experts(x, gates, chosen, multiplied[0], slots[loop])
        with torch.no_grad():
            assert torch.equal(run_experts(x, gates, chosen, multiplied[0], slots[loop]), result)
        return result

    actual = run(leaves, gates, experts, direction, 3, ours)
    expected = run(leaves, gates.masked_fill(left_out, 0), experts, direction, 3, one_by_one)
    expected[-1] = expected[-1].masked_fill(left_out, 0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("needed", [False, True])
def test_a_recomputation_computes_the_output_only_if_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, needed: bool
) -> None:
    """Products for the tokens of a pass, of its recomputation, and of its gradients; which are those without it."""
    leaves, gates, experts, direction = random_inputs(loops=1)
    products = []

    def counted(x: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        products.append(tuple(weights.shape[1:]))
        return grouped_product(x, weights, ends)

    monkeypatch.setattr(grouped_experts, "grouped_product", counted)

    def pass_of(x, gate_up, down, gates, experts):
        y = run_experts(x, gates, experts, ExpertWeights(gate_up, down, torch.float32))
        return y.sin() if needed else 2 * y

    def recomputed(*arguments):
        return checkpoint(pass_of, *arguments, use_reentrant=False)

    expected = run(leaves, gates, experts, direction, 1, pass_of)
    up, down = (DIM, 2 * HIDDEN), (HIDDEN, DIM)
    forward, backward = [up, down], [down[::-1], up[::-1]]
    assert products == forward + backward
    products.clear()
    actual = run(leaves, gates, experts, direction, 1, recomputed)
    assert products == forward + (forward if needed else [up]) + backward
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 2, 70])
def test_without_gradient(tokens: int) -> None:
    (x, gate_up, down), gates, experts, _ = random_inputs(loops=1, tokens=tokens)
    weights = ExpertWeights(gate_up, down, torch.float32)
    with torch.no_grad():
        actual = run_experts(x, gates[0], experts[0], weights)
    torch.testing.assert_close(actual, one_by_one(x, gate_up, down, gates[0], experts[0]), rtol=1e-5, atol=1e-5)
    torch.library.opcheck(
        run_experts_operator, (x, gates[0], experts[0], gate_up, down), test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.parametrize("tokens", [1, 3])
def test_products_without_gradient_are_in_the_type_of_the_weights(tokens: int) -> None:
    (x, gate_up, down), gates, experts, _ = random_inputs(loops=1, tokens=tokens)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run_experts(x, gates[0], experts[0], ExpertWeights(gate_up, down, torch.bfloat16))
    assert actual.dtype == torch.float32
    expected = one_by_one(x, gate_up, down, gates[0], experts[0])
    assert 0 < (actual - expected).norm() < 0.02 * expected.norm()


def test_many_loops_are_summed_in_float32() -> None:
    """In bfloat16 a sum of 300 equal gradients would stop growing at 256 times the first."""
    x, gates = torch.ones(1, DIM), torch.ones(1, 1)
    gate_up = torch.ones(1, DIM, 2 * HIDDEN).requires_grad_()
    down = torch.ones(1, HIDDEN, DIM).requires_grad_()
    weights = ExpertWeights(gate_up, down, torch.bfloat16)
    weights.gradient.room = 0
    experts = torch.zeros(1, 1, dtype=torch.int64)
    sum(run_experts(x, gates, experts, weights).sum() for _ in range(300)).backward()
    once = ExpertWeights(gate_up, down, torch.bfloat16)
    gradient, down.grad = down.grad, None
    run_experts(x, gates, experts, once).sum().backward()
    assert down.grad.dtype == torch.float32
    torch.testing.assert_close(gradient, 300 * down.grad, rtol=1e-6, atol=0)


def test_loops_without_gradient_leave_nothing() -> None:
    leaves, gates, experts, _ = random_inputs(loops=1)
    x, gate_up, down = (leaf.requires_grad_() for leaf in leaves)
    weights = ExpertWeights(gate_up, down, torch.float32)
    with torch.no_grad():
        early = run_experts(x, gates[0], experts[0], weights)
    run_experts(early, gates[0], experts[0], weights).sum().backward()
    alone = one_by_one(early, gate_up, down, gates[0], experts[0])
    expected = torch.autograd.grad(alone.sum(), [gate_up, down])
    torch.testing.assert_close([gate_up.grad, down.grad], list(expected), rtol=1e-4, atol=1e-5)
    assert x.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_of_uneven_groups(dtype: torch.dtype) -> None:
    sizes = [0, 1, ROWS - 1, ROWS, 0, 3 * ROWS + 5, 2]
    ends = torch.tensor(sizes).cumsum(0).int()
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(sum(sizes), size, generator=generator).to(dtype) for size in (8, 16))
    weights = torch.randn(len(sizes), 8, 16, generator=generator).to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-1}
    parts, others = x.float().split(sizes), y.float().split(sizes)
    product = torch.cat([part @ weight.float() for part, weight in zip(parts, weights, strict=True)])
    torch.testing.assert_close(grouped_product(x, weights, ends).float(), product, **close)
    outer = torch.stack([part.T @ other for part, other in zip(parts, others, strict=True)])
    torch.testing.assert_close(grouped_outer(x, y, ends).float(), outer, **close)
    # And as torch's own kernel has them.
    torch.testing.assert_close(F.grouped_mm(x, weights, offs=ends).float(), product, **close)


def test_a_step_leaves_nothing_to_the_garbage_collector() -> None:
    leaves, gates, experts, _ = random_inputs(loops=1)
    gate_up, down = (leaf.requires_grad_() for leaf in leaves[1:])
    gc.disable()
    try:
        for backward in (True, False):
            weights = ExpertWeights(gate_up, down, torch.bfloat16)
            y = run_experts(leaves[0], gates[0], experts[0], weights)
            if backward:
                y.sum().backward()
            gone = weakref.ref(weights)
            del weights, y
            assert gone() is None
    finally:
        gc.enable()


def test_a_backward_pass_that_ends_half_way_leaves_nothing_either() -> None:
    """As when memory runs out in one: what is kept for later products may not keep the graph alive."""
    leaves, gates, experts, _ = random_inputs(loops=4)
    x, gate_up, down = (leaf.requires_grad_() for leaf in leaves)

    def fails(gradient: torch.Tensor) -> None:
        raise MemoryError

    weights = ExpertWeights(gate_up, down, torch.float32)
    for loop in range(4):
        x = x + run_experts(x, gates[loop], experts[loop], weights)
        if loop == 1:
            x.register_hook(fails)
    with pytest.raises(MemoryError):
        x.sum().backward()
    gone = weakref.ref(weights.gradient)
    del weights, x
    gc.collect()
    assert gone() is None


def test_frozen_experts_pass_gradients_on_and_form_none() -> None:
    leaves, gates, experts, direction = random_inputs(loops=1)
    x = leaves[0].requires_grad_()
    weights = ExpertWeights(*leaves[1:], torch.float32)
    (run_experts(x, gates[0], experts[0], weights) * direction).sum().backward()
    alone = (one_by_one(x, *leaves[1:], gates[0], experts[0]) * direction).sum()
    torch.testing.assert_close(x.grad, torch.autograd.grad(alone, x)[0], rtol=1e-4, atol=1e-5)
    assert weights.link is None and not weights.gradient.take()
    torch.compiler.reset()
    expected, x.grad = x.grad, None
    compiled = torch.compile(run_experts, backend="aot_eager", fullgraph=True)
    (compiled(x, gates[0], experts[0], weights) * direction).sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("room", [0, 10**9], ids=["one loop at a time", "all loops"])
def test_compiled_equals_autograd(room: int) -> None:
    """Three loops, each a graph of its own as in training; weights share one gradient beside the graphs."""
    leaves, gates, experts, direction = random_inputs(loops=3)
    torch.compiler.reset()
    shared: list[ExpertWeights] = []
    compiled = torch.compile(run_experts, backend="aot_eager", fullgraph=True)

    def ours(x, gate_up, down, gates, experts):
        if not shared:
            shared.append(ExpertWeights(gate_up, down, torch.float32))
            shared[0].gradient.room = room
        return compiled(x, gates, experts, shared[0])

    actual = run(leaves, gates, experts, direction, 3, ours)
    expected = run(leaves, gates, experts, direction, 3, one_by_one)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert not shared[0].gradient.take(), "handed over"
    torch.compiler.reset()


def test_operators_of_compiled_graphs() -> None:
    """The fake implementations have the right shapes, types and strides; no operator changes or returns its inputs."""
    (x, gate_up, down), gates, experts, direction = random_inputs(loops=1)
    weights = ExpertWeights(gate_up.requires_grad_(), down.requires_grad_(), torch.float32)
    checks = ("test_schema", "test_faketensor")
    inputs = (x, gates[0], experts[0], weights.gate_up, weights.down, weights.link, weights.number)
    torch.library.opcheck(train_experts, inputs, test_utils=checks)
    _, *kept = train_experts(*inputs)
    backward = (direction, x, gates[0], *kept, weights.gate_up, weights.down, weights.number)
    torch.library.opcheck(train_experts_backward, backward, test_utils=checks)


def test_what_a_compiled_backward_pass_leaves_is_not_overwritten() -> None:
    """A graph reuses the memory of its inputs once the operator is done; the weights' gradient is formed later."""
    (x, gate_up, down), gates, experts, direction = random_inputs(loops=2)
    weights = ExpertWeights(gate_up.requires_grad_(), down.requires_grad_(), torch.float32)
    weights.gradient.room = 10**9
    alone = 0.0
    for loop in range(2):
        inputs = (x, gates[loop], experts[loop])
        _, *kept = train_experts(*inputs, weights.gate_up, weights.down, weights.link, weights.number)
        reused = [direction.clone(), x.clone(), gates[loop].clone(), *kept]
        train_experts_backward(*reused, weights.gate_up, weights.down, weights.number)
        for tensor in reused:
            tensor.zero_()
        alone = alone + (one_by_one(x, gate_up, down, *inputs[1:]) * direction).sum()
    expected = torch.autograd.grad(alone, [gate_up, down])
    torch.testing.assert_close(weights.gradient.take(), list(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_pass_after_a_partial_one_raises(compiled: bool) -> None:
    """The first pass went through the loops but not to the weights: its gradients must not be added to the second's."""
    leaves, gates, experts, direction = random_inputs(loops=2)
    x, gate_up, down = (leaf.requires_grad_() for leaf in leaves)
    torch.compiler.reset()
    apply = torch.compile(run_experts, backend="aot_eager", fullgraph=True) if compiled else run_experts

    def forward() -> torch.Tensor:
        weights, y = ExpertWeights(gate_up, down, torch.float32), x
        for loop in range(2):
            y = y + apply(y, gates[loop], experts[loop], weights)
        return (y * direction).sum()

    total = forward()
    torch.autograd.grad(total, x, retain_graph=True)
    with pytest.raises(RuntimeError, match=r"an earlier backward pass .* run the forward pass again"):
        total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="an earlier backward pass"):
        torch.autograd.grad(total, gate_up, retain_graph=True)
    gate_up.grad = down.grad = None
    forward().backward()
    expected = [gate_up.grad, down.grad]
    gate_up.grad = down.grad = None
    total = forward()
    for _ in range(2):  # complete passes through one graph add up as usual
        total.backward(retain_graph=True)
    torch.testing.assert_close([gate_up.grad / 2, down.grad / 2], expected)
    torch.compiler.reset()


def test_a_pass_after_a_failed_one_raises() -> None:
    leaves, gates, experts, _ = random_inputs(loops=2)
    x, gate_up, down = (leaf.requires_grad_() for leaf in leaves)
    weights = ExpertWeights(gate_up, down, torch.float32)
    first = run_experts(x, gates[0], experts[0], weights)
    total = run_experts(first, gates[1], experts[1], weights).sum()

    def fail(gradient: torch.Tensor) -> None:
        raise MemoryError

    hook = first.register_hook(fail)
    with pytest.raises(MemoryError):
        total.backward(retain_graph=True)
    hook.remove()
    with pytest.raises(RuntimeError, match="an earlier backward pass"):
        total.backward()
