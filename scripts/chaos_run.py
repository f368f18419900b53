"""The runs that chaos_test.py disturbs: run directory, processes, fault injection, and comparison of results."""

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[1]

EVERY, KEEP = 5, 3
"""Steps between checkpoints, and how many are kept."""
PAUSE_SECONDS = 0.8
"""Pause of a save that is to be hit by a fault, so that the fault comes in time; training goes on meanwhile."""
PATIENCE = 240.0
"""Seconds to wait for any event; longer means that a process hangs."""
GONE_SECONDS = 60.0
"""Seconds after the end of a run until all its processes must have ended."""

FOLDER, HARNESS = "MYTHOS_CHAOS_FOLDER", "MYTHOS_CHAOS_HARNESS"
"""Environment variables of the processes: the run's folder, and the process that watches it."""
NOT_REPEATED = ("time", "tokens_per_second", "peak_memory_bytes", "resumed_from")
"""Keys of metrics.jsonl that depend on the processes, like those that begin with straggler/."""

START, TRAINING, TMP, SHARDS, RENAMED = "start-up", "training", "writing shards", "shards written", "renamed"
"""Moments of a fault; at SHARDS the rename is yet to come, at RENAMED the marker."""


class Failed(Exception):
    """A run did not behave as promised."""


# Inside the processes that train


def train_with_faults(arguments: list[str]) -> int:
    """The command `train`, which also reports events, pauses saves for faults, and injects faults by itself."""
    folder, rank = Path(os.environ[FOLDER]), int(os.environ["RANK"])

    def report(event: str) -> None:
        line = f"{time.monotonic()} {os.getpid()} {event}\n"
        with open(folder / f"events-{rank}", "a", encoding="utf-8") as file:
            file.write(line)

    def plan() -> dict[str, Any]:
        return json.loads((folder / "plan.json").read_text())

    report("begun")
    threading.Thread(target=_end_with_harness, args=(int(os.environ[HARNESS]),), daemon=True).start()
    _instrument_saves(report, plan)
    _instrument_training(report, plan, rank)
    from mythos.cli.train import main

    return main(arguments)


def _instrument_saves(report: Callable[[str], None], plan: Callable[[], dict[str, Any]]) -> None:
    """Report the moments of every save, and pause at the one in the plan."""
    from mythos.files import storage

    workspace_before, write_whole_before = storage.LocalStorage.workspace, storage.write_whole

    def reach(moment: str, checkpoint: str) -> None:
        step = int(checkpoint.removeprefix("step-").removesuffix(".tmp"))
        report(f"{moment}: {step}")
        if (pause := plan()["pause"]) and pause[0] == moment and step >= pause[1]:
            time.sleep(PAUSE_SECONDS)

    def workspace(self: storage.LocalStorage, name: str, needed: int) -> Path:
        reach(TMP, name)
        return workspace_before(self, name, needed)

    def write_whole(path: Path, content: bytes, *, durable: bool) -> None:
        if path.name == storage.META:
            reach(SHARDS, path.parent.name)
        elif path.name == storage.MARKER:
            reach(RENAMED, path.parent.name)
        write_whole_before(path, content, durable=durable)
        if path.name == storage.MARKER:
            report(f"committed {int(path.parent.name.removeprefix('step-'))}")

    storage.LocalStorage.workspace, storage.write_whole = workspace, write_whole


def _instrument_training(report: Callable[[str], None], plan: Callable[[], dict[str, Any]], rank: int) -> None:
    """Report every step; make gradients NaN and limit the size of files as planned."""
    import torch

    from mythos import trainer

    trainer.draw_plots = lambda *_: []  # importing matplotlib takes a second
    cls = trainer.Trainer
    run_before, forward_before, train_step_before = cls.run, cls.forward, cls.train_step

    def run(self: trainer.Trainer) -> None:
        report(f"continued {self.step}")
        run_before(self)

    def forward(self: trainer.Trainer, *inputs: Any) -> Any:
        output = forward_before(self, *inputs)
        if plan()["nan"].get(str(self.step)) == rank:
            output.loss.register_hook(lambda gradient: gradient * float("nan"))
        return output

    def weights(self: trainer.Trainer) -> list[torch.Tensor]:
        parameters = (parameter.detach() for parameter in self.model.parameters())
        return [getattr(parameter, "to_local", lambda p=parameter: p)().clone() for parameter in parameters]

    def train_step(self: trainer.Trainer, batch: Any) -> Any:
        report(f"step {self.step}")
        limit, poisoned = plan()["limit"], str(self.step) in plan()["nan"]
        if limit and rank == limit[0] and self.step >= limit[1]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
        before = weights(self) if poisoned else []
        result = train_step_before(self, batch)
        if poisoned:
            same = all(map(torch.equal, before, weights(self)))
            report(f"poisoned {self.step} {'skipped' if same else 'not skipped'}")
        return result

    cls.run, cls.forward, cls.train_step = run, forward, train_step


def _end_with_harness(pid: int) -> None:
    while psutil.pid_exists(pid):
        time.sleep(1)
    os._exit(1)


