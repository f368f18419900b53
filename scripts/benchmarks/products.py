"""Matrix products of a step: their FLOPs, and how fast the machine makes the same ones alone."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mythos.model.ops.causal_attention
import mythos.model.ops.grouped_experts  # noqa: F401 (defines operators)
from mythos.torch_internals import (
    FUSED_ATTENTION,
    GROUPED_MM,
    ONEDNN_LINEAR,
    TorchDispatchMode,
    argument_names,
    raw_flop_formula,
)

aten = torch.ops.aten

GROUPED = (GROUPED_MM, torch.ops.mythos.grouped_product, torch.ops.mythos.grouped_outer)
"""Products of the experts: torch's, and operators of our own that are its loop on a CPU."""

GEMMS = (aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm, aten.baddbmm_, ONEDNN_LINEAR, *GROUPED)
"""What the roofline is made of. Fused attention is not: it is products and a softmax in one."""

ATTENTION = (
    torch.ops.mythos.causal_attention,
    torch.ops.mythos.causal_attention_backward,
    *FUSED_ATTENTION,
)
"""Ours, which is always causal, and torch's."""


class Flops(NamedTuple):
    """FLOPs of the products that were executed, two per multiply-add."""

    gemms: int
    """Of :data:`GEMMS`."""
    attention: int
    """Of attention: the causal half where it is causal, padding of heads included."""
    recomputed: int
    """Part of `attention`: scores that its backward pass makes again, instead of reading them from memory."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.gemms + self.attention


def executed_flops(work: Callable[[], object]) -> Flops:
    """Count what a run executes."""
    recomputed = 0

    def attention(operator: Any) -> Callable[..., int]:
        def count(*args: Any, **kwargs: Any) -> int:
            nonlocal recomputed
            forward, again = attention_flops(operator, args, kwargs)
            recomputed += again
            return forward + again

        return raw_flop_formula(count)

    # torch 2.13 knows neither these, nor fused attention on a CPU, and counts the masked scores of causal attention.
    formulas = {
        **{operator: raw_flop_formula(lambda a, b, *args, **kwargs: product_flops(a, b)) for operator in GROUPED},
        ONEDNN_LINEAR: raw_flop_formula(lambda a, b, *args: product_flops(a, b.T)),
        aten.addmm_: raw_flop_formula(lambda total, a, b, **kwargs: product_flops(a, b)),
        aten.baddbmm_: raw_flop_formula(lambda total, a, b, **kwargs: product_flops(a, b)),
    }
    formulas |= {operator: attention(operator) for operator in ATTENTION}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    with counter:
        work()
    counts = counter.get_flop_counts()["Global"]
    of_attention = sum(counts.get(operator, 0) for operator in ATTENTION)
    return Flops(sum(counts.values()) - of_attention, of_attention, recomputed)


def product_flops(a: Tensor, b: Tensor) -> int:
    """FLOPs of a product, of many of equal shape, or of a grouped one.

    Grouped are rows (N, K) by matrices (E, K, M), and (K, N) or its transpose by (N, M) for the gradient of the
    matrices: every row or column belongs to one group.
    """
    if a.dim() == b.dim() == 3:
        return 2 * a.shape[0] * a.shape[1] * a.shape[2] * b.shape[2]
    return 2 * a.shape[-2] * a.shape[-1] * b.shape[-1]


def attention_flops(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of fused attention with the given arguments: of its mathematics, and of scores that are made again.

    A causal kernel skips blocks above the diagonal, so half is counted: (S + 1) / 2 keys a query.
    """
    names = argument_names(operator)
    given = dict(zip(names, args, strict=False)) | kwargs
    query, key, value = (given[name].shape for name in ("query", "key", "value"))
    pairs = query[0] * query[1] * query[2] * key[2]
    if given.get("is_causal") or "is_causal" not in names:
        pairs = query[0] * query[1] * query[2] * (key[2] + 1) // 2
    scores, values = 2 * pairs * query[3], 2 * pairs * value[3]
    return (2 * (scores + values), scores) if "grad_out" in names[0] else (scores + values, 0)


class Product(NamedTuple):
    """A call of one of :data:`GEMMS`, with what its time depends on."""

    operator: Any
    arguments: tuple[Any, ...]
    """Tensors as :class:`Like`; anything else as it is."""
    options: tuple[tuple[str, Any], ...]

    def prepare(self, device: torch.device) -> Callable[[], object]:
        """The same product of random matrices, ready to be timed."""
        arguments = [value.make(device) if isinstance(value, Like) else value for value in self.arguments]
        options = {name: v.make(device) if isinstance(v, Like) else v for name, v in self.options}
        return lambda: self.operator(*arguments, **options)


class Like(NamedTuple):
    """A tensor's layout."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    values: tuple[int, ...] | None
    """Of whole numbers: where the groups of a grouped product end decides how long it takes."""

    @classmethod
    def of(cls, tensor: Tensor) -> "Like":
        """Describe a tensor."""
        values = None if tensor.is_floating_point() else tuple(tensor.tolist())
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, values)

    def make(self, device: torch.device) -> Tensor:
        """A tensor of this layout."""
        if self.values is not None:
            return torch.tensor(self.values, dtype=self.dtype, device=device)
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device).normal_()


def _described(value: Any) -> Any:
    """An argument as it can be compared."""
    if torch.is_tensor(value):
        return Like.of(value)
    return tuple(value) if isinstance(value, list) else value


class ProductRecorder(TorchDispatchMode):
    """Counts the different products that are executed inside."""

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
    """The products of a run, and how often each is made."""
    with ProductRecorder() as recorder:
        work()
    return recorder.products


class Replay:
    """Makes all products of a step and nothing else; call it to make them once.

    Operands are made anew for each call and lie in cache as much as their size allows: this is what the machine can do,
    and no step can be faster at it. Time that making operands takes is not in :attr:`cost`.
    """

    def __init__(self, products: Counter[Product], device: torch.device, clock: Callable[[Callable], float]) -> None:
        self.products, self.device, self.clock = products, device, clock

    def cost(self) -> float:
        """Seconds that all products take, each timed twice alone, the better one as often as the step makes it."""
        total = 0.0
        for product, count in self.products.items():
            work = product.prepare(self.device)
            work()
            total += count * min(self.clock(work), self.clock(work))
        return total
