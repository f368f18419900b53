"""What a claim's folder shows: verdict.md and its picture, and the table of all claims."""

import io
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from mythos.claims.costs import cpu_seconds
from mythos.claims.definition import Claim, claim_names, load_claim
from mythos.claims.judgement import NOT_RUN, UNDECIDED, Judgement, judge, markdown, panels
from mythos.claims.results import EMBEDDED, FILE, Results, read_results
from mythos.config.checking import flat_fields
from mythos.files.local import replacing, write_whole, writing
from mythos.files.text import read_bytes
from mythos.progress import duration

VERDICT, PICTURE = "verdict.md", "figure.png"
PAGES = "../results/claims"
"""Folder of the committed results, seen from docs/."""
STAMP = "Results"
"""Key of the picture's text that names the results it was drawn from."""


def write_verdict(folder: Path, claim: Claim, results: Results, judgement: Judgement) -> None:
    """Write verdict.md and, if there is something to draw, figure.png. Raises MythosError if that is impossible."""
    with writing(folder):
        write_whole(folder / VERDICT, verdict_text(claim, results, judgement))
        if judgement.outcome != NOT_RUN and judgement.tables:
            draw(folder / PICTURE, claim, results)


def draw(path: Path, claim: Claim, results: Results) -> None:
    """Draw the claim's picture, stamped with the hash of the results."""
    from mythos.reports.style import DPI, compose

    figure = compose(panels(claim, results))
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={STAMP: results.digest(), "Software": None})


def stamp_of(path: Path) -> str | None:
    """The hash of the results that a picture was drawn from; None without a readable picture."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(read_bytes(path))) as image:
            return str(image.info.get(STAMP))
    # Pillow's PNG reader raises all of these for damaged files.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, zlib.error, Image.DecompressionBombError):
        return None


def command(claim: Claim, data: str = EMBEDDED) -> str:
    """The command that runs a claim."""
    size = "" if claim.size == "nano" else f" --size {claim.size}"
    return f"mythos claims {claim.name}{size}" + ("" if data == EMBEDDED else f" --data {data}")


def verdict_text(claim: Claim, results: Results, judgement: Judgement) -> str:
    """The Markdown page of a verdict: a function of the definition and the results."""
    about = claim.definition
    lines = [
        f"# {claim.name}: {judgement.outcome}",
        "",
        f"> {about.claim}",
        "",
        f"**{judgement.number}.** {judgement.why}",
        "",
        f"- Who says it: {about.source}",
        f"- Hypothesis: {about.hypothesis}",
        f"- Metric: {about.metric}",
        *(
            [f"- Thresholds: {', '.join(f'{key} {value:g}' for key, value in about.thresholds.items())}"]
            * bool(about.thresholds)
        ),
        f"- What would falsify it: {about.falsified_by}",
        f"- Command: `{command(claim, results.data)}`",
        "",
        "## Set-up",
        "",
        *set_up(claim, results),
        "",
        "## Result",
        "",
    ]
    for table in judgement.tables:
        lines += [table.markdown(), ""]
    if judgement.tables:
        lines += [f"![{claim.name}]({PICTURE})", ""]
    lines.append(f"Computed from `{FILE}` by `mythos claims check`; definition {results.config}.")
    return "\n".join(lines) + "\n"


def set_up(claim: Claim, results: Results) -> list[str]:
    """How the runs were made, as lines of a Markdown list."""
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines = [f"- Size {claim.size}; {versions}."]
    if not claim.arms:
        return [*lines, f"- Nothing is trained: `{json.dumps(claim.definition.once)}`."]
    runs = list(results.runs.values())
    for arm, overrides in claim.arms.items():
        of_arm = results.of_arm(arm)
        facts = ""
        if of_arm:
            tokens, flops = ([getattr(run, name) for run in of_arm] for name in ("tokens", "flops"))
            facts = (
                f": {len(of_arm)} runs, {of_arm[0].parameters:,} parameters, {extent(tokens, ',')} tokens, "
                f"{extent(flops, '.2e')} training FLOPs"
            )
        lines.append(f"- Arm `{arm}` ({fields(overrides) or 'the base'}){facts}.")
    base = dict(flat_fields(claim.definition.base))
    lines.append(f"- The base of `configs/claims/{claim.name}.yaml`: {fields(base)}.")
    if claim.at_size.set:
        lines.append(f"- All runs: {fields(claim.at_size.set)}.")
    lines += [f"- Grid, for every seed: `{path}` in {listed(values)}." for path, values in claim.grid.items()]
    best = results.best(claim).values()
    for path, values in claim.tune.items():
        chosen = [point[path] for point in best]
        counts = listed(f"{value} {chosen.count(value)} times" for value in values)
        lines.append(f"- Tuning grid, by the loss of seed 0: `{path}` in {listed(values)}. Chosen: {counts}.")
    seconds = sum(run.seconds for run in runs)
    text = "embedded text" if results.data == EMBEDDED else f"text of `{results.data}`"
    what = text if claim.on_text else "generated tasks"
    lines.append(
        f"- {what[0].upper()}{what[1:]}; training steps of all {len(runs)} runs took {duration(seconds)} of wall time."
    )
    return lines


def extent(values: Sequence[float], form: str) -> str:
    """A value that all runs have, or the smallest and the largest."""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def listed(values: Iterable[object]) -> str:
    """Values with commas between them."""
    return ", ".join(map(str, values))


def fields(overrides: dict[str, object]) -> str:
    """Overrides as text for Markdown."""
    return ", ".join(f"`{path}={json.dumps(value)}`".replace('"', "") for path, value in overrides.items())


def outcome_line(name: str, folder: Path) -> tuple[Claim, Results | None, Judgement]:
    """A claim at the size of its results in `folder` (nano if there are none), those results, and the verdict."""
    results = read_results(folder)
    claim = load_claim(name, results.size if results else "nano")
    if results is None:
        return claim, None, Judgement(NOT_RUN, f"about {duration(cpu_seconds(claim))} on one core", "")
    if results.config != claim.digest():
        return claim, results, Judgement(UNDECIDED, "its definition has changed since", "Run it anew.")
    return claim, results, judge(claim, results)


def claims_overview(root: Path) -> str:
    """The table of all claims as Markdown, then reason and picture of every claim that has results."""
    rows, parts = [], []
    for name in claim_names():
        claim, results, judgement = outcome_line(name, root / name)
        outcome = f"[{judgement.outcome}]({PAGES}/{name}/{VERDICT})" if results else judgement.outcome
        line = f"`{command(claim, results.data if results else EMBEDDED)}`"
        took = duration(sum(run.seconds for run in results.runs.values())) if results and results.runs else ""
        rows.append([claim.definition.claim, claim.definition.source, outcome, judgement.number, line, took])
        if results is not None and judgement.tables:
            picture = f"![{claim.definition.claim}]({PAGES}/{name}/{PICTURE})"
            parts += [f"### {name}", f"{judgement.outcome.capitalize()}: {judgement.why}", picture]
    table = markdown(["claim", "who says it", "verdict", "number", "command", "training took"], rows)
    return "\n\n".join([table, "## Results so far", *parts])
