"""The small parts every block is made of, and their deterministic initialisation."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from hashlib import blake2b
from math import erf, sqrt

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mythos.model.ops.matmul import linear, without_autocast
from mythos.model.ops.recompute import recomputable

Initializer = Callable[[Tensor, np.random.Generator], None]
"""Fills a tensor that is whole, contiguous, float32 and on the CPU."""


def zeros(weight: Tensor, generator: np.random.Generator) -> None:
    """Fill with 0."""
    weight.zero_()


def ones(weight: Tensor, generator: np.random.Generator) -> None:
    """Fill with 1."""
    weight.fill_(1.0)


# Initializers are functions of this module and partial calls of them, not closures: modules keep them, and a closure
# cannot be pickled.


def identity(scale: float = 1.0) -> Initializer:
    """(n, m) matrix with `scale` on the diagonal."""
    return partial(_fill_identity, scale)


def constant(value: float) -> Initializer:
    """Fill with `value`."""
    return partial(_fill_constant, value)


def truncated_normal(fan_in: int) -> Initializer:
    """Normal of std sqrt(2 / (5 fan_in)), cut at three standard deviations (Huginn, arXiv 2502.05171)."""
    return partial(_fill_truncated_normal, sqrt(2 / (5 * fan_in)))


def _fill_identity(scale: float, weight: Tensor, generator: np.random.Generator) -> None:
    nn.init.eye_(weight).mul_(scale)


def _fill_constant(value: float, weight: Tensor, generator: np.random.Generator) -> None:
    weight.fill_(value)


def _fill_truncated_normal(std: float, weight: Tensor, generator: np.random.Generator) -> None:
    within = erf(3 / sqrt(2))  # the share of a normal distribution within three standard deviations
    # By the inverse distribution function: 5 times as fast as nn.init.trunc_normal_, which draws until all fit.
    generator.random(out=weight.detach().numpy(), dtype=np.float32)
    # Draws are multiples of 2^-24 from 0 to 1 - 2^-24; half a step more makes them symmetric.
    weight.add_(2**-25 - 0.5).mul_(2 * within).erfinv_().mul_(sqrt(2) * std)


def random_stream(seed: int, name: str, expert: int | None = None) -> np.random.Generator:
    """Generator of the values of one parameter, or of one expert's matrix in a stack of them.

    Philox has a key of 128 bits, here a digest of the three arguments: the probability that any two of a million
    streams are the same is 2e-27. A torch generator on the CPU uses only the low 32 bits of its seed; with that, two of
    100,000 experts would start equal with a probability of 69%.
    """
    text = f"{seed}/{name}" if expert is None else f"{seed}/{name}/{expert}"
    return np.random.Generator(np.random.Philox(key=int.from_bytes(blake2b(text.encode(), digest_size=16).digest())))


def starting_value(model: nn.Module, name: str, seed: int) -> Tensor:
    """The value that a parameter which is no stack of experts starts from: whole, on the CPU, float32.

    A function of (seed, name).
    """
    value = torch.empty(model.get_parameter(name).shape, dtype=torch.float32, device="cpu")
    _initializer(model, name)(value, random_stream(seed, name))
    return value


@torch.no_grad()
def place(value: Tensor, parameter: Tensor) -> None:
    """Copy a whole value, which every rank has, into a parameter, of which a rank may hold a shard: nothing is sent."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter from (seed, its name), drawn on the CPU in float32: the same on every device and world size.

    Each module that owns parameters declares `initializers`, one per parameter, and in `float32` those that are never
    computed with in bfloat16. A parameter of three dimensions is a stack of experts' matrices, each a function of
    (seed, name, expert): a rank draws only those that it holds or holds a part of, one at a time. Buffers start at 0.
    """
    for name, parameter in model.named_parameters():
        initializer = _initializer(model, name)
        if initializer is zeros:
            parameter.zero_()
        elif parameter.ndim == 3:
            _draw_stack(initializer, parameter, seed, name)
        else:
            place(starting_value(model, name, seed), parameter)
    for buffer in model.buffers():
        buffer.zero_()


def _initializer(model: nn.Module, name: str) -> Initializer:
    owner_name, _, leaf = name.rpartition(".")
    return model.get_submodule(owner_name).initializers[leaf]


def _draw_stack(initializer: Initializer, parameter: Tensor, seed: int, name: str) -> None:
    """Fill a stack (E, n, m), or the shard of it that this rank holds, with one matrix (n, m) beside it."""
    experts, rows, columns = (_held(parameter, dim) for dim in range(3))
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    matrix = torch.empty(parameter.shape[1:], dtype=torch.float32, device="cpu")
    for index, expert in enumerate(range(experts.start, experts.stop)):
        initializer(matrix, random_stream(seed, name, expert))
        local[index].copy_(matrix[rows, columns])


def _held(parameter: Tensor, dim: int) -> slice:
    """What this rank holds of a parameter's dimension."""
    if not isinstance(parameter, DTensor):
        return slice(0, parameter.shape[dim])
    # By sharding the indices as the dimension is sharded.
    placements = [Shard(0) if placement.is_shard(dim) else Replicate() for placement in parameter.placements]
    indices = torch.arange(parameter.shape[dim], device=parameter.device)
    held = distribute_tensor(indices, parameter.device_mesh, placements, src_data_rank=None).to_local().tolist()
    return slice(held[0], held[-1] + 1) if held else slice(0, 0)


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type that autocast gives matrix products on x's device, or x's own."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def autocast_to(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Matrix products on a device in a type; float32 is what they are in without autocast."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class Linear(nn.Linear):
    """y = x W^T without bias; W is (out_features, in_features).

    An `nn.Linear`, so that adapter libraries such as PEFT know it. They replace it by a wrapper: who calls `recomputed`
    and `applied_weight` instead of a method or `weight` gets what the wrapper computes.
    """

    def __init__(self, in_features: int, out_features: int, init: Initializer | None = None) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.in_pass: Tensor | None = None
        """The weight as a pass of the loop uses it, while that runs (`Recurrence.run`)."""
        self.initializers = {"weight": init or truncated_normal(in_features)}

    def reset_parameters(self) -> None:
        """Draw nothing: `initialize` fills the weight."""

    def forward(self, x: Tensor, in_pass: Tensor | None = None) -> Tensor:
        """(..., in_features) -> (..., out_features), in the autocast type.

        `in_pass` is the weight to use instead of the attribute of that name.
        """
        in_pass = self.in_pass if in_pass is None else in_pass
        return linear(x, self.weight if in_pass is None else in_pass)


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, which selective checkpointing computes again, with the weight that this pass has now.

    A module other than `Linear`, such as an adapter's wrapper of one, is simply called.
    """
    return recomputable(module, x, module.in_pass) if isinstance(module, Linear) else module(x)


def applied_weight(module: nn.Module) -> Tensor:
    """(out_features, in_features) matrix that a linear module applies.

    That of an adapter's wrapper includes the adapter: it is read off the images of the unit vectors.
    """
    if isinstance(module, Linear):
        return module.weight
    weight = module.weight
    return module(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)).T


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (arXiv 1910.07467), always computed in float32.

    With `cast` the result is in the autocast type, for the matrix products that read it; without, it is float32.
    """

    float32 = ("weight",)

    def __init__(self, dim: int, eps: float, cast: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.eps = eps
        self._eps = torch.tensor(eps, device="cpu")
        self.cast = cast
        self.initializers = {"weight": ones}

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) of any float type -> (..., dim)."""
        return recomputable(self.normed, x)

    def normed(self, x: Tensor) -> Tensor:
        """The same, without a mark."""
        dtype = autocast_dtype(x) if self.cast else torch.float32
        if x.is_cuda or torch.compiler.is_compiling():
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(dtype)
        if not torch.is_grad_enabled():
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
            return (x * scale * self.weight).to(dtype)
        return _RMSNorm.apply(x, self.weight, self.eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """Two to three times as fast as F.rms_norm on a CPU, which has no kernel of its own, and keeps its input alone."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        values = x.float()  # products of two types, and sums of bfloat16, take twice as long
        norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (values * scale).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # With s the scale, g the gradient and w the weight, of x: s (g w - x s^2 sum(g w x) / D).
        x, weight, scale = ctx.saved_tensors
        gradient, values, scales = gradient.float(), x.float(), scale.flatten()
        products = (gradient * values).flatten(0, -2)
        with without_autocast(gradient):  # in which a caller may run the backward pass
            of_weight = scales @ products
            along = (products @ weight).mul_(scales**3).div_(-x.shape[-1]).view_as(scale)
        return (gradient * weight).mul_(scale).addcmul_(values, along).to(x.dtype), of_weight, None, None


