"""Progress of long work: a bar on a terminal; in a log file, a SLURM job or CI one plain line now and then."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar, overload

from tqdm import tqdm

T = TypeVar("T")

INTERVAL = 10.0
"""Seconds between two plain lines: about 40 kB an hour."""


@overload
def progress_bar(items: Iterable[T], **options: Any) -> "tqdm[T] | Lines[T]": ...
@overload
def progress_bar(**options: Any) -> "tqdm[Any] | Lines[Any]": ...
def progress_bar(items: Iterable[Any] = (), **options: Any) -> "tqdm[Any] | Lines[Any]":
    """tqdm's bar if standard error is a terminal, else plain lines.

    Takes the options of `Lines` and of tqdm. Without `items`, `total` is required and `update` counts.
    """
    return tqdm(items, **options) if sys.stderr.isatty() else Lines(items, **options)


class Lines(Generic[T]):
    """Replaces tqdm without a terminal: writes a line to standard error every INTERVAL seconds.

    Work that takes less than INTERVAL writes nothing. tqdm would write a carriage return and the whole bar ten times a
    second. Options of tqdm that concern only the bar's looks are ignored.
    """

    def __init__(
        self,
        items: Iterable[T] = (),
        *,
        total: int | None = None,
        initial: int = 0,
        desc: str = "",
        unit: str = "it",
        unit_scale: bool = False,
        disable: bool = False,
        **_: Any,
    ) -> None:
        self.items, self.initial = items, initial
        self.n: float = initial
        self.total = len(items) if total is None and isinstance(items, Sized) else total
        self.desc, self.unit, self.disable = desc, unit, disable
        self.format_number: Callable[[float], str] = scaled if unit_scale else "{:,}".format
        self.postfix = ""
        self.started = self.written = time.monotonic()

    def __iter__(self) -> Iterator[T]:
        for item in self.items:
            yield item
            self.update()
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def update(self, n: float = 1) -> None:
        """Count `n` more units as done."""
        self.n += n
        if time.monotonic() - self.written >= INTERVAL:
            self._write()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Append a text to the lines to come."""
        self.postfix = f" | {s}" if s else ""

    def refresh(self) -> None:
        """Write a line if the last one is old."""
        self.update(0)

    def close(self) -> None:
        """Write a last line if there were any."""
        if self.written > self.started and not self.disable:
            self._write()
        self.disable = True

    def _write(self) -> None:
        self.written = time.monotonic()
        seconds, done = self.written - self.started, self.n - self.initial
        amount = self.format_number(self.n)
        eta = ""
        if self.total is not None:
            amount += f"/{self.format_number(self.total)}"
            if self.total and done:
                eta = f" | ETA {duration(seconds / done * (self.total - self.n))}"
        if not self.disable:
            line = f"{self.desc}: {amount} {self.unit} | {duration(seconds)}{eta}{self.postfix}"
            print(line, file=sys.stderr, flush=True)


class Console:
    """A training run's output: a bar on a terminal, elsewhere lines that `grep` and `tail` can read.

    Lines go to standard output. Without a terminal there is a line for the first logged step, every validation and the
    last step, and between them at most one every INTERVAL seconds.
    """

    def __init__(self, shown: bool) -> None:
        """Show everything; on ranks other than 0 show nothing."""
        self.shown = shown
        self.bar: tqdm[Any] | None = None
        self.first = self.steps = 0
        self.started = self.written = 0.0

    @contextlib.contextmanager
    def training(self, step: int, steps: int) -> Iterator[None]:
        """Show a training that goes from `step` to `steps`."""
        self.first, self.steps, self.started, self.written = step, steps, time.monotonic(), -math.inf
        if self.shown and sys.stderr.isatty():
            self.bar = tqdm(total=steps, initial=step, unit="step", desc="training", dynamic_ncols=True)
        try:
            yield
        finally:
            if self.bar is not None:
                self.bar.close()
                self.bar = None

    def step_done(self) -> None:
        """Advance the bar."""
        if self.bar is not None:
            self.bar.update()

    def report(self, metrics: dict[str, Any], always: bool) -> None:
        """Show the record of a logged step: beside the bar, or as a line if `always` or if the last line is old."""
        if self.bar is not None:
            self.bar.set_postfix_str(" | ".join(measurements(metrics)))
        elif always or time.monotonic() - self.written >= INTERVAL:
            self.written = now = time.monotonic()
            step = metrics["step"]
            left = (now - self.started) / max(1, step - self.first) * (self.steps - step)
            eta = [f"ETA {duration(left)}"] if step < self.steps else []
            self.write(" | ".join([f"step {step}/{self.steps}", *measurements(metrics), *eta]))

    def write(self, text: str) -> None:
        """Write a line, above the bar if there is one.

        When standard output cannot be written any more (`| head` has read enough, the disk is full) the run continues
        without it.
        """
        if self.shown:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:
                # Python flushes standard output as it exits, which would fail once more.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def measurements(metrics: dict[str, Any]) -> list[str]:
    """The values of a record that a person follows, e.g. `loss 3.214`."""
    loss, norm = metrics["loss"], metrics["grad_norm"]
    shown = [
        "skipped" if loss is None else f"loss {loss:.3f}",
        f"lr {metrics['lr']:.1e}",
        f"grad {'not finite' if norm is None else f'{norm:.2f}'}",
        f"loops {metrics['loops']:.1f}",
        f"{scaled(metrics['tokens_per_second'])} tok/s",
    ]
    return shown + ([f"MFU {metrics['mfu']:.0%}"] if "mfu" in metrics else [])


def scaled(number: float) -> str:
    """A number with three digits and a unit: 2.17M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5 or unit == "G":
            break
        number /= 1000
    return f"{number:.3g}{unit}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 45s, 3m05s, 2h10m, 4d02h."""
    whole = timedelta(seconds=round(seconds))
    minutes, rest = divmod(whole.seconds, 60)
    hours, minutes = divmod(minutes, 60)
    if whole.days:
        return f"{whole.days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
