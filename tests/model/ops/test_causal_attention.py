"""Causal attention by products against attention written out, in double precision."""

import contextlib

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mythos.model.ops import causal_attention as module
from mythos.model.ops.causal_attention import causal_attention, causal_attention_backward


def written_out(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(B, H, S, d), (B, KV, S, d), (B, KV, S, v) -> (B, H, S, v)."""
    group, length = query.shape[1] // key.shape[1], query.shape[2]
    key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    unseen = torch.arange(length)[:, None] < torch.arange(length)
    return torch.einsum("bhqk,bhkv->bhqv", scores.masked_fill(unseen, float("-inf")).softmax(-1), value)


@pytest.mark.parametrize("piece_bytes", [module.PIECE_BYTES, 1], ids=["all heads", "a head at a time"])
@pytest.mark.parametrize(("heads", "kv", "dim", "width"), [(4, 4, 6, 6), (3, 3, 8, 4), (4, 2, 4, 8), (6, 1, 8, 8)])
@pytest.mark.parametrize("length", [1, 13, 64, 150, 300])
def test_equals_softmax_written_out(monkeypatch, length, heads, kv, dim, width, piece_bytes):
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    generator = torch.Generator().manual_seed(length)
    shapes = ((2, length, heads, dim), (2, length, kv, dim), (2, length, kv, width), (2, length, heads, width))
    query, key, value, gradient = (torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes)
    results = []
    for attention, dtype in ((causal_attention, torch.float32), (written_out, torch.float64)):
        inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        output = attention(*inputs, 0.3)
        results.append([output, *torch.autograd.grad(output, inputs, gradient.to(dtype))])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)


def test_in_bfloat16_it_is_off_by_roundings_only():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, 200, 16, generator=generator).bfloat16().requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    output, expected = causal_attention(*inputs, 0.25), written_out(*exact, 0.25)
    gradient = torch.randn(output.shape, generator=generator).bfloat16()
    results_of_kernel = [output, *torch.autograd.grad(output, inputs, gradient)]
    wanted = [expected, *torch.autograd.grad(expected, exact, gradient.double())]
    for actual, expected in zip(results_of_kernel, wanted, strict=True):
        assert actual.dtype == torch.bfloat16
        assert (actual - expected).norm() < 0.01 * expected.norm()


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_is_an_operator_to_torch(kv):
    """Shapes, strides and gradients as torch traces them."""
    inputs = [torch.randn(2, 70, h, d).transpose(1, 2).requires_grad_() for h, d in ((4, 8), (kv, 8), (kv, 4))]
    torch.library.opcheck(causal_attention, (*inputs, 0.3))
    gradient = torch.randn(2, 70, 4, 4).transpose(1, 2)
    results = []
    for mode in (contextlib.nullcontext(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode:
            results_of_kernel = (causal_attention(*inputs, 0.3), *causal_attention_backward(gradient, *inputs, 0.3))
        results.append([(x.shape, x.stride()) for x in results_of_kernel])
    assert results[0] == results[1]
