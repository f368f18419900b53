"""Train under faults and compare with an undisturbed run, bit by bit.

python scripts/chaos_test.py --faults 60 --seed 0

A tiny model trains in two or four processes on the CPU, under launch.sh, with DDP or FSDP2. At random moments a rank or
everything is killed (also in the middle of a save), a rank gets SIGTERM, the disk is full, a byte of the newest
checkpoint is flipped, or one rank's gradient is NaN. If that ends the run, the same command is started again. After
every fault no committed checkpoint may be lost, damaged or different, the run must continue from the newest one, and no
process may be left. At the end weights, optimizer, data position and every recorded loss must equal those of a run of
the same layout without faults except for the NaN. The exit status is 1 if any of this fails.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script this sees only its own folder

from scripts.chaos_run import (  # noqa: E402
    EVERY,
    KEEP,
    PAUSE_SECONDS,
    RENAMED,
    SHARDS,
    START,
    TMP,
    TRAINING,
    Failed,
    Run,
    compare_records,
    damage,
    difference,
)

MOST_STEPS_BETWEEN = 12
"""Most steps between two faults; the least is one."""
STEPS_AFTER = 20
"""Steps after the last fault."""
FAULTS_OF_A_RUN = 10
START_SECONDS = 4.0
"""Most seconds from the start of a launch to a fault during start-up."""
DISK_BYTES = 8 << 20
"""Size of the disk that becomes full. A checkpoint has half a MiB, and needs one more."""
OWN_MOUNTS = "MYTHOS_CHAOS_MOUNTS"
"""Environment variable: set if this process may mount."""

RANK, ALL, LAUNCHER = "one rank", "everything", "launch.sh and torchrun"

KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "rank killed": ((START, TRAINING, TRAINING), (RANK,)),
    "all killed": ((START, TRAINING, TRAINING), (ALL, ALL, LAUNCHER)),
    "killed while shards are written": ((TMP,), (RANK, ALL)),
    "killed between shards and marker": ((SHARDS, RENAMED), (RANK, ALL)),
    "SIGTERM": ((TRAINING, TMP, RENAMED), (RANK,)),
    "disk full": ((TRAINING, TMP, SHARDS, RENAMED), (RANK,)),
    "flipped byte": ((TRAINING,), (ALL,)),
    "NaN": ((TRAINING,), (RANK,)),
}
"""For each kind of fault, the moments and targets that are drawn from."""


class Fault(NamedTuple):
    """A planned fault."""

    kind: str
    when: str
    target: str
    rank: int
    step: int
    """Steps done by then."""

    @property
    def restarts_in_place(self) -> bool:
        """Whether torchrun starts the processes again by itself."""
        return self.target == RANK and self.kind not in ("SIGTERM", "disk full", "NaN")

    def __str__(self) -> str:
        who = f"rank {self.rank}" if self.target == RANK else self.target
        return f"{self.kind} ({who}, {self.when}, step {self.step})"


@dataclass
class Outcome:
    """The circumstances and the cost of a fault."""

    fault: Fault
    met: str
    """The moment that the newest save had reached, by the files on disk; "" without one."""
    moment: float
    """Time of the fault, by time.monotonic."""
    gone: float | None = None
    """Seconds until all earlier processes had ended."""
    next_step: float | None = None
    """Seconds until the next step began."""
    lost: int | None = None
    """Steps that were trained again."""


def draw_faults(draw: random.Random, kinds: Iterator[str], count: int, processes: int) -> list[Fault]:
    """Draw the faults of a run; faults during start-up only follow faults that cause one."""
    faults: list[Fault] = []
    step = EVERY
    for kind in itertools.islice(kinds, count):
        moments, targets = KINDS[kind]
        starting = not faults or faults[-1].kind != "NaN"
        when = draw.choice([moment for moment in moments if starting or moment != START])
        # Where no disk can be filled, file sizes are limited instead. Rank 0 writes files that must not fail.
        rank = draw.randrange(1 if kind == "disk full" else 0, processes)
        step += draw.randint(1, MOST_STEPS_BETWEEN)
        faults.append(Fault(kind, when, draw.choice(targets), rank, step))
    return faults


def deck(draw: random.Random, kinds: Sequence[str]) -> Iterator[str]:
    """Every kind equally often, in random order."""
    while True:
        yield from draw.sample(kinds, len(kinds))


class Chaos:
    """Inflicts faults on a run and compares it with the reference after each."""

    def __init__(self, run: Run, reference: Run, draw: random.Random, mounted: bool) -> None:
        self.run, self.reference, self.draw, self.mounted = run, reference, draw, mounted
        self.known: set[int] = set()
        """Steps of the checkpoints that were committed, are whole, and may not be lost."""
        self.flipped: int | None = None
        """Step of a damaged checkpoint that no process has detected so far."""
        self.newest = 0
        """Step of the checkpoint that the run must continue from."""
        self.compared = 0
        self.outcomes: list[Outcome] = []

    def go(self, faults: list[Fault], progress: Callable[[Outcome], None]) -> None:
        """Inflict all faults and let the run end; raises Failed naming the fault after which a check failed."""
        fault: Fault | None = None
        try:
            for number, fault in enumerate(faults):
                if self.run.process is None:
                    ahead = itertools.takewhile(lambda f: f.restarts_in_place or f.kind == "NaN", faults[number:])
                    # One more than needed: an error that a restart would meet again must end the run all the same.
                    self.run.launch(restarts=1 + sum(f.restarts_in_place for f in ahead))
                self.outcomes.append(self.happen(fault))
                progress(self.outcomes[-1])
            if self.run.process is None:
                self.run.launch(restarts=1)
            self.finish()
        except Failed as error:
            raise Failed(f"after {fault or 'no fault'}: {error}") from error

    def happen(self, fault: Fault) -> Outcome:
        """Wait for the fault's moment, inflict it, and check the run's files and processes."""
        run = self.run
        self.await_moment(fault)
        moment = time.monotonic()
        if fault.kind == "NaN":
            return Outcome(fault, "", moment)
        outcome = Outcome(fault, run.save_under_way(), moment)
        pids, printed = run.pids(), len(run.printed())
        if fault.kind == "SIGTERM":
            os.kill(pids[fault.rank], signal.SIGTERM)
        elif fault.kind == "disk full":
            self.fill(fault)
        else:
            self.kill(fault)
        if fault.restarts_in_place:
            run.wait_gone(pids)
        else:
            self.check_end(fault, printed)
            run.wait_gone()
        outcome.gone = time.monotonic() - moment
        if fault.kind == "disk full":
            (run.checkpoints / "fill").unlink(missing_ok=True)
        run.plan()

        steps = run.steps(0, "step")
        after = sum(when > moment for when, _, _ in run.events(0, "step"))
        if fault.target == LAUNCHER and after > 2:
            raise Failed(f"the ranks trained {after} steps after launch.sh and torchrun were gone")
        self.look()
        if steps:
            outcome.lost = steps[-1] + 1 - self.newest
            if outcome.lost and (fault.kind == "SIGTERM" or fault.target == LAUNCHER):
                raise Failed(f"{steps[-1] + 1} steps were done, {self.newest} are saved")
        if fault.kind == "flipped byte":
            self.flip()
        if fault.restarts_in_place:
            run.since, run.gone = moment, set(pids)  # the next ones may have begun already
        else:
            run.since, run.gone, run.process = time.monotonic(), set(), None
        return outcome

    def await_moment(self, fault: Fault) -> None:
        """Wait until the fault is due, and check that the run has continued from the right checkpoint."""
        run, everyone = self.run, range(self.run.processes)
        after = self.draw.random()
        if fault.when == START:
            if fault.target != ALL:
                run.wait(lambda: len(run.pids()) == run.processes, "all ranks to begin")
            end = time.monotonic() + after * START_SECONDS
            run.wait(lambda: time.monotonic() > end or max(run.steps(0, "step"), default=0) > fault.step, "start-up")
            return
        if fault.when != TRAINING:
            run.plan(pause=(fault.when, fault.step))
        run.wait(lambda: all(run.steps(rank, "step") for rank in everyone), "the first step")
        self.check_continued()
        self.time_next_step()
        if fault.kind == "NaN":
            event = f"poisoned {fault.step} "
            run.wait(lambda: all(run.events(rank, event, ever=True) for rank in everyone), event)
            for rank in everyone:
                if any("not" in event for _, _, event in run.events(rank, event, ever=True)):
                    raise Failed(f"rank {rank} did not skip the update of step {fault.step}")
        elif fault.when == TRAINING:
            two = fault.kind == "flipped byte"  # one to flip, one to go on from
            run.wait(
                lambda: run.steps(fault.rank, "step")[-1] >= fault.step and (not two or len(run.complete()) > 1),
                f"step {fault.step}",
            )
            time.sleep(after * 0.05)
        else:
            run.wait(lambda: max(run.steps(0, f"{fault.when}:"), default=0) >= fault.step, f"a save: {fault.when}")
            time.sleep(after * PAUSE_SECONDS)

    def time_next_step(self) -> None:
        """Record how long faults kept the run from training, including further ones during start-up."""
        if begun := self.run.events(0, "step"):
            for outcome in self.outcomes:
                if outcome.next_step is None and outcome.fault.kind != "NaN":
                    outcome.next_step = begun[0][0] - outcome.moment

    def kill(self, fault: Fault) -> None:
        """End processes with SIGKILL."""
        ranks = self.run.pids()
        if fault.target == RANK:
            os.kill(ranks[fault.rank], signal.SIGKILL)
        elif fault.target == ALL:
            self.run.destroy()
        else:
            for process in self.run.living():
                if process.pid not in ranks:
                    process.kill()

    def fill(self, fault: Fault) -> None:
        """Fill the disk of the checkpoints; without a disk of their own, limit a rank's file size instead."""
        if not self.mounted:
            self.run.plan(limit=(fault.rank, 0))
            return
        with contextlib.suppress(OSError), (self.run.checkpoints / "fill").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    def flip(self) -> None:
        """Change a byte of the newest checkpoint."""
        path = self.run.checkpoints / f"step-{self.newest:08d}"
        file = self.draw.choice(sorted(path.iterdir()))
        content = bytearray(file.read_bytes())
        content[self.draw.randrange(len(content))] ^= 0xFF
        file.write_bytes(content)
        self.flipped = self.newest
        self.known.remove(self.newest)
        self.newest = max(self.known)

    def check_end(self, fault: Fault, printed: int) -> None:
        """Raise Failed if the launch does not end as promised; `printed`: length of its output before the fault."""
        status = self.run.status()
        promised = {"SIGTERM": 0, "disk full": 1}.get(fault.kind, -signal.SIGKILL)
        if status != promised:
            raise Failed(f"the status is {status}, not {promised}\n{self.run.said()}")
        if fault.kind == "disk full":
            output = self.run.printed()[printed:].splitlines()
            errors = [line for line in output if line.startswith("error: ")]
            # Where no disk can be filled, the size of a file is limited, which free space does not mend.
            advice = "Fix that" if "File too large" in "".join(errors) else "Free some space"
            if len(errors) != 1 or not ("could not be written" in errors[0] and advice in errors[0]):
                raise Failed("the full disk is not reported once and clearly:\n" + "\n".join(errors or output))

    def check_continued(self) -> None:
        """Raise Failed if the current processes continued from anything but the newest undamaged checkpoint."""
        for rank in range(self.run.processes):
            for step in self.run.steps(rank, "continued"):
                if step != self.newest:
                    raise Failed(f"rank {rank} continued from step {step}, not {self.newest}\n{self.run.said()}")
                if self.flipped is not None:
                    path = self.run.checkpoints / f"step-{self.flipped:08d}"
                    if f"checkpoint {path} is damaged" not in self.run.printed():
                        raise Failed(f"{path} is damaged, which was not reported\n{self.run.said()}")
                    self.flipped = None

    def look(self, ended: bool = False) -> None:
        """Raise Failed if a checkpoint or a record is lost, damaged or different; update the newest checkpoint.

        Unless the run has `ended`, the last record may be without its validation, which the next start then repeats.
        """
        self.check_continued()
        complete = self.run.complete()
        if self.flipped is not None and complete.pop(self.flipped, None) is None:
            self.flipped = None  # detected by processes that were killed before they continued
        kept = sorted({*self.known, *self.run.steps(0, "committed"), *complete})[-KEEP:]
        if lost := [step for step in kept if step not in complete]:
            raise Failed(f"the committed checkpoint of step {lost[0]} is lost")
        for step, path in complete.items():
            if problem := damage(path):
                raise Failed(f"the committed checkpoint of step {step} is damaged: {problem}")
            if (other := self.reference.checkpoints / path.name).exists():
                if problem := difference(path, other):
                    raise Failed(f"step {step}: {problem}")
                self.compared += 1
        self.known = set(complete)
        self.newest = max(complete, default=0)
        newest = complete.get(self.newest)
        unfinished = None if ended or newest is None else json.loads((newest / "meta.json").read_text())["record"]
        compare_records(self.run.directory, self.reference.directory, self.newest, unfinished)

    def finish(self) -> None:
        """Wait for the end of the run and compare everything."""
        if status := self.run.status():
            raise Failed(f"the run failed at last, with {status}\n{self.run.said()}")
        self.run.wait_gone()
        self.look(ended=True)
        last = max(self.reference.complete())
        if self.newest != last:
            raise Failed(f"the run ended at step {self.newest}, not {last}")
        self.time_next_step()


