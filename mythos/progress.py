"""Progress of long work: a bar on a terminal; in a log file, a SLURM job or CI one plain line now and then."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import Any, Generic, Self, TypeVar

from tqdm import tqdm

T = TypeVar("T")

INTERVAL = 10.0
"""Seconds between two plain lines: a run of weeks writes some 40 kB an hour."""


def progress_bar(items: Iterable[T] = (), **options: Any) -> "tqdm[T] | Lines[T]":
    """tqdm's bar if standard error is a terminal, else plain lines. Takes the options of `Lines` and of tqdm."""
    if sys.stderr.isatty():
        return tqdm(items or None, **options)
    return Lines(items, **options)


class Lines(Generic[T]):
    """Stands in for tqdm where no terminal is: a line on standard error every INTERVAL seconds.

    Work that takes less than INTERVAL writes nothing. tqdm would write a carriage return and the whole bar ten times a
    second. Options of tqdm that concern the bar's looks are ignored.
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
        self.items, self.initial, self.n = items, initial, initial
        self.total = len(items) if total is None and hasattr(items, "__len__") else total
        self.desc, self.unit, self.disable = desc, unit, disable
        self.number = scaled if unit_scale else "{:,}".format
        self.more = ""
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
        """Say more in the lines to come."""
        self.more = f" | {s}" if s else ""

    def refresh(self) -> None:
        """Write a line, if the last one is old."""
        self.update(0)

    def close(self) -> None:
        """End with a line, if there were any."""
        if self.written > self.started and not self.disable:
            self._write()
        self.disable = True

    def _write(self) -> None:
        self.written = time.monotonic()
        seconds, done = self.written - self.started, self.n - self.initial
        amount = self.number(self.n) if self.total is None else f"{self.number(self.n)}/{self.number(self.total)}"
        left = "" if not (self.total and done) else f" | ETA {duration(seconds / done * (self.total - self.n))}"
        if not self.disable:
            line = f"{self.desc}: {amount} {self.unit} | {duration(seconds)}{left}{self.more}"
            print(line, file=sys.stderr, flush=True)


class Console:
    """What a training run tells while it trains: a bar on a terminal, elsewhere lines that `grep` and `tail` can read.

    Lines go to standard output. Without a terminal the first logged step has one, every validation, the last step, and
    between them at most one every INTERVAL seconds.
    """

    def __init__(self, shown: bool) -> None:
        """Tell all, or on ranks other than 0 nothing."""
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
        """Move the bar on."""
        if self.bar is not None:
            self.bar.update()

    def report(self, metrics: dict[str, Any], always: bool) -> None:
        """Show the record of a logged step: beside the bar, or as a line if `always` or if the last one is old."""
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

        Once standard output cannot be written (`| head` has read enough, the disk is full) a run goes on without it.
        """
        if self.shown:
            try:
                tqdm.write(text)
                sys.stdout.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails once more as it ends


def measurements(metrics: dict[str, Any]) -> list[str]:
    """The measurements of a record that a person follows, e.g. `loss 3.214`."""
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
    """A number in three digits with a unit: 2.17M."""
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
