"""What is float32 by declaration is so in training as well: under autocast, with gradient, and in compiled blocks."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.model.config import ROUTERS, ModelConfig
from mythos.model.halting import ActHalting, HaltingGate
from mythos.model.injection import LTIInjection
from mythos.model.lanes import StateLanes
from mythos.model.layers import RMSNorm
from mythos.model.moe import Router
from mythos.model.recurrence import LoopAdapter, LoopEmbedding
from tests.model.conftest import scrambled

DIM = 32
SLOTS = torch.tensor([3, 1, 1, 0, 1, 5])
"""Loop indices of rows, one beyond the trained ones."""


def lti(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    injection = LTIInjection(config)
    return injection, lambda x: torch.add(*injection(x))


def router(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = Router(config)
    return module, lambda x: module(x.flatten(0, 1))[0]


def gate(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = HaltingGate(DIM)
    return module, lambda x: module(x.flatten(0, 1), x.flatten(0, 1).roll(1, 0))


def embedding(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = LoopEmbedding(DIM)
    return module, lambda x: x + module(SLOTS)


def norm(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = RMSNorm(DIM, 1e-6, cast=False)
    return module, module


def act(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = ActHalting(DIM, 4)
    return module, module


def lanes(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    module = StateLanes(config.model_copy(update={"lanes": 2}))

    def read_and_gates(x: Tensor) -> Tensor:
        return torch.cat(module(torch.stack((x, x.roll(1, 0)), dim=-2)), dim=-1)

    return module, read_and_gates


def loop_router(name: str) -> Callable[[ModelConfig], tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    def build(config: ModelConfig) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
        module = ROUTERS[name](config)
        return module, lambda x: module(x.flatten(0, 1), SLOTS)[0]

    return build


LOOP_ROUTERS = [pytest.param(loop_router(name), id=f"{name} router") for name in ("bias", "embedding")]
PARTS = (lti, router, *LOOP_ROUTERS, lanes, gate, act, embedding, norm)


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(len(SLOTS), 5, DIM, generator=torch.Generator().manual_seed(0))


def results(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor, autocast: bool) -> Iterator[Tensor]:
    """Output, then the gradients of input and parameters."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = function(x)
    yield output
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    yield from torch.autograd.grad((output * weights).sum(), (x, *module.parameters()))


@pytest.mark.parametrize("part", PARTS)
def test_autocast_changes_nothing(small, inputs, part):
    module, function = part(small(dim=DIM))
    scrambled(module)
    expected = list(results(module, function, inputs, autocast=False))
    for actual, exact in zip(results(module, function, inputs, autocast=True), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("part", [lti, router, *LOOP_ROUTERS, lanes, norm])
def test_autocast_changes_nothing_where_compiled(small, inputs, part):
    """The backward pass too, which the compiler traces under the autocast of the forward pass; and in one graph."""
    module, function = part(small(dim=DIM))
    scrambled(module)
    expected = list(results(module, function, inputs, autocast=False))
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    for actual, exact in zip(results(module, compiled, inputs, autocast=True), expected, strict=True):
        scale = exact.abs().max()
        torch.testing.assert_close(actual / scale, exact / scale, rtol=1e-5, atol=1e-5)
    torch.compiler.reset()


@pytest.fixture
def adapter(small: Callable[..., ModelConfig]) -> LoopAdapter:
    """With scales that bfloat16 rounds by up to 0.4%."""
    module = scrambled(LoopAdapter(small(dim=DIM, lora_rank=4)))
    with torch.no_grad():
        module.scale.copy_(1.003 + 0.37 * torch.arange(16).view(4, 4))
    return module


def test_scales_of_the_adapter_are_the_same_in_training(adapter, inputs):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trained = adapter(inputs, SLOTS)
        with torch.no_grad():
            decoded = adapter(inputs, SLOTS)
    assert trained.requires_grad
    torch.testing.assert_close(trained, decoded, rtol=1e-6, atol=0)


@pytest.mark.parametrize("slots", [SLOTS, torch.tensor([2])], ids=["a row each", "one for all"])
def test_gradient_of_the_scales_is_that_of_a_lookup(adapter, inputs, slots):
    scale = adapter.scale.detach().clone().requires_grad_()
    looked_up = F.embedding(slots.clamp(max=3), scale).unsqueeze(1)
    adapter.up(adapter.down(adapter.norm(inputs)) * looked_up).square().sum().backward()
    adapter(inputs, slots).square().sum().backward()
    assert adapter.scale.grad.shape == scale.shape
    torch.testing.assert_close(adapter.scale.grad, scale.grad, rtol=1e-5, atol=1e-5)
