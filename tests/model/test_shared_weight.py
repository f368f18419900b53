"""Weights that the loops share, against autograd in float32."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from mythos.model.layers import Linear
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.model.shared_weight import SharedWeight
from mythos.presets import preset_config
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


def test_weights_are_given_back_after_a_pass_that_fails() -> None:
    model = scrambled(RecurrentDepthTransformer(preset_config("mythos_nano").model_copy(update={"vocab_size": 128})))

    def fails(*inputs: object) -> None:
        raise MemoryError

    model.recurrence.step = fails
    with pytest.raises(MemoryError), torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.zeros(1, 4, dtype=torch.int64), loops=2)
    assert all(module.in_pass is None for module in model.modules() if isinstance(module, Linear))
