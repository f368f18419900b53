"""How far the chosen experts differ between loops, and what that does to loss and balance."""

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread, upper_bound
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult, final_loss, grouped

BASE, TOLD = "default", ("router-bias", "router-embedding")
RECORDED = "moe/depth_overlap"
NO_EXPERTS = "no experts"


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


def in_training(results: Results, arm: str) -> dict[int, list[float]]:
    """By step of a validation: the share of its experts that the last loop keeps from the one before, of every seed.

    Validations record that of the training mean's last loop alone, where `overlap` is the mean over loops. Empty for a
    dense core.
    """
    records = [record for run in results.finished(arm) for record in run.validations]
    return grouped((one["step"], one[RECORDED]) for one in records if one.get(RECORDED) is not None)


def judge(claim: Claim, results: Results) -> Judgement:
    """Compare the default router's overlap with the threshold, then that of routers that are told the loop."""
    losses = {arm: [final_loss(run) for run in results.of_arm(arm)] for arm in claim.arms}
    limit, most = upper_bound(losses[BASE]), claim.thresholds["overlap"]
    kept = {arm: mean(overlaps(results, arm)) for arm in claim.arms}
    told = [arm for arm in TOLD if kept[arm] <= most and mean(losses[arm]) <= limit]
    outcome = SUPPORTED if kept[BASE] <= most else CONDITIONS if told else NOT_SUPPORTED
    rows = [
        [
            f"`{arm}`",
            spread(overlaps(results, arm), ".2f") or NO_EXPERTS,
            spread(losses[arm]),
            spread([run.last("moe/load_max_over_mean") for run in results.of_arm(arm)], ".2f")
            if kept[arm] == kept[arm]
            else NO_EXPERTS,
        ]
        for arm in claim.arms
    ]
    head = ["arm", "overlap of neighbouring loops", "validation loss", "busiest expert over mean load"]
    others = ", ".join(f"{arm} {kept[arm]:.0%} at {mean(losses[arm]) - mean(losses[BASE]):+.3f} nats" for arm in TOLD)
    why = (
        f"The default router keeps {kept[BASE]:.0%} of a token's experts from loop to loop. Routers that depend on the "
        f"loop keep: {others}."
    )
    shares = {step: mean(values) for step, values in in_training(results, BASE).items()}
    if shares:
        first, last = min(shares), max(shares)
        why += (
            f" In training, the last loop of the default router kept {shares[first]:.0%} at step {first} and "
            f"{shares[last]:.0%} at step {last}."
        )
    table = Table("Means over seeds (range); loss in nats per token", head, rows)
    tables = [table, over_training(claim, results)]
    return Judgement(outcome, f"overlap {kept[BASE]:.2f} with the default router", why, tables)


def over_training(claim: Claim, results: Results) -> Table:
    """The overlap of the last loop at every validation."""
    shares = {arm: in_training(results, arm) for arm in claim.arms}
    steps = sorted({step for by_step in shares.values() for step in by_step})
    rows = [
        [f"`{arm}`", *(spread(by_step.get(step, []), ".2f") for step in steps)]
        for arm, by_step in shares.items()
        if by_step
    ]
    loops = results.of_arm(BASE)[0].mean_loops
    title = f"Overlap of loops {loops - 1} and {loops} at the validations of training, means over seeds (range)"
    return Table(title, ["arm", *(f"step {step}" for step in steps)], rows)


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Overlap by loop after training, and that of the last loop during training."""
    after, during = {}, {}
    for arm in claim.arms:
        by_loop = grouped(share for run in results.of_arm(arm) for share in overlap_by_loop(run))
        if by_loop:
            after[arm], during[arm] = list(by_loop.items()), list(in_training(results, arm).items())
    loops, level = results.of_arm(BASE)[0].mean_loops, (claim.thresholds["overlap"], "claimed at most")
    kept = "share of experts kept"
    return [
        lines_panel("After training: experts kept from the loop before", "loop", kept, after, level=level),
        lines_panel(
            f"During training: experts of loop {loops - 1} kept in loop {loops}", "training step", kept, during
        ),
    ]
