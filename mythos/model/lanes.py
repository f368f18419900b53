"""State lanes: the loop's state as K streams of width D, between which every pass chooses by gates.

After hyper-connections (arXiv 2409.19606), which keep several residual streams, used once per loop as in Hyperloop
(arXiv 2604.21254). There the gates are indexed by the loop; here they are not, so that depth at inference stays free.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mythos.model.config import ModelConfig
from mythos.model.layers import Initializer, RMSNorm, without_autocast, zeros


class StateLanes(nn.Module):
    """Gates of K lanes: read = softmax(W_r x + b_r), write = 2 sigmoid(W_w x + b_w), with x the RMSNorms of all lanes.

    A pass computes u = sum_k read_k l_k from the lanes l_k that the injection leaves, and the next state
    l_k + write_k (Core(u) - u). With the starting values, zeros, it reads the mean and writes the whole change to every
    lane. All in float32.
    """

    float32 = ("weight", "bias")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.count = config.lanes
        self.norm = RMSNorm(config.dim, config.norm_eps, cast=False)
        self.weight = nn.Parameter(torch.empty(2 * self.count, self.count * config.dim))
        self.bias = nn.Parameter(torch.empty(2 * self.count))
        self.initializers: dict[str, Initializer] = {"weight": zeros, "bias": zeros}

    @staticmethod
    def products(config: ModelConfig) -> int:
        """Multiply-adds of the gates in one pass, for one token."""
        return 2 * config.lanes**2 * config.dim if config.lanes > 1 else 0

    def forward(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """The core's input u (n, S, D), and the gates of `write` (n, S, K), from lanes (n, S, K, D) float32."""
        with without_autocast(lanes):
            gates = F.linear(self.norm(lanes).flatten(-2), self.weight, self.bias)
            read, write = gates.chunk(2, dim=-1)
            return read_lanes(lanes, read.softmax(-1)), 2 * write.sigmoid()

    def write(self, lanes: Tensor, gates: Tensor, change: Tensor) -> Tensor:
        """l_k + gates_k * change, (n, S, K, D), from the change (n, S, D) that the core made."""
        return write_lanes(lanes, gates, change)


def read_lanes(lanes: Tensor, read: Tensor) -> Tensor:
    """sum_k read_k l_k: lanes (..., K, D) and read (..., K) -> (..., D)."""
    if torch.compiler.is_compiling():
        return (read.unsqueeze(-1) * lanes).sum(-2)
    return _Read.apply(lanes, read)


def write_lanes(lanes: Tensor, write: Tensor, change: Tensor) -> Tensor:
    """l_k + write_k change: lanes (..., K, D), write (..., K) and change (..., D) -> (..., K, D)."""
    if torch.compiler.is_compiling():
        return torch.addcmul(lanes, write.unsqueeze(-1), change.unsqueeze(-2))
    return _Write.apply(lanes, write, change)


class _Read(torch.autograd.Function):
    """`read_lanes` without a product of the lanes' size in either pass."""

    @staticmethod
    def forward(ctx: Any, lanes: Tensor, read: Tensor) -> Tensor:
        ctx.save_for_backward(lanes, read)
        return _weighted_sum(lanes, read)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        lanes, read = ctx.saved_tensors
        return read.unsqueeze(-1) * gradient.unsqueeze(-2), _dots(lanes, gradient)


class _Write(torch.autograd.Function):
    """`write_lanes`, which saves neither lanes nor result."""

    @staticmethod
    def forward(ctx: Any, lanes: Tensor, write: Tensor, change: Tensor) -> Tensor:
        ctx.save_for_backward(write, change)
        return torch.addcmul(lanes, write.unsqueeze(-1), change.unsqueeze(-2))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        write, change = ctx.saved_tensors
        return gradient, _dots(gradient, change), _weighted_sum(gradient, write)


def _weighted_sum(lanes: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights_k lanes_k, lane by lane: (..., K, D) and (..., K) -> (..., D)."""
    first, *others = lanes.unbind(-2)
    total = first * weights[..., :1]
    for lane, others_lane in enumerate(others, start=1):
        total.addcmul_(others_lane, weights[..., lane : lane + 1])
    return total


def _dots(lanes: Tensor, vector: Tensor) -> Tensor:
    """Scalar product of every lane with a vector: (..., K, D) and (..., D) -> (..., K)."""
    return torch.stack([torch.linalg.vecdot(lane, vector) for lane in lanes.unbind(-2)], dim=-1)
