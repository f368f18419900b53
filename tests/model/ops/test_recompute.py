"""Selective checkpointing on its own: what is recomputed, how often, and that it is not saved meanwhile."""

import weakref
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.model.ops.recompute import Selective, recomputable
from mythos.model.rdt import RecurrentDepthTransformer

CPU = torch.device("cpu")


class Counted:
    """A function that counts its calls and sees whether its last result lives."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x: Tensor, factor: float) -> Tensor:
        self.calls += 1
        result = x.sin() * factor
        self.lives = weakref.ref(result.untyped_storage())
        return result


def branches(x: Tensor, weight: Tensor, first: Counted, second: Counted) -> Tensor:
    """Two marked results, the second computed from half of the first; matmuls read both, two of them the first."""
    one = recomputable(first, x, 2.0)
    two = recomputable(second, one[:, 3:], 3.0)
    return one @ weight + one.flip(0) @ weight.square() + two @ weight[3:]


def test_results_are_recomputed_once_for_all_readers_and_not_kept() -> None:
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    plain = torch.autograd.grad(branches(x, weight, Counted(), Counted()).square().sum(), (x, weight))
    first, second = Counted(), Counted()
    with Selective(CPU):
        loss = branches(x, weight, first, second).square().sum()
    assert first.lives() is None and second.lives() is None, "nothing holds them between the passes"
    actual = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(actual, plain, strict=True))
    assert first.calls <= 3 and second.calls == 2, "forward, and once again for what was read"
    assert first.lives() is None and second.lives() is None, "nor after the backward pass"
    again = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))


def test_outside_of_the_context_results_are_kept() -> None:
    function, x = Counted(), torch.randn(4, 6, requires_grad=True)
    (recomputable(function, x, 2.0) @ torch.randn(6, 5, requires_grad=True)).sum().backward()
    assert function.calls == 1 and Selective.current is None


def test_recomputed_tensors_have_the_type_that_autocast_gave_them() -> None:
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(6, 5, requires_grad=True)
    gradients = []
    for selective in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if selective:
                with Selective(CPU):
                    y = recomputable(F.linear, x, weight.T).sin() * 2
            else:
                y = F.linear(x, weight.T).sin() * 2
        gradients.append(torch.autograd.grad(y.float().sum(), (x, weight)))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_the_context_ends_with_an_exception() -> None:
    try:
        with Selective(CPU):
            raise KeyError
    except KeyError:
        pass
    assert Selective.current is None


def test_a_compiled_pass_keeps_less_and_has_the_same_gradients(model: Callable[..., RecurrentDepthTransformer]) -> None:
    """Kept are what the graph of the forward pass hands to that of the backward pass."""
    ids = torch.randint(0, 128, (2, 33), generator=torch.Generator().manual_seed(0))
    kept: dict[str, int] = {}
    gradients: dict[str, dict[str, Tensor]] = {}
    for mode in ("eager", "none", "selective"):
        built = model(attention="mla", core_layers=1, prelude_layers=0, coda_layers=0)
        torch.compiler.reset()
        if mode != "eager":
            built.recurrence.checkpointing = mode
            built.recurrence.compile(backend="aot_eager_decomp_partition")
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor, sizes: dict[int, int] = sizes) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            objective = built(ids[:, :-1], ids[:, 1:], loops=3).objective
        objective.backward()
        kept[mode] = sum(sizes.values())
        gradients[mode] = {name: parameter.grad for name, parameter in built.named_parameters()}
    torch.compiler.reset()
    assert kept["selective"] < 0.9 * kept["none"], kept
    for mode in ("none", "selective"):
        torch.testing.assert_close(gradients[mode], gradients["eager"], rtol=1e-5, atol=1e-5)
    assert not Selective.in_graph
