"""Runs the checks in processes of their own, which may die or hang, and reports every one of them."""

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
"""Seconds that a task may go on when all time is over."""
PATIENCE = 6.0
"""A task that takes so many times what it should, and at least GRACE, hangs."""
START_SECONDS = 300.0
"""Longest that a process may import packages and start the GPU: disks of clusters may be cold."""
KILL_SECONDS = 30.0
"""Longest that a killed process is waited for."""
PRINTED_LINES = 40
"""Lines of what a process printed that go into the report where it dies."""


class Runner:
    """Runs all tasks and fills a report.

    Args:
        report: what is filled.
        minutes: for all stages.
        catalog: name of the module that has STAGES.
        grace: see GRACE.
        patience: see PATIENCE.

    Raises OSError where the report's folder cannot be written.
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
        """Number of the task that runs, or ran last; -1 before the first."""
        self.given = 0
        """Its checks that have lines."""
        self.begun = time.time()
        self.device = ""
        folder = report.folder / SCRATCH
        folder.mkdir(exist_ok=True)
        self.events, self.log = folder / "events.jsonl", folder / "log.txt"
        # What an earlier call left is not added to.
        for path in (self.events, self.log):
            path.write_text("")
        for path in (report.folder / PROFILE, folder / RATES):
            path.unlink(missing_ok=True)
        self.read = 0

    def run(self) -> None:
        """Run the tasks; ends its process where this one is told to end (SIGTERM)."""
        before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
        try:
            self.run_tasks()
        finally:
            signal.signal(signal.SIGTERM, before)

    def run_tasks(self) -> None:
        """Run the tasks. A process that dies or hangs costs the task it was at; another one goes on with the next."""
        first = 0
        while first < len(self.tasks):
            how = self.process(first) if time.time() < self.end else f"{OUT_OF_TIME}, give more --minutes"
            if self.task < first:
                # It began nothing, so the next one would not either.
                for number in range(first, len(self.tasks)):
                    self.task, self.given = number, 0
                    self.give_up(how, detailed=number == first)
                return
            self.give_up(how)
            first = self.task + 1

    @property
    def checks(self) -> tuple[Check, ...]:
        """Checks of the task that runs."""
        return self.tasks[self.task][1].checks

    def give_up(self, reason: str, detailed: bool = True) -> None:
        """Report what the task that runs has not given."""
        verdict = "not run" if reason.startswith(OUT_OF_TIME) else "failed"
        detail = self.printed() if detailed and verdict == "failed" else ""
        while self.given < len(self.checks):
            self.add({"verdict": verdict, "measured": reason, "detail": detail})

    def process(self, first: int) -> str:
        """Run tasks from number `first` on in a process; returns how it ended, for the tasks that it has not done."""
        command = [sys.executable, "-m", "mythos.gpu_check.stage", "--catalog", self.catalog]
        command += ["--out", str(self.report.folder), "--events", str(self.events)]
        command += ["--first", str(first), "--end", str(self.end)]
        self.begun = time.time()
        with self.log.open("a", encoding="utf-8") as log:
            try:
                # A session of its own, so that the processes that it starts end with it.
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
        """Why the process must end now; "" if it need not."""
        now = time.time()
        ran = now - self.begun
        seconds = self.tasks[self.task][1].seconds if self.task >= first else START_SECONDS / self.patience
        if ran > max(self.grace, self.patience * seconds):
            return f"it hangs: ended after {ran:.0f} s, where about {seconds:g} were expected"
        if now > self.end + self.grace:
            return f"{OUT_OF_TIME}: ended after {ran:.0f} s, give more --minutes"
        return ""

    def take_events(self) -> None:
        """Report what the process has told since last time."""
        text = self.events.read_bytes()[self.read :]
        whole = text[: text.rfind(b"\n") + 1]
        self.read += len(whole)
        for row in whole.splitlines():
            event = json.loads(row)
            if "task" in event:
                self.task, self.given = event["task"], 0
                self.begun, self.device = time.time(), event["device"]
            else:
                self.add(event)

    def add(self, event: dict[str, Any]) -> None:
        """Report the next check of the task that runs."""
        check, stage = self.checks[self.given], self.tasks[self.task][0].name
        self.given += 1
        found = (event["measured"], event["verdict"], self.device, event["detail"])
        self.report.add(Line(stage, check.name, check.expected, *found))

    def printed(self) -> str:
        """The last lines that the processes printed."""
        return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-PRINTED_LINES:])


def environment() -> dict[str, str]:
    """Of a stage's process: no network, and none of torchrun's variables, should this one run under it."""
    of_torchrun = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(of_torchrun)}
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONFAULTHANDLER": "1"}


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that is stuck in the driver does not end
        child.wait(KILL_SECONDS)