class SwiGLU(nn.Module):
    """Gated feed-forward W_down(silu(W_gate x) * W_up x) (arXiv 2002.05202); gate and up share one product."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim, zeros)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(recomputable(gated, self.gate_up(x)))


class SquaredReLU(nn.Module):
    """Feed-forward W_down(relu(W_up x)^2) (arXiv 2109.08668)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim, zeros)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(recomputable(squared_relu, self.up(x)))


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return F.relu(x).square() if torch.compiler.is_compiling() else _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2, which keeps nothing but its input."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(2).mul_(gradient)


def dense_ffn(name: str, dim: int, hidden: int) -> nn.Module:
    """The feed-forward that `model.dense_ffn` names."""
    return {"swiglu": SwiGLU, "relu2": SquaredReLU}[name](dim, hidden)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up of the halves of the last dimension."""
    # The compiler decides by itself what it keeps.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Gated.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


class _Gated(torch.autograd.Function):
    """`gated`, which keeps nothing but its input."""

    @staticmethod
    def forward(ctx, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)), dim=-1)


def rope_table(length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions 0..length-1, two float32 tensors (length, dim / 2)."""
    return rope_at(torch.arange(length, device=device), dim, theta)


def rope_at(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions (arXiv 2104.09864).

    positions (...) of whole numbers -> two float32 tensors (..., dim / 2). Angles are formed in float64: at position
    1,000,000 a float32 product is off by up to 0.06 rad.
    """
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angle = positions.double().unsqueeze(-1) * frequency
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of the last dimension.

    x is (B, S, heads, d), cos and sin are (S, d / 2) or (B, S, d / 2). The result is computed in float32 and given in
    `dtype` (default: x's).
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype or x.dtype)