# Runs and summary


class Layout(NamedTuple):
    """Processes of a run."""

    mode: str
    processes: int
    expert: int = 1
    """Processes that share the experts."""

    def __str__(self) -> str:
        experts = f", experts over {self.expert}" if self.expert > 1 else ""
        return f"{self.mode} x {self.processes}{experts}"


LAYOUTS = (
    Layout("ddp", 2),
    Layout("fsdp", 2),
    Layout("fsdp", 2, expert=2),
    Layout("ddp", 2),
    Layout("fsdp", 2),
    Layout("fsdp", 4),
    Layout("ddp", 4),
    Layout("fsdp", 4, expert=2),
)
"""Layouts of the runs, in turn."""


def settings(folder: Path, layout: Layout, steps: int) -> dict[str, Any]:
    """The configuration of a run: a model of 40,000 parameters on a generated corpus, checkpoints often."""
    corpus = folder / "corpus.jsonl"
    if not corpus.exists():
        draw = random.Random(0)
        words = ["river", "naïve", "café", "深い", "loop", "the", "of", "between", "stone", "signal", "garden"]
        texts = [f"{number}: " + " ".join(draw.choices(words, k=draw.choice((5, 30, 200)))) for number in range(120)]
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = {"dim": 32, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8}
    model |= {"qk_nope_head_dim": 8, "v_head_dim": 16, "ffn_dim": 48, "n_experts": 4, "expert_dim": 16}
    model |= {"shared_expert_dim": 16, "loops": 3, "lora_rank": 2, "context_length": 64}
    data = {"kind": "files", "path": str(corpus), "streams": 4, "sequence_length": 32, "workers": 0}
    return {
        "model": model,
        "tokenizer": {"vocab_size": 384},
        "data": {**data, "cache_dir": str(folder / "cache"), "validation": {"fraction": 0.2}},
        "depth": {"backprop": 2, "curriculum": {"shape": "linear", "over": 0.5, "start": 1}},
        "train": {"steps": steps, "global_batch": 8, "micro_batch": 2, "dtype": "float32"},
        "eval": {"every": 0, "batches": 1, "loops": [3], "samples": 0},
        "checkpoint": {"every": EVERY, "keep": KEEP, "asynchronous": True},
        "parallel": {"mode": layout.mode, "expert": layout.expert, "start_timeout": 120, "timeout": 30},
        "log": {"every": 1},
    }


