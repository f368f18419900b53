"""Kill a run whose experts are divided, and continue it with other ways to divide them, again and again.

python scripts/expert_kill_test.py --kills 20 --seed 0

A tiny model trains in one to four processes on the CPU. After a random number of steps one process or all are killed
with SIGKILL, also in the middle of a save, and the run continues under another layout from its newest checkpoint. At
the end every step must be recorded once, with the loss of a run in one process that was never stopped, within
TOLERANCE, or within ROUNDING times what rounding alone does to this recipe: the difference up to that step between two
runs in one process, one of which adds up its gradients in micro-batches of another size. The exit status is 1 if not.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # as a script this sees only its own folder

from mythos.training.metrics import read_metrics  # noqa: E402
from scripts import chaos_test  # noqa: E402
from scripts.chaos_run import Failed, start_ranks  # noqa: E402

TOLERANCE = 1e-4
"""Relative difference of losses that is always allowed: layouts add up in another order, and training amplifies it."""
ROUNDING = 2.0
"""Allowed multiple of the difference between the two runs in one process."""
STEPS_BETWEEN = 4
"""Most steps from the start of a generation to its kill; the least is one."""
PATIENCE = 600.0
"""Seconds after which a generation counts as hanging."""


class Generation(NamedTuple):
    """One start of the run, and its end."""

    processes: int
    mode: str
    expert: int
    shard: int | None = None
    shared: int = 1
    steps: int | None = None
    """Kill once so many more steps are saved; None = let the run end."""
    victims: int = 1
    """Processes that are killed, the last ones; the others notice."""
    delay: float = 0.0
    """Seconds from the last of these saves to the kill."""

    @property
    def overrides(self) -> list[str]:
        """Its settings on the command line."""
        shard = "null" if self.shard is None else self.shard
        sizes = {"expert": self.expert, "shared": self.shared, "shard": shard}
        return [f"parallel.mode={self.mode}", *(f"parallel.{name}={size}" for name, size in sizes.items())]


LAYOUTS = (
    Generation(2, "fsdp", 2),
    Generation(4, "fsdp", 4),
    Generation(4, "fsdp", 4, shared=2),
    Generation(1, "single", 1),
    Generation(4, "hsdp", 2, shard=2),
    Generation(2, "fsdp", 1),
    Generation(4, "fsdp", 2),
    Generation(2, "ddp", 1),
)
"""Layouts that are drawn from."""


def draw_generations(draw: random.Random, kills: int) -> list[Generation]:
    """Draw the layouts, each another one than before, and their kills; the last one is not killed."""
    generations: list[Generation] = []
    for _ in range(kills + 1):
        layout = draw.choice([each for each in LAYOUTS if not generations or each[:5] != generations[-1][:5]])
        victims = draw.choice((1, layout.processes))
        steps = draw.randint(1, STEPS_BETWEEN)
        generations.append(layout._replace(steps=steps, victims=victims, delay=draw.uniform(0, 0.3)))
    generations[-1] = generations[-1]._replace(steps=None)
    return generations


def saved(run: Path) -> int:
    """Step of the newest complete checkpoint, 0 without one."""
    return max((int(path.parent.name[5:]) for path in run.glob("checkpoints/step-????????/committed")), default=0)


def live(config: Path, run: Path, generation: Generation, log: Path) -> None:
    """Run a generation to its kill or to the end; raises Failed if it does neither."""
    begun, deadline = saved(run), time.monotonic() + PATIENCE
    command = [sys.executable, "-m", "mythos", "train", str(config), *generation.overrides]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = start_ranks(command, generation.processes, environment, log, ROOT)
    try:
        while generation.steps is None or saved(run) < begun + generation.steps:
            if time.monotonic() > deadline:
                raise Failed(f"{generation} took more than {PATIENCE:.0f} s; see {log}")
            statuses = [process.poll() for process in processes]
            if any(status for status in statuses):
                raise Failed(f"{generation} ended with {statuses}; see {log}")
            if None not in statuses:
                return  # it has done all steps
            time.sleep(0.02)
        time.sleep(generation.delay)
        for process in processes[-generation.victims :]:
            process.kill()
        for process in processes:
            process.wait(PATIENCE)
    finally:
        for process in processes:
            process.kill()
            process.wait()


def relay(folder: Path, generations: list[Generation], steps: int) -> tuple[list[int], float, float]:
    """Run all generations and compare.

    Returns the steps at which they continued, the largest relative difference to the run in one process, and that
    between the two runs in one process. Raises Failed.
    """
    values = chaos_test.settings(folder, chaos_test.Layout("single", 1), steps)
    values["optim"] = {"lr": 3e-3, "eps": 1e-5}
    values["checkpoint"] |= {"every": 1, "keep": 3}
    values["train"]["device"] = "cpu"
    continued, log = [], folder / "log"
    runs = {name: folder / name for name in ("reference", "rounding", "relay")}
    for name, run in runs.items():
        values["run"] = {"name": name, "dir": str(run)}
        values["train"]["micro_batch"] = 4 if name == "rounding" else 2
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(values))
        for generation in generations if name == "relay" else [Generation(1, "single", 1)]:
            if name == "relay":
                continued.append(saved(run))
            live(config, run, generation, log)
    expected, rounded, actual = (
        {record["step"]: record["loss"] for record in read_metrics(run / "metrics.jsonl")} for run in runs.values()
    )
    if list(actual) != list(expected) or len(actual) != steps:
        raise Failed(f"recorded steps {list(actual)}, not {list(expected)}")
    largest, rounding = 0.0, 0.0
    for step, loss in expected.items():
        rounding = max(rounding, abs(rounded[step] - loss) / loss)
        largest = max(largest, abs(actual[step] - loss) / loss)
        if largest > max(TOLERANCE, ROUNDING * rounding):
            raise Failed(
                f"step {step}: loss {actual[step]}, in one process {loss} (rounding alone: {rounding:.1e} of the loss)"
            )
    return continued, largest, rounding


def main(arguments: list[str] | None = None) -> int:
    """Draw generations and run them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="number of kills (default 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default 0)")
    options = parser.parse_args(arguments)
    generations = draw_generations(random.Random(options.seed), options.kills)
    folder = Path(tempfile.mkdtemp(prefix="expert-kills-"))
    try:
        continued, largest, rounding = relay(folder, generations, STEPS_BETWEEN * (options.kills + 2))
    except Failed as error:
        print(f"FAILED {error}\nrecords and logs: {folder}", file=sys.stderr)
        return 1
    for generation, step in zip(generations, continued, strict=True):
        print(f"continued from step {step:4d}: {' '.join(generation.overrides)} on {generation.processes}")
    print(f"losses differ by at most {largest:.1e}; with other micro-batches in one process by {rounding:.1e}")
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
