"""The last lines of a terminal while a run trains: progress and measurements, redrawn in place, with text above."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

SECONDS = 0.25
"""Least time between two drawings, each of which takes 0.7 ms of a core."""
WIDTH = 79
"""Largest width. In a terminal that becomes narrower, down to 80 columns, no line that is to be redrawn then breaks."""
STYLES = {"loss": "bold cyan", "skipped": "bold red", "grad not finite": "bold red"}
"""Styles of measurements, by what their text begins with."""


class VisibleCursor(Console):
    """A console that never hides the cursor.

    A second Ctrl-C, or a kill, ends the process at once, and nothing would show the cursor again.
    """

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing."""
        return False


class TrainingDisplay:
    """Draws the step, a bar, the remaining time and the newest measurements on the terminal of standard output.

    Until :meth:`close`, text that is printed to standard output or, if it is a terminal too, standard error goes above
    the drawing. `NO_COLOR` is respected. Any method may raise OSError if the terminal is gone.
    """

    def __init__(self, step: int, steps: int) -> None:
        """Draw for the first time: a training that goes from `step` to `steps`."""
        # Whether standard output is a terminal has been decided by the caller, not by rich's variables for CI.
        self.console = VisibleCursor(force_terminal=True, force_interactive=True)
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(30),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}"),
            console=self.console,
        )
        self.task = self.progress.add_task("training", completed=step, total=steps, left="")
        self.measurements: list[Text] = []
        self.drawn = self.shown = time.monotonic()  # the last drawing, and the last of measurements
        # Drawn by the training thread: another one would take the interpreter from it in the middle of a step.
        self.live = Live(
            get_renderable=self._content,
            console=self.console,
            auto_refresh=False,
            redirect_stderr=sys.stderr.isatty(),
        )
        self.live.start(refresh=True)

    def _content(self) -> Constrain:
        lines: list[Any] = [self.progress]
        if self.measurements:
            separator = Text(" | ", "dim", no_wrap=True, overflow="ellipsis")
            lines.append(separator.join(self.measurements))
        return Constrain(Group(*lines), WIDTH)

    def advance(self, step: int, left: str) -> None:
        """Show the number of steps done and the remaining time."""
        self.progress.update(self.task, completed=step, left=left)
        if time.monotonic() - self.drawn >= SECONDS:
            self.refresh()

    def show(self, measurements: Sequence[str]) -> None:
        """Replace the measurements by new ones, such as `loss 3.214`."""
        styles = [next((style for key, style in STYLES.items() if text.startswith(key)), "") for text in measurements]
        self.measurements = [Text(text, style) for text, style in zip(measurements, styles, strict=True)]
        if time.monotonic() - self.shown >= SECONDS:  # a validation of minutes may follow
            self.shown = time.monotonic()
            self.refresh()

    def refresh(self) -> None:
        """Draw again."""
        self.drawn = time.monotonic()
        self.live.refresh()

    def print(self, text: str, style: str) -> None:
        """Write lines above the drawing, in a style of rich such as `bold` or `cyan`."""
        self.console.print(Text(text, style), soft_wrap=True)

    def close(self) -> None:
        """Draw for the last time; later output follows below."""
        self.live.stop()
