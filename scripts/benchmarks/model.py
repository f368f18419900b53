"""Time of a training step by part of the model, forward and backward, and by operator."""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.profiler_util import FunctionEvent

from mythos.cli.common import check_least
from mythos.errors import MythosError
from mythos.gpu_check.timed_steps import Steps
from mythos.progress import aligned
from scripts.benchmarks.steps import configuration
from scripts.benchmarks.timing import in_turns
from scripts.benchmarks.train import describe

MARK = "part: "

PARTS = {
    "GroupedQueryAttention": "attention",
    "MultiHeadLatentAttention": "attention",
    "Router": "experts: router",
    "LoopBiasRouter": "experts: router",
    "LoopEmbeddingRouter": "experts: router",
    "MixtureOfExperts": "experts: ",  # followed by a key of DISPATCH
    "SwiGLU": "dense and shared feed-forward",
    "SquaredReLU": "dense and shared feed-forward",
    "RMSNorm": "norms",
    "LoopNorm": "norms",
    "LTIInjection": "injection",
    "LinearInjection": "injection",
    "AddInjection": "injection",
    "LoopAdapter": "depth-wise adapter",
    "LoopEmbedding": "depth-wise adapter",
    "TokenEmbedding": "embedding",
    "ValueTable": "embedding",
    "HaltingGate": "halting",
    "ActHalting": "halting",
}
"""Parts by class of module. Time counts for the innermost module listed here, else for the rest of the model."""

METHODS = {"combine": "injection"}
"""Parts by name of methods that are not modules."""

FUNCTIONS = {
    "_SummedCrossEntropy": "head and loss",
    "_ExpertProjections": "experts: ",
    "_ExpertOutput": "experts: ",
    "_Parameters": "experts: ",
}
"""Parts by name of autograd functions, as traces show them."""

REST = "rest of the model"
OUTSIDE = "clipping, measurements, accumulation"
OPTIMIZER = "optimizer"

DISPATCH = {
    "grouped products": ("mm", "addmm", "_linear_pointwise", "_grouped_mm", "new_empty"),
    "sort": ("sort", "argsort", "searchsorted", "arange"),
    "gather and scatter": ("index", "scatter", "gather", "sum", "zeros", "floor_divide"),
    "casts": ("to", "_to_copy", "copy_", "float"),
    "concatenation": ("cat",),
}
"""Purpose of the experts' operators, by the beginning of their names; all others are gating."""

