"""Perplexity at more loops than in training, by how depths were drawn and what is read out."""

from math import exp, expm1, inf

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult

TIMES = 8
OURS, ALSO, FIXED = "random", "curriculum", "fixed"
UNMEASURED = "-"


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
    runs = {arm: results.finished(arm) for arm in claim.arms}
    depths = sorted({loops for found in runs.values() for run in found for loops in perplexities(run)})
    rows = [
        [
            f"`{arm}`",
            *(
                spread([perplexities(run)[n] for run in found if n in perplexities(run)], ".1f") or UNMEASURED
                for n in depths
            ),
            f"{harms[arm]:+.2%}",
        ]
        for arm, found in runs.items()
    ]
    title = "Perplexity by loops, means over seeds (range)"
    if any(UNMEASURED in row for row in rows):
        title += (
            f". `act` reads out the average of its passes, up to the loop in which a position halts, and not the last "
            f"state. Its columns are limits of the loops; {UNMEASURED} is a limit that was not measured"
        )
    table = Table(title, ["arm", *map(str, depths), "harm"], rows)
    why = "Perplexity at 8 times the training mean over the lowest: " + ", ".join(
        f"{arm} {value:+.2%}" for arm, value in harms.items()
    )
    why += "."
    if max(harms[FIXED], harms[OURS]) <= limit:
        why += f" The arm `{FIXED}` stays within {limit:.0%} too, so random depth in training is not the reason."
    tables = [table, halted(claim, results)]
    return Judgement(outcome, f"{harms[OURS]:+.2%} at {TIMES} times the loops", why, tables)


def halted(claim: Claim, results: Results) -> Table:
    """Loops and loss when each position halts by the rule that the model was trained for, by limit of the loops."""
    rows = []
    for arm in claim.arms:
        runs = results.finished(arm)
        for points in zip(*(run.measured["sweep"]["halting"] for run in runs), strict=True):
            most = points[0]["most"]
            against = [expm1(point["loss"] - run.swept[most]) for point, run in zip(points, runs, strict=True)]
            loops, losses = ([point[key] for point in points] for key in ("loops", "loss"))
            rows.append([f"`{arm}`", str(most), spread(loops, ".2f"), spread(losses), spread(against, "+z.2%")])
    title = "Halted by the rule of the arm at its default threshold, means over seeds (range)"
    head = ["arm", "most loops", "mean loops", "loss, nats per token", "perplexity against the most loops for all"]
    return Table(title, head, rows)


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Perplexity by loops above the lowest of its arm: at all depths, and enlarged from the training mean on."""
    arms: dict[str, list[tuple[int, list[float]]]] = {}
    for arm in claim.arms:
        runs = [perplexities(run) for run in results.finished(arm)]
        depths = sorted(runs[0]) if runs else []
        arms[arm] = [(n, [100 * (run[n] / min(run.values()) - 1) for run in runs]) for n in depths]
    lines = alike_joined(arms)
    trained = next(iter(results.runs.values())).mean_loops
    deep = {name: [(n, values) for n, values in points if n >= trained] for name, points in lines.items()}
    x, y, level = "loops at inference", "percent above the lowest", (100 * claim.thresholds["harm"], "allowed harm")
    return [
        lines_panel("Perplexity above each arm's lowest", x, y, lines, loops=True, trained=trained, level=level),
        lines_panel("The same from the training mean on, enlarged", x, y, deep, loops=True, trained=trained),
    ]


def alike_joined(lines: dict[str, list[tuple[int, list[float]]]]) -> dict[str, list[tuple[int, list[float]]]]:
    """The lines, with arms of equal points joined under one name, as `gate` and `random`, which train alike."""
    joined: dict[str, list[tuple[int, list[float]]]] = {}
    for arm, points in lines.items():
        same = next((name for name, others in joined.items() if others == points), None)
        if same is not None:
            joined = {f"{name}, {arm}" if name == same else name: others for name, others in joined.items()}
        else:
            joined[arm] = points
    return joined
