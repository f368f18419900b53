"""Matmuls with optional gradients: torch's, or in float32 oneDNN's where `device_choice` selects it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos.model.ops import device_choice
from mythos.torch_internals import onednn_matmul

ROWS = 16
"""Where row counts vary, only multiples of this go to oneDNN. It compiles a kernel for each number of rows that it
meets: 0.3 ms each, and hundreds of MiB for experts, whose number of rows changes in every pass."""


def without_autocast(x: Tensor) -> AbstractContextManager[None]:
    """Context in which matmuls on x's device run in the type of their inputs."""
    device = x.device.type
    # While a backward pass is traced, autocast may look disabled here and still be enabled in the graph.
    entered = torch.is_autocast_enabled(device) or torch.compiler.is_compiling()
    return torch.autocast(device, enabled=False) if entered else nullcontext()


def multiply(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (n, K) times b (K, M) of the same type -> (n, M), written to `out` unless it is None; no autograd."""
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
    """x (..., K) of any float type times the transpose of weight (M, K) float32, in float32 -> (..., M).

    Saves x in its own type for the backward pass.
    """
    if torch.is_grad_enabled():
        return _Float32Linear.apply(x, weight)
    # Decoding brings any number of rows.
    by_onednn = device_choice.float32_by_onednn(x.device, torch.float32) and x.numel() // x.shape[-1] % ROWS == 0
    return _float32_product(x.float(), weight) if by_onednn else F.linear(x.float(), weight)


def _float32_product(x: Tensor, weight: Tensor) -> Tensor:
    return multiply(x.flatten(0, -2), weight.T).unflatten(0, x.shape[:-1])


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _float32_product(x.float(), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient_NM, x_NK = gradient.flatten(0, -2), x.flatten(0, -2).float()
        grad_x = grad_weight = None
        with without_autocast(gradient_NM):  # a compiled backward pass inherits the forward pass's autocast
            if ctx.needs_input_grad[0]:
                grad_x = multiply(gradient_NM, weight).to(x.dtype).view_as(x)
            if ctx.needs_input_grad[1]:
                # oneDNN copies a transposed left factor: transpose the narrower one.
                if x_NK.shape[1] < gradient_NM.shape[1]:
                    grad_weight = multiply(x_NK.T, gradient_NM).T
                else:
                    grad_weight = multiply(gradient_NM.T, x_NK)
        return grad_x, grad_weight
