"""The matmuls of a step: their FLOPs, and how fast the machine runs the same matmuls alone."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mythos.model.ops.causal_attention
import mythos.model.ops.grouped_experts  # noqa: F401 (defines operators)
from mythos.planning.fake_step import FLOP_FORMULAS
from mythos.torch_internals import FUSED_ATTENTION, GROUPED_MM, ONEDNN_LINEAR, TorchDispatchMode, argument_names

aten = torch.ops.aten

GROUPED = (GROUPED_MM, torch.ops.mythos.grouped_product, torch.ops.mythos.grouped_outer)
"""Grouped matmuls: torch's, and our operators, which loop over groups on a CPU."""

GEMMS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_, ONEDNN_LINEAR, *GROUPED)
"""Matmuls of the roofline. Fused attention is not among them, because it includes a softmax."""

ATTENTION = (
    torch.ops.mythos.causal_attention,
    torch.ops.mythos.causal_attention_backward,
    *FUSED_ATTENTION,
)
"""Fused attention: ours, which is always causal, and torch's."""


class Flops(NamedTuple):
    """Executed FLOPs of matmuls, two per multiply-add."""

    gemms: int
    """Of :data:`GEMMS`."""
    attention: int
    """Attention: the causal half if it is causal, padding of heads included."""
    recomputed: int
    """Part of `attention`: scores that its backward pass computes again instead of reading them from memory."""

    @property
    def total(self) -> int:
        """The sum of `gemms` and `attention`."""
        return self.gemms + self.attention


def executed_flops(work: Callable[[], object]) -> Flops:
    """Count the FLOPs that the work executes."""
    recomputed = 0

    def attention(operator: Any) -> Callable[..., int]:
        def count(*args: Any, **kwargs: Any) -> int:
            nonlocal recomputed
            flops, again = attention_flops(operator, args, kwargs)
            recomputed += again
            return flops + again

        return count

    # torch 2.13 does not count these, nor fused attention on a CPU, and it counts the masked half of causal attention.
    formulas = FLOP_FORMULAS | {
        GROUPED_MM: FLOP_FORMULAS[torch.ops.mythos.grouped_product],
        # a (n, K) times the transpose of weight (M, K)
        ONEDNN_LINEAR: lambda a, weight, *args, **kwargs: 2 * math.prod(a) * weight[0],
        aten.baddbmm_: FLOP_FORMULAS[aten.addmm_],
        **{operator: attention(operator) for operator in ATTENTION},
    }
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    of_attention = sum(counts.get(operator, 0) for operator in ATTENTION)
    return Flops(sum(counts.values()) - of_attention, of_attention, recomputed)


def attention_flops(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of a call of fused attention: those of the mathematics, and those of scores that are computed again.

    `args` and `kwargs` are the operator's arguments, with shapes instead of tensors, as FlopCounterMode passes them. A
    causal kernel skips blocks above the diagonal, so (S + 1) / 2 keys per query are counted.
    """
    names = argument_names(operator)
    arguments = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    pairs = query[0] * query[1] * query[2] * key[2]
    if arguments.get("is_causal") or "is_causal" not in names:
        pairs = query[0] * query[1] * query[2] * (key[2] + 1) // 2
    scores, values = 2 * pairs * query[3], 2 * pairs * value[3]
    return (2 * (scores + values), scores) if "grad_out" in names[0] else (scores + values, 0)


class Product(NamedTuple):
    """A call of one of :data:`GEMMS`, described by everything its time depends on."""

    operator: Any
    arguments: tuple[Any, ...]
    """Tensors are described by :class:`Like`; other arguments are kept."""
    options: tuple[tuple[str, Any], ...]

    def prepare(self, device: torch.device) -> Callable[[], object]:
        """The same matmul with random operands, ready to be timed."""
        arguments = [value.make(device) if isinstance(value, Like) else value for value in self.arguments]
        options = {name: v.make(device) if isinstance(v, Like) else v for name, v in self.options}
        return lambda: self.operator(*arguments, **options)


class Like(NamedTuple):
    """A tensor's layout, and its values if they are integers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    values: tuple[int, ...] | None
    """Values of an integer tensor: the time of a grouped matmul depends on where its groups end."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Like":
        """Describe a tensor."""
        values = None if tensor.is_floating_point() else tuple(tensor.tolist())
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, values)

    def make(self, device: torch.device) -> Tensor:
        """Create a tensor of this layout."""
        if self.values is not None:
            return torch.tensor(self.values, dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device).normal_()


def _described(value: Any) -> Any:
    """Convert an argument to something hashable."""
    if torch.is_tensor(value):
        return Like.of(value)
    return tuple(value) if isinstance(value, list) else value


class ProductRecorder(TorchDispatchMode):
    """Counts the distinct matmuls that are executed inside."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in GEMMS:
            arguments = tuple(_described(value) for value in args)
            options = tuple((name, _described(value)) for name, value in (kwargs or {}).items())
            self.products[Product(func, arguments, options)] += 1
        return func(*args, **(kwargs or {}))


def record_products(work: Callable[[], object]) -> Counter[Product]:
    """The matmuls that the work executes, and how often."""
    with ProductRecorder() as recorder:
        work()
    return recorder.products


def replay_cost(products: Counter[Product], device: torch.device, clock: Callable[[Callable], float]) -> float:
    """Seconds of all matmuls of a step and nothing else: no step can run its matmuls faster.

    Each counts with the better of two timings, times the number of its calls in the step. Operands are created just
    before, outside of the timing, so they are in cache as far as their size allows.
    """
    total = 0.0
    for product, count in products.items():
        work = product.prepare(device)
        work()
        total += count * min(clock(work), clock(work))
    return total
