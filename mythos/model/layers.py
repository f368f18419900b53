"""Linear maps, norms, feed-forwards and RoPE, and the deterministic initialisation of parameters."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from hashlib import blake2b
from math import erf, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mythos.model.config import FEED_FORWARDS, ModelConfig
from mythos.model.ops.matmul import linear, without_autocast
from mythos.model.ops.recompute import recomputable
from mythos.torch_internals import interleaved_parts, interleaved_shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor
    from typing_extensions import TypeIs

Initializer = Callable[[Tensor, np.random.Generator], None]
"""Fills a tensor, which is unsharded, contiguous, float32 and on the CPU."""

DRAWN_AT_ONCE = 2**22
"""About how many numbers of a matrix are drawn at a time: 16 MiB beside the parameters, of matrices of any size."""


def zeros(weight: Tensor, generator: np.random.Generator) -> None:
    """Fill with 0."""
    weight.zero_()


def ones(weight: Tensor, generator: np.random.Generator) -> None:
    """Fill with 1."""
    weight.fill_(1.0)


# Initializers are module functions or partials of them, not closures: modules store them and must stay picklable.


def identity(scale: float = 1.0) -> Initializer:
    """(n, m) matrix with `scale` on the diagonal."""
    return partial(_fill_identity, scale)


def constant(value: float) -> Initializer:
    """Fill with `value`."""
    return partial(_fill_constant, value)


def by_row(values: Sequence[float]) -> Initializer:
    """Fill row k of (K, n) with values[k]; one value fills a vector (n,)."""
    return partial(_fill_by_row, tuple(values))


def truncated_normal(fan_in: int) -> Initializer:
    """Normal of std sqrt(2 / (5 fan_in)), truncated at three standard deviations (Huginn, arXiv 2502.05171)."""
    return partial(_fill_truncated_normal, sqrt(2 / (5 * fan_in)))


def _fill_identity(scale: float, weight: Tensor, generator: np.random.Generator) -> None:
    nn.init.eye_(weight).mul_(scale)


def _fill_constant(value: float, weight: Tensor, generator: np.random.Generator) -> None:
    weight.fill_(value)


def _fill_by_row(values: Sequence[float], weight: Tensor, generator: np.random.Generator) -> None:
    for row, value in zip(weight.view(len(values), -1), values, strict=True):
        row.fill_(value)


def _fill_truncated_normal(std: float, weight: Tensor, generator: np.random.Generator) -> None:
    within = erf(3 / sqrt(2))  # share of a normal distribution within three standard deviations
    # Inverse distribution function: 5 times as fast as nn.init.trunc_normal_, which redraws until all values fit.
    generator.random(out=weight.detach().numpy(), dtype=np.float32)
    # Draws are multiples of 2^-24 from 0 to 1 - 2^-24. Adding half a step makes them symmetric around 1/2.
    weight.add_(2**-25 - 0.5).mul_(2 * within).erfinv_().mul_(sqrt(2) * std)


def noise(std: float) -> Initializer:
    """Normal of this standard deviation, truncated at three of them."""
    return partial(_fill_truncated_normal, std)


def random_stream(seed: int, name: str, expert: int | None = None) -> np.random.Generator:
    """Random generator for one parameter, or for one expert's matrix in a stack.

    The key of Philox has 128 bits; here it is a digest of the three arguments. The probability that any two of a
    million streams are equal is 2e-27. A torch CPU generator uses only the low 32 bits of its seed: two of 100,000
    experts would start equal with a probability of 69%.
    """
    text = f"{seed}/{name}" if expert is None else f"{seed}/{name}/{expert}"
    return np.random.Generator(np.random.Philox(key=int.from_bytes(blake2b(text.encode(), digest_size=16).digest())))


def starting_value(model: nn.Module, name: str, seed: int) -> Tensor:
    """Initial value of a parameter that is not a stack of experts: a function of (seed, name).

    Unsharded, float32, on the CPU.
    """
    value = torch.empty(model.get_parameter(name).shape, dtype=torch.float32, device="cpu")
    _initializer(model, name)(value, random_stream(seed, name))
    return value


@torch.no_grad()
def place(value: Tensor, parameter: Tensor) -> None:
    """Copy an unsharded value into a parameter, which may be sharded. Every rank has the value: nothing is sent."""
    if is_dtensor(parameter):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Fill every parameter as a function of (seed, its name): the same values on every device and world size.

    Values are drawn on the CPU in float32. A module that owns parameters declares `initializers`, one per parameter,
    and lists in `float32` the parameters that are never used in bfloat16. A parameter of three dimensions is a stack of
    experts' matrices, each a function of (seed, name, expert). Of random matrices a rank draws only the rows of which
    it has a shard, DRAWN_AT_ONCE numbers at a time. Buffers start at 0.
    """
    for name, parameter in model.named_parameters():
        initializer = _initializer(model, name)
        if initializer is zeros:
            parameter.zero_()
        elif parameter.ndim == 3 or (parameter.ndim == 2 and _is_random(initializer)):
            _fill_matrices(initializer, parameter, seed, name)
        else:
            place(starting_value(model, name, seed), parameter)
    for buffer in model.buffers():
        buffer.zero_()


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: all of it, unless it is a DTensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def is_dtensor(tensor: Tensor) -> "TypeIs[DTensor]":
    """Whether a tensor is a DTensor, asked without importing the class, which takes half a second."""
    return hasattr(tensor, "device_mesh")


