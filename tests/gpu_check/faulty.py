"""Checks that fail in every way, among some that succeed."""

import os
import signal
import sys
import time
from collections.abc import Iterator

from mythos.gpu_check.catalog import Check, Stage, Task
from mythos.gpu_check.result import Result, Setting, judged


def fine(setting: Setting, number: int = 1) -> Iterator[Result]:
    yield from (judged(True, f"process {os.getpid()}") for _ in range(number))


def off(setting: Setting) -> Iterator[Result]:
    yield judged(False, "12, in a | cell")


def raises(setting: Setting) -> Iterator[Result]:
    yield judged(True, "first")
    raise ValueError("no such thing\nsecond line")


def runs_out(setting: Setting) -> Iterator[Result]:
    class OutOfMemoryError(RuntimeError):
        """An error with the name of torch's."""

    raise OutOfMemoryError("tried to allocate 2 GiB")


def dies(setting: Setting, number: int) -> Iterator[Result]:
    print("the last words", flush=True)
    yield judged(True, "before")
    os.kill(os.getpid(), number)


def ends(setting: Setting) -> Iterator[Result]:
    os._exit(3)
    yield judged(True, "never")


def hangs(setting: Setting) -> Iterator[Result]:
    time.sleep(1000)
    yield judged(True, "never")


def loses_context(setting: Setting) -> Iterator[Result]:
    sys.modules["__main__"].release = lambda setting: True  # type: ignore[attr-defined]
    yield judged(True, f"process {os.getpid()}")


def task(run: str, *names: str, seconds: float = 1.0, **arguments: object) -> Task:
    checks = tuple(Check(name, f"{name} is fine") for name in names)
    return Task(checks, run if ":" in run else f"{__name__}:{run}", arguments, seconds)


STAGES = (
    Stage("one", 1, (task("fine", "a", "b", number=2), task("off", "c"), task("raises", "d", "e", "f"))),
    Stage("two", 1, (task("runs_out", "g"), task("tests.gpu_check.nothing:run", "h"), task("fine", "i", number=0))),
    Stage(
        "three",
        1,
        (
            task("dies", "j", "k", "l", number=signal.SIGSEGV),
            task("fine", "m"),
            task("hangs", "n"),
            task("dies", "o", "p", number=signal.SIGKILL),
            task("ends", "q"),
        ),
    ),
    Stage("four", 1, (task("loses_context", "r"), task("fine", "s"))),
)
