"""Whether the state after t loops holds all nodes that a breadth-first search reaches in t steps."""

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, UNDECIDED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results

ARM = "looped"
LEVELS = (2, 3)
ANSWERS = 0.75
"""Share of right answers from which the models count as having learned the task; half of them come by guessing."""


def values(results: Results, name: str, level: int) -> list[float]:
    """A measured figure of every finished run at a level."""
    taken = [run.measured["frontier"] for run in results.of_arm(ARM) if run.diverged is None]
    return [float(figures[name][figures["loops"].index(level)]) for figures in taken]


def accuracy(results: Results, level: int) -> list[float]:
    """Right answers at a level, with as many loops."""
    runs = [run.measured["reasoning"] for run in results.finished(ARM)]
    return [taken["accuracy"][taken["difficulties"].index(level)][taken["loops"].index(level)] for taken in runs]


def judge(claim: Claim, results: Results) -> Judgement:
    """Compare the probe's recall with the threshold and with depth-first search.

    Undecided if the models do not answer the questions: the state then shows nothing about how they are answered.
    """
    recall = {level: mean(values(results, "recall", level)) for level in LEVELS}
    bound = {level: mean(values(results, "depth_first", level)) for level in LEVELS}
    right = [mean(accuracy(results, level)) for level in LEVELS]
    learned = min(right) >= ANSWERS
    if not learned:
        outcome = UNDECIDED
    elif all(recall[level] >= claim.thresholds["recall"] for level in LEVELS):
        outcome = SUPPORTED
    else:
        outcome = CONDITIONS if all(recall[level] > bound[level] for level in LEVELS) else NOT_SUPPORTED
    names = ("recall", "depth_first", "chance")
    rows = [
        [
            str(level),
            *(spread(values(results, name, level), ".2f") for name in names),
            spread(accuracy(results, level), ".2f"),
        ]
        for level in (1, *LEVELS)
    ]
    head = ["level and loops", "recall", "depth first", "chance", "right answers"]
    why = "Recall " + "; ".join(f"after {n} loops {recall[n]:.0%}, depth first {bound[n]:.0%}" for n in LEVELS) + "."
    if not learned:
        shares = " and ".join(f"{share:.0%}" for share in right)
        why = f"The models have not learned the task ({shares} of the answers are right, 50% by guessing). {why}"
    number = f"recall {recall[2]:.0%} and {recall[3]:.0%}" if learned else "the task was not learned"
    table = Table("Recall of the nodes of a level by the probe, means over seeds (range)", head, rows)
    return Judgement(outcome, number, why, [table])


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Recall by level."""
    names = {"recall": "state after t loops", "depth_first": "depth first", "chance": "chance"}
    lines = {
        text: [(level, [100 * value for value in values(results, name, level)]) for level in (1, *LEVELS)]
        for name, text in names.items()
    }
    return [lines_panel("Nodes of a level found by the probe", "level and loops", "percent", lines, loops=True)]