def _initializer(model: nn.Module, name: str) -> Initializer:
    owner_name, _, leaf = name.rpartition(".")
    return vars(model.get_submodule(owner_name))["initializers"][leaf]


def _is_random(initializer: Initializer) -> bool:
    """Whether an initializer draws one number for each element, in order."""
    return isinstance(initializer, partial) and initializer.func is _fill_truncated_normal


def _fill_matrices(initializer: Initializer, parameter: Tensor, seed: int, name: str) -> None:
    """Fill a matrix (n, m) or a stack of them (E, n, m), or this rank's shard of it."""
    local, shape = local_part(parameter), parameter.shape[-2:]
    if parameter.ndim == 2:
        (columns,) = local_runs(parameter, 1)
        start = 0
        for rows in local_runs(parameter, 0):
            part = local[start : start + rows.stop - rows.start]
            _fill_matrix(initializer, part, shape, rows, columns, random_stream(seed, name))
            start += len(part)
        return
    stacked, rows, columns = local_slices(parameter)
    for index, expert in enumerate(range(stacked.start, stacked.stop)):
        _fill_matrix(initializer, local[index], shape, rows, columns, random_stream(seed, name, expert))


def _fill_matrix(
    initializer: Initializer,
    part: Tensor,
    shape: torch.Size,
    rows: slice,
    columns: slice,
    generator: np.random.Generator,
) -> None:
    """Fill `part` with these rows and columns of a matrix of `shape`, whose first number `generator` draws next."""
    height, width = shape
    if not _is_random(initializer):
        whole = torch.empty(height, width, dtype=torch.float32, device="cpu")
        initializer(whole, generator)
        part.copy_(whole[rows, columns])
        return
    skip_numbers(generator, rows.start * width)
    for some in part.split(max(1, DRAWN_AT_ONCE // width)):
        drawn = torch.empty(len(some), width, dtype=torch.float32, device="cpu")
        initializer(drawn, generator)
        some.copy_(drawn[:, columns])


def skip_numbers(generator: np.random.Generator, count: int) -> None:
    """Advance a new generator of `random_stream` as if it had drawn `count` float32 numbers."""
    # Each value of Philox's counter gives 256 bits, and a float32 takes 32 of them.
    generator.bit_generator.advance(count // 8)  # type: ignore[attr-defined]
    generator.random(count % 8, dtype=np.float32)


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """For every dimension of a tensor, the range of its indices that this rank has, where it has only one."""
    runs = [local_runs(tensor, dim) for dim in range(tensor.ndim)]
    assert all(len(of_dim) == 1 for of_dim in runs), "see `mythos.checkpoints.shards.in_one_piece`"
    return tuple(of_dim[0] for of_dim in runs)


def local_runs(parameter: Tensor, dim: int) -> list[slice]:
    """The ranges of a dimension's indices that this rank's shard covers: one, or several if placements interleave."""
    if not is_dtensor(parameter):
        return [slice(0, parameter.shape[dim])]
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    # Shard the indices in the same way as the dimension.
    placements = []
    for placement in parameter.placements:
        parts, cut = interleaved_parts(placement), getattr(placement, "dim", None) == dim
        placements.append((Shard(0) if parts == 1 else interleaved_shard(0, parts)) if cut else Replicate())
    indices = torch.arange(parameter.shape[dim], device=parameter.device)
    local = distribute_tensor(indices, parameter.device_mesh, placements, src_data_rank=None).to_local().tolist()
    runs: list[slice] = []
    for index in local:
        if runs and index == runs[-1].stop:
            runs[-1] = slice(runs[-1].start, index + 1)
        else:
            runs.append(slice(index, index + 1))
    return runs or [slice(0, 0)]


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The type of matmuls on x's device under autocast; x's own type without."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def has_dropout(module: nn.Module) -> bool:
    """Whether a forward pass may draw random numbers, which only dropout does, that an adapter may add.

    Without it checkpointing need not save the generator's state, which on a GPU waits for a copy to the host.
    """
    return any(isinstance(part, nn.Dropout) for part in module.modules())


def autocast_to(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[None]:
    """Context in which matmuls on a device run in `dtype`; autocast stays off for float32."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


class Linear(nn.Linear):
    """y = x W^T without bias; W is (out_features, in_features).

    A subclass of `nn.Linear`, so that adapter libraries such as PEFT recognise it and replace it by their wrapper.
    Callers use `recomputed` and `applied_weight`, which also work on a wrapper, instead of methods and `weight`.
    """

    def __init__(self, in_features: int, out_features: int, init: Initializer | None = None) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.in_pass: Tensor | None = None
        """The weight to use during a pass of the loop; set by `Recurrence.run`, None outside."""
        self.initializers = {"weight": init or truncated_normal(in_features)}

    def reset_parameters(self) -> None:
        """Do nothing: `initialize` fills the weight."""

    def forward(self, x: Tensor, in_pass: Tensor | None = None) -> Tensor:
        """(..., in_features) -> (..., out_features), in the autocast type.

        `in_pass` overrides the attribute of that name.
        """
        in_pass = self.in_pass if in_pass is None else in_pass
        return linear(x, self.weight if in_pass is None else in_pass)


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, which selective checkpointing recomputes in the backward pass, with this pass's weight.

    A module other than `Linear`, such as an adapter's wrapper, is called without recomputation.
    """
    return recomputable(module, x, module.in_pass) if isinstance(module, Linear) else module(x)


def applied_weight(module: nn.Module) -> Tensor:
    """(out_features, in_features) matrix that a linear module applies, an adapter's contribution included."""
    if isinstance(module, Linear):
        return module.weight
    # A wrapper: apply it to the unit vectors.
    weight = module.weight
    assert isinstance(weight, Tensor)
    return module(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device)).T


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale (arXiv 1910.07467), computed in float32.

    With `cast` the result is in the autocast type, for the matmuls that read it; without, it is float32.
    """

    float32: tuple[str, ...] = ("weight",)

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
        """`forward` without selective checkpointing."""
        dtype = autocast_dtype(x) if self.cast else torch.float32
        if x.is_cuda or torch.compiler.is_compiling():
            return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(dtype)
        if not torch.is_grad_enabled():
            norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
            scale = torch.addcmul(self._eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()
            return (x * scale * self.weight).to(dtype)
        return _RMSNorm.apply(x, self.weight, self.eps, dtype)


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that saves only its input; 2 to 3 times as fast as F.rms_norm on a CPU, where torch has no kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        values = x.float()  # mixed types and bfloat16 sums take twice as long on a CPU
        norm = torch.linalg.vector_norm(values, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (values * scale).mul_(weight).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        # With scale s, gradient g and weight w, the gradient of x is s (g w - x s^2 sum(g w x) / D).
        x, weight, scale = ctx.saved_tensors
        gradient, values, scales = gradient.float(), x.float(), scale.flatten()
        products = (gradient * values).flatten(0, -2)
        with without_autocast(gradient):  # a caller may run the backward pass under autocast
            grad_weight = scales @ products
            along = (products @ weight).mul_(scales**3).div_(-x.shape[-1]).view_as(scale)
        return (gradient * weight).mul_(scale).addcmul_(values, along).to(x.dtype), grad_weight, None, None


def is_loop_table(name: str) -> bool:
    """Whether a parameter has one row for each trained loop, by its full name: the last part begins with `loop_`."""
    return name.rpartition(".")[2].startswith("loop_")


def loop_rows(table: Tensor, loop: Tensor) -> Tensor:
    """The rows of `table` (loops, W) for loop indices (n,) int64 -> (n, 1, W). Later loops use the last row.

    So the core computes the same function in all passes beyond the trained ones, and the state can settle.
    """
    slot = loop.clamp(max=table.shape[0] - 1).unsqueeze(1)
    if not torch.is_grad_enabled():
        return F.embedding(slot, table)
    # A masked sum over all rows instead of an index: its backward pass is one deterministic operation. It is exact,
    # whereas a matmul with a one-hot vector would run in the autocast type.
    rows = torch.arange(table.shape[0], device=loop.device)
    return torch.where((slot == rows).unsqueeze(-1), table, 0.0).sum(1, keepdim=True)


class LoopNorm(RMSNorm):
    """RMSNorm whose result is scaled and shifted by vectors of the loop: (1 + scale[t]) * RMSNorm(x) + shift[t].

    Both start at zero, and loops beyond the trained ones use the last. After the adaptive norm of LoopMoE (arXiv
    2606.04438), whose scale and shift depend on the token's state too.
    """

    float32 = ("weight", "loop_scale", "loop_shift")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.dim, config.norm_eps, cast=False)
        self.loop_scale, self.loop_shift = (nn.Parameter(torch.empty(config.loops, config.dim)) for _ in range(2))
        self.initializers |= {"loop_scale": zeros, "loop_shift": zeros}

    def forward(self, x: Tensor, loop: Tensor | None = None) -> Tensor:
        """(n, S, D) of any float type, loop index of each row (n,) or of all (1,) int64 -> (n, S, D), autocast type."""
        assert loop is not None
        scale, shift = loop_rows(self.loop_scale, loop), loop_rows(self.loop_shift, loop)
        return recomputable(modulated, super().forward(x), scale, shift)


def modulated(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """(1 + scale) * x + shift, float32 (n, S, D) and (n, 1, D), in the autocast type."""
    return torch.addcmul(shift, x, 1 + scale).to(autocast_dtype(x))


class SwiGLU(nn.Module):
    """Gated feed-forward W_down(silu(W_gate x) * W_up x) (arXiv 2002.05202); gate and up share one matmul."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = Linear(dim, 2 * hidden)
        self.down = Linear(hidden, dim, zeros)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(self.hidden(x))

    def hidden(self, x: Tensor) -> Tensor:
        """The hidden units, without W_down: (..., D) -> (..., H)."""
        return recomputable(gated, self.gate_up(x))


class SquaredReLU(nn.Module):
    """Feed-forward W_down(relu(W_up x)^2) (arXiv 2109.08668)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(dim, hidden)
        self.down = Linear(hidden, dim, zeros)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down(recomputable(squared_relu, self.up(x)))


def dense_feed_forward(config: ModelConfig) -> nn.Module:
    """The feed-forward that `model.dense_ffn` names."""
    return FEED_FORWARDS[config.dense_ffn](config.dim, config.ffn_dim)


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2."""
    return F.relu(x).square() if torch.compiler.is_compiling() else _SquaredReLU.apply(x)


class _SquaredReLU(torch.autograd.Function):
    """relu(x)^2 that saves only its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(2).mul_(gradient)


def gated(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, where gate and up are the halves of the last dimension."""
    # In compiled code the compiler decides what to save.
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _Gated.apply(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gated_backward(gradient: Tensor, gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gate_up` (n, 2 H), given that of the result of `gated` (n, H); and that result, recomputed."""
    gate, up = gate_up.chunk(2, dim=-1)
    swish = F.silu(gate)
    grad_gate = torch.ops.aten.silu_backward(gradient * up, gate)
    return torch.cat((grad_gate, gradient * swish), dim=-1), swish * up


class _Gated(torch.autograd.Function):
    """`gated` that saves only its input."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        return torch.cat((torch.ops.aten.silu_backward(gradient * up, gate), gradient * F.silu(gate)), dim=-1)


def rope_table(length: int, dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE at positions 0..length-1, two float32 tensors (length, dim / 2)."""
    return rope_at(torch.arange(length, device=device), dim, theta)


def rope_at(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of RoPE (arXiv 2104.09864): integer positions (...) -> two float32 tensors (..., dim / 2).

    Angles are computed in float64: at position 1,000,000 a float32 product is off by up to 0.06 rad.
    """
    frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    angle = positions.double().unsqueeze(-1) * frequency
    return angle.cos().float(), angle.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}) of the last dimension.

    x is (B, S, H, d), cos and sin are (S, d / 2) or (B, S, d / 2). Computed in float32, returned in `dtype` (default:
    x's).
    """
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(dtype or x.dtype)
