"""Final loss against the FLOPs of the core, by ramp of the depth."""

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, bars_panel
from mythos.claims.results import Results, final_loss

BASE = "none"
RAMP = "depth.curriculum.shape"


def judge(claim: Claim, results: Results) -> Judgement:
    """Look for a ramp that saves the threshold's share of core FLOPs within the range of the runs without one."""
    losses = {arm: [final_loss(run) for run in results.of_arm(arm)] for arm in claim.arms}
    flops = {arm: mean([run.core_flops for run in results.of_arm(arm)]) for arm in claim.arms}
    limit = mean(losses[BASE]) + max(losses[BASE]) - min(losses[BASE])
    saved = {arm: 1 - flops[arm] / flops[BASE] for arm in claim.arms}
    ramps = [arm for arm, overrides in claim.arms.items() if RAMP in overrides]
    equal = [arm for arm in ramps if mean(losses[arm]) <= limit and saved[arm] > 0]
    best = max(equal, key=lambda arm: saved[arm], default=None)
    if best is None:
        nearest = min(ramps, key=lambda arm: mean(losses[arm]))
        number = f"best ramp {mean(losses[nearest]) - mean(losses[BASE]):+.3f} nats, saving {saved[nearest]:.0%}"
        why = f"No ramp stays within {limit:.3f} nats, the loss without one plus its range over seeds."
        outcome = NOT_SUPPORTED
    else:
        outcome = SUPPORTED if saved[best] >= claim.thresholds["saved"] else CONDITIONS
        number = f"{saved[best]:.0%} fewer core FLOPs at {mean(losses[best]) - mean(losses[BASE]):+.3f} nats"
        why = (
            f"`{best}` saves {saved[best]:.1%} of the core's FLOPs within {limit:.3f} nats, the loss without a ramp "
            "plus its range."
        )
    rows = [
        [
            f"`{arm}`",
            spread(losses[arm]),
            f"{flops[arm]:.3e}",
            f"{saved[arm]:.1%}",
            "yes" if mean(losses[arm]) <= limit else "no",
        ]
        for arm in claim.arms
    ]
    head = ["arm", "validation loss", "core FLOPs", "saved", "within the range"]
    return Judgement(
        outcome, number, why, [Table("Loss in nats per token and FLOPs, means over seeds (range)", head, rows)]
    )


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Loss and saved FLOPs of every arm."""
    base = mean([run.core_flops for run in results.of_arm(BASE)])
    none = mean([final_loss(run) for run in results.of_arm(BASE)])
    differences = {arm: mean([final_loss(run) for run in results.of_arm(arm)]) - none for arm in claim.arms}
    saved = {arm: 100 * (1 - mean([run.core_flops for run in results.of_arm(arm)]) / base) for arm in claim.arms}
    return [
        bars_panel("Loss against no ramp", "nats per token", "arm", differences),
        bars_panel("Core FLOPs saved", "percent", "arm", saved),
    ]
