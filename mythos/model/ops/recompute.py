"""Selective activation checkpointing: what is cheap to make is made again in the backward pass, and not kept for it.

Marked are results of few operations per byte: norms, gates, rotations, copies, and what latent attention expands from
its latents (as in arXiv 2412.19437, section 3.2.3). What they are made of stays: the residual stream, and what other
products and attention return. torch's own selective checkpointing asks a Python function at every operation of both
passes, which on a CPU takes as long as it saves; here Python sees the kept tensors alone. In compiled code the same
results are marked by `torch.utils.checkpoint`, which costs nothing when the graph runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mythos.torch_internals import storage_address


def recomputable(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), which inside of :class:`Selective` is made again in the backward pass and not kept for it.

    The function gives a new tensor, the same in every call: it draws nothing and changes nothing.
    """
    if torch.compiler.is_compiling():
        if Selective.in_graph and torch.is_grad_enabled():
            # In a graph this is a note to the compiler, which by itself would keep the results of products.
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)
    output = function(*inputs)
    if Selective.current is not None:
        Selective.current.mark(output, function, inputs)
    return output


class Selective:
    """Context of a forward pass whose :func:`recomputable` results are not kept for the backward pass."""

    current: "Selective | None" = None
    in_graph = False
    """Whether a graph that is traced or called now computes marked results again."""

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        # With the tensors, so that none dies and leaves its address to another while the context lasts.
        self.marked: dict[int, tuple[Tensor, Recipe]] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, unpack)

    @classmethod
    @contextmanager
    def graph(cls, selective: bool) -> Iterator[None]:
        """Context of a call of compiled code, which computes :func:`recomputable` results again if `selective`."""
        cls.in_graph = selective
        try:
            yield
        finally:
            cls.in_graph = False

    def __enter__(self) -> None:
        Selective.current = self
        self.hooks.__enter__()

    def __exit__(self, *exception: Any) -> None:
        self.hooks.__exit__(*exception)
        Selective.current = None
        self.marked.clear()

    def mark(self, output: Tensor, function: Callable[..., Tensor], inputs: tuple[Any, ...]) -> None:
        """Remember how a tensor was made."""
        sources = tuple(self.reference(x) if isinstance(x, Tensor) else x for x in inputs)
        self.marked[storage_address(output)] = output, Recipe(function, sources, self.autocast)

    def reference(self, tensor: Tensor) -> "Tensor | View":
        """What stands for a tensor until the backward pass: itself, or how it is made."""
        if storage_address(tensor) not in self.marked:
            return tensor.detach()
        _, recipe = self.marked[storage_address(tensor)]
        return View(recipe, tensor.shape, tensor.stride(), tensor.storage_offset())

    def pack(self, tensor: Tensor) -> "Tensor | View":
        """What the graph keeps instead of a tensor."""
        kept = self.reference(tensor)
        if isinstance(kept, View):
            kept.recipe.awaited += 1
            return kept
        return tensor


class Recipe:
    """How a tensor is made; inputs are values, or recipes themselves."""

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...], autocast: tuple[Any, ...]) -> None:
        self.function, self.inputs, self.autocast = function, inputs, autocast
        self.awaited = 0
        """Saved tensors that will ask for it."""
        self.made: Tensor | None = None

    def make(self) -> Tensor:
        """The tensor; kept as long as others will ask for it."""
        if self.made is not None:
            return self.made
        kind, dtype, enabled = self.autocast
        inputs = (x.make() if isinstance(x, View) else x for x in self.inputs)
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            made = self.function(*inputs)
        self.made = made if self.awaited > 0 else None
        return made


class View(NamedTuple):
    """A tensor that shares the memory of one that is made again."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def make(self) -> Tensor:
        """The tensor."""
        return self.recipe.make().as_strided(self.shape, self.stride, self.offset)


def unpack(kept: Tensor | View) -> Tensor:
    """The tensor that `Selective.pack` stood something for."""
    if isinstance(kept, Tensor):
        return kept
    made = kept.make()
    kept.recipe.awaited -= 1
    if kept.recipe.awaited == 0:
        kept.recipe.made = None
    return made
