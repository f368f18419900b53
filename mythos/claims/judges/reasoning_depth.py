"""Accuracy beyond the steps of training, by task: looped against fixed-depth models."""

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult

LOOPED, FIXED = "looped", ("parameters", "flops")


def accuracy(run: RunResult, steps: int) -> float:
    """Share of right sequences of so many steps, with as many loops; 0 for a run that diverged."""
    if run.diverged is not None:
        return 0.0
    taken = run.measured["reasoning"]
    row = taken["accuracy"][taken["difficulties"].index(steps)]
    return float(row[taken["loops"].index(steps) if len(taken["loops"]) > 1 else 0])


def tasks(claim: Claim) -> list[str]:
    """The tasks, by the first parts of the arms' names."""
    return list(dict.fromkeys(arm.rpartition("-")[0] for arm in claim.arms))


def judge(claim: Claim, results: Results) -> Judgement:
    """The tasks on which only the looped model reaches the accuracy at the threshold's steps."""
    steps, enough = int(claim.thresholds["steps"]), claim.thresholds["accuracy"]

    def reached(arm: str) -> float:
        return mean([accuracy(run, steps) for run in results.of_arm(arm)])

    won = [
        task
        for task in tasks(claim)
        if reached(f"{task}-{LOOPED}") >= enough > max(reached(f"{task}-{kind}") for kind in FIXED)
    ]
    outcome = SUPPORTED if won == tasks(claim) else CONDITIONS if won else NOT_SUPPORTED
    difficulties = claim.measure["reasoning"]["difficulties"]
    rows = [
        [f"`{arm}`", *(spread([100 * accuracy(run, n) for run in results.of_arm(arm)], ".1f") for n in difficulties)]
        for arm in claim.arms
    ]
    alone = f"only the looped model does so on {', '.join(won)}" if won else "on no task only the looped model does so"
    rates = (
        f"{task} {reached(f'{task}-{LOOPED}'):.0%} ({max(reached(f'{task}-{kind}') for kind in FIXED):.0%})"
        for task in tasks(claim)
    )
    why = (
        f"To get {enough:.0%} of the sequences of {steps} steps right: {alone}. Right by the looped model, and in "
        f"brackets by the better fixed one: {', '.join(rates)}"
    )
    head = ["arm", *(f"{n} steps" for n in difficulties)]
    table = Table("Right sequences in percent, with as many loops as steps, means over seeds (range)", head, rows)
    return Judgement(outcome, f"{len(won)} of {len(tasks(claim))} tasks at {steps} steps", f"{why}.", [table])


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Accuracy by steps: of the looped models, and of the better fixed one."""
    difficulties = claim.measure["reasoning"]["difficulties"]

    def rates(arm: str, steps: int) -> list[float]:
        return [100 * accuracy(run, steps) for run in results.of_arm(arm)]

    looped = {task: [(n, rates(f"{task}-{LOOPED}", n)) for n in difficulties] for task in tasks(claim)}
    fixed = {
        task: [(n, max((rates(f"{task}-{kind}", n) for kind in FIXED), key=mean)) for n in difficulties]
        for task in tasks(claim)
    }
    trained = "trained on 1 to 5"
    return [
        lines_panel(f"Right sequences, {what}", f"{x} ({trained})", "percent", lines, loops=True, y_range=(0, 105))
        for what, x, lines in (
            ("looped models", "steps, and loops", looped),
            ("the better of the two fixed models", "steps", fixed),
        )
    ]
