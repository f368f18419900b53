"""Weights that the loops share, against autograd in float32."""

import gc
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mythos.config.presets import preset_config
from mythos.model.config import ModelConfig
from mythos.model.layers import Linear
from mythos.model.ops.shared_weight import SharedWeight
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.torch_internals import TorchDispatchMode
from tests.model.conftest import scrambled


def test_many_loops_are_summed_in_float32() -> None:
    """In bfloat16 a sum of 300 equal gradients would stop growing at 256 times the first."""
    weight = torch.ones(4, 8).requires_grad_()
    x = torch.ones(1, 8, dtype=torch.bfloat16)
    shared = SharedWeight(weight, torch.bfloat16)
    sum(F.linear(x, shared.in_pass()).float().sum() for _ in range(300)).backward()
    torch.testing.assert_close(weight.grad, torch.full((4, 8), 300.0), rtol=0, atol=0)


def test_passes_without_gradient_leave_none() -> None:
    weight, x = torch.randn(4, 8).requires_grad_(), torch.randn(2, 8).bfloat16()
    shared = SharedWeight(weight, torch.bfloat16)
    with torch.no_grad():
        early = F.linear(x, shared.in_pass())
    assert not early.requires_grad
    F.linear(x, shared.in_pass()).float().sum().backward()
    torch.testing.assert_close(weight.grad, x.float().sum(0).expand(4, 8), rtol=1e-2, atol=1e-2)


def test_a_weight_that_is_not_used_gets_no_gradient() -> None:
    weight = torch.randn(4, 8).requires_grad_()
    shared = SharedWeight(weight, torch.bfloat16)
    shared.link.backward()
    assert weight.grad is None


def test_nothing_is_left_to_the_garbage_collector() -> None:
    weight = torch.randn(4, 8).requires_grad_()
    gc.disable()
    try:
        for backward in (True, False):
            shared = SharedWeight(weight, torch.bfloat16)
            y = F.linear(torch.randn(2, 8).bfloat16(), shared.in_pass()).float().sum()
            if backward:
                y.backward()
            gone = weakref.ref(shared.sum)
            del shared, y
            assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("checkpointing", ["none", "selective", "loop"])
@pytest.mark.parametrize(("attention", "injection"), [("mla", "lti"), ("gqa", "linear")])
def test_core_gradients_of_many_loops(attention: str, injection: str, checkpointing: str) -> None:
    """A gradient of 16 loops in bfloat16 is the float32 sum of what each loop gives, to float32's precision.

    Each loop's part is what remains of the whole where the weight of all other loops gives no gradient.
    """
    changes = {"vocab_size": 128, "dim": 32, "attention": attention, "injection": injection, "core_ffn": "dense"}
    model = scrambled(RecurrentDepthTransformer(preset_config("mythos_nano").model_copy(update=changes)))
    model.recurrence.checkpointing = checkpointing
    ids, loops = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(0)), 16

    def gradients(only: int | None) -> dict[str, torch.Tensor]:
        model.zero_grad()
        original, passes = SharedWeight.in_pass, {}

        def in_pass(shared: SharedWeight) -> torch.Tensor:
            passes[shared] = passes.get(shared, -1) + 1
            return original(shared) if only in (None, passes[shared]) else shared.value

        with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", dtype=torch.bfloat16):
            patch.setattr(SharedWeight, "in_pass", in_pass)
            model(ids[:, :-1], ids[:, 1:], loops=loops).objective.backward()
        looped = {id(linear.weight) for linear in model.recurrence.looped}
        return {n: p.grad.double() for n, p in model.named_parameters() if id(p) in looped}

    whole, parts = gradients(None), [gradients(loop) for loop in range(loops)]
    assert len(whole) > 4
    for name, gradient in whole.items():
        total = torch.stack([part[name] for part in parts]).sum(0)
        assert (gradient - total).norm() < 1e-6 * total.norm(), name


def test_weights_are_restored_after_a_pass_that_fails() -> None:
    model = scrambled(RecurrentDepthTransformer(preset_config("mythos_nano").model_copy(update={"vocab_size": 128})))

    def fails(*inputs: object) -> None:
        raise MemoryError

    model.recurrence.step = fails
    with pytest.raises(MemoryError), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.zeros(1, 4, dtype=torch.int64), loops=2)
    assert all(module.in_pass is None for module in model.modules() if isinstance(module, Linear))


class Casts(TorchDispatchMode):
    """Counts casts of matrices to bfloat16, by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16 and args[0].ndim == 2:
            self.shapes[result.shape] += 1
        return result


@pytest.mark.parametrize("checkpointing", ["none", "selective", "loop"])
def test_weights_of_the_core_are_cast_once_a_step(checkpointing: str, small: Callable[..., ModelConfig]) -> None:
    """However many loops there are, with gradient and without, and where loops are computed again."""
    model = RecurrentDepthTransformer(small()).initialize(0)
    model.recurrence.checkpointing = checkpointing
    expected = Counter(linear.weight.shape for linear in model.recurrence.looped)
    for part in (*model.prelude, *model.coda, model.readout):
        expected.update(module.weight.shape for module in part.modules() if isinstance(module, Linear))
    ids = torch.zeros(2, 9, dtype=torch.int64)
    with Casts() as casts:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            objective = model(ids[:, :-1], ids[:, 1:], loops=5, backprop=3).objective
        objective.backward()
    assert {shape: casts.shapes[shape] for shape in expected} == expected


def test_graphs_of_a_pass_receive_cast_weights(small: Callable[..., ModelConfig]) -> None:
    model = RecurrentDepthTransformer(small()).initialize(0)
    shapes = {linear.weight.shape for linear in model.recurrence.looped}
    matrices: list[torch.Tensor] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        matrices.extend(tensor for tensor in inputs if isinstance(tensor, torch.Tensor) and tensor.shape in shapes)
        return graph.forward

    torch.compiler.reset()
    model.recurrence.compile(backend=keep)
    ids = torch.zeros(2, 9, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(ids[:, :-1], ids[:, 1:], loops=2, backprop=1).objective.backward()
    torch.compiler.reset()
    assert len(matrices) == 2 * len(model.recurrence.looped) and {tensor.dtype for tensor in matrices} == {
        torch.bfloat16
    }


def test_a_pass_that_ends_before_the_weight_leaves_nothing_or_makes_the_next_one_raise() -> None:
    weight, x = torch.randn(4, 8).requires_grad_(), torch.randn(2, 8).bfloat16().requires_grad_()
    shared = SharedWeight(weight, torch.bfloat16)
    first = F.linear(x, shared.in_pass())
    total = F.linear(first, shared.in_pass()[:, :4]).float().sum()
    torch.autograd.grad(total, x, retain_graph=True)  # autograd skips the weight
    total.backward(retain_graph=True)
    gradient, weight.grad = weight.grad, None
    total.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, gradient)

    def fail(gradient: torch.Tensor) -> None:
        raise MemoryError

    hook = first.register_hook(fail)
    with pytest.raises(MemoryError):
        total.backward(retain_graph=True)
    hook.remove()
    with pytest.raises(RuntimeError, match=r"an earlier backward pass .* run the forward pass again"):
        total.backward()