def disturb(folder: Path, name: str, layout: Layout, faults: list[Fault], draw: random.Random, mount: bool) -> Chaos:
    """Train once undisturbed and once under faults, and compare; raises Failed."""
    values = settings(folder, layout, faults[-1].step + STEPS_AFTER)
    nan = {fault.step: fault.rank for fault in faults if fault.kind == "NaN"}
    # Checkpoints of every step, because a run that gets SIGTERM saves at any step.
    every_step = {**values, "checkpoint": {"every": 1, "keep": len(range(values["train"]["steps"]))}}
    reference = Run(folder / f"{name}-reference", every_step, layout.processes, nan)
    run = Run(folder / f"{name}-faults", values, layout.processes, nan)
    if mount:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "none", str(run.checkpoints)], check=True, timeout=30
        )
    chaos = Chaos(run, reference, draw, mount)

    def progress(outcome: Outcome) -> None:
        result = f"at step {chaos.newest}, {outcome.lost or 0} lost" if outcome.gone is not None else "skipped"
        print(
            f"{layout}, {len(chaos.outcomes):2d}/{len(faults)}: {outcome.fault}; {result}",
            flush=True,
        )

    try:
        reference.train_alone()
        chaos.go(faults, progress)
    finally:
        reference.destroy()
        run.destroy()
        if mount:
            subprocess.run(["umount", str(run.checkpoints)], check=True, timeout=30)
    return chaos


