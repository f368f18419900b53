"""A comparison of runs as one self-contained page of HTML, like the page of a run."""

from collections.abc import Iterator

from matplotlib.figure import Figure

from mythos.reports.comparison import Comparison, shown_name
from mythos.reports.figures import page_style
from mythos.reports.page import Pictures, document, escape, folded, table
from mythos.reports.plots import new_axes

GENERATOR = '<meta name="generator" content="mythos compare">'


def comparison_page(comparison: Comparison) -> str:
    """The page's HTML: table, notes, losses over tokens and FLOPs, loss by loops, differing fields of the runs."""
    header, *rows = comparison.cells()
    notes = "".join(f"<p>Note: {escape(note)}</p>\n" for note in comparison.notes())
    directories = [[name, str(run.directory)] for name, run in zip(comparison.names, comparison.runs, strict=True)]
    with page_style():
        pictures = Pictures().row(figures(comparison))
    differing = comparison.differences()
    configuration = (
        table(["field", *comparison.names], differing) if differing else "<p>No field differs, besides run.</p>"
    )
    sections = [
        ("Runs", table(header, rows) + "\n" + notes + folded("Directories", table(["run", "directory"], directories))),
        ("Losses", pictures),
        ("Differences in configuration", configuration),
    ]
    return document(" and ".join(comparison.names), "", sections, GENERATOR)


def figures(comparison: Comparison) -> Iterator[Figure]:
    """Draw every panel of the comparison as a figure of its own, with a legend."""
    labels = [shown_name(name) for name in comparison.names]
    for key, label in comparison.measures.items():
        for over_flops, unit in ((False, "tokens"), (True, "FLOPs needed")):
            figure, axes = new_axes(comparison.title(key, unit), unit, label)
            comparison.draw_curves(axes, key, over_flops)
            axes.legend(axes.get_lines(), labels)
            yield figure
    figure, axes = new_axes("", "", "")
    comparison.draw_depths(axes)
    axes.legend(axes.get_lines(), labels)
    yield figure
