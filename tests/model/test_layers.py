"""The parts of a block, against torch's own."""

import pytest
import torch
import torch.nn.functional as F

from mythos.model.layers import RMSNorm, SwiGLU


@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 4, 10)], ids=str)
def test_rms_norm_with_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    x[0] = 0  # as a position that knows nothing
    norm = RMSNorm(shape[-1], 1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(shape[-1], generator=generator) + 0.5)
    results = []
    for apply in (norm, lambda x: F.rms_norm(x, norm.weight.shape, norm.weight, norm.eps)):
        leaf = x.clone().requires_grad_()
        norm.weight.grad = None
        result = apply(leaf)
        (result * direction).sum().backward()
        results.append((result.detach(), leaf.grad, norm.weight.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), results[1][0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize(("cast", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_rms_norm_is_computed_in_float32_and_cast_at_the_end(cast: bool, dtype: torch.dtype, gradient: bool) -> None:
    x = (torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) + 300).bfloat16()
    norm = RMSNorm(64, 1e-6, cast=cast)
    torch.nn.init.ones_(norm.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(gradient):
        result = norm(x)
    assert result.dtype == dtype
    expected = F.rms_norm(x.double(), (64,), eps=1e-6)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6 if dtype == torch.float32 else 2**-8, atol=0)


def test_swiglu_with_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = SwiGLU(12, 20)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    x, direction = (torch.randn(3, 5, 12, generator=generator) for _ in range(2))
    gate, up = layer.gate_up.weight.chunk(2)
    results = []
    for apply in (layer, lambda x: (F.silu(x @ gate.T) * (x @ up.T)) @ layer.down.weight.T):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        (apply(leaf) * direction).sum().backward()
        results.append((apply(leaf).detach(), leaf.grad, *(parameter.grad for parameter in layer.parameters())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), results[1][0], rtol=1e-5, atol=1e-5)
