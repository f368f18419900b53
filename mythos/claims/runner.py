"""Run a claim: train what is missing with the ordinary trainer, collect, and judge.

Everything that was finished stays: results are written after each run, and a run that was interrupted continues from
its newest checkpoint.
"""

import contextlib
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mythos.checkpoints.failed_start import removed_if_it_fails
from mythos.claims.collect import collect, is_finished
from mythos.claims.costs import run_flops
from mythos.claims.definition import Claim, PlannedRun
from mythos.claims.judgement import Judgement, judge
from mythos.claims.measures import check_measures, measure_once
from mythos.claims.results import EMBEDDED, FILE, Results, read_results, rounded
from mythos.claims.verdict_page import write_verdict
from mythos.errors import DivergedError, MythosError
from mythos.progress import Console, progress_bar
from mythos.versions import installed_versions

RUNS = Path("runs/claims")
"""Parent of the run directories."""
GIGA = 10**9


@dataclass(frozen=True)
class Task:
    """A claim to be run: at which size, with how many seeds, on which text, and where results go."""

    claim: Claim
    seeds: int
    data: str | None
    """Path of text; None = the text of the claim's base."""
    out: Path

    @property
    def directory(self) -> Path:
        """Parent of the run directories: another one for another definition or text."""
        digest = self.claim.digest()
        if self.data is not None:
            digest += f"-{hashlib.blake2b(self.data.encode(), digest_size=4).hexdigest()}"
        return RUNS / f"{self.claim.name}-{self.claim.size}-{digest}"

    def planned(self, results: Results | None = None) -> list[PlannedRun]:
        """All runs, with the values of the tuning grid that the results have chosen so far."""
        best = results.best(self.claim) if results else {}
        return self.claim.runs(self.seeds, self.directory, self.data, best)


def open_results(task: Task) -> Results:
    """The results in the output folder, or new ones. Raises MythosError if they are of something else."""
    claim, data = task.claim, EMBEDDED if task.data is None else task.data
    results = read_results(task.out)
    if results is None:
        versions = installed_versions(("mythos-rdt", "torch"))
        return Results(claim.name, claim.size, claim.digest(), data, versions)
    expected = {"claim": claim.name, "size": claim.size, "config": claim.digest(), "data": data}
    different = [
        f"{key} {getattr(results, key)}, not {value}"
        for key, value in expected.items()
        if getattr(results, key) != value
    ]
    if different:
        raise MythosError(
            f"{task.out / FILE}: results of another configuration ({'; '.join(different)}). Give another folder with "
            "--out, or delete this one to run the claim anew."
        )
    return results


def run_claim(task: Task, say: Callable[[str], None] = print) -> Judgement:
    """Do everything that is missing, write results, verdict and picture, and return the verdict.

    Raises MythosError for results of another configuration and for runs that cannot be trained, and KeyboardInterrupt
    if a signal stops a run, which has then been saved.
    """
    claim, results = task.claim, open_results(task)
    check_measures(claim.measure, claim.definition.once)
    if claim.definition.once and not results.once:
        results.once = rounded(measure_once(claim.definition.once))
        results.write(task.out)
    total = sum(run_flops(planned.config) for planned in task.planned(results))
    done = sum(run_flops(planned.config) for planned in task.planned(results) if planned.name in results.runs)
    bar: Any
    # FLOPs measure progress, because runs of a claim may differ a hundredfold in length.
    with progress_bar(
        total=round(total / GIGA),
        initial=round(done / GIGA),
        desc=claim.name,
        unit="GFLOP",
        unit_scale=True,
        disable=not task.planned(),
    ) as bar:
        while missing := [planned for planned in task.planned(results) if planned.name not in results.runs]:
            planned = missing[0]
            bar.set_postfix_str(f"{planned.name}, {len(missing)} runs left")
            run = train_and_collect(claim, planned, bar.update)
            results.runs[planned.name] = run
            results.write(task.out)
    judgement = judge(claim, results)
    write_verdict(task.out, claim, results, judgement)
    say(f"{claim.name}: {judgement.outcome}. {judgement.why}")
    return judgement


def collect_finished(task: Task) -> Judgement | None:
    """Collect the runs that others have trained, and judge; None if there are no results yet."""
    claim, results = task.claim, open_results(task)
    check_measures(claim.measure, claim.definition.once)
    for planned in task.planned(results):
        if planned.name not in results.runs and is_finished(planned):
            results.runs[planned.name] = collect(claim, planned)
            results.write(task.out)
    if not results.runs:
        return None
    judgement = judge(claim, results)
    write_verdict(task.out, claim, results, judgement)
    return judgement


def train_and_collect(claim: Claim, planned: PlannedRun, advance: Callable[[float], Any]) -> Any:
    """Train a run unless it is finished, and collect its results; `advance` is told GFLOPs."""
    return collect(claim, planned, None if is_finished(planned) else train(planned, advance))


def train(planned: PlannedRun, advance: Callable[[float], Any]) -> int | None:
    """Train or continue a run. What the trainer prints goes to log.txt in the run directory.

    Returns the step at which it diverged, None if it did not. Raises MythosError for a run that cannot be trained, and
    KeyboardInterrupt if a signal stopped it.
    """
    from mythos.trainer import Trainer

    config = planned.config
    config.run_dir.mkdir(parents=True, exist_ok=True)
    step_cost = run_flops(config) / GIGA / config.train_steps
    with (config.run_dir / "log.txt").open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        with removed_if_it_fails(config):
            trainer = Trainer(config)
        advance(trainer.step * step_cost)
        trainer.console = CountingConsole(lambda: advance(step_cost))
        try:
            trainer.run()
        except DivergedError as error:
            print(error)
            return trainer.step
        reason = trainer.stop.reason
    if not is_finished(planned):
        raise KeyboardInterrupt(reason)
    return None


class CountingConsole(Console):
    """A trainer's console that also advances the claim's progress."""

    def __init__(self, advance: Callable[[], Any]) -> None:
        super().__init__(shown=True)
        self.advance = advance

    def step_done(self) -> None:
        """Advance both."""
        super().step_done()
        self.advance()
