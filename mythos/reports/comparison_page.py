"""A comparison of runs as one self-contained page of HTML, like the page of a run."""

from mythos.reports.comparison import Comparison
from mythos.reports.figures import page_style
from mythos.reports.markup import Pictures, document, escape, folded, table

GENERATOR = '<meta name="generator" content="mythos compare">'


def comparison_page(comparison: Comparison) -> str:
    """The page's HTML: table, notes, losses over tokens and FLOPs, loss by loops, differing fields of the runs."""
    header, *rows = comparison.cells()
    notes = "".join(f"<p>Note: {escape(note)}</p>\n" for note in comparison.notes())
    directories = [[name, str(run.directory)] for name, run in zip(comparison.names, comparison.runs, strict=True)]
    with page_style():
        pictures = Pictures().row(comparison.panels(), comparison.key())
    differing = comparison.differences()
    configuration = (
        table(["field", *comparison.names], differing) if differing else "<p>No field differs, besides run.</p>"
    )
    sections = [
        ("Runs", table(header, rows) + "\n" + notes + folded("Directories", table(["run", "directory"], directories))),
        ("Losses", pictures or "<p>No run has measured its loss twice yet.</p>"),
        ("Differences in configuration", configuration),
    ]
    return document(" and ".join(comparison.names), "", sections, GENERATOR)
