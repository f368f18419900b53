"""Stable learning rates by injection: the highest of each arm, and its lowest loss."""

import math

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import lines_panel
from mythos.claims.results import Results, RunResult, grouped
from mythos.reports.style import Panel

RATE = "optim.lr"
OURS, OTHERS = "lti", ("add", "linear")
DEEPER = 4
"""The second depth at which a stable run's loss is bounded, in training means."""
WITHOUT_RECORD = {"add": "1 by construction", "linear": "not bounded"}
"""rho(A) of injections that record none, by `model.injection`."""


def losses(run: RunResult) -> tuple[float, float]:
    """Losses at the training mean and at four times as many loops; infinite for a run that diverged."""
    values = [run.last(f"val/loss@{run.mean_loops * factor}") for factor in (1, DEEPER)]
    bad = run.diverged is not None or any(map(math.isnan, values))
    return (math.inf, math.inf) if bad else (values[0], values[1])


def by_rate(results: Results, arm: str) -> dict[float, list[RunResult]]:
    """The runs of an arm by learning rate, lowest first."""
    return dict(sorted(grouped((float(run.point[RATE]), run) for run in results.of_arm(arm)).items()))


def mean_loss(runs: list[RunResult]) -> float:
    """Mean loss over seeds at the training mean."""
    return mean([losses(run)[0] for run in runs])


def stable(runs: list[RunResult], limit: float) -> bool:
    """Whether on every seed no update was skipped and both losses are within the limit."""
    return all(run.skipped == 0 and max(losses(run)) <= limit for run in runs)


def loss_limit(claim: Claim, results: Results) -> float:
    """The highest loss of a stable run: the lowest mean loss of any arm and rate, plus the allowed distance."""
    means = [mean_loss(runs) for arm in claim.arms for runs in by_rate(results, arm).values()]
    return min(means) + claim.thresholds["nats"]


def failed(runs: list[RunResult]) -> int:
    """Number of runs that diverged or skipped an update."""
    return sum(run.diverged is not None or run.skipped > 0 for run in runs)


def judge(claim: Claim, results: Results) -> Judgement:
    """Compare the highest stable rate and the lowest loss of the LTI injection with those of the unconstrained ones."""
    arms = {arm: by_rate(results, arm) for arm in claim.arms}
    best = {arm: min(map(mean_loss, rates.values())) for arm, rates in arms.items()}
    limit = loss_limit(claim, results)
    highest = {
        arm: max((rate for rate, runs in rates.items() if stable(runs, limit)), default=0.0)
        for arm, rates in arms.items()
    }
    wider = [arm for arm in OTHERS if highest[OURS] >= claim.thresholds["range"] * highest[arm]]
    lower = [arm for arm in OTHERS if best[OURS] <= best[arm] + claim.thresholds["loss"]]
    # What the definition calls a falsification comes before its conditions, which this result may meet as well.
    falsified = [
        arm
        for arm in OTHERS
        if 0 < highest[OURS] <= highest[arm] and best[arm] <= best[OURS] + claim.thresholds["loss"]
    ]
    if falsified or not wider:
        outcome = NOT_SUPPORTED
    else:
        outcome = SUPPORTED if len(wider) == len(lower) == len(OTHERS) else CONDITIONS
    rows = [
        [
            f"`{arm}`",
            *(cell(runs, limit) for runs in rates.values()),
            f"{highest[arm]:g}",
            f"{best[arm]:.3f}",
            f"{failed(results.of_arm(arm))} of {len(results.of_arm(arm))}",
        ]
        for arm, rates in arms.items()
    ]
    grid = [f"{rate:g}" for rate in arms[OURS]]
    state = Table(
        "Size of the state, log ||h||, in the last validation's record, and the largest rho(A) during training",
        ["arm", *grid, "rho(A)"],
        [
            [
                f"`{arm}`",
                *(spread([run.last("state_norm") for run in runs], ".2f") for runs in rates.values()),
                radius(rates, claim.arms[arm].get("model.injection", "")),
            ]
            for arm, rates in arms.items()
        ],
    )
    number = "highest stable rate: " + ", ".join(f"{arm} {highest[arm]:g}" for arm in (OURS, *OTHERS))
    why = (
        f"The LTI injection is stable up to {highest[OURS]:g} (lowest loss {best[OURS]:.3f}), "
        + ", ".join(f"{arm} up to {highest[arm]:g} ({best[arm]:.3f})" for arm in arms if arm != OURS)
        + f". Stable means at most {limit:.3f} nats at the training mean of the loops and at {DEEPER} times as many."
        + bad_runs(results)
        + f" Falsified: {' and '.join(falsified)} is as stable at an equal or lower loss." * bool(falsified)
    )
    head = ["arm", *grid, "highest stable", "lowest mean loss", "runs that diverged or skipped an update"]
    return Judgement(
        outcome, number, why, [Table("Validation loss, nats per token, by learning rate (* stable)", head, rows), state]
    )


def cell(runs: list[RunResult], limit: float) -> str:
    """Losses of the seeds, with a mark if the rate is stable."""
    diverged = sum(run.diverged is not None for run in runs)
    if diverged:
        return f"{diverged} of {len(runs)} diverged"
    return spread([losses(run)[0] for run in runs]) + (" *" if stable(runs, limit) else "")


def bad_runs(results: Results) -> str:
    """A sentence on runs that diverged or skipped an update, and on the meaning of stable if there are none."""
    runs = list(results.runs.values())
    if bad := failed(runs):
        return f" {bad} of {len(runs)} runs diverged or skipped an update."
    steps = max(run.last("step") for run in runs)
    return (
        f" No run diverged or skipped an update, so stable says only that a run reached this loss within {steps:.0f} "
        "steps."
    )


def radius(rates: dict[float, list[RunResult]], injection: str) -> str:
    """The largest spectral radius of all runs; in words if the injection records none."""
    values = [run.largest.get("rho_a") for runs in rates.values() for run in runs]
    finite = [value for value in values if value is not None]
    return f"{max(finite):.3f}" if finite else WITHOUT_RECORD.get(injection, "")


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Loss by learning rate, with filled markers where it is stable."""
    limit = loss_limit(claim, results)
    arms = {arm: by_rate(results, arm) for arm in claim.arms}
    lines = {
        arm: [(rate, [losses(run)[0] for run in runs]) for rate, runs in rates.items()] for arm, rates in arms.items()
    }
    filled = {arm: [rate for rate, runs in rates.items() if stable(runs, limit)] for arm, rates in arms.items()}
    title = "Loss by learning rate and injection (filled: stable on every seed)"
    y = "validation loss, nats per token"
    return [lines_panel(title, "learning rate", y, lines, log_x=True, level=(limit, "loss limit"), filled=filled)]
