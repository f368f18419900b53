"""A program in a pseudo-terminal, and what a person sees on its screen (by pyte, a terminal emulator)."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import pyte

from tests.warm import WarmPopen


class Terminal:
    """A program that runs in a terminal, started warm or not; use as a context manager, which ends it."""

    def __init__(
        self, command: list[str], columns: int = 80, lines: int = 24, warm: bool = False, **environment: str
    ) -> None:
        self.master, slave = pty.openpty()
        self.emulated = pyte.HistoryScreen(columns, lines, history=5000, ratio=0.5)
        self.stream = pyte.ByteStream(self.emulated)
        self.raw = b""
        self.resize(columns, lines)

        def take_terminal() -> None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C then sends SIGINT

        inherited = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = (WarmPopen if warm else subprocess.Popen)(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=None if warm else take_terminal,
            env={**inherited, "TERM": "xterm-256color", **environment},
        )
        os.close(slave)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)

    def resize(self, columns: int, lines: int) -> None:
        """Change the size of the terminal, as dragging the corner of its window does."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.emulated.resize(lines, columns)

    def send(self, keys: str) -> None:
        """Type; `\\x03` is Ctrl-C, `\\x04` Ctrl-D, `\\r` the enter key."""
        os.write(self.master, keys.encode())

    def until(self, holds: Callable[[str], bool], seconds: float = 300) -> str:
        """Wait until the text of the screen is as wished; returns it."""
        deadline = time.monotonic() + seconds
        while not holds(self.text):
            assert self._read(deadline), f"the terminal shows only:\n{self.text}"
        return self.text

    def end(self, seconds: float = 300) -> int:
        """Wait until the program has ended and all is read; returns its exit status."""
        deadline = time.monotonic() + seconds
        while self._read(deadline):
            pass
        return self.process.wait(max(1, deadline - time.monotonic()))

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self.master], [], [], max(0, deadline - time.monotonic()))
        try:
            data = os.read(self.master, 65536) if ready else b""
        except OSError:  # EIO: no process has the terminal open any more
            data = b""
        self.raw += data
        self.stream.feed(data)
        return bool(data)

    @property
    def shown(self) -> list[str]:
        """All lines, those that have scrolled away too, without the blank ones at the end."""
        old = ["".join(line[x].data for x in range(self.emulated.columns)) for line in self.emulated.history.top]
        lines = [line.rstrip() for line in [*old, *self.emulated.display]]
        while lines and not lines[-1]:
            lines.pop()
        return lines

    @property
    def text(self) -> str:
        """The lines as one text."""
        return "\n".join(self.shown)
