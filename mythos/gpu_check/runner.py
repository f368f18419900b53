"""Runs the stages, each in a process of its own under a limit of time, and reports every check of every stage."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from mythos.gpu_check.catalog import Check, Stage
from mythos.gpu_check.report import Line, Report
from mythos.gpu_check.stage import CONTEXT_LOST, OUT_OF_TIME

CATALOG = "mythos.gpu_check.catalog"
GRACE = 60.0
"""Seconds past its time after which a task that is not done is ended."""
PATIENCE = 6.0
"""A task that takes so many times what it should, and at least GRACE, hangs."""
PRINTED_LINES = 40
"""Lines of what a process printed that go into the report where it dies."""


class Runner:
    """Runs stages and fills a report.

    Args:
        report: what is filled.
        minutes: for all stages.
        catalog: name of the module that has STAGES.
        grace: see GRACE.
        patience: see PATIENCE.
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
        self.folder = report.folder / "stages"
        self.folder.mkdir(exist_ok=True)

    def run(self) -> None:
        """Run all stages."""
        stages: Sequence[Stage] = import_module(self.catalog).STAGES
        for place, stage in enumerate(stages):
            left = max(0.0, self.end - time.time())
            share = stage.share / sum(later.share for later in stages[place:])
            StageRun(self, stage, time.time() + left * share).run()


class StageRun:
    """One stage: processes, one after another, until every task has its lines."""

    def __init__(self, runner: Runner, stage: Stage, deadline: float) -> None:
        self.runner, self.stage, self.deadline = runner, stage, deadline
        self.task = -1
        """Number of the task that runs, or ran last; -1 before the first."""
        self.given = 0
        """Its checks that have lines."""
        self.begun = time.time()
        self.device = ""
        self.events, self.log = (runner.folder / f"{stage.name}.{end}" for end in ("jsonl", "log"))
        for path in (self.events, self.log):
            path.unlink(missing_ok=True)
        self.read = 0

    def run(self) -> None:
        """Run the tasks. A process that dies or hangs costs the task that it was at; another one goes on with the next."""
        first = 0
        while first < len(self.stage.tasks):
            how = self.process(first) if time.time() < self.deadline else f"{OUT_OF_TIME}, give more --minutes"
            if self.task < first:
                # It began nothing, so the next one would not either.
                for self.task in range(first, len(self.stage.tasks)):
                    self.given = 0
                    self.give_up(how)
                return
            self.give_up(how)
            first = self.task + 1

    @property
    def checks(self) -> tuple[Check, ...]:
        """Checks of the task that runs."""
        return self.stage.tasks[self.task].checks if self.task >= 0 else ()

    def give_up(self, reason: str) -> None:
        """Report what the task that runs has not given."""
        verdict = "not run" if reason.startswith(OUT_OF_TIME) else "failed"
        while self.given < len(self.checks):
            self.add({"verdict": verdict, "measured": reason, "detail": self.printed() if verdict == "failed" else ""})

    def process(self, first: int) -> str:
        """Run the tasks from number `first` on in a process; returns how it ended, for the tasks that it has not done."""
        command = [sys.executable, "-m", "mythos.gpu_check.stage", self.stage.name]
        command += ["--catalog", self.runner.catalog, "--out", str(self.runner.report.folder)]
        command += ["--events", str(self.events), "--first", str(first), "--deadline", str(self.deadline)]
        self.begun = time.time()
        with self.log.open("a", encoding="utf-8") as log:
            # A group of its own, so that the processes that it starts end with it.
            try:
                child = subprocess.Popen(command, stdout=log, stderr=log, env=environment(), start_new_session=True)
            except OSError as error:
                return f"no process can be started: {error}"
            try:
                while child.poll() is None:
                    time.sleep(0.1)
                    self.take_events()
                    if reason := self.overdue():
                        end(child)
                        self.take_events()
                        return reason
            finally:
                end(child)
        self.take_events()
        if child.returncode == CONTEXT_LOST:
            return "the GPU's context was lost"
        if child.returncode < 0:
            name = signal.Signals(-child.returncode).name
            hint = ", most likely for lack of host memory" if name == "SIGKILL" else ""
            return f"the process died by {name}{hint}"
        return f"the process ended with status {child.returncode}"

    def overdue(self) -> str:
        """Why the task that runs must end now; "" if it need not."""
        now, runner = time.time(), self.runner
        ran = now - self.begun
        seconds = self.stage.tasks[max(self.task, 0)].seconds
        if ran > max(runner.grace, runner.patience * seconds):
            return f"it hangs: ended after {ran:.0f} s, where about {seconds:g} were expected"
        if now > runner.end + runner.grace:
            return f"{OUT_OF_TIME}: ended after {ran:.0f} s, give more --minutes"
        return ""

    def take_events(self) -> None:
        """Report what the process has told since last time."""
        text = self.events.read_bytes()[self.read :] if self.events.exists() else b""
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
        check = self.checks[self.given]
        self.given += 1
        self.runner.report.add(
            Line(
                self.stage.name,
                check.name,
                check.expected,
                event["measured"],
                event["verdict"],
                self.device,
                event["detail"],
            )
        )

    def printed(self) -> str:
        """The last lines that the processes of this stage printed."""
        if not self.log.exists():
            return ""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(lines[-PRINTED_LINES:])


def environment() -> dict[str, str]:
    """Of a stage's process: no network, and none of torchrun's variables, should this one run under it."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "PYTHONFAULTHANDLER": "1"}


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process and those that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
