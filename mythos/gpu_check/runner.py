"""Run the checks in separate processes, which may die or hang, and report every check."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from mythos.gpu_check.catalog import Check, Stage, Task
from mythos.gpu_check.report import Line, Report
from mythos.gpu_check.result import PROFILE, RATES, SCRATCH
from mythos.gpu_check.stage import CONTEXT_LOST, OUT_OF_TIME

CATALOG = "mythos.gpu_check.catalog"
GRACE = 60.0
"""Seconds that a task may continue after the total time is over."""
PATIENCE = 6.0
"""A task counts as hanging after this many times its expected seconds, and at least GRACE."""
START_SECONDS = 300.0
"""Limit for importing packages and starting the GPU; a cluster's file system may be slow at first."""
KILL_SECONDS = 30.0
"""Limit of the wait for a killed process."""
PRINTED_LINES = 40
"""Last lines of the processes' output that the report quotes when a process dies."""


class Runner:
    """Runs all tasks and adds their results to a report.

    Args:
        report: receives the results.
        minutes: time for all stages.
        catalog: name of the module that defines STAGES.
        grace: see GRACE.
        patience: see PATIENCE.

    Raises OSError if the report's folder cannot be written.
    """

    def __init__(
        self,
        report: Report,
        minutes: float,
        catalog: str = CATALOG,
        *,
        grace: float = GRACE,
        patience: float = PATIENCE,
    ) -> None:
        self.report = report
        self.end = time.time() + 60 * minutes
        self.catalog = catalog
        self.grace, self.patience = grace, patience
        stages: tuple[Stage, ...] = import_module(catalog).STAGES
        self.tasks: list[tuple[Stage, Task]] = [(stage, task) for stage in stages for task in stage.tasks]
        self.task = -1
        """Number of the task that runs or ran last; -1 before the first."""
        self.reported = 0
        """Checks of that task that are in the report."""
        self.started = time.time()
        """When the task, or its process, began."""
        self.device = ""
        folder = report.folder / SCRATCH
        folder.mkdir(exist_ok=True)
        self.events, self.log = folder / "events.jsonl", folder / "log.txt"
        # Remove the results of an earlier call.
        for path in (self.events, self.log):
            path.write_text("")
        for path in (report.folder / PROFILE, folder / RATES):
            path.unlink(missing_ok=True)
        self.read = 0
        """Bytes of `events` that have been read."""

    def run(self) -> None:
        """Run all tasks; on SIGTERM end the process that runs them."""
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            self.run_tasks()
        finally:
            signal.signal(signal.SIGTERM, before)

    def run_tasks(self) -> None:
        """Run all tasks. If a process dies or hangs, its task fails and another process continues with the next."""
        first = 0
        while first < len(self.tasks):
            how = self.process(first) if time.time() < self.end else f"{OUT_OF_TIME}, give more --minutes"
            if self.task < first:
                # The process started no task, so another process would not either.
                for number in range(first, len(self.tasks)):
                    self.task, self.reported = number, 0
                    self.give_up(how, detailed=number == first)
                return
            self.give_up(how)
            first = self.task + 1

    @property
    def checks(self) -> tuple[Check, ...]:
        """Checks of the current task."""
        return self.tasks[self.task][1].checks

    def give_up(self, reason: str, detailed: bool = True) -> None:
        """Report the remaining checks of the current task as failed or not run."""
        verdict = "not run" if reason.startswith(OUT_OF_TIME) else "failed"
        detail = self.printed() if detailed and verdict == "failed" else ""
        while self.reported < len(self.checks):
            self.add({"verdict": verdict, "measured": reason, "detail": detail})

    def process(self, first: int) -> str:
        """Run tasks from number `first` on in a new process; returns why there are no more results."""
        command = [sys.executable, "-m", "mythos.gpu_check.stage", "--catalog", self.catalog]
        command += ["--out", str(self.report.folder), "--events", str(self.events)]
        command += ["--first", str(first), "--end", str(self.end)]
        self.started = time.time()
        with self.log.open("a", encoding="utf-8") as log:
            try:
                # A session of its own, so that `end` also kills the processes that it starts.
                child = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)
            except OSError as error:
                return f"no process can be started: {error}"
            try:
                while child.poll() is None:
                    time.sleep(0.1)
                    self.take_events()
                    if reason := self.overdue(first):
                        end(child)
                        self.take_events()
                        return reason
            finally:
                end(child)
        self.take_events()
        if child.returncode is None:
            return "the process did not end when it was killed"
        if child.returncode == CONTEXT_LOST:
            return "the GPU's context was lost"
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            hint = ", most likely for lack of host memory" if name == "SIGKILL" else ""
            return f"the process died by {name}{hint}"
        return f"the process ended with status {child.returncode}"

    def overdue(self, first: int) -> str:
        """Why the process must end now; empty if it may continue."""
        now = time.time()
        ran = now - self.started
        seconds = self.tasks[self.task][1].seconds if self.task >= first else START_SECONDS / self.patience
        if ran > max(self.grace, self.patience * seconds):
            return f"it hangs: ended after {ran:.0f} s, where about {seconds:g} were expected"
        if now > self.end + self.grace:
            return f"{OUT_OF_TIME}: ended after {ran:.0f} s, give more --minutes"
        return ""

    def take_events(self) -> None:
        """Report the results that the process has written since the last call."""
        text = self.events.read_bytes()[self.read :]
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        for row in whole.splitlines():
            event = json.loads(row)
            if "task" in event:
                self.task, self.reported = event["task"], 0
                self.started, self.device = time.time(), event["device"]
            else:
                self.add(event)

    def add(self, event: dict[str, Any]) -> None:
        """Report the next check of the current task."""
        check, stage = self.checks[self.reported], self.tasks[self.task][0].name
        self.reported += 1
        outcome = (event["measured"], event["verdict"], self.device, event["detail"])
        self.report.add(Line(stage, check.name, check.expected, *outcome))

    def printed(self) -> str:
        """The last lines of the processes' output."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-PRINTED_LINES:])


def environment() -> dict[str, str]:
    """Environment of a stage's process: no network, and none of the variables that torchrun sets."""
    of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(of_torchrun)}
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONFAULTHANDLER": "1"}


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and the processes that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # a process stuck in the driver cannot be killed
        child.wait(KILL_SECONDS)
