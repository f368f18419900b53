"""The process that makes the checks: `python -m mythos.gpu_check.stage`, started by `runner`.

It appends a JSON object a line to a file: {"task": 3} when a task begins, then one with `verdict` and `measured` for
each of its checks. On a GPU it ends with the stage, so that the next one finds clean memory and compilers; and where an
illegal memory access has destroyed the GPU's context, which answers nothing more. `runner` then starts another one.
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
"""Exit status where the GPU's context is destroyed."""
OUT_OF_TIME = "out of time"


def main(arguments: list[str] | None = None) -> int:
    """Run tasks from number `--first` on, counted over all stages."""
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

        def tell(event: dict[str, Any]) -> None:
            file.write(json.dumps(event) + "\n")
            file.flush()

        number = 0
        for place, stage in enumerate(stages):
            tasks = [(number + index, task) for index, task in enumerate(stage.tasks)]
            number += len(tasks)
            tasks = [(index, task) for index, task in tasks if index >= options.first]
            if not tasks:
                continue
            share = stage.share * len(tasks) / len(stage.tasks)
            share /= share + sum(later.share for later in stages[place + 1 :])
            setting = Setting(device, options.out, time.time() + share * max(0.0, options.end - time.time()))
            for index, task in tasks:
                tell({"task": index, "device": device.type})
                if perform(setting, task, tell):
                    return CONTEXT_LOST
            if setting.cuda:
                break
    return 0


def prepare() -> Any:
    """The device, with torch set up for exact comparisons. Returns a torch.device."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    # TF32 would round float32's factors to 10 bits.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if not cuda:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or torch.get_num_threads())
        # Inductor takes a C++ compiler a minute a model: a CPU tries what is traced, and not the code that comes of it.
        torch.compile = functools.partial(torch.compile, backend="eager")
    return device


def perform(setting: Setting, task: Task, tell: Callable[[dict[str, Any]], None]) -> bool:
    """Make a task's checks and tell their results; returns whether the GPU's context is lost."""
    given = 0

    def give(result: Result, detail: str = "") -> None:
        nonlocal given
        tell({"verdict": result.verdict, "measured": result.measured, "detail": detail})
        given += 1

    try:
        for result in results(setting, task):
            if given < len(task.checks):
                give(result)
        if given < len(task.checks):
            raise RuntimeError(f"the check gave {given} results of {len(task.checks)}")
    except BaseException as error:  # torch's checkpoints raise some that are no Exception
        told, detail = problem(error), traceback.format_exc()
        while given < len(task.checks):
            give(Result("failed", told), detail)
        # The traceback holds the frames, and these the tensors that the next task needs room for.
        traceback.clear_frames(error.__traceback__)
    return release(setting)


def results(setting: Setting, task: Task) -> Iterator[Result]:
    """What a task yields; that there is no time for it, where there is not."""
    if not (setting.cuda or task.on_cpu):
        yield from (not_run("at tiny size on a CPU, one of a kind is run") for _ in task.checks)
        return
    # On a CPU all is tiny and takes seconds.
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
    """An error in words."""
    kind = type(error).__name__
    return f"out of memory: {error}" if kind == "OutOfMemoryError" else f"{kind}: {error}" if str(error) else kind


def release(setting: Setting) -> bool:
    """Free what a task has left on the GPU; returns whether its context is lost."""
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
