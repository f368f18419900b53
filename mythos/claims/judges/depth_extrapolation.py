"""Perplexity at more loops than in training, by how depths were drawn and what is read out."""

from math import exp, inf

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult

TIMES = 8
OURS, ALSO = "random", "curriculum"


def perplexities(run: RunResult) -> dict[int, float]:
    """Perplexity by loops with the last state read out; of a model of act its own average, up to each limit."""
    halting = run.measured["sweep"]["halting"]
    averaged = {point["most"]: point["loss"] for point in halting if point["rule"] == "act"}
    return {loops: exp(loss) for loops, loss in (averaged or run.swept).items()}


def harm(run: RunResult) -> float:
    """Perplexity at 8 times the training mean over the lowest, minus 1; infinite for a run that diverged."""
    if run.diverged is not None:
        return inf
    values = perplexities(run)
    return values[TIMES * run.mean_loops] / min(values.values()) - 1


def judge(claim: Claim, results: Results) -> Judgement:
    """Compare the harm of eight times the loops with the threshold."""
    harms = {arm: mean([harm(run) for run in results.of_arm(arm)]) for arm in claim.arms}
    limit = claim.thresholds["harm"]
    outcome = SUPPORTED if harms[OURS] <= limit else CONDITIONS if harms[ALSO] <= limit else NOT_SUPPORTED
    runs = {arm: [run for run in results.of_arm(arm) if run.diverged is None] for arm in claim.arms}
    depths = sorted({loops for found in runs.values() for run in found for loops in perplexities(run)})
    rows = [
        [
            f"`{arm}`",
            *(spread([perplexities(run)[n] for run in found if n in perplexities(run)], ".1f") for n in depths),
            f"{harms[arm]:+.2%}",
        ]
        for arm, found in runs.items()
    ]
    table = Table("Perplexity by loops, means over seeds (range)", ["arm", *map(str, depths), "harm"], rows)
    why = "Perplexity at 8 times the training mean over the lowest: " + ", ".join(
        f"{arm} {value:+.2%}" for arm, value in harms.items()
    )
    return Judgement(outcome, f"{harms[OURS]:+.2%} at {TIMES} times the loops", f"{why}.", [table])


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Perplexity by loops."""
    lines = {}
    for arm in claim.arms:
        runs = [perplexities(run) for run in results.of_arm(arm) if run.diverged is None]
        lines[arm] = [(n, mean([run[n] for run in runs])) for n in sorted(runs[0])] if runs else []
    trained = next(iter(results.runs.values())).mean_loops
    return [lines_panel("Perplexity by loops", "loops", "perplexity", lines, loops=True, log_y=True, trained=trained)]
