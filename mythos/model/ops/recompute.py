"""Selective activation checkpointing: cheap results are recomputed in the backward pass instead of saved.

Cheap are results of few operations per byte: norms, gates, rotations, copies, and what latent attention expands from
its latents (as in arXiv 2412.19437, section 3.2.3). Their inputs stay in memory: the residual stream, and the results
of matmuls and attention.

torch's own selective checkpointing calls a Python function for every operation of both passes, which on a CPU takes as
much time as it saves. Here Python runs for saved tensors only. In compiled code `torch.utils.checkpoint` marks the same
results, which costs nothing when the graph runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mythos.torch_internals import storage_address


def recomputable(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """function(*inputs), which inside of :class:`Selective` is recomputed in the backward pass and not saved for it.

    The function must return a new tensor, use no random numbers and have no side effects.
    """
    if torch.compiler.is_compiling():
        if Selective.in_graph and torch.is_grad_enabled():
            # In a graph this is an instruction to the compiler, which otherwise would save the results of matmuls.
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
        return function(*inputs)
    output = function(*inputs)
    if Selective.current is not None:
        Selective.current.mark(output, function, inputs)
    return output


class Selective:
    """Context of a forward pass whose :func:`recomputable` results are not saved for the backward pass."""

    current: "Selective | None" = None
    in_graph = False
    """Whether a graph that is being traced or called recomputes marked results."""

    def __init__(self, device: torch.device) -> None:
        kind = device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.marked: dict[int, tuple[Tensor, Recipe]] = {}
        """Recipes by storage address, with the tensors: a tensor that died could leave its address to another."""
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, unpack)

    @classmethod
    @contextmanager
    def graph(cls, selective: bool) -> Iterator[None]:
        """Context of a call of compiled code, which recomputes :func:`recomputable` results if `selective`."""
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
        """Remember how to recompute a tensor."""
        sources = tuple(self.reference(x) if isinstance(x, Tensor) else x for x in inputs)
        self.marked[storage_address(output)] = output, Recipe(function, sources, self.autocast)

    def reference(self, tensor: Tensor) -> "Tensor | View":
        """What to keep of a tensor until the backward pass: how to recompute it if it is marked, else itself."""
        if storage_address(tensor) not in self.marked:
            return tensor.detach()
        _, recipe = self.marked[storage_address(tensor)]
        return View(recipe, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def pack(self, tensor: Tensor) -> "Tensor | View":
        """What the autograd graph saves instead of a tensor."""
        reference = self.reference(tensor)
        if isinstance(reference, View):
            reference.recipe.pending += 1
            return reference
        return tensor


class Recipe:
    """How to recompute a tensor; inputs are values, or views of other recomputed tensors.

    A backward pass that is not completed leaves at most a cached tensor here, never a wrong one.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: tuple[Any, ...], autocast: tuple[Any, ...]) -> None:
        self.function, self.inputs, self.autocast = function, inputs, autocast
        self.pending = 0
        """Saved tensors that still have to be unpacked from this one."""
        self.cached: Tensor | None = None

    def compute(self) -> Tensor:
        """The tensor; cached while other saved tensors are pending."""
        if self.cached is not None:
            return self.cached
        kind, dtype, enabled = self.autocast
        inputs = (x.compute() if isinstance(x, View) else x for x in self.inputs)
        with torch.no_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
            output = self.function(*inputs)
        self.cached = output if self.pending > 0 else None
        return output


class View(NamedTuple):
    """A view of a recomputed tensor."""

    recipe: Recipe
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int

    def compute(self) -> Tensor:
        """The tensor."""
        return self.recipe.compute().as_strided(self.shape, self.stride, self.offset)


def unpack(saved: Tensor | View) -> Tensor:
    """Inverse of `Selective.pack`: recompute a tensor that was saved as a view."""
    if isinstance(saved, Tensor):
        return saved
    tensor = saved.compute()
    saved.recipe.pending -= 1
    if saved.recipe.pending == 0:
        saved.recipe.cached = None
    return tensor
