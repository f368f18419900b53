"""Cost of a step against loops, sequence length, experts and batch: slopes on logarithmic axes."""

import argparse
import contextlib
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

from mythos.cli.common import check_least, whole_numbers
from mythos.errors import MythosError
from mythos.gpu_check.timed_steps import Steps, Work
from mythos.progress import aligned
from scripts.benchmarks.steps import configuration
from scripts.benchmarks.timing import Timings, in_turns, mebibytes

AXES: dict[str, tuple[str, Callable[[int], list[str]]]] = {
    "loops": (
        "2,4,8,16",
        lambda n: [
            *(f"depth.{name}=null" for name in ("mean", "maximum")),
            *("depth.sampling=fixed", f"model.loops={n}", f"depth.backprop={n}"),
        ],
    ),
    "length": (
        "128,256,512,1024",
        lambda n: [f"data.sequence_length={n}", f"model.context_length={n}"],
    ),
    "experts": ("8,16,32,64", lambda n: [f"model.n_experts={n}"]),
    "batch": ("1,2,4,8", lambda n: [f"{name}={n}" for name in ("data.streams", "train.global_batch")]),
}
"""For each axis its default values, and the overrides that set one."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("config", metavar="CONFIG.yaml | SIZE", help="a run, a preset, or a size of this benchmark")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    for name, (values, _) in AXES.items():
        parser.add_argument(f"--{name}", default=values, metavar="N,N,...", help=f"values ({values})")
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES), help="what to vary (all)")
    parser.add_argument("--repeats", type=int, default=7, help="turns (7)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Print a table for each axis; return the figures."""
    check_least(options, repeats=1)
    values = {name: whole_numbers(f"--{name}", getattr(options, name)) for name in options.axes}
    for name, numbers in values.items():
        if len(set(numbers)) < 2:
            raise MythosError(f"--{name}: got {getattr(options, name)!r}; a slope takes at least two numbers")
    return {name: along(name, sorted(set(numbers)), options) for name, numbers in values.items()}


def along(axis: str, values: Sequence[int], options: argparse.Namespace) -> dict[str, Any]:
    """Measure steps at each value of an axis; for loops also the core alone, and memory at a fixed backprop."""
    _, settings = AXES[axis]
    with contextlib.ExitStack() as stack:
        steps = {}
        for value in values:
            config = configuration(options.config, [*options.overrides, *settings(value)])
            steps[value] = stack.enter_context(Steps(config))
        device = steps[values[0]].device
        works: dict[str, Work] = {f"{value}": work for value, work in steps.items()}
        if axis == "loops":
            works |= {f"core {value}": core_alone(work) for value, work in steps.items()}
        timings = in_turns(works, options.repeats, device)
        memory: dict[int, int | None] = dict.fromkeys(values)
        if device.type == "cpu":
            memory = {value: work.peak_tensor_bytes() for value, work in steps.items()}

    result: dict[str, Any] = {"values": list(values), "step": described(timings, values, "")}
    unit = "s" if device.type == "cuda" else "CPU s"
    header = [axis, f"{unit} a step", "best", "memory in tensors"]
    rows = [
        [f"{n}", f"{timings[f'{n}'].median:.3f}", f"{timings[f'{n}'].best:.3f}", mebibytes(memory[n])] for n in values
    ]
    result["step"]["tensor_bytes"] = list(memory.values())
    text = f"slope of the step {result['step']['slope']:.2f}"
    if axis == "loops":
        result["core"] = described(timings, values, "core ")
        flat = flat_memory(values, options)
        result["tensor_bytes_at_fixed_backprop"] = flat
        header += [f"core alone, {unit}", "best", f"memory, backprop {values[0]}"]
        for row, value, size in zip(rows, values, flat, strict=True):
            core = timings[f"core {value}"]
            row += [f"{core.median:.3f}", f"{core.best:.3f}", mebibytes(size)]
        text += f", of the core alone {result['core']['slope']:.2f}"
        if None not in flat:
            text += f"; memory at a fixed backprop grows by a factor of {flat[-1] / flat[0]:.3f}"
    print(f"{aligned([header, *rows], left=1)}\n{text}\n")
    return result


def described(timings: dict[str, Timings], values: Sequence[int], prefix: str) -> dict[str, Any]:
    """The slope of the best times, and all times."""
    of_values = [timings[f"{prefix}{value}"] for value in values]
    return {"slope": slope(values, [times.best for times in of_values]), "times": [t.record() for t in of_values]}


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Least-squares slope of log y against log x; 1 if y is proportional to x."""
    return statistics.linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope


def core_alone(steps: Steps) -> Work:
    """Forward and backward pass of the recurrence alone, on the first micro-batch of a step."""
    model = steps.trainer.model
    ids = steps.batch.ids[: steps.trainer.micro_batch, :-1].to(steps.device)
    with torch.no_grad():
        context = model.context(ids)
    e = torch.randn(*ids.shape, model.config.dim, device=steps.device, requires_grad=True)
    state = torch.zeros_like(e)

    def work() -> None:
        with steps.trainer.parallel.autocast:
            last = model.recurrence(e, state, steps.loops[: len(ids)], steps.backprop, context, lambda after: None)
        last.state.backward(torch.ones_like(last.state))
        model.zero_grad(set_to_none=True)
        e.grad = None

    return work


def flat_memory(values: Sequence[int], options: argparse.Namespace) -> list[Any]:
    """Peak tensor bytes at each number of loops, with gradient through as many loops as the smallest number."""
    sizes: list[Any] = []
    for value in values:
        overrides = [*options.overrides, *AXES["loops"][1](value), f"depth.backprop={values[0]}"]
        with Steps(configuration(options.config, overrides)) as steps:
            if steps.device.type == "cuda":
                steps()
                torch.cuda.reset_peak_memory_stats(steps.device)
                steps()
                sizes.append(torch.cuda.max_memory_allocated(steps.device))
            else:
                steps()
                sizes.append(steps.peak_tensor_bytes())
    return sizes
