"""Loss against mean loops by halting rule, and which tokens get the loops."""

from collections.abc import Iterable
from math import expm1
from typing import NamedTuple

from mythos.claims.definition import Claim
from mythos.claims.judgement import CONDITIONS, NOT_SUPPORTED, SUPPORTED, Judgement, Table, mean, spread
from mythos.claims.plots import Panel, lines_panel
from mythos.claims.results import Results, RunResult, grouped

BASE = "none"
TRAINED = ("gate", "act")
"""Rules whose runs have their own arm; the others are measured on the arm without one."""
SHOWN_PERCENT = 3
"""The highest perplexity in the picture, against all loops."""
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


class Place(NamedTuple):
    """A rule at a threshold, or a number of loops that all positions get."""

    threshold: float | None
    loops: float
    """Mean over positions and seeds."""
    losses: dict[int, float]
    """By seed."""

    @property
    def loss(self) -> float:
        """Mean loss over seeds."""
        return mean(list(self.losses.values()))


def frontier(results: Results, claim: Claim) -> dict[str, list[Place]]:
    """The places of each rule, from few loops to many."""
    found: dict[tuple[str, float], dict[int, tuple[float, float]]] = {}
    for arm in claim.arms:
        for run in results.of_arm(arm):
            for point in run.measured.get("sweep", {}).get("halting", []):
                if arm == (point["rule"] if point["rule"] in TRAINED else BASE):
                    seeds = found.setdefault((point["rule"], point["threshold"]), {})
                    seeds[run.seed] = (point["loops"], point["loss"])
    places = []
    for (rule, threshold), seeds in found.items():
        losses = {seed: loss for seed, (_, loss) in seeds.items()}
        places.append((rule, Place(threshold, mean([loops for loops, _ in seeds.values()]), losses)))
    return {rule: sorted(of_rule, key=lambda place: place.loops) for rule, of_rule in grouped(places).items()}


def fixed(results: Results) -> list[Place]:
    """The places where all positions get the same number of loops, of the arm without a rule."""
    runs = results.finished(BASE)
    return [Place(None, count, {run.seed: run.swept[count] for run in runs}) for count in runs[0].swept]


def all_loops(results: Results) -> Place:
    """The place where all positions get as many loops as the training mean."""
    loops = results.of_arm(BASE)[0].mean_loops
    return next(place for place in fixed(results) if place.loops == loops)


def largest_saving(places: Iterable[Place], full: Place, nats: float) -> float:
    """The largest share of the loops saved at a loss at most `nats` above that of all loops; 0 if none is."""
    return max((1 - place.loops / full.loops for place in places if place.loss <= full.loss + nats), default=0.0)


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
    same, full, rules = fixed(results), all_loops(results), frontier(results, claim)
    nats, wanted = claim.thresholds["nats"], claim.thresholds["saved"]
    saved = {rule: largest_saving(places, full, nats) for rule, places in rules.items()}
    alike = largest_saving(same, full, nats)
    rare = {rule: more_for_rare(results, rule) for rule in rules}
    saving = [rule for rule, share in saved.items() if share >= wanted]
    outcome = SUPPORTED if any(is_more(rare[rule]) for rule in saving) else CONDITIONS if saving else NOT_SUPPORTED
    best = max(saved, key=lambda rule: saved[rule])
    rows = [
        [
            rule,
            "" if place.threshold is None else f"{place.threshold:.4g}",
            f"{place.loops:.2f}",
            f"{1 - place.loops / full.loops:.0%}",
            f"{expm1(place.loss - full.loss):+z.2%}",
        ]
        for rule, places in [*rules.items(), ("none: all positions alike", same)]
        for place in places
    ]
    table = Table(
        f"Rules at their thresholds, means over seeds; perplexity against all {full.loops} loops of `{BASE}`",
        ["rule", "threshold", "mean loops", "saved", "perplexity"],
        rows,
    )
    why = "Largest saving within the allowed loss: " + ", ".join(f"{rule} {share:.0%}" for rule, share in saved.items())
    differences = ", ".join(f"{rule} {spread(values, '+.2f')}" for rule, values in rare.items())
    gain = 100 * (saved[best] - alike)
    why += f"; the same number of loops for all positions {alike:.0%}. " + (
        f"So adaptive loops save {gain:.1f} percentage points more than equal depth."
        if gain > 0
        else "So adaptive loops save no more than equal depth."
    )
    why += f" Loops of the rarest tokens against the most frequent, by rule: {differences}."
    shallow = ", ".join(f"{p.loops} {expm1(p.loss - full.loss):+z.2%}" for p in same if p.loops < full.loops)
    why += f" Perplexity with the same number of loops for all positions: {shallow}."
    tables = [table, *(by_class(results, rules, kind) for kind in CLASSES), on_sentences(results, rules)]
    number = f"{best} saves {saved[best]:.0%} of the loops, equal depth for all {alike:.0%}"
    return Judgement(outcome, number, why, tables)


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
    """Perplexity of each rule by mean loops, up to SHOWN_PERCENT: ACT and a single loop would flatten the picture."""
    full = all_loops(results)
    lines: dict[str, list[tuple[float, list[float]]]] = {}
    hidden: dict[str, list[str]] = {}
    for rule, places in [*frontier(results, claim).items(), ("equal depth", fixed(results))]:
        name = rule.replace("_", " ")
        # Each seed against its own model at all loops, because seeds differ more than rules.
        for place in places:
            percents = [100 * expm1(loss - full.losses[s]) for s, loss in place.losses.items() if s in full.losses]
            if mean(percents) <= SHOWN_PERCENT:
                lines.setdefault(name, []).append((place.loops, percents))
            else:
                hidden.setdefault(name, []).append(f"{place.loops:.3g}")
    title = f"Perplexity against all {full.loops} loops, mean and range over seeds"
    if hidden:
        names = (f"{name} at {' and '.join(at)}" if name in lines else name for name, at in hidden.items())
        title += f"\nnot shown, above {SHOWN_PERCENT}%: {', '.join(names)}"
    limit, x, y = 100 * expm1(claim.thresholds["nats"]), "mean loops of a position", "percent above all loops"
    return [lines_panel(title, x, y, lines, level=(limit, "allowed"), scattered=["equal depth"])]
