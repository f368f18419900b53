"""Memory that a training step allocates, read off the model's own code over fake tensors."""

import gc
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mythos.model.config import ModelConfig, loop_stages
from mythos.model.ops import device_choice
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.planning.fake_step import Step, fake_model, run_forward
from mythos.planning.trace_cache import remembered
from mythos.torch_internals import TorchDispatchMode, storage_address, tree_leaves

TRACED_LOOPS = 8
"""Most loops with gradient that are traced, at a tenth of a second each."""


@dataclass(frozen=True)
class Activations:
    """Bytes that a step allocates at its peak, beside weights, gradients and optimizer state."""

    kept: int
    """What the core's passes keep for the backward pass."""
    peak: int
    """The whole: `kept`, activations of prelude, coda and head, temporaries of one pass, weights cast for matmuls,
    and gradients that are not yet added to those of earlier micro-batches."""


@remembered(lambda value: Activations(**value))
def step_activations(config: ModelConfig, step: Step) -> Activations:
    """Measure the memory of a step's forward and backward pass over fake tensors.

    The figures follow the model's code, because that code runs. Beyond TRACED_LOOPS loops with gradient they are
    extrapolated: each further loop adds what the last traced ones added, or what a pass keeps if that is more.
    """
    depth = min(step.backprop, TRACED_LOOPS)
    traced = _trace(config, replace(step, backprop=depth))
    per_loop, peak = traced.per_loop, traced.peak
    if config.injection != "none" and per_loop is None:
        shallow, deeper = (_trace(config, replace(step, backprop=loops), forward_only=True) for loops in (1, 2))
        per_loop = deeper.live - shallow.live
    per_loop = per_loop or 0
    if step.backprop > depth:
        half = _trace(config, replace(step, backprop=depth // 2)).peak
        peak += (step.backprop - depth) * max(per_loop, (peak - half) // (depth - depth // 2))
    return Activations(per_loop * step.backprop, peak)


@dataclass(frozen=True)
class _Trace:
    """Bytes of one traced step."""

    live: int
    """What is alive after the forward pass."""
    per_loop: int | None
    """What a pass of the core keeps for the backward pass; None if this step is too short to show it."""
    peak: int = 0
    """The most at any time; 0 if only the forward pass was traced."""


def _trace(config: ModelConfig, step: Step, forward_only: bool = False) -> _Trace:
    """Run a step over fake tensors, or with `forward_only` its forward pass."""
    with fake_model(config, step) as model:
        weights = [*model.parameters(), *model.buffers()]
        if step.accumulating and not step.gathered:
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
                weights.append(parameter.grad)
        shapes = {shape for p in model.parameters() for shape in (p.shape, p.shape[::-1])}
        ledger = Ledger(weights, shapes)
        on_gpu = device_choice.simulated_gpu(ledger.call_fused) if step.device == "cuda" else nullcontext()
        with on_gpu, ledger:
            starts = _live_at_passes(model, ledger)
            objective = run_forward(model, step)
            per_loop = _kept_by_pass(config, step, starts)
            live = ledger.live
            if forward_only:
                return _Trace(live, per_loop)
            ledger.collecting = step.checkpointing != "none"
            objective.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        peak = ledger.peak(without=gradients if step.gathered else ())
        if not (step.gathered or step.accumulating):
            peak -= sum(gradient.nbytes for gradient in gradients)  # counted with the training state
    return _Trace(live, per_loop, max(0, peak))


def _live_at_passes(model: RecurrentDepthTransformer, ledger: "Ledger") -> list[int]:
    """A list that grows by the bytes alive whenever the core's first block starts."""
    starts: list[int] = []
    model.recurrence.blocks[0].register_forward_pre_hook(lambda *_: starts.append(ledger.live))
    return starts


def _kept_by_pass(config: ModelConfig, step: Step, starts: list[int]) -> int | None:
    """What one pass keeps: from the start of the third last to that of the second last pass of a forward pass.

    Earlier passes also cast weights, which all passes share; later ones keep what the loss reads.
    """
    return starts[-2] - starts[-3] if step.backprop >= 4 and len(loop_stages(config)) == 1 else None


class Ledger(TorchDispatchMode):
    """Records when operators allocate memory and when it is freed, except for tensors that existed before.

    torch handles fake tensors differently from real ones in two places, which are corrected here: the gradient of silu
    is one operator instead of several, and gradients of weights are accumulated in place.

    Args:
        known: tensors that are not counted.
        weight_shapes: shapes of the parameters and of their transposes.
    """

    def __init__(self, known: Sequence[Tensor], weight_shapes: set[torch.Size]) -> None:
        super().__init__()
        self.live = 0
        """Bytes that are allocated now."""
        self.weight_shapes = weight_shapes
        self.numbers: dict[int, int] = {storage_address(tensor): -1 for tensor in known}
        """Number of each storage that is alive, by address; -1 for those that are not counted."""
        self.changes: list[tuple[int, int]] = []
        """All allocations (bytes > 0) and frees (bytes < 0) in order: number of the storage, bytes."""
        self.highest = 0
        self.allocations = 0
        self.fusing = False
        """A function runs that a GPU fuses."""
        self.collecting = False
        """Collect garbage before every new peak. When passes are recomputed, fake tensors end up in reference cycles
        that real tensors do not form."""

    def call_fused(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function that a GPU runs as one kernel, which allocates its results only."""
        if torch.is_grad_enabled():
            return function(*arguments)  # may also save something for the backward pass
        self.fusing = True
        try:
            results = function(*arguments)
        finally:
            self.fusing = False
        self.note_all(results)
        return results

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.corrected(operation, args)
        if result is None:
            result = operation(*args, **(kwargs or {}))
        if not self.fusing:
            self.note_all(result)
        return result

    def note_all(self, results: Any) -> None:
        """Record the storages of all tensors in a result that are new."""
        for value in tree_leaves(results):
            if isinstance(value, Tensor):
                self.note(value)

    def corrected(self, operation: Any, args: Any) -> Tensor | None:
        """What the operator returns for real tensors; None if fake tensors behave the same."""
        aten = torch.ops.aten
        if operation is aten.silu_backward.default:
            return torch.empty_like(args[0])
        adds = operation is aten.add.Tensor and not torch.is_grad_enabled() and isinstance(args[1], Tensor)
        if adds and args[0].shape == args[1].shape and args[0].shape in self.weight_shapes:
            return args[0]
        return None

    def note(self, tensor: Tensor) -> None:
        """Record the tensor's storage if it is new."""
        storage = tensor.untyped_storage()
        address, size = storage_address(tensor), storage.nbytes()
        if address not in self.numbers:
            if self.collecting and self.live + size > self.highest:
                gc.collect()
            self.highest = max(self.highest, self.live + size)
            self.allocations += 1
            self.numbers[address] = self.allocations
            self._record(self.allocations, size)
            weakref.finalize(storage, self._freed, address, size)

    def _freed(self, address: int, size: int) -> None:
        self._record(self.numbers.pop(address), -size)

    def _record(self, number: int, size: int) -> None:
        self.changes.append((number, size))
        self.live += size

    def peak(self, without: Sequence[Tensor] = ()) -> int:
        """Most bytes that were allocated at once, leaving out the tensors `without`, which must be alive."""
        left_out = {self.numbers.get(storage_address(tensor)) for tensor in without}
        now = highest = 0
        for number, size in self.changes:
            now += 0 if number in left_out else size
            highest = max(highest, now)
        return highest
