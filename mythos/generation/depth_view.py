"""Shows the loops of each piece of generated text as a colour: on a terminal, and as an HTML page."""

import html
from collections.abc import Sequence
from pathlib import Path

from mythos.files.local import write_whole, writing
from mythos.generation.text import Piece, TextGeneration

PALETTE = (
    (33, "#93cdf8"),
    (39, "#b8dcf7"),
    (74, "#d8e8f2"),
    (145, "#f0eadf"),
    (179, "#ffddb5"),
    (214, "#ffc37f"),
    (202, "#ffa146"),
)
"""From few loops to many: a colour of a 256-colour terminal, and a background colour of pages and pictures.

Blue to orange without green, so that people with colour-blindness see the order too.
"""

# Control characters as visible symbols: a model may generate escape sequences, which must not reach a terminal.
CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {127: 0x2421}
CONTROL |= dict.fromkeys(range(128, 160), 0xFFFD)


def shade(loops: int, most: int) -> int:
    """Index in the palette of a loop count from 1 to `most`."""
    return round((min(loops, most) - 1) / max(1, most - 1) * (len(PALETTE) - 1))


def harmless(text: str) -> str:
    """The text with control characters other than line breaks and tabs replaced by symbols."""
    return text.translate(CONTROL)


def coloured(piece: Piece, most: int) -> str:
    """The piece in the terminal colour of its loops."""
    return f"\x1b[38;5;{PALETTE[shade(piece.loops, most)][0]}m{piece.text}\x1b[0m"


def numbered(piece: Piece) -> str:
    """The piece followed by its loops in brackets, for output without colours."""
    return f"{piece.text}[{piece.loops}]"


def in_loops(loops: int) -> str:
    """The number with its noun: `1 loop`, `2 loops`."""
    return f"{loops} loop" if loops == 1 else f"{loops} loops"


def legend(most: int) -> list[int]:
    """Loop counts to show in a legend: all of them, or about as many as there are colours."""
    if most <= 2 * len(PALETTE):
        return list(range(1, most + 1))
    return sorted({1 + round(n * (most - 1) / (len(PALETTE) - 1)) for n in range(len(PALETTE))})


def terminal_legend(most: int) -> str:
    """The legend as one line for a terminal."""
    return "loops: " + " ".join(coloured(Piece(str(loops), loops), most) for loops in legend(most))


def histogram(generation: TextGeneration, width: int = 40) -> str:
    """Number of tokens by loops, one line per loop count."""
    counts = generation.loops
    largest = max(counts.values(), default=1)
    return "\n".join(
        f"{loops:6d} {'loop ' if loops == 1 else 'loops'}  {count:6d}  {'#' * round(width * count / largest)}".rstrip()
        for loops, count in sorted(counts.items())
    )


STYLE = """
body { font: 16px/1.6 system-ui, sans-serif; max-width: 46em; margin: 2em auto; padding: 0 1em; color: #1b1b1b;
       background: #fff; color-scheme: light }
.text { white-space: pre-wrap; overflow-wrap: anywhere; margin: 1em 0 2em }
.prompt { color: #777 }
span { border-radius: 2px }
.legend span { padding: 0 .5em }
footer { color: #555; font-size: 14px }
pre { font: 13px/1.4 ui-monospace, "DejaVu Sans Mono", monospace; overflow-x: auto }
"""


def html_page(generation: TextGeneration, title: str) -> str:
    """A self-contained page: every prompt with its continuation, the legend, and the summary."""
    most = max((row.limit for row in generation.rows), default=1)
    colours = "\n".join(f".d{n} {{ background: {colour} }}" for n, (_, colour) in enumerate(PALETTE))
    texts = "\n".join(
        f'<p class="text"><span class="prompt">{html.escape(row.prompt)}</span>{spans(row.pieces, most)}</p>'
        for row in generation.rows
    )
    occurring = sorted(generation.loops)
    legend_loops = occurring if len(occurring) <= 8 else legend(most)
    scale = " ".join(f'<span class="d{shade(loops, most)}">{loops}</span>' for loops in legend_loops)
    return (
        f'<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}{colours}\n</style>\n</head>\n<body>\n<h1>{html.escape(title)}</h1>\n"
        f'<p class="legend">loops: {scale}</p>\n{texts}\n'
        f"<footer>{html.escape(generation.summary())}\n<pre>{html.escape(histogram(generation))}</pre></footer>\n"
        "</body>\n</html>\n"
    )


def spans(pieces: Sequence[Piece], most: int) -> str:
    """The pieces as HTML, each with its loops as tooltip."""
    return "".join(
        f'<span class="d{shade(piece.loops, most)}" title="{in_loops(piece.loops)}">{html.escape(harmless(piece.text))}'
        "</span>"
        for piece in pieces
    )


def write_page(path: Path, page: str) -> None:
    """Write the page, complete or not at all. Raises MythosError if it cannot be written."""
    with writing(path, "; give another file"):
        write_whole(path, page.encode("utf-8", errors="replace"))
