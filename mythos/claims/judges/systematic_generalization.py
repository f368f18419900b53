"""Two-hop questions about memorised facts that were never composed in training, by loops."""

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult, grouped
from mythos.generation.depth_view import in_loops

LOOPED, ONE = "loops-4", "loops-1"
SPLITS = {"train": "of training", "in": "in distribution", "out": "out of distribution"}


def accuracies(run: RunResult, split: str) -> list[tuple[int, float]]:
    """Steps and accuracies of the kept checkpoints, at the loops of training."""
    taken = run.measured["facts"]
    column = taken["loops"].index(run.mean_loops)
    return [(step, row[column]) for step, row in zip(taken["steps"], taken[split], strict=True)]


def last(results: Results, arm: str, split: str) -> list[float]:
    """Accuracies at the end of training; 0 for a run that diverged."""
    return [0.0 if run.diverged is not None else accuracies(run, split)[-1][1] for run in results.of_arm(arm)]


def judge(claim: Claim, results: Results) -> Judgement:
    """Whether four loops reach the accuracy and one does not: out of distribution, or in distribution only."""
    enough = claim.thresholds["accuracy"]
    end = {arm: {split: mean(last(results, arm, split)) for split in SPLITS} for arm in claim.arms}
    reached = {split: end[LOOPED][split] >= enough > end[ONE][split] for split in ("in", "out")}
    outcome = SUPPORTED if reached["out"] else CONDITIONS if reached["in"] else NOT_SUPPORTED
    rows = [[f"`{arm}`", *(spread(last(results, arm, split), ".2f") for split in SPLITS)] for arm in claim.arms]
    title = "Right answers to two-hop questions at the end, means over seeds (range)"
    why = "With 4 loops: " + ", ".join(f"{end[LOOPED][split]:.0%} {name}" for split, name in SPLITS.items())
    why += f"; with 1 loop {end[ONE]['out']:.0%} out of distribution."
    number = f"{end[LOOPED]['out']:.0%} out of distribution with 4 loops"
    tables = [Table(title, ["arm", *SPLITS.values()], rows)]
    with_loops = {arm: out_by_loops(results, arm) for arm in claim.arms}
    for arm, at_loops in with_loops.items():
        own, most = trained_loops(results, arm), max(at_loops, default=0)
        if at_loops and all(more > less for more, less in zip(at_loops[most], at_loops[own], strict=True)):
            why += (
                f" The model trained with {in_loops(own)} answers {mean(at_loops[most]):.0%} out of distribution when "
                f"it runs with {most}, and {mean(at_loops[own]):.0%} with {own}: more on every seed."
            )
    depths = sorted({loops for at_loops in with_loops.values() for loops in at_loops})
    rows = [
        [f"`{arm}`", *(spread(at_loops.get(loops, []), ".2f") for loops in depths)]
        for arm, at_loops in with_loops.items()
    ]
    head = ["arm", *(f"run with {in_loops(loops)}" for loops in depths)]
    title = "Right answers out of distribution at the end, by loops at the test, means over seeds (range)"
    return Judgement(outcome, number, why, [*tables, Table(title, head, rows)])


def trained_loops(results: Results, arm: str) -> int:
    """The loops with which an arm was trained."""
    return results.of_arm(arm)[0].mean_loops


def out_by_loops(results: Results, arm: str) -> dict[int, list[float]]:
    """Accuracies out of distribution at the end of training by loops at the test, of the runs that finished."""
    taken = [run.measured["facts"] for run in results.finished(arm)]
    return grouped(pair for facts in taken for pair in zip(facts["loops"], facts["out"][-1], strict=True))


def panels(claim: Claim, results: Results) -> list[Panel]:
    """The phases: accuracy by step of each split, one plot for each number of loops in training."""
    found = []
    for arm in claim.arms:
        lines = {}
        for split, name in SPLITS.items():
            pairs = [pair for run in results.finished(arm) for pair in accuracies(run, split)]
            lines[name] = list(grouped((step, 100 * value) for step, value in pairs).items())
        title = f"Two-hop questions, trained with {in_loops(trained_loops(results, arm))}"
        panel = lines_panel(title, "training step", "percent right", lines, y_range=(0, 105))
        found.append(panel._replace(height=3.0))
    return found
