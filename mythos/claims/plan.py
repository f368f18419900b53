"""The text of `mythos claims NAME --dry-run`: runs, tokens, FLOPs and time, and the launch commands of size full."""

import math
import shlex
from pathlib import Path

from mythos.claims.costs import GPU, GPUS_OF_SIZE, cost_of, gpu_hours
from mythos.claims.runner import Task, open_results
from mythos.config.loading import save_config
from mythos.files.local import writing
from mythos.planning.trace_cache import kept_on_disk
from mythos.progress import duration, scaled

LAUNCHES = "launch"
"""Folder with the configurations of runs that are launched, in the claim's run directory."""


def plan_text(task: Task) -> str:
    """Describe what a claim will run."""
    claim, results = task.claim, open_results(task)
    planned = task.planned(results)
    left = [run for run in planned if run.name not in results.runs]
    tuned = math.prod(map(len, claim.tune.values())) if claim.tune else 1
    lines = [
        f"{claim.name}, size {claim.size}: {claim.definition.claim}",
        f"hypothesis      {claim.definition.hypothesis}",
        f"metric          {claim.definition.metric}",
        f"definition      {claim.digest()}, results in {task.out}",
    ]
    if not planned:
        return "\n".join([*lines, "runs            none: everything is measured without training"])
    cost = cost_of(left)
    points = math.prod(map(len, claim.grid.values())) if claim.grid else 1
    counts = f"{len(claim.arms)} arms x {points} grid points x {task.seeds} seeds"
    counts += f", and {tuned} tuning values with seed 0" if claim.tune else ""
    lines += [
        f"runs            {len(planned)} ({counts}), {len(planned) - len(left)} recorded",
        f"left            {scaled(cost.tokens)} tokens, {cost.flops:.2e} FLOPs",
    ]
    if claim.size == "nano":
        lines.append(f"time            about {duration(cost.cpu_seconds)} on one CPU core")
    else:
        gpus = GPUS_OF_SIZE[claim.size]
        with kept_on_disk():
            hours = [gpu_hours(run.config, gpus) for run in left]
        total = sum(hours)
        lines.append(f"time            about {total:,.1f} GPU hours: {duration(3600 * total / gpus)} on {gpus} {GPU}")
        lines.append("                from a model of a step, not measured")
    lines += ["", *(f"  {run.name}" + " (recorded)" * (run.name in results.runs) for run in planned)]
    return "\n".join(lines)


def write_launches(task: Task) -> list[str]:
    """Write the configuration of every run that is left, and return the commands that launch them.

    Other seeds of an arm whose tuning grid has not all been run with seed 0 are left for a later call: their values are
    not known yet. Raises MythosError if the files cannot be written.
    """
    results = open_results(task)
    folder, best = task.directory / LAUNCHES, results.best(task.claim)
    commands = []
    with writing(folder, advice=""):
        folder.mkdir(parents=True, exist_ok=True)
        for run in task.planned(results):
            known = not task.claim.tune or run.seed == 0 or task.claim.place_of(run.arm, run.point) in best
            if run.name not in results.runs and known:
                path: Path = folder / f"{run.name}.yaml"
                save_config(run.config, path)
                commands.append(f"./launch.sh {shlex.quote(str(path))}")
    return commands
