"""Perplexity of looped and fixed-depth models at equal parameters, FLOPs and effective depth, by number of tokens."""

import itertools
from math import exp, log

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult, final_loss, grouped

STEPS = "train.steps"
LOOPED, EQUAL, DEEP = "looped", "parameters", "depth"
MOE = "-moe"
"""End of the names of arms whose core is a mixture of experts."""


def perplexities(claim: Claim, results: Results) -> dict[str, dict[int, list[float]]]:
    """Perplexities of the chosen runs by arm and number of training steps."""
    runs = grouped((run.arm, run) for run in results.chosen(claim))
    found = {arm: grouped((run.point[STEPS], exp(final_loss(run))) for run in runs.get(arm, ())) for arm in claim.arms}
    return {arm: dict(sorted(values.items())) for arm, values in found.items()}


def ratio(values: dict[str, dict[int, list[float]]], arm: str, against: str, steps: int) -> float:
    """Mean perplexity of an arm over that of another, minus 1."""
    return mean(values[arm][steps]) / mean(values[against][steps]) - 1


def crossing(points: list[tuple[float, float]]) -> float | None:
    """Where a curve of (tokens a parameter, ratio) crosses 0, on a logarithmic axis; None if it does not.

    The first crossing, whatever its direction.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if (y0 > 0) != (y1 > 0):
            return exp(log(x0) + (log(x1) - log(x0)) * y0 / (y0 - y1))
    return None


def tokens_a_parameter(results: Results, arm: str) -> dict[int, float]:
    """Training tokens over parameters, by number of steps."""
    return {run.point[STEPS]: run.tokens / run.parameters for run in results.of_arm(arm)}


def judge(claim: Claim, results: Results) -> Judgement:
    """Compare the loop with a deep model at the most tokens, and with one of its own size at any."""
    values = perplexities(claim, results)
    steps = list(values[LOOPED])
    deep = ratio(values, LOOPED, DEEP, steps[-1])
    equal = {count: ratio(values, LOOPED, EQUAL, count) for count in steps}
    if deep <= claim.thresholds["harm"]:
        outcome = SUPPORTED
    else:
        outcome = CONDITIONS if min(equal.values()) < 0 else NOT_SUPPORTED
    per_parameter = tokens_a_parameter(results, LOOPED)
    rows = []
    for arm, by_steps in values.items():
        runs = [run for run in results.chosen(claim) if run.arm == arm and run.point[STEPS] == steps[-1]]
        rows.append(
            [
                f"`{arm}`",
                *(spread(by_steps[count], ".2f") for count in steps),
                *facts(runs[0]),
                rates(claim, results, arm),
            ]
        )
    head = [
        "arm",
        *(f"{per_parameter[count]:.2g} tokens a parameter" for count in steps),
        "parameters",
        "FLOPs",
        "rates",
    ]
    why = (
        f"At the most tokens the looped model has {deep:+.1%} perplexity against as many blocks as loops run. "
        f"Against the same blocks run once it has {by_tokens(values, results, '')}; as mixtures of experts "
        f"{by_tokens(values, results, MOE)}."
    )
    table = Table("Perplexity at the tuned learning rate, means over seeds (range)", head, rows)
    return Judgement(
        outcome, f"{deep:+.1%} against equal depth, {equal[steps[-1]]:+.1%} against equal parameters", why, [table]
    )


def by_tokens(values: dict[str, dict[int, list[float]]], results: Results, kind: str) -> str:
    """The looped model against the same blocks run once, by tokens a parameter, and where they cross."""
    per_parameter = tokens_a_parameter(results, LOOPED + kind)
    curve = [(per_parameter[count], ratio(values, LOOPED + kind, EQUAL + kind, count)) for count in values[LOOPED]]
    where = crossing(curve)
    text = ", ".join(f"{value:+.1%} at {tokens:.2g}" for tokens, value in curve) + " tokens a parameter"
    return text + (f" (equal at {where:.2g})" if where else " (the curves do not cross)")


def facts(run: RunResult) -> tuple[str, str]:
    """Parameters and FLOPs of a run as text."""
    return f"{run.parameters:,}", f"{run.flops:.2e}"


def rates(claim: Claim, results: Results, arm: str) -> str:
    """The tuned learning rates of an arm, by number of steps."""
    chosen = {run.point[STEPS]: run.point["optim.lr"] for run in results.chosen(claim) if run.arm == arm}
    return ", ".join(f"{rate:g}" for _, rate in sorted(chosen.items()))


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Perplexity of the loop against each other arm, by tokens a parameter of the looped model."""
    values = perplexities(claim, results)
    others = {arm: LOOPED + MOE * arm.endswith(MOE) for arm in claim.arms if not arm.startswith(LOOPED)}
    lines = {}
    for arm, loop in others.items():
        per_parameter = tokens_a_parameter(results, loop)
        lines[f"against {arm}"] = [
            (per_parameter[count], 100 * ratio(values, loop, arm, count)) for count in values[LOOPED]
        ]
    title = "Perplexity of the looped model over that of others (0: equal)"
    return [lines_panel(title, "training tokens a parameter", "percent", lines, log_x=True)]
