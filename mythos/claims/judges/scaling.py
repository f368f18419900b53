"""How the best loops and tokens grow with the training FLOPs."""

import math

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Judgement, Table, mean
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results
from mythos.claims.scaling_fits import Point, budgets, exponents, isoflop
from mythos.evaluation.depth_sweep import fit_losses


def points_of(results: Results) -> list[Point]:
    """The finished runs."""
    return [
        Point(run.flops, run.mean_loops, run.tokens, run.last("val/loss"))
        for run in results.runs.values()
        if run.diverged is None
    ]


def judge(claim: Claim, results: Results) -> Judgement:
    """Compare the fitted exponents with the published ones."""
    points = points_of(results)
    fitted = exponents(points)
    agree = [name for name, one in fitted.items() if one.low <= claim.thresholds[name] <= one.high]
    outcome = SUPPORTED if len(agree) == len(fitted) else CONDITIONS if fitted["loops"].low > 0 else NOT_SUPPORTED
    best = [isoflop(group) for group in budgets(points)]
    rows = [
        [f"{one.flops:.2e}", f"{one.loops:.2f}", f"{one.tokens:,.0f}", f"{one.loss:.3f}", "yes" if one.inside else "no"]
        for one in best
    ]
    head = ["FLOPs", "best loops", "best tokens", "loss", "between the loops that were run"]
    why = (
        f"Best loops grow with exponent {fitted['loops']}, published {claim.thresholds['loops']:g}; best tokens with "
        f"{fitted['tokens']}, published {claim.thresholds['tokens']:g}."
    )
    edges = [one.loops for one in best if not one.inside]
    at_one = edges.count(1)
    # Fewer loops than one there are not: the lowest loss there is a result, at any other edge of the runs it is none.
    if others := len(edges) - at_one:
        outcome = UNDECIDED
        why += (
            f" At {others} of {len(best)} budgets the lowest loss is at the fewest or most loops that were run, so "
            "the exponents say little."
        )
    if at_one:
        why += f" At {at_one} of {len(best)} budgets one loop is best."
    number = f"loops ~ C^{fitted['loops'].value:z.2f}, tokens ~ C^{fitted['tokens'].value:z.2f}"
    return Judgement(outcome, number, why, [Table("Lowest points of the isoFLOP parabolas", head, rows), laws(results)])


def laws(results: Results) -> Table:
    """The saturating law of the loss by loops at inference of every run of seed 0."""
    rows = []
    for run in results.runs.values():
        if run.seed == 0 and run.diverged is None:
            fit = fit_losses(run.swept)
            law = ["no fit"] * 3
            if fit is not None:
                fall = fit.amplitude * math.exp(-fit.rate * fit.loops[0])
                law = [f"{fit.limit:.3f}", f"{fall:z.3f}", f"{fit.rate:.2f}"]
            rows.append([f"`{run.arm}`", *law])
    title = "Loss by loops at inference, L(T) = limit + fall exp(-rate (T - 1)) (seed 0). With fall below 0 it rises"
    return Table(title, ["arm", "limit", "fall", "rate"], rows)


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Loss by loops for every budget."""
    lines = {}
    for group in budgets(points_of(results)):
        counts = sorted({point.loops for point in group})
        digits, _, power = f"{group[0].flops:.1e}".partition("e+")
        name = rf"${digits} \times 10^{{{power}}}$ FLOPs"
        lines[name] = [(n, mean([point.loss for point in group if point.loops == n])) for n in counts]
    return [lines_panel("Loss by loops at equal FLOPs", "mean loops", "nats per token", lines, loops=True)]
