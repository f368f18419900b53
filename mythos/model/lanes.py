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
from mythos.model.ops.matmul import float32_linear


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

    def forward(self, lanes: Tensor) -> tuple[Tensor, Tensor]:
        """The core's input u (n, S, D), and the gates of `write_lanes` (n, S, K), from lanes (n, S, K, D) float32."""
        with without_autocast(lanes):
            weight = (self.weight.unflatten(-1, (self.count, -1)) * self.norm.weight).flatten(-2)
            if torch.compiler.is_compiling():
                normed = F.rms_norm(lanes, lanes.shape[-1:], eps=self.norm.eps)
                # Not F.linear, whose backward pass the compiler may trace under the forward pass's autocast.
                read, write = (float32_linear(normed.flatten(-2), weight) + self.bias).chunk(2, dim=-1)
                read = read.softmax(-1)
                return (read.unsqueeze(-1) * lanes).sum(-2), 2 * write.sigmoid()
            mixed, gates = _Gates.apply(lanes, weight, self.bias, self.norm.eps)
            return mixed, gates


# In compiled code the formulas are written as they are: the compiler fuses them. Elsewhere a pass over the lanes costs
# as much as an operator on D channels of a block, so that the functions below make as few of them as they can.


def inject_lanes(state: Tensor, decay: Tensor, delta: Tensor, injected: Tensor) -> Tensor:
    """decay_k * l_k + delta_k * injected for each lane k.

    state (..., K, D), decay and delta (K, D), injected (..., D) -> (..., K, D).
    """
    if torch.compiler.is_compiling():
        return decay * state + delta * injected.unsqueeze(-2)
    return _Inject.apply(state, decay, delta, injected)


def write_lanes(lanes: Tensor, write: Tensor, change: Tensor) -> Tensor:
    """l_k + write_k * change for each lane k: (..., K, D), (..., K) and (..., D) -> (..., K, D)."""
    if torch.compiler.is_compiling():
        return lanes + write.unsqueeze(-1) * change.unsqueeze(-2)
    return _Write.apply(lanes, write, change)


class _Inject(torch.autograd.Function):
    """`inject_lanes`; saves state and input."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, decay: Tensor, delta: Tensor, injected: Tensor) -> Tensor:
        ctx.save_for_backward(state, decay, delta, injected)
        lanes = decay * state
        for lane, rate in zip(lanes.unbind(-2), delta, strict=True):
            lane.addcmul_(rate, injected)
        return lanes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        state, decay, delta, injected = ctx.saved_tensors
        lanes, flat = gradient.unbind(-2), injected.flatten(0, -2)
        grad_decay = torch.linalg.vecdot(gradient.flatten(0, -3), state.flatten(0, -3), dim=0)
        grad_delta = torch.stack([torch.linalg.vecdot(lane.flatten(0, -2), flat, dim=0) for lane in lanes])
        return gradient * decay, grad_decay, grad_delta, _weighted_sum(gradient, delta)


class _Gates(torch.autograd.Function):
    """`StateLanes.forward` with the norm's scale in `weight`; saves the lanes and a few numbers for each position."""

    @staticmethod
    def forward(ctx: Any, lanes: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        count, dim = lanes.shape[-2:]
        # Divide the products by the lanes' norms, not the lanes.
        scale = torch.linalg.vector_norm(lanes, dim=-1).square_().div_(dim).add_(eps).rsqrt_()  # (..., K)
        columns = weight.view(-1, count, dim).unbind(1)
        products = [lane @ column.T for lane, column in zip(lanes.unbind(-2), columns, strict=True)]  # (..., 2 K) each
        opened = bias.expand(*scale.shape[:-1], -1).clone()
        for lane, product in enumerate(products):
            opened.addcmul_(product, scale[..., lane : lane + 1])
        read, write = opened[..., :count].softmax(-1), 2 * opened[..., count:].sigmoid()
        ctx.save_for_backward(lanes, weight, scale, read, write, *products)
        return _weighted_sum(lanes, read.unsqueeze(-1)), write

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_mixed: Tensor, grad_write: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        lanes, weight, scale, read, write, *products = ctx.saved_tensors
        count, dim = lanes.shape[-2:]
        with without_autocast(lanes):  # a caller may run the backward pass under autocast
            grad_read = _dots(lanes, grad_mixed)
            grad_read = read * (grad_read - torch.linalg.vecdot(read, grad_read).unsqueeze(-1))
            grad_opened = torch.cat((grad_read, grad_write * write * (1 - write / 2)), dim=-1)
            grad_lanes, grad_weight = read.unsqueeze(-1) * grad_mixed.unsqueeze(-2), []
            columns = weight.view(-1, count, dim).unbind(1)
            for index, (lane, column, product) in enumerate(zip(lanes.unbind(-2), columns, products, strict=True)):
                root = scale[..., index : index + 1]
                scaled = (grad_opened * root).flatten(0, -2)
                along = torch.linalg.vecdot(grad_opened, product).unsqueeze(-1) * (root**3 / -dim)
                grad_lanes[..., index, :].addcmul_(lane, along).add_((scaled @ column).view_as(lane))
                grad_weight.append(scaled.T @ lane.flatten(0, -2))
        return grad_lanes, torch.stack(grad_weight, 1).flatten(1), grad_opened.flatten(0, -2).sum(0), None


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
        return gradient, _dots(gradient, change), _weighted_sum(gradient, write.unsqueeze(-1))


def _weighted_sum(lanes: Tensor, weights: Tensor) -> Tensor:
    """sum_k weights_k lanes_k, lane by lane: (..., K, D) and (..., K, 1), or (K, D) for all positions -> (..., D)."""
    (first, factor), *others = zip(lanes.unbind(-2), weights.unbind(-2), strict=True)
    total = first * factor
    for lane, weight in others:
        total.addcmul_(lane, weight)
    return total


def _dots(lanes: Tensor, vector: Tensor) -> Tensor:
    """Scalar product of every lane with a vector: (..., K, D) and (..., D) -> (..., K)."""
    return torch.stack([torch.linalg.vecdot(lane, vector) for lane in lanes.unbind(-2)], dim=-1)
