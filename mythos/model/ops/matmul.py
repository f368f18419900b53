"""Matrix products, with gradients where asked: torch's own, and oneDNN's in float32 where `kernels` chooses it."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos.model.ops import device_choice
from mythos.torch_internals import onednn_matmul

ROWS = 16
"""Numbers of rows that are no multiple of this are left to torch where any may come: oneDNN compiles a kernel for each
number of rows that it meets (0.3 ms each, and hundreds of MiB for experts that get other numbers in every pass)."""


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Products on x's device in the type of what is multiplied."""
    device = x.device.type
    # While a backward pass is traced, autocast may seem off and still be on in the graph.
    entered = torch.is_autocast_enabled(device) or torch.compiler.is_compiling()
    return torch.autocast(device, enabled=False) if entered else nullcontext()


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (n, K) times b (K, M) of the same type -> (n, M), written to `out` if that is given; no autograd."""
    if not device_choice.float32_by_onednn(a.device, a.dtype):
        return torch.mm(a, b, out=out)
    product = onednn_matmul(a, b)
    return product if out is None else out.copy_(product)


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) times the transpose of weight (M, K), in the autocast type -> (..., M)."""
    autocast = torch.is_autocast_enabled(x.device.type)
    if autocast or x.dtype != weight.dtype or not device_choice.float32_by_onednn(x.device, x.dtype):
        return F.linear(x, weight)
    return float32_linear(x, weight)


def float32_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., K) of any float type times the transpose of weight (M, K) float32, in float32; keeps x as it is."""
    if torch.is_grad_enabled():
        return _Float32Linear.apply(x, weight)
    # Decoding meets any number of rows.
    by_onednn = device_choice.float32_by_onednn(x.device, torch.float32) and x.numel() // x.shape[-1] % ROWS == 0
    return _float32_product(x.float(), weight) if by_onednn else F.linear(x.float(), weight)


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    return multiply(x.flatten(0, -2), weight.T).unflatten(0, x.shape[:-1])


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _float32_product(x.float(), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient, rows = gradient.flatten(0, -2), x.flatten(0, -2).float()
        of_x = of_weight = None
        with without_autocast(gradient):  # which a compiled backward pass takes over from the forward pass
            if ctx.needs_input_grad[0]:
                of_x = multiply(gradient, weight).to(x.dtype).view_as(x)
            if ctx.needs_input_grad[1]:
                # oneDNN copies a left factor that is transposed: better the narrower one.
                narrow = rows.shape[1] < gradient.shape[1]
                of_weight = multiply(rows.T, gradient).T if narrow else multiply(gradient.T, rows)
        return of_x, of_weight
