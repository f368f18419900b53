"""Final loss against the FLOPs of the core, by ramp of the depth."""

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread, upper_bound
from mythos.claims.plots import Panel, points_panel
from mythos.claims.results import Results, final_loss

BASE = "none"
RAMP = "depth.curriculum.shape"


def allowed(results: Results) -> float:
    """The loss without a ramp plus its range over seeds."""
    return upper_bound([final_loss(run) for run in results.of_arm(BASE)])


def judge(claim: Claim, results: Results) -> Judgement:
    """Look for a ramp that saves the threshold's share of core FLOPs within the range of the runs without one."""
    losses = {arm: [final_loss(run) for run in results.of_arm(arm)] for arm in claim.arms}
    flops = {arm: mean([run.core_flops for run in results.of_arm(arm)]) for arm in claim.arms}
    above = {arm: mean(losses[arm]) - mean(losses[BASE]) for arm in claim.arms}
    limit = allowed(results)
    saved = {arm: 1 - flops[arm] / flops[BASE] for arm in claim.arms}
    ramps = [arm for arm, overrides in claim.arms.items() if RAMP in overrides]
    equal = [arm for arm in ramps if mean(losses[arm]) <= limit and saved[arm] > 0]
    best = max(equal, key=lambda arm: saved[arm], default=None)
    if best is None:
        nearest = min(ramps, key=lambda arm: mean(losses[arm]))
        number = f"best ramp {above[nearest]:+.3f} nats, saving {saved[nearest]:.0%}"
        why = f"No ramp stays within {limit:.3f} nats, the loss without one plus its range over seeds."
        outcome = NOT_SUPPORTED
    else:
        outcome = SUPPORTED if saved[best] >= claim.thresholds["saved"] else CONDITIONS
        number = f"{saved[best]:.0%} fewer core FLOPs at {above[best]:+.3f} nats"
        why = (
            f"`{best}` saves {saved[best]:.1%} of the core's FLOPs within {limit:.3f} nats, the loss without a ramp "
            "plus its range."
        )
    enough = [arm for arm in ramps if saved[arm] >= claim.thresholds["saved"]]
    lowest = min(enough, key=lambda arm: above[arm], default=None)
    if lowest is not None and lowest != (best or nearest):
        why += (
            f" Of the ramps that save at least {claim.thresholds['saved']:.0%}, `{lowest}` has the lowest loss: it "
            f"saves {saved[lowest]:.1%} at {above[lowest]:+.3f} nats."
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
    """Loss of every arm by the FLOPs of its core."""
    runs = {arm: results.of_arm(arm) for arm in claim.arms}
    points = {
        arm: (mean([run.core_flops for run in of_arm]), [final_loss(run) for run in of_arm])
        for arm, of_arm in runs.items()
    }
    title = "Loss against training FLOPs of the core, mean and range over seeds"
    x, y = "FLOPs of the core's loops during training (T: 10\u00b9\u00b2)", "validation loss, nats per token"
    return [points_panel(title, x, y, points, level=(allowed(results), "allowed loss"))]