OPERATORS = ("aten::", "mkldnn::")
"""Operators whose own time is shown; other time is between operators."""
PRODUCTS = (
    *(f"aten::{name}" for name in ("mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "_grouped_mm")),
    "mkldnn::_linear_pointwise",
)
FUSED_ATTENTION = "aten::_scaled_dot_product"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("config", metavar="CONFIG.yaml | SIZE", help="a run, a preset, or a size of this benchmark")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--repeats", type=int, default=5, help="steps traced, and steps timed without a trace (5)")
    parser.add_argument("--operators", type=int, default=12, help="operators named (12)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print both tables; return the figures."""
    check_least(options, repeats=1, operators=1)
    config = configuration(options.config, options.overrides)
    if config.train.compile is True:
        raise MythosError("train.compile: got true; compiled blocks cannot be taken apart: set it to false")
    with Steps(config) as steps:
        if steps.device.type != "cpu":
            raise MythosError("model: measures CPU time; set train.device=cpu, or trace a run with train.profile.steps")
        print(describe(steps))
        plain = in_turns({"step": steps}, options.repeats)["step"]
        with marked(steps):
            steps()
            traces = [trace(steps) for _ in range(options.repeats)]
    cells = median_of([by_part(events) for events in traces])
    total = sum(cells.values())
    # A trace contains wall time, which includes other processes and tracing itself. So only the shares are used, of the
    # CPU time of a step that is not traced.
    cells = {cell: seconds / total * plain.median for cell, seconds in cells.items()}
    parts, operators = added_up(cells, 0), added_up(cells, 1)

    print(f"a step takes {plain.median:.3f} CPU s ({plain.best:.3f} at best), divided as in a trace of it:")
    rows = [[part, f"{1000 * s:,.1f}", f"{s / plain.median:.1%}", mostly(cells, part)] for part, s in parts.items()]
    print(aligned([["part", "CPU ms", "share", "mostly"], *rows], left=1))
    products = sum(operators.get(name, 0.0) for name in PRODUCTS)
    attention = sum(seconds for name, seconds in operators.items() if name.startswith(FUSED_ATTENTION))
    others = {
        name: seconds
        for name, seconds in operators.items()
        if name not in PRODUCTS and not name.startswith(FUSED_ATTENTION)
    }
    print(
        f"\nmatmuls {products / plain.median:.1%}, fused attention {attention / plain.median:.1%}, "
        f"everything else {sum(others.values()) / plain.median:.1%}:"
    )
    named = list(others.items())[: options.operators]
    rows = [[name, f"{1000 * s:,.1f}", f"{s / plain.median:.1%}"] for name, s in named]
    print(aligned([["operator", "CPU ms", "share"], *rows], left=1))
    return {
        "configuration": config.model_dump(mode="json"),
        "step": plain.record(),
        "parts": {part: {"cpu_seconds": s, "operators": of_part(cells, part)} for part, s in parts.items()},
        "products": products,
        "fused_attention": attention,
        "other_operators": others,
    }


def added_up(cells: dict[tuple[str, str], float], key: int) -> dict[str, float]:
    """Seconds by part (key 0) or by operator (1), in descending order."""
    sums: dict[str, float] = defaultdict(float)
    for cell, seconds in cells.items():
        sums[cell[key]] += seconds
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def of_part(cells: dict[tuple[str, str], float], part: str) -> dict[str, float]:
    """Seconds of one part by operator, in descending order."""
    return added_up({cell: seconds for cell, seconds in cells.items() if cell[0] == part}, 1)


def mostly(cells: dict[tuple[str, str], float], part: str) -> str:
    """The three operators that take most of a part's time."""
    operators = of_part(cells, part)
    total = sum(operators.values())
    named = [(shortened(name), seconds / total) for name, seconds in list(operators.items())[:3]]
    return ", ".join(f"{name} {share:.0%}" for name, share in named)


def shortened(operator: str) -> str:
    """Shorten an operator's name."""
    if operator.startswith(FUSED_ATTENTION):
        return "fused attention" + " backward" * operator.endswith("_backward")
    return operator.removeprefix("aten::")


@contextmanager
def marked(steps: Steps) -> Iterator[None]:
    """Record in traces which part of the model is running."""
    model, optimizer = steps.trainer.model, steps.trainer.optimizer
    handles = []
    wrapped: list[tuple[Any, str, str]] = []
    open_marks: list[Any] = []

    def begin(name: str) -> Callable[..., None]:
        def hook(*unused: Any) -> None:
            open_marks.append(torch.profiler.record_function(MARK + name))
            open_marks[-1].__enter__()

        return hook

    def end(*unused: Any) -> None:
        open_marks.pop().__exit__(None, None, None)

    for module in model.modules():
        part = PARTS.get(type(module).__name__)
        if part:
            handles.append(module.register_forward_pre_hook(begin(part)))
            handles.append(module.register_forward_hook(end, always_call=True))
    for owner in model.modules():
        wrapped += [(owner, name, part) for name, part in METHODS.items() if hasattr(type(owner), name)]
    wrapped.append((optimizer, "step", OPTIMIZER))
    wrapped.append((steps.trainer, "forward", REST))
    for owner, name, part in wrapped:
        owner.__dict__[name] = marking(getattr(owner, name), part)
    try:
        yield
    finally:
        for owner, name, _ in wrapped:
            del owner.__dict__[name]
        for handle in handles:
            handle.remove()


def marking(method: Callable[..., Any], part: str) -> Callable[..., Any]:
    """The method, recorded in traces as a part."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(MARK + part):
            return method(*args, **kwargs)

    return call


def trace(work: Callable[[], object]) -> list[FunctionEvent]:
    """Trace the work; returns its events."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    return [event for event in profile.events() if event.name != "[memory]"]


def by_part(events: list[FunctionEvent]) -> dict[tuple[str, str], float]:
    """Seconds by part and operator, backward passes included; `python and autograd` is time between operators."""
    creator: dict[int, tuple[float, str]] = {}
    for event in events:
        if event.sequence_nr < 0 or backward_node(event) is not None:
            continue
        # Operators that create no autograd node carry the number of the next node, so the last operator created it.
        start = event.time_range.start
        if event.sequence_nr not in creator or start >= creator[event.sequence_nr][0]:
            creator[event.sequence_nr] = (start, part_of(event) or OUTSIDE)
    seconds: dict[tuple[str, str], float] = defaultdict(float)
    for event in events:
        part = part_of(event)
        if part is None:
            node = backward_node(event)
            part = creator[node.sequence_nr][1] if node is not None and node.sequence_nr in creator else OUTSIDE
        if part == PARTS["MixtureOfExperts"]:
            part += purpose(event)
        operator = event.name if event.name.startswith(OPERATORS) else "python and autograd"
        seconds[part, operator] += event.self_cpu_time_total / 1e6
    return dict(seconds)


def ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    """The event, its caller, and so on outwards."""
    current: FunctionEvent | None = event
    while current is not None:
        yield current
        current = current.cpu_parent


def part_of(event: FunctionEvent) -> str | None:
    """The innermost part around an event, also in a forward pass that the backward pass recomputes."""
    for above in ancestors(event):
        if above.name.startswith(MARK):
            return above.name.removeprefix(MARK)
        if above.name.removesuffix("Backward") in FUNCTIONS:
            return FUNCTIONS[above.name.removesuffix("Backward")]
    return None


def backward_node(event: FunctionEvent) -> FunctionEvent | None:
    """The autograd node whose backward pass contains an event; None outside backward passes."""
    return next((above for above in ancestors(event) if above.name.startswith("autograd::engine::evaluate")), None)


def purpose(event: FunctionEvent) -> str:
    """The purpose of an operator of the experts, by DISPATCH."""
    called = [above.name for above in ancestors(event) if above.name.startswith(OPERATORS)]
    name = called[-1].partition("::")[2] if called else ""
    return next((what for what, starts in DISPATCH.items() if name.startswith(starts)), "gating and the rest")


def median_of(tables: list[dict[tuple[str, str], float]]) -> dict[tuple[str, str], float]:
    """Medians by part and operator; a missing value counts as 0."""
    cells = {cell for table in tables for cell in table}
    return {cell: statistics.median(table.get(cell, 0.0) for table in tables) for cell in cells}
