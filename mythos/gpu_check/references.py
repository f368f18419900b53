"""Plain reference implementations of the kernels, for float64 on the CPU; autograd differentiates them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention: query (B, S, H, K), key (B, S, G, K), value (B, S, G, V), visible (B or 1, S, S) bool.

    H is a multiple of G.
    """
    group = query.shape[2] // key.shape[2]
    key, value = (heads.repeat_interleave(group, dim=2) for heads in (key, value))
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = scores.masked_fill(~visible.unsqueeze(1), float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, value)


def experts(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor, chosen: Tensor) -> Tensor:
    """Weighted sum of each token's experts.

    x (N, D), gates (N, k), gate_up (E, D, 2 F), down (E, F, D), chosen (N, k) int64; a choice of E is left out.
    """
    rows = []
    for token, weights, numbers in zip(x, gates, chosen.tolist(), strict=True):
        there = [(weight, number) for weight, number in zip(weights, numbers, strict=True) if number < len(gate_up)]
        rows.append(sum(weight * (gated(token @ gate_up[number]) @ down[number]) for weight, number in there))
    return torch.stack(rows)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the halves of the last dimension."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gate * torch.sigmoid(gate) * up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square along the last dimension, times a weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x: Tensor, theta: float) -> Tensor:
    """Rotary positions of x (B, S, H, K): the pair (x_i, x_{i + K/2}) as a complex number, times exp(i angle)."""
    half = x.shape[-1] // 2
    frequency = theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequency
    rotated_pairs = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat((rotated_pairs.real, rotated_pairs.imag), dim=-1)


def cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over the targets; a target of -100 is skipped."""
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum", ignore_index=-100)


def with_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor | None, others: Sequence[Any] = ()
) -> list[Tensor]:
    """The output of `function(*inputs, *others)`, then the gradient of each input.

    `upstream` is the gradient of the output; None stands for ones.
    """
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*leaves, *others)
    gradient = torch.ones_like(output) if upstream is None else upstream.to(output.device, output.dtype)
    output.backward(gradient)
    return [output.detach(), *gradients(leaves)]


def gradients(leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of each leaf; zeros if it has none."""
    return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def errors(measured: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """Largest error of each tensor, relative to the largest absolute expected value; NaN counts as inf."""
    relative = []
    for one, other in zip(measured, expected, strict=True):
        error = (one.detach().double().cpu() - other).abs().amax() / other.abs().amax().clamp_min(1e-30)
        relative.append(float(error) if error.isfinite() else float("inf"))
    return relative
