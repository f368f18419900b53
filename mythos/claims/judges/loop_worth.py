"""What a loop is worth as if it were layers: the exponent phi, with one state lane and with two."""

from math import inf
from pathlib import Path

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, final_loss, grouped
from mythos.claims.scaling_fits import LoopRun, loop_worth, worth_interval
from mythos.config.sections import Config
from mythos.planning.flops import build_on_meta

STEPS = "train.steps"
UNLOOPED = "blocks"
LANES = {"one": "one lane", "two": "two lanes"}
"""Beginnings of the names of looped arms."""


Sizes = dict[str, tuple[int, int]]
"""Parameters by arm: of the blocks outside of the loop, and of the core."""


def sizes_of(claim: Claim) -> Sizes:
    """The sizes of all arms, from their configurations."""
    return {planned.arm: block_parameters(planned.config) for planned in claim.runs(1, Path("unused"), None)}


def block_parameters(config: Config) -> tuple[int, int]:
    """Parameters of the blocks outside of the loop, and of the core."""
    model = build_on_meta(config.model)
    parts = (*model.prelude, *model.coda), (model.recurrence.blocks,)
    once, core = (sum(weight.numel() for module in modules for weight in module.parameters()) for modules in parts)
    return once, core


def cells(claim: Claim, results: Results, sizes: Sizes, kind: str, steps: int | None = None) -> list[list[LoopRun]]:
    """The runs that are fitted for a number of lanes: one list for each arm and number of steps (all, or this one)."""
    pairs = (
        ((run.arm, run.point[STEPS]), LoopRun(*sizes[run.arm], run.mean_loops, run.tokens, final_loss(run)))
        for run in results.chosen(claim)
        if run.arm.split("-")[0] in (UNLOOPED, kind) and steps in (None, run.point[STEPS]) and final_loss(run) < inf
    )
    return list(grouped(pairs).values())


def judge(claim: Claim, results: Results) -> Judgement:
    """Compare the exponents with 0, with the published one, and with each other."""
    sizes = sizes_of(claim)
    fitted = {kind: worth_interval(cells(claim, results, sizes, kind)) for kind in LANES}
    one, two = fitted["one"], fitted["two"]
    if one.low <= 0:
        outcome = NOT_SUPPORTED
    elif one.low <= claim.thresholds["one"] <= one.high < two.value:
        outcome = SUPPORTED
    else:
        outcome = CONDITIONS
    why = (
        f"r loops are worth r^{one} cores with one lane (published 0.45), and r^{two} with two (published 0.65 with "
        "hyper-connections)."
    )
    gains = gain_of_blocks(claim, results)
    if idle := [f"{steps} steps ({gain:+.3f} nats)" for steps, gain in gains.items() if gain >= 0]:
        why += (
            f" The most blocks of their own, run once, gain nothing over one after {' and '.join(idle)}: such runs "
            "cannot show what a loop is worth, and widen the intervals."
        )
    number = f"phi {one.value:.2f} with one lane, {two.value:.2f} with two"
    tables = [losses(claim, results, sizes), by_length(claim, results, sizes, gains)]
    return Judgement(outcome, number, why, tables)


def gain_of_blocks(claim: Claim, results: Results) -> dict[int, float]:
    """Mean loss of the most blocks run once minus that of one, by number of steps; below 0 if they help."""
    arms = sorted((int(arm.split("-")[1]), arm) for arm in claim.arms if arm.startswith(UNLOOPED))

    def loss(arm: str, steps: int) -> float:
        return mean([final_loss(run) for run in results.chosen(claim) if run.arm == arm and run.point[STEPS] == steps])

    return {steps: loss(arms[-1][1], steps) - loss(arms[0][1], steps) for steps in claim.grid[STEPS]}


def by_length(claim: Claim, results: Results, sizes: Sizes, gains: dict[int, float]) -> Table:
    """phi of the runs of each number of steps alone."""
    rows = []
    for steps, gain in gains.items():
        found = []
        for kind in LANES:
            every = cells(claim, results, sizes, kind, steps)
            found.append(loop_worth([one[0]._replace(loss=mean([run.loss for run in one])) for one in every]))
        rows.append([str(steps), *(f"{phi:.2f}" for phi in found), f"{gain:+.3f}"])
    head = ["steps", *(f"phi, {text}" for text in LANES.values()), "loss of the most blocks run once, against one"]
    return Table("phi of L = E + A (N_once + r^phi N_core)^-alpha, fitted to each number of steps alone", head, rows)


def losses(claim: Claim, results: Results, sizes: Sizes) -> Table:
    """Validation loss of every arm by number of steps, and the size that it is fitted with."""
    steps = claim.grid[STEPS]
    rows = []
    for arm in claim.arms:
        runs = [run for run in results.chosen(claim) if run.arm == arm]
        by_steps = [spread([final_loss(run) for run in runs if run.point[STEPS] == count]) for count in steps]
        rows.append([f"`{arm}`", f"{sum(sizes[arm]):,}", str(runs[0].mean_loops), *by_steps])
    head = ["arm", "parameters of blocks", "loops", *(f"{count} steps" for count in steps)]
    return Table("Validation loss, nats per token, means over seeds (range)", head, rows)


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Loss by the layers that run, after the most steps: blocks of their own, and a block that is looped."""
    most = max(claim.grid[STEPS])
    found: dict[str, dict[int, list[float]]] = {}
    for run in results.chosen(claim):
        kind, _, count = run.arm.partition("-")
        layers, _, loops = count.partition("x")
        if run.point[STEPS] == most and (kind == UNLOOPED or layers == "1"):
            name = LANES.get(kind, "blocks run once")
            found.setdefault(name, {}).setdefault(int(loops or layers), []).append(final_loss(run))
    lines = {name: [(count, mean(values)) for count, values in by_count.items()] for name, by_count in found.items()}
    title = f"Loss after {most} steps by blocks of the core that run"
    return [lines_panel(title, "blocks, or loops of one block", "nats per token", lines, loops=True)]
