"""Where time goes: a window of steps traced by torch.profiler, and each rank's own work in every step."""

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from mythos.config.sections import ProfileConfig

logger = logging.getLogger(__name__)

OPERATORS = 10
"""Rows of the table of operators."""


class Profiler:
    """Traces `steps` steps from `start` on, counted from 1 at the start of the process. A context manager.

    Enter it before the first step, call :meth:`step` after each, and leave it when the run ends. Each rank writes
    `profile/rank-NNNNN.json.gz` to the run directory, a Chrome trace (chrome://tracing, ui.perfetto.dev) in which the
    n-th step is marked `ProfilerStep#n`, and beside it `rank-NNNNN.txt`, a table of the costliest operators, by GPU
    time if a GPU was used. If the run ends within the window, the trace is written up to there; its last mark is the
    work after the last step. With `steps` 0 nothing is traced or written.
    """

    def __init__(self, run_dir: Path, config: ProfileConfig, rank: int) -> None:
        self.config = config
        self.rank = rank
        self.path = run_dir / "profile" / f"rank-{rank:05d}.json.gz"
        self.trace: torch.profiler.profile | None = None
        self.stack = contextlib.ExitStack()
        self.done = 0

    def __enter__(self) -> Self:
        if self.config.steps:
            self.trace = torch.profiler.profile(
                schedule=torch.profiler.schedule(
                    skip_first=self.config.start - 1, wait=0, warmup=1, active=self.config.steps, repeat=1
                ),
                on_trace_ready=self.write,
            )
            self.stack.enter_context(self.trace)
            self.trace.step()  # torch counts from 0: its step 0, the warm-up if start is 1, ends here
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.trace = None
        self.stack.close()

    def step(self) -> None:
        """Mark the end of a training step."""
        if self.trace is not None:
            self.trace.step()
            self.done += 1
            if self.done == self.config.start + self.config.steps - 1:
                self.__exit__(None, None, None)

    def write(self, trace: torch.profiler.profile) -> None:
        """Write the trace. A full disk is logged, not raised: a trace is not worth ending a run for."""
        operators = trace.key_averages()
        operators[:] = [operator for operator in operators if not operator.key.startswith("ProfilerStep")]
        on_gpu = any(operator.self_device_time_total for operator in operators)
        by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        table = operators.table(sort_by=by, row_limit=OPERATORS, max_name_column_width=80)
        try:
            self.path.parent.mkdir(exist_ok=True)
            trace.export_chrome_trace(str(self.path))
            self.path.with_name(self.path.name.removesuffix(".json.gz") + ".txt").write_text(table + "\n")
        except OSError as error:
            logger.warning("the trace of rank %d cannot be written: %s", self.rank, error)
            return
        if self.rank == 0:
            print(f"profile     {self.path}, one for each rank: open it in ui.perfetto.dev")


class Stopwatch:
    """Seconds between laps, without time spent in :meth:`pause`."""

    def __init__(self) -> None:
        self.start = time.perf_counter()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time spent in this context."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.start += time.perf_counter() - began

    def lap(self) -> float:
        """Seconds since the last lap."""
        before, self.start = self.start, time.perf_counter()
        return self.start - before


class OwnTime:
    """Time that a rank spends on its own work, as opposed to waiting for others. A context manager around that work.

    On a GPU work is timed by events, which are read when the host waits for the device anyway.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.start = 0.0
        self.seconds = 0.0
        self.events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def __enter__(self) -> None:
        self.start = time.perf_counter()
        if self.cuda:
            self.events.append((torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
            self.events[-1][0].record()

    def __exit__(self, *exception: object) -> None:
        if self.cuda:
            self.events[-1][1].record()
        else:
            self.seconds += time.perf_counter() - self.start

    def read(self) -> float:
        """Seconds since the last reading; waits for the device."""
        if self.events:
            self.events[-1][1].synchronize()
        seconds = self.seconds + sum(start.elapsed_time(end) for start, end in self.events) / 1000
        self.seconds, self.events = 0.0, []
        return seconds
