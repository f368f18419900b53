"""Progress of long work: drawn on a terminal; plain lines in a log file, a SLURM job or CI.

Two libraries draw. Work that only counts (files, batches, tokens) has a bar of tqdm, like downloads by datasets and
huggingface_hub in the same commands. Training has the display of `mythos.display`, with several lines, colours and
text above them, for which tqdm has no means.
"""

import contextlib
import os
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import TYPE_CHECKING, Any, Generic, Self, TextIO, TypeVar, overload

if TYPE_CHECKING:
    from tqdm import tqdm

    from mythos.display import TrainingDisplay

T = TypeVar("T")

INTERVAL = 10.0
"""Seconds between two plain lines of work that counts: about 40 kB an hour."""


@overload
def progress_bar(items: Iterable[T], **options: Any) -> "tqdm[T] | Lines[T]": ...
@overload
def progress_bar(**options: Any) -> "tqdm[Any] | Lines[Any]": ...
def progress_bar(items: Iterable[Any] = (), **options: Any) -> "tqdm[Any] | Lines[Any]":
    """tqdm's bar if standard error is a terminal, else plain lines.

    Takes the options of `Lines` and of tqdm. Without `items`, `total` is required and `update` counts.
    """
    if not sys.stderr.isatty():
        return Lines(items, **options)
    from tqdm import tqdm  # not needed for help texts and errors, which come at once

    return tqdm(items, **options)


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
            with contextlib.suppress(OSError):  # the work goes on without its output: `2>&1 | head`
                print(line, file=sys.stderr, flush=True)


class Console:
    """A training run's output: a display on a terminal, elsewhere lines that `grep` and `tail` can read.

    On a terminal the newest measurements are redrawn in place, and lines go above them, in colour. Elsewhere there is a
    line for every logged step, and no colour. Everything goes to standard output: `| tee log` writes the lines.
    """

    def __init__(self, shown: bool) -> None:
        """Show everything; on ranks other than 0 show nothing."""
        self.shown = shown
        self.display: TrainingDisplay | None = None
        self.first = self.step = self.steps = 0
        self.started = 0.0

    @contextlib.contextmanager
    def training(self, step: int, steps: int) -> Iterator[None]:
        """Show a training that goes from `step` to `steps`."""
        self.first, self.step, self.steps, self.started = step, step, steps, time.monotonic()
        if self.shown and can_redraw(sys.stdout):
            from mythos.display import TrainingDisplay  # imports rich, for terminals only

            with self._going_on():
                self.display = TrainingDisplay(step, steps)
        try:
            yield
        finally:
            self.end_training()

    def end_training(self) -> None:
        """Leave the display as it is; later lines go below it."""
        if self.display is not None:
            with self._going_on():
                self.display.close()
            self.display = None

    def step_done(self) -> None:
        """Advance the display."""
        self.step += 1
        if self.display is not None:
            with self._going_on():
                self.display.advance(self.step, self._left())

    def report(self, metrics: dict[str, Any]) -> None:
        """Show the record of the newest step: in the display, or as a line."""
        if self.display is not None:
            with self._going_on():
                self.display.show(measurements(metrics))
        else:
            self.step = metrics["step"]
            parts = [f"step {self.step}/{self.steps}", *measurements(metrics), self._left()]
            self.write(" | ".join(filter(None, parts)))

    def write(self, text: str, style: str = "") -> None:
        """Write lines, above the display if there is one, in a style of rich such as `bold`."""
        if self.shown:
            with self._going_on():
                if self.display is not None:
                    self.display.print(text, style)
                else:
                    print(text, flush=True)

    def _left(self) -> str:
        """The remaining time, as text."""
        if self.step == self.steps:
            return ""
        seconds = (time.monotonic() - self.started) / max(1, self.step - self.first) * (self.steps - self.step)
        return f"ETA {duration(seconds)}"

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        """Go on without standard output if it cannot be written any more: a pipe without reader, a full disk."""
        try:
            yield
        except OSError:
            discard_output()


def can_redraw(stream: TextIO) -> bool:
    """Whether a stream is a terminal on which text can be moved and coloured."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def can_colour(stream: TextIO) -> bool:
    """Whether to write colours to a stream: it is a terminal that has them, and `NO_COLOR` is not set."""
    return can_redraw(stream) and not os.environ.get("NO_COLOR")


def discard_output() -> None:
    """Discard all further standard output. Python flushes it as it exits, which would fail once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def reader_is_gone() -> bool:
    """Whether standard output is a pipe that nobody reads any more (`| head` has read enough)."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)  # errors and hang-ups are reported without being asked for
        return bool(poll.poll(0))
    except (OSError, ValueError):  # a stream without a file descriptor
        return False


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


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Lay out cells in columns for a terminal: the first `left` of them aligned on the left, others on the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    align = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    lines = ([place(cell, width) for place, cell, width in zip(align, row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def scaled(number: float) -> str:
    """A number with three digits and a unit: 2.17M."""
    for unit in ("", "k", "M", "G"):
        if abs(number) < 999.5 or unit == "G":
            break
        number /= 1000
    return f"{number:.3g}{unit}"


def duration(seconds: float) -> str:
    """A time in its two largest units: 45s, 3m05s, 2h10m, 4d02h."""
    # Not timedelta, which ends after 2.7 million years: a run may be configured to take longer.
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