def summary(runs: list[tuple[Layout, Chaos]], seconds: float) -> str:
    """The figures as a Markdown table."""
    outcomes = [outcome for _, chaos in runs for outcome in chaos.outcomes]

    def spread(values: list[float], form: str) -> str:
        return f"{statistics.median(values):{form}}, at most {max(values):{form}}" if values else "-"

    def counts(values: list[str]) -> str:
        return ", ".join(f"{name}: {count}" for name, count in sorted(Counter(values).items()))

    killed = [outcome for outcome in outcomes if "killed" in outcome.fault.kind]
    lines = {
        "runs, processes each": counts([str(layout) for layout, _ in runs]),
        "steps": f"{sum(max(chaos.reference.complete()) for _, chaos in runs)}",
        "faults": str(len(outcomes)),
        "killed": counts([outcome.fault.target for outcome in killed]),
        "killed in start-up": str(sum(outcome.fault.when == START for outcome in killed)),
        "killed in a save": counts([f"{outcome.met}" for outcome in killed if outcome.met]),
        "checkpoints lost": "0",
        "continued from another than the newest undamaged checkpoint": "0",
        "processes left behind": "0",
        "checkpoints compared bit by bit": str(sum(chaos.compared for _, chaos in runs)),
        "differences": "0",
        "until all earlier processes had ended, s": spread([o.gone for o in killed if o.gone is not None], ".1f"),
        "in all, s": f"{seconds:,.0f}",
        "versions": f"Python {platform.python_version()}, torch {version('torch')}",
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines.items())]
    table += [
        "",
        "| fault | count | seconds to the next step, median | steps trained again, median |",
        "|---|---|---|---|",
    ]
    for kind in KINDS:
        some = [outcome for outcome in outcomes if outcome.fault.kind == kind]
        taken = spread([o.next_step for o in some if o.next_step is not None], ".1f")
        lost = spread([o.lost for o in some if o.lost is not None], ".0f")
        if some:
            table.append(f"| {kind} | {len(some)} | {taken} | {lost} |")
    return "\n".join(table)


