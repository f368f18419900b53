"""Memory of keys and values: latent attention against grouped-query and multi-head attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mythos.claims.definition import Claim
from mythos.claims.judgement import NOT_SUPPORTED, SUPPORTED, Judgement, Table
from mythos.claims.results import Results
from mythos.reports.style import BLUE, GREY, ORANGE, SMALL, Panel, describe, log_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OTHERS = {"gqa": "grouped-query", "mha": "multi-head"}


def bytes_by_preset(results: Results, kind: str = "rows") -> dict[str, dict[str, dict[str, Any]]]:
    """The measured rows by preset and attention: of the published sizes, or those `beside` them."""
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results.once["cache"].get(kind, []):
        rows.setdefault(row["preset"], {})[row["attention"]] = row
    return rows


def judge(claim: Claim, results: Results) -> Judgement:
    """Supported if every size reaches the factor against grouped-query attention; one that does not falsifies it."""
    rows, factor = bytes_by_preset(results), claim.thresholds["factor"]
    ratios = {kind: [row[kind]["measured"] / row["mla"]["measured"] for row in rows.values()] for kind in OTHERS}
    # What the definition calls a falsification comes before its conditions, which this result may meet as well.
    outcome = SUPPORTED if all(ratio >= factor for ratio in ratios["gqa"]) else NOT_SUPPORTED
    against = {kind: f"{min(values):.1f} to {max(values):.1f}" for kind, values in ratios.items()}
    wide = [preset for preset, ratio in zip(rows, ratios["mha"], strict=True) if ratio >= factor]
    enough = f"{len(wide)} of {len(rows)} sizes reach {factor:g}" if wide else f"no size reaches {factor:g}"
    head = ["size", "loops", "entry of a layer and loop: latent", *OTHERS.values(), "all: latent", *OTHERS.values()]
    head.append("ratios")
    titles = {
        "rows": "Bytes of a token in bfloat16, all layers and loops; decoding allocates what is computed unless both "
        "are given",
        "beside": "The same of our other sizes with latent attention, which were not published and decide nothing. Of "
        "few_visits and moe sizes grouped-query is one key and value head for all query heads",
    }
    by_kind = {title: bytes_by_preset(results, kind) for kind, title in titles.items()}
    tables = [Table(title, head, [line(*one) for one in found.items()]) for title, found in by_kind.items() if found]
    return Judgement(
        outcome,
        f"{against['gqa']} times less than grouped-query attention, {against['mha']} times less than multi-head",
        f"Against full multi-head attention {enough}. The published sizes share key and value heads, and against that "
        f"they save {against['gqa']} times. With every attention each loop adds one entry.",
        tables,
    )


def line(preset: str, row: dict[str, dict[str, Any]]) -> list[str]:
    """A preset's line of the table."""
    kinds = ("mla", *OTHERS)
    return [
        preset,
        str(row["mla"]["loops"]),
        *(f"{row[kind]['entry']:,}" for kind in kinds),
        *(size(row[kind]) for kind in kinds),
        ", ".join(f"{row[kind]['measured'] / row['mla']['measured']:.1f}" for kind in OTHERS),
    ]


def size(row: dict[str, Any]) -> str:
    """Bytes of a token; both figures if the measured one differs from the computed one."""
    equal = row["measured"] == row["computed"]
    return f"{row['computed']:,}" if equal else f"{row['computed']:,} computed, {row['measured']:,} measured"


def panels(claim: Claim, results: Results) -> list[Panel]:
    """Bytes of an entry by size and attention."""
    rows = bytes_by_preset(results)

    def draw(axes: Axes) -> None:
        describe(axes, "Keys and values of a token, one layer and loop", "size", "bytes in bfloat16")
        styles = {"mla": ("latent", BLUE, "o"), "gqa": ("grouped-query", ORANGE, "s"), "mha": ("multi-head", GREY, "D")}
        names = [preset.removeprefix("mythos_") for preset in rows]
        for kind, (label, colour, marker) in styles.items():
            axes.plot(
                range(len(names)),
                [row[kind]["entry"] for row in rows.values()],
                color=colour,
                marker=marker,
                label=label,
            )
        log_scale(axes)
        axes.set_xticks(range(len(names)), names)
        axes.legend(frameon=False, fontsize=SMALL)

    return [Panel(draw)]
