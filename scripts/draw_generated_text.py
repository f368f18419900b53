"""Draw a page of `mythos generate --html` as an SVG picture: the text, each token coloured by its loops.

mythos generate runs/quickstart --prompt "The" --html page.html
python scripts/draw_generated_text.py page.html docs/figures/loops-per-token.svg
"""

import re
import sys
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path

COLUMNS, CHARACTER, LINE = 52, 8, 30
"""Characters of a line; pixels of a character and of a line."""
MARGIN, WIDTH = 22, 460
FONT = "DejaVu Sans Mono, Menlo, Consolas, monospace"


class Page(HTMLParser):
    """Collects the pieces of a page's text as (class, text): `prompt`, or `d0` to `d6` for the colours.

    Also the legend, as pairs of class and loops, and the text of the footer.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pieces: list[tuple[str, str]] = []
        self.legend: list[tuple[str, str]] = []
        self.footer = ""
        self.colours = dict(re.findall(r"\.(d\d) \{ background: (#\w+) \}", text))
        self._block = self._piece = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Remember the block (`legend`, `text`, `footer`) and the class of the piece that begins."""
        name = dict(attributes).get("class") or tag
        if tag == "span":
            self._piece = name
        else:
            self._block = name

    def handle_endtag(self, tag: str) -> None:
        """Forget the piece or the block that ends."""
        if tag == "span":
            self._piece = ""
        else:
            self._block = ""

    def handle_data(self, data: str) -> None:
        """Add text to the block that it is in."""
        if self._block == "footer":
            self.footer += data
        elif self._block == "text" and self._piece:
            self.pieces.append((self._piece, data))
        elif self._block == "legend" and self._piece:
            self.legend.append((self._piece, data))


def lines(pieces: list[tuple[str, str]]) -> list[list[tuple[int, str, str]]]:
    """Break the pieces into lines of at most COLUMNS characters, as (column, class, text).

    Lines end where the text has a line break, or before a token that begins a word and no longer fits.
    """
    broken: list[list[tuple[int, str, str]]] = [[]]
    column = 0
    for name, text in pieces:
        for number, part in enumerate(re.split(r"\n+", text)):
            if number or (column + len(part) > COLUMNS and column):
                broken.append([])
                column = 0
                part = part.lstrip() if not number else part
            if part:
                broken[-1].append((column, name, part))
                column += len(part)
    return [line for line in broken if line]


def draw(page: Page) -> str:
    """The picture: the legend, the text, and the mean loops from the footer."""
    elements: list[str] = []

    def put(column: int, row: float, text: str, fill: str, background: str | None = None) -> None:
        x, y, width = MARGIN + CHARACTER * column, MARGIN + LINE * row, CHARACTER * len(text)
        if background:
            elements.append(
                f'<rect x="{x}" y="{y - 1:g}" width="{width}" height="19" fill="{background}" stroke="#ffffff"/>'
            )
        # Every font then has the characters where the backgrounds are.
        length = f'textLength="{width}" lengthAdjust="spacingAndGlyphs"'
        elements.append(
            f'<text x="{x}" y="{y + 13:g}" {length} fill="{fill}" xml:space="preserve">{escape(text)}</text>'
        )

    label = "loops per token:"
    put(0, 0, label, "#6e7781")
    for number, (name, loops) in enumerate(page.legend):
        put(len(label) + 1 + 4 * number, 0, f" {loops} ", "#24292f", page.colours[name])
    rows = lines(page.pieces)
    for row, line in enumerate(rows, 1):
        for column, name, text in line:
            put(column, row, text, "#6e7781" if name == "prompt" else "#24292f", page.colours.get(name))
    summary = re.findall(r"[^\n;]+ loops per token[^\n;]*", page.footer)[0]
    put(0, len(rows) + 1.2, summary, "#6e7781")
    height = round(MARGIN * 2 + LINE * (len(rows) + 1.2) + 18)
    shown = Counter(name for name, _ in page.pieces if name != "prompt")
    loops = ", ".join(f"{page_loops} loops: {shown[name]}" for name, page_loops in page.legend if shown[name])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="{FONT}" font-size="13.3">\n'
        f"  <title>Text coloured by loops</title>\n"
        f"  <desc>Generated text, each token coloured by the loops that it ran; tokens by colour: {loops}. "
        f"{escape(summary)}</desc>\n"
        f'  <rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" fill="#ffffff" stroke="#d0d7de"/>\n'
        + "".join(f"  {element}\n" for element in elements)
        + "</svg>\n"
    )


def main() -> None:
    """Draw the page named on the command line."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    page = Page(Path(sys.argv[1]).read_text(encoding="utf-8"))
    Path(sys.argv[2]).write_text(draw(page), encoding="utf-8")


if __name__ == "__main__":
    main()