ENTRY = f"""import sys
sys.path[0] = {str(ROOT)!r}
from scripts.chaos_run import train_with_faults
sys.exit(train_with_faults(sys.argv[1:]))
"""
"""The train.py that launch.sh starts."""


# Outside


class Run:
    """A run directory with the processes that train in it, one launch after another."""

    def __init__(self, folder: Path, settings: dict[str, Any], processes: int, nan: dict[int, int]) -> None:
        self.folder, self.processes = folder, processes
        self.directory = folder / "run"
        self.checkpoints = self.directory / "checkpoints"
        self.checkpoints.mkdir(parents=True)
        settings = {**settings, "run": {"name": "chaos", "dir": str(self.directory)}}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        (folder / "train.py").write_text(ENTRY)
        shutil.copy(ROOT / "launch.sh", folder)
        self.nan = nan
        self.plan()
        self.since = 0.0
        """Start time of the current processes; earlier events are of others."""
        self.gone: set[int] = set()
        """Processes that have ended since then, or are ending."""
        self.launches = 0
        self.process: subprocess.Popen[bytes] | None = None

    def plan(self, pause: tuple[str, int] | None = None, limit: tuple[int, int] | None = None) -> None:
        """Write the faults that the processes inject by themselves."""
        temporary = self.folder / "plan.tmp"
        temporary.write_text(json.dumps({"nan": self.nan, "pause": pause, "limit": limit}))
        temporary.replace(self.folder / "plan.json")

    @property
    def environment(self) -> dict[str, str]:
        """Environment of the processes. The folder in it identifies them, also orphans."""
        own = {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable, "TMPDIR": str(self.folder)}
        own |= {"PYTHONPATH": str(ROOT), FOLDER: str(self.folder), HARNESS: str(os.getpid())}
        # Ignore settings of a launcher that this test itself runs under.
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "NNODES", "MASTER"))}
        return kept | own

    @property
    def log(self) -> Path:
        """The output of the current launch."""
        return self.folder / f"launch-{self.launches:03d}.log"

    def launch(self, restarts: int) -> None:
        """Start launch.sh, for the first time or again."""
        self.since = time.monotonic()
        self.launches += 1
        command = ["./launch.sh", "--cpu", str(self.processes), str(self.folder / "config.yaml")]
        environment = self.environment | {"MAX_RESTARTS": str(restarts), "SHUTDOWN_TIMEOUT": "60"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def train_alone(self) -> None:
        """Train from the first step to the last, without launch.sh and torchrun; raises Failed if that fails."""
        command = [sys.executable, "train.py", str(self.folder / "config.yaml"), "train.device=cpu"]
        ranks = start_ranks(command, self.processes, self.environment, self.log, self.folder)
        deadline = time.monotonic() + PATIENCE
        if any([rank.wait(max(0.1, deadline - time.monotonic())) for rank in ranks]):
            raise Failed(f"the undisturbed run failed\n{self.said()}")

    def printed(self) -> str:
        """The output of the current launch, without the progress bar."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return "\n".join(line for line in text.replace("\r", "\n").split("\n") if "step/s" not in line)

    def said(self) -> str:
        """The end of the output, for messages."""
        return self.printed()[-5000:]

    def events(self, rank: int, kind: str, *, ever: bool = False) -> list[tuple[float, int, str]]:
        """(time, process, text) of events of a rank's current processes, or with `ever` of all it had."""
        path = self.folder / f"events-{rank}"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        fields = (line.rstrip("\n").split(" ", 2) for line in lines if line.endswith("\n"))
        events = [(float(when), int(pid), event) for when, pid, event in fields]
        current = [event for event in events if ever or (event[0] > self.since and event[1] not in self.gone)]
        return [event for event in current if event[2].startswith(kind)]

    def steps(self, rank: int, kind: str) -> list[int]:
        """The step numbers at the end of events of a kind."""
        return [int(event.split()[-1]) for _, _, event in self.events(rank, kind)]

    def pids(self) -> list[int]:
        """The current processes of the ranks, as far as they have begun."""
        return [begun[-1][1] for rank in range(self.processes) if (begun := self.events(rank, "begun"))]

    def wait(self, until: Callable[[], Any], what: str, *, ended: bool = False) -> None:
        """Wait for a condition; raises Failed after PATIENCE, or if the launch ends, unless `ended` allows that."""
        deadline = time.monotonic() + PATIENCE
        while not until():
            if time.monotonic() > deadline:
                raise Failed(f"waited {PATIENCE:.0f} s for: {what}\n{self.said()}")
            if not ended and self.process is not None and self.process.poll() is not None:
                raise Failed(f"ended with {self.process.returncode} before: {what}\n{self.said()}")
            time.sleep(0.02)

    def living(self) -> list[psutil.Process]:
        """All processes of the run, orphans included."""
        living = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.pid != os.getpid() and process.environ().get(FOLDER) == str(self.folder):
                    living.append(process)
        return living

    def wait_gone(self, pids: list[int] | None = None) -> None:
        """Wait until these processes, or all of the run, have ended; raises Failed if they do not."""
        deadline = time.monotonic() + GONE_SECONDS
        while left := [process for process in self.living() if pids is None or process.pid in pids]:
            if time.monotonic() > deadline:
                lines = [f"{process.pid}: {' '.join(process.cmdline())}" for process in left]
                raise Failed(f"left after {GONE_SECONDS:.0f} s:\n" + "\n".join(lines) + f"\n{self.said()}")
            time.sleep(0.05)

    def status(self) -> int:
        """The exit status of a launch that has ended or is ending."""
        assert self.process is not None
        self.wait(lambda: self.process.poll() is not None, "the end of launch.sh", ended=True)
        return self.process.returncode

    def destroy(self) -> None:
        """Kill all processes of the run."""
        while living := self.living():
            for process in living:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            if self.process is not None:
                self.process.poll()
            time.sleep(0.02)

    def complete(self) -> dict[int, Path]:
        """The checkpoints that count, by step."""
        paths = {int(path.name[5:]): path for path in self.checkpoints.glob("step-*") if path.name[5:].isdigit()}
        return {step: paths[step] for step in sorted(paths) if (paths[step] / "committed").exists()}

    def save_under_way(self) -> str:
        """The moment that a save has reached, by the files on disk; "" without one."""
        if any(self.checkpoints.glob("step-*.tmp/meta.json")):
            return SHARDS
        if any(self.checkpoints.glob("step-*.tmp")):
            return TMP
        newest = max(self.checkpoints.glob("step-????????"), default=None)
        return RENAMED if newest and not (newest / "committed").exists() and not (newest / "damaged").exists() else ""


def start_ranks(
    command: list[str], processes: int, environment: dict[str, str], log: Path, folder: Path
) -> list[subprocess.Popen[bytes]]:
    """Start the processes of a run in a folder, as torchrun would; their output is appended to `log`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    size = str(processes)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    ranks = []
    with log.open("ab") as output:
        for rank in map(str, range(processes)):
            own = environment | meeting | {"RANK": rank, "LOCAL_RANK": rank}
            ranks.append(subprocess.Popen(command, cwd=folder, env=own, stdout=output, stderr=output))
    return ranks


# Comparison


def damage(checkpoint: Path) -> str | None:
    """The first file that differs from its checksum in the checkpoint; None without damage."""
    content = (checkpoint / "meta.json").read_bytes()
    if zlib.crc32(content) != json.loads((checkpoint / "committed").read_text())["meta_crc32"]:
        return "meta.json"
    for name, expected in json.loads(content)["files"].items():
        content = (checkpoint / name).read_bytes()
        if {"bytes": len(content), "crc32": zlib.crc32(content)} != expected:
            return name
    return None


def difference(checkpoint: Path, reference: Path) -> str | None:
    """The first tensor or number in which two checkpoints of the same step and layout are not equal, bit by bit."""
    ours, theirs = (json.loads((path / "meta.json").read_text()) for path in (checkpoint, reference))
    for key in sorted((ours.keys() | theirs.keys()) - {"config", "files", "record", "run"}):
        here, there = ours.get(key), theirs.get(key)
        if here != there:
            return f"{key} differs from the undisturbed run's: {str(here)[:500]}, {str(there)[:500]}"
    if ours["files"].keys() != theirs["files"].keys():
        return f"other files than the undisturbed run's: {', '.join(ours['files'])}"
    for file in sorted(ours["files"]):
        mine, other = load_file(checkpoint / file), load_file(reference / file)
        if mine.keys() != other.keys():
            return f"{file} has other tensors than the undisturbed run's"
        for name in sorted(mine):
            if mine[name].tobytes() != other[name].tobytes():
                return f"tensor {name} ({file}) differs from the undisturbed run's"
    return None


def compare_records(directory: Path, reference: Path, last: int, unfinished: Mapping[str, Any] | None = None) -> None:
    """Raise Failed unless metrics.jsonl has the reference's numbers of every step up to `last`, each once.

    `unfinished`: the record of `last` without its validation, which may be missing because a signal interrupted it.
    """

    def repeated(record: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: value for key, value in record.items() if key not in NOT_REPEATED and not key.startswith("straggler/")
        }

    def records(folder: Path) -> list[dict[str, Any]]:
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A kill may cut the last one short.
        return [repeated(json.loads(line)) for line in lines if line.endswith("\n")]

    ours, theirs = records(directory), records(reference)
    if [record["step"] for record in ours[:last]] != list(range(1, last + 1)):
        raise Failed(f"metrics.jsonl has the steps {[record['step'] for record in ours]}, not each to {last} once")
    for here, there in zip(ours, theirs, strict=False):
        if unfinished is not None and here["step"] == last and here.keys() == repeated(unfinished).keys():
            there = {key: value for key, value in there.items() if key in here}
        if here != there:
            keys = [key for key in here.keys() | there.keys() if here.get(key) != there.get(key)]
            values = ", ".join(f"{key}: {here.get(key)}, {there.get(key)}" for key in sorted(keys))
            raise Failed(f"step {here['step']}: metrics.jsonl differs from the undisturbed run's: {values}")
