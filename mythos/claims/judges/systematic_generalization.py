"""Two-hop questions about memorised facts that were never composed in training, by loops."""

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult

LOOPED, ONE = "loops-4", "loops-1"
SPLITS = {"train": "of training", "in": "in distribution", "out": "out of distribution"}


def accuracies(run: RunResult, split: str) -> list[tuple[int, float]]:
    """Steps and accuracies of the kept checkpoints, at the loops of training."""
    taken = run.measured["facts"]
    column = taken["loops"].index(run.mean_loops)
    return [(step, row[column]) for step, row in zip(taken["steps"], taken[split], strict=True)]


def last(results: Results, arm: str, split: str) -> list[float]:
    """Accuracies at the end of training; 0 for a run that diverged."""
    return [0.0 if run.diverged is not None else accuracies(run, split)[-1][1] for run in results.of_arm(arm)]


def judge(claim: Claim, results: Results) -> Judgement:
    """Whether four loops reach the accuracy and one does not: out of distribution, or in distribution only."""
    enough = claim.thresholds["accuracy"]
    end = {arm: {split: mean(last(results, arm, split)) for split in SPLITS} for arm in claim.arms}
    reached = {split: end[LOOPED][split] >= enough > end[ONE][split] for split in ("in", "out")}
    outcome = SUPPORTED if reached["out"] else CONDITIONS if reached["in"] else NOT_SUPPORTED
    rows = [[f"`{arm}`", *(spread(last(results, arm, split), ".2f") for split in SPLITS)] for arm in claim.arms]
    title = "Right answers to two-hop questions at the end, means over seeds (range)"
    why = "With 4 loops: " + ", ".join(f"{end[LOOPED][split]:.0%} {name}" for split, name in SPLITS.items())
    why += f"; with 1 loop {end[ONE]['out']:.0%} out of distribution."
    number = f"{end[LOOPED]['out']:.0%} out of distribution with 4 loops"
    return Judgement(outcome, number, why, [Table(title, ["arm", *SPLITS.values()], rows)])


def panels(claim: Claim, results: Results) -> list[Panel]:
    """The phases: accuracy by step of each split, with one loop and with four."""
    found = []
    for arm in (ONE, LOOPED):
        lines = {}
        for split, name in SPLITS.items():
            by_step: dict[int, list[float]] = {}
            for run in results.of_arm(arm):
                for step, value in accuracies(run, split) if run.diverged is None else ():
                    by_step.setdefault(step, []).append(100 * value)
            lines[name] = [(step, mean(values)) for step, values in sorted(by_step.items())]
        title = f"Two-hop questions, {arm.replace('-', ' ')}"
        found.append(lines_panel(title, "step", "percent right", lines))
    return found