def get_own_mounts(folder: Path) -> None:
    """Restart this command in a namespace of its own in which it may mount a disk, if the system allows that."""
    if OWN_MOUNTS in os.environ or shutil.which("unshare") is None:
        return
    alone = ["unshare", "--mount", "--propagation", "private", *(["--user", "--map-root-user"] if os.getuid() else [])]
    attempt = [*alone, "mount", "-t", "tmpfs", "none", str(folder)]
    if subprocess.run(attempt, capture_output=True, timeout=30).returncode == 0:
        folder.rmdir()
        os.environ[OWN_MOUNTS] = "yes"
        os.execvp(alone[0], [*alone, sys.executable, *sys.argv])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=60, help="how many (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of kinds, moments and targets (%(default)s)")
    parser.add_argument("--kinds", default=",".join(KINDS), help="only these, separated by commas (%(default)s)")
    parser.add_argument("--experts", action="store_true", help="only layouts whose processes divide the experts")
    parser.add_argument("--folder", type=Path, help="an empty directory for runs and logs, kept if something fails")
    options = parser.parse_args(arguments)
    kinds = options.kinds.split(",")
    if options.faults < 1 or not set(kinds) <= KINDS.keys():
        parser.error(f"--faults: at least 1; --kinds: some of {', '.join(KINDS)}")
    folder = options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    if arguments is None:
        get_own_mounts(folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that processes and mounts are ended
    begun = time.monotonic()
    draw = random.Random(options.seed)
    order = deck(draw, kinds)
    layouts = [layout for layout in LAYOUTS if layout.expert > 1 or not options.experts]
    runs: list[tuple[Layout, Chaos]] = []
    try:
        count = -(-options.faults // FAULTS_OF_A_RUN)
        for number in range(count):
            layout = layouts[number % len(layouts)]
            share = options.faults // count + (number < options.faults % count)
            faults = draw_faults(draw, order, share, layout.processes)
            runs.append(
                (layout, disturb(folder, f"{number}-{layout.mode}", layout, faults, draw, OWN_MOUNTS in os.environ))
            )
    except Failed as error:
        print(f"FAILED {error}\nrecords and logs: {folder}", file=sys.stderr)
        return 1
    print(f"\n{summary(runs, time.monotonic() - begun)}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
