"""The process that runs checks: `python -m mythos.gpu_check.stage`, started by `runner`.

It appends lines of JSON to a file: {"task": 3} when a task begins, then one with `verdict` and `measured` for each of
its checks. On a GPU it ends with the stage, so that the next stage starts with empty memory and fresh compilers. It
also ends if the GPU's context is lost, after an illegal memory access for instance. `runner` then starts another one.
"""

import argparse
import functools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from mythos.gpu_check.catalog import Stage, Task
from mythos.gpu_check.result import Result, Setting, not_run

CONTEXT_LOST = 70
"""Exit status if the GPU's context is lost."""
OUT_OF_TIME = "out of time"


def main(arguments: list[str] | None = None) -> int:
    """Run the tasks from number `--first` on, counted over all stages; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mythos.gpu_check.stage", description=__doc__)
    parser.add_argument("--catalog", required=True, help="module that has STAGES")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--events", type=Path, required=True, help="file to append to")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--end", type=float, required=True, help="of all stages, seconds of time.time()")
    options = parser.parse_args(arguments)
    stages: tuple[Stage, ...] = import_module(options.catalog).STAGES
    device = prepare()
    with options.events.open("a", encoding="utf-8") as file:

        def emit(event: dict[str, Any]) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        number = 0
        for place, stage in enumerate(stages):
            tasks = [(number + index, task) for index, task in enumerate(stage.tasks)]
            number += len(tasks)
            tasks = [(index, task) for index, task in tasks if index >= options.first]
            if not tasks:
                continue
            # Divide the remaining time by the shares of this stage's remaining tasks and of the later stages.
            share = stage.share * len(tasks) / len(stage.tasks)
            share /= share + sum(later.share for later in stages[place + 1 :])
            setting = Setting(device, options.out, time.time() + share * max(0.0, options.end - time.time()))
            for index, task in tasks:
                emit({"task": index, "device": device.type})
                if perform(setting, task, emit):
                    return CONTEXT_LOST
            if setting.cuda:
                break
    return 0


def prepare() -> Any:
    """Set torch up for exact comparisons; returns the torch.device to use."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # TF32 would round the operands of float32 matmuls to 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not cuda:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads())
        # Compiling Inductor's C++ takes a minute per model, so on a CPU only Dynamo's tracing is checked.
        torch.compile = functools.partial(torch.compile, backend="eager")
    return device


def perform(setting: Setting, task: Task, emit: Callable[[dict[str, Any]], None]) -> bool:
    """Run a task and emit one result for each of its checks; returns whether the GPU's context is lost."""
    reported = 0

    def report(result: Result, detail: str = "") -> None:
        nonlocal reported
        emit({"verdict": result.verdict, "measured": result.measured, "detail": detail})
        reported += 1

    try:
        for result in results(setting, task):
            if reported < len(task.checks):
                report(result)
        if reported < len(task.checks):
            raise RuntimeError(f"the check gave {reported} results of {len(task.checks)}")
    except BaseException as error:  # torch.distributed.checkpoint raises errors that are not an Exception
        reason, detail = problem(error), traceback.format_exc()
        while reported < len(task.checks):
            report(Result("failed", reason), detail)
        # The traceback keeps frames alive, and these keep tensors, whose memory the next task needs.
        traceback.clear_frames(error.__traceback__)
    return release(setting)


def results(setting: Setting, task: Task) -> Iterator[Result]:
    """Run a task and yield its results; `not run` if it is not for CPUs or there is no time."""
    if not (setting.cuda or task.on_cpu):
        yield from (not_run("at tiny size on a CPU, one of a kind is run") for _ in task.checks)
        return
    # On a CPU sizes are tiny, and a task takes seconds.
    needed = task.seconds if setting.cuda else min(task.seconds, 5.0)
    if setting.deadline - time.time() < needed:
        yield from (not_run(f"{OUT_OF_TIME}, give more --minutes") for _ in task.checks)
        return
    module, _, function = task.run.partition(":")
    run: Callable[..., Iterable[Result]] = getattr(
        import_module(module if "." in module else f"mythos.gpu_check.{module}"), function
    )
    yield from run(setting, **task.arguments)


def problem(error: BaseException) -> str:
    """Describe an error."""
    kind = type(error).__name__
    return f"out of memory: {error}" if kind == "OutOfMemoryError" else f"{kind}: {error}" if str(error) else kind


def release(setting: Setting) -> bool:
    """Free a task's memory on the GPU; returns whether its context is lost."""
    if not setting.cuda:
        return False
    import gc

    import torch

    gc.collect()
    try:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError as error:
        print(f"the GPU's context is lost: {error}", file=sys.stderr)
        return True
    return False


if __name__ == "__main__":
    sys.exit(main())
