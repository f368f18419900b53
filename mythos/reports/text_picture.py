"""A picture of generated text whose tokens are coloured by their loops."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from mythos.generation.depth_view import harmless, legend
from mythos.generation.text import TextGeneration
from mythos.reports.style import DARK, GREY, LIGHT, SMALL, WIDTH, loop_colour, save

SIZE = 13.0
"""Of the text, points."""
ADVANCE = 0.602 * SIZE
"""Width of a character of DejaVu Sans Mono, points."""
LINE = 1.75 * SIZE
MARGIN = 14.0
COLUMNS = int((WIDTH * 72 - 2 * MARGIN) / ADVANCE)


def draw_text(generation: TextGeneration, path: Path) -> Path:
    """Draw prompts in grey and generated text on the colours of its loops, below their key; returns the path.

    Raises OSError if the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import FancyBboxPatch, Rectangle

    most = max((row.limit for row in generation.rows), default=1)
    places: list[tuple[int, float, str, int | None]] = []
    lines = 0.0
    for row in generation.rows:
        pieces = [(row.prompt, None), *((piece.text, piece.loops) for piece in row.pieces)]
        placed = list(wrapped(pieces))
        places += [(column, line + lines, text, loops) for column, line, text, loops in placed]
        lines += max((line for _, line, _, _ in placed), default=0) + 1.5
    height = 2 * MARGIN + LINE * (lines + 1.5)
    figure = Figure(figsize=(WIDTH, height / 72), facecolor="none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH * 72), ylim=(height, 0))
    axes.axis("off")
    frame = FancyBboxPatch((2, 2), WIDTH * 72 - 4, height - 4, boxstyle="round,pad=0,rounding_size=6")
    frame.set(facecolor=LIGHT, edgecolor=GREY, linewidth=0.5)
    axes.add_patch(frame)

    def cell(x: float, y: float, text: str, loops: int | None) -> None:
        if loops is not None:
            box = (x, y - 0.62 * LINE), len(text) * ADVANCE, 0.86 * LINE
            axes.add_patch(Rectangle(*box, facecolor=loop_colour(loops, most), edgecolor=LIGHT, linewidth=0.8))
        shown = text.replace("$", r"\$")
        axes.text(x, y, shown, family="monospace", size=SIZE, color=DARK if loops else GREY, va="baseline")

    counts = generation.loops
    x, y = MARGIN, MARGIN + 0.8 * SIZE
    axes.text(x, y, "loops", size=SIZE, color=GREY, va="baseline")
    x += 5 * ADVANCE + 8
    for loops in sorted(counts) if len(counts) <= 7 else legend(most):
        share = f"{counts[loops] / max(1, generation.tokens):.0%}" if len(counts) <= 7 else ""
        cell(x, y, f" {loops} ", loops)
        x += (len(str(loops)) + 2) * ADVANCE + 4
        axes.text(x, y, share, size=SIZE, color=GREY, va="baseline")
        x += len(share) * ADVANCE + 8
    for column, line, text, number in places:
        cell(MARGIN + column * ADVANCE, y + (line + 1.5) * LINE, text, number)
    axes.text(
        MARGIN, height - MARGIN, generation.summary().splitlines()[-1].partition(";")[0], size=SMALL + 1, color=GREY
    )
    # A browser that lacks the font would break the alignment, so glyphs are stored as outlines.
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": "text"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the font lacks a character: a box stands for it
        return save(figure, path)


def wrapped(pieces: Sequence[tuple[str, int | None]]) -> Iterator[tuple[int, float, str, int | None]]:
    """Break pieces into lines of COLUMNS characters: (column, line, text, loops) of each part.

    A piece that does not fit begins a new line without its leading spaces, unless it is longer than a line. Line breaks
    of the text stay; an empty line has half the height.
    """
    column, line = 0, 0.0
    for whole, loops in pieces:
        for number, text in enumerate(harmless(whole).expandtabs(4).split("\n")):
            if number:
                column, line = 0, line + (1 if column else 0.5)
            if column and len(text) <= COLUMNS < column + len(text):
                column, line, text = 0, line + 1, text.lstrip(" ")
            while text:
                part, text = text[: COLUMNS - column], text[COLUMNS - column :]
                yield column, line, part, loops
                column, line = (0, line + 1) if text else (column + len(part), line)
