"""How far the chosen experts differ between loops, and what that does to loss and balance."""

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult, final_loss

BASE, TOLD = "default", ("router-bias", "router-embedding")


def overlap_by_loop(run: RunResult) -> list[tuple[int, float]]:
    """Loop, and the share of its experts that the loop before chose too, from 2 to the training mean.

    Empty for a dense core or a run that diverged.
    """
    loops = run.measured.get("sweep", {}).get("loops", [])[1 : run.mean_loops]
    return [(one["loops"], one["expert_overlap"]) for one in loops if one["expert_overlap"] is not None]


def overlap(run: RunResult) -> float | None:
    """Mean of `overlap_by_loop`; None if it is empty."""
    values = [share for _, share in overlap_by_loop(run)]
    return mean(values) if values else None


def overlaps(results: Results, arm: str) -> list[float]:
    """The overlaps of an arm's runs."""
    return [value for run in results.of_arm(arm) if (value := overlap(run)) is not None]


def judge(claim: Claim, results: Results) -> Judgement:
    """Compare the default router's overlap with the threshold, then that of routers that are told the loop."""
    losses = {arm: [final_loss(run) for run in results.of_arm(arm)] for arm in claim.arms}
    limit, most = mean(losses[BASE]) + max(losses[BASE]) - min(losses[BASE]), claim.thresholds["overlap"]
    kept = {arm: mean(overlaps(results, arm)) for arm in claim.arms}
    told = [arm for arm in TOLD if kept[arm] <= most and mean(losses[arm]) <= limit]
    outcome = SUPPORTED if kept[BASE] <= most else CONDITIONS if told else NOT_SUPPORTED
    rows = [
        [
            f"`{arm}`",
            spread(overlaps(results, arm), ".2f"),
            spread(losses[arm]),
            spread([run.last("moe/load_max_over_mean") for run in results.of_arm(arm)], ".2f")
            if kept[arm] == kept[arm]
            else "",
        ]
        for arm in claim.arms
    ]
    head = ["arm", "overlap of neighbouring loops", "validation loss", "busiest expert over mean load"]
    others = ", ".join(f"{arm} {kept[arm]:.0%} at {mean(losses[arm]) - mean(losses[BASE]):+.3f} nats" for arm in TOLD)
    why = (
        f"The default router keeps {kept[BASE]:.0%} of a token's experts from loop to loop. Routers that depend on the "
        f"loop keep: {others}."
    )
    table = Table("Means over seeds (range); loss in nats per token", head, rows)
    return Judgement(outcome, f"overlap {kept[BASE]:.2f} with the default router", why, [table])


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Overlap by loop after training, mean over seeds."""
    lines = {}
    for arm in claim.arms:
        every = [overlap_by_loop(run) for run in results.of_arm(arm)]
        runs = [points for points in every if points]
        lines[arm] = [(points[0][0], mean([share for _, share in points])) for points in zip(*runs, strict=True)]
    shown = {arm: points for arm, points in lines.items() if points}
    return [lines_panel("Experts kept from the loop before", "loop", "share", shown)]
