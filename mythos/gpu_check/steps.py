"""Whether a training step waits for the device, and how often it is compiled."""

import shutil
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

import mythos
from mythos.gpu_check.catalog import LAST_NEW_GRAPH, MOST_GRAPHS, RECOMPILE_STEPS
from mythos.gpu_check.result import Result, Setting, judged, not_run
from mythos.gpu_check.runs import next_step, steps_of, task_run
from mythos.gpu_check.timed_steps import Steps
from mythos.model.ops import grouped_experts
from mythos.torch_internals import compiler_counters
from mythos.trainer import Trainer

WARM_UP = 3
GROUPED_KERNEL = ((9, 0), (10, 0))
"""SMs on which `F.grouped_mm` is one kernel; elsewhere it waits for the host (`mythos.model.ops.device_choice`)."""


def waits(setting: Setting, *, preset: str, compiled: bool) -> Iterator[Result]:
    """Run steps while torch raises an error at every operator that waits for the device."""
    with Steps(steps_of(setting, preset, 4, train__compile=compiled)) as steps:
        for _ in range(WARM_UP):
            steps()
        if not setting.cuda:
            yield not_run("steps ran, and only a GPU can show what waits")
            return
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                steps()
        except RuntimeError as error:
            torch.cuda.set_sync_debug_mode("default")
            if "synchroniz" not in str(error):
                raise
            place, by_experts = where(error)
            grouped = by_experts and torch.cuda.get_device_capability(setting.device) not in GROUPED_KERNEL
            yield judged(grouped, f"waits at {place}{', as grouped_mm does on this SM' * grouped}: {error}")
            return
        finally:
            torch.cuda.set_sync_debug_mode("default")
    yield judged(True, "none in 3 steps")


def where(error: BaseException) -> tuple[str, bool]:
    """The innermost line of mythos in an error's traceback, and whether the experts' matmuls are in the traceback."""
    folder = Path(mythos.__file__).parent
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(folder)
    ]
    if not frames:
        return "an unknown place", False
    last = frames[-1]
    place = f"{Path(last.filename).relative_to(folder.parent)}:{last.lineno} ({last.line})"
    return place, any(frame.filename == grouped_experts.__file__ for frame in frames)


def recompiles(setting: Setting) -> Iterator[Result]:
    """Count graphs of a compiled run whose depths change at every step, validated half way and at the end."""
    steps = RECOMPILE_STEPS if setting.cuda else 8
    torch.compiler.reset()
    counters = compiler_counters()
    counters.clear()
    folder = setting.scratch / "recompiles"
    shutil.rmtree(folder, ignore_errors=True)
    trainer = Trainer(task_run(setting, folder, train__compile=True, train__steps=steps))
    graphs = last_step = 0
    try:
        for step in range(1, steps + 1):
            next_step(trainer)
            if step in (steps // 2, steps):
                trainer.validate()
            if counters["stats"]["unique_graphs"] > graphs:
                graphs, last_step = counters["stats"]["unique_graphs"], step
    finally:
        trainer.resources.close()
    if not graphs:
        raise RuntimeError("train.compile=true, but nothing was compiled")
    yield judged(graphs <= MOST_GRAPHS, f"{graphs} in {steps} steps")
    yield judged(last_step <= LAST_NEW_GRAPH, f"step {last_step} of {steps}")
    breaks = counters["graph_break"]
    reasons = "; ".join(f"{count} x {reason.strip().splitlines()[0]}" for reason, count in breaks.most_common(3))
    yield judged(not breaks, f"{sum(breaks.values())}{f': {reasons}' if reasons else ''}")
