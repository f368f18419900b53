"""Loss against mean loops by halting rule, and which tokens get the loops."""

from collections.abc import Iterable
from math import expm1

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult

BASE = "none"
TRAINED = ("gate", "act")
"""Rules whose runs have their own arm; the others are measured on the arm without one."""
SHOWN = (0, 2, 4, 7)
"""Of eight classes of positions, those that tables show."""
CLASSES = {
    "frequency": (
        "Mean loops by frequency of the predicted token: eighths of all positions, from the most frequent tokens",
        ("most frequent", "rarest"),
    ),
    "place": ("Mean loops by place in the sequence: eighths, from its beginning", ("first", "last")),
}
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def frontier(results: Results, claim: Claim) -> dict[str, list[tuple[float, float, float]]]:
    """By rule: threshold, mean loops and mean loss over seeds, from few loops to many."""
    found: dict[tuple[str, float], list[tuple[float, float]]] = {}
    for arm in claim.arms:
        for run in results.of_arm(arm):
            for point in run.measured.get("sweep", {}).get("halting", []):
                if arm == (point["rule"] if point["rule"] in TRAINED else BASE):
                    found.setdefault((point["rule"], point["threshold"]), []).append((point["loops"], point["loss"]))
    rules: dict[str, list[tuple[float, float, float]]] = {}
    for (rule, threshold), points in found.items():
        loops, loss = (mean([point[n] for point in points]) for n in (0, 1))
        rules.setdefault(rule, []).append((threshold, loops, loss))
    return {rule: sorted(points, key=lambda point: point[1]) for rule, points in rules.items()}


def fixed(results: Results) -> list[tuple[int, float]]:
    """Loss when all positions get the same number of loops, of the arm without a rule: means over seeds."""
    runs = [run.swept for run in results.of_arm(BASE) if run.diverged is None]
    return [(count, mean([swept[count] for swept in runs])) for count in runs[0]]


def more_for_rare(results: Results, rule: str) -> list[float]:
    """Loops of the rarest tokens minus those of the most frequent ones, of every seed."""
    runs = [run.measured["spent"][rule]["frequency"]["loops"] for run in finished(results, rule)]
    return [loops[-1] - loops[0] for loops in runs]


def is_more(differences: list[float]) -> bool:
    """Whether the mean difference is above 0, and above its range over seeds."""
    return bool(differences) and mean(differences) > max(differences) - min(differences)


def finished(results: Results, rule: str) -> list[RunResult]:
    """Runs on which it was measured where the rule spends loops."""
    runs = results.of_arm(rule if rule in TRAINED else BASE)
    return [run for run in runs if rule in run.measured.get("spent", {})]


def judge(claim: Claim, results: Results) -> Judgement:
    """The largest saving of each rule at the allowed loss, and whether rare tokens get more loops."""
    base = [run for run in results.of_arm(BASE) if run.diverged is None]
    same, loops = fixed(results), base[0].mean_loops
    full = dict(same)[loops]
    limit, wanted = full + claim.thresholds["nats"], claim.thresholds["saved"]
    rules = frontier(results, claim)
    saved = {
        rule: max((1 - mean_loops / loops for _, mean_loops, loss in points if loss <= limit), default=0.0)
        for rule, points in rules.items()
    }
    rare = {rule: more_for_rare(results, rule) for rule in rules}
    saving = [rule for rule, share in saved.items() if share >= wanted]
    outcome = SUPPORTED if any(is_more(rare[rule]) for rule in saving) else CONDITIONS if saving else NOT_SUPPORTED
    best = max(saved, key=lambda rule: saved[rule])
    rows = [
        [rule, f"{threshold:.4g}", f"{mean_loops:.2f}", f"{1 - mean_loops / loops:.0%}", f"{expm1(loss - full):+.2%}"]
        for rule, points in rules.items()
        for threshold, mean_loops, loss in points
    ]
    rows += [
        ["none: all positions alike", "", f"{count}", f"{1 - count / loops:.0%}", f"{expm1(loss - full):+.2%}"]
        for count, loss in same
    ]
    table = Table(
        f"Rules at their thresholds, means over seeds; perplexity against all {loops} loops of `{BASE}`",
        ["rule", "threshold", "mean loops", "saved", "perplexity"],
        rows,
    )
    why = "Largest saving within the allowed loss: " + ", ".join(f"{rule} {share:.0%}" for rule, share in saved.items())
    differences = ", ".join(f"{rule} {spread(values, '+.2f')}" for rule, values in rare.items())
    why += f". Loops of the rarest tokens against the most frequent, by rule: {differences}."
    alike = ", ".join(f"{count} {expm1(loss - full):+.2%}" for count, loss in same if count < loops)
    why += f" Perplexity with the same number of loops for all positions: {alike}."
    tables = [table, *(by_class(results, rules, kind) for kind in CLASSES), on_sentences(results, rules)]
    return Judgement(outcome, f"{best} saves {saved[best]:.0%} of the loops", why, tables)


def by_class(results: Results, rules: Iterable[str], kind: str) -> Table:
    """Mean loops of every rule in the first, third, fifth and last class of positions."""
    title, (first, last) = CLASSES[kind]
    rows = []
    for rule in rules:
        classes = zip(*(run.measured["spent"][rule][kind]["loops"] for run in finished(results, rule)), strict=True)
        rows.append([rule, *(spread(loops, ".2f") for number, loops in enumerate(classes) if number in SHOWN)])
    return Table(title, ["rule", first, "third", "fifth", last], rows)


def on_sentences(results: Results, rules: Iterable[str]) -> Table:
    """The same sentences under every rule, with the loops of each token as an exponent (seed 0)."""
    found = {rule: finished(results, rule)[0].measured["spent"][rule]["sentences"] for rule in rules}
    rows = [
        [rule, "".join(text + str(loops).translate(SUPERSCRIPTS) for text, loops in sentence).strip()]
        for same in zip(*found.values(), strict=True)
        for rule, sentence in zip(found, same, strict=True)
    ]
    return Table(
        "Loops after which each token of validation sentences was predicted (seed 0)", ["rule", "sentence"], rows
    )


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Loss by mean loops of each rule."""
    lines: dict[str, list[tuple[float, float]]] = {
        rule.replace("_", " "): [(loops, loss) for _, loops, loss in points]
        for rule, points in frontier(results, claim).items()
    }
    # One loop is far above the others, and would flatten the picture.
    lines["all alike"] = [(count, loss) for count, loss in fixed(results) if count > 1]
    return [lines_panel("Loss by mean loops of halting rules", "mean loops", "nats per token", lines)]
