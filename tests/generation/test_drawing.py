"""The picture of a generated text, against the page that it is drawn from."""

import re
from itertools import pairwise
from xml.etree import ElementTree

from mythos.generation.depth_view import html_page
from mythos.generation.text import Piece, TextGeneration, TextRow
from scripts.draw_generated_text import CHARACTER, COLUMNS, MARGIN, Page, draw

SVG = "{http://www.w3.org/2000/svg}"


def test_every_token_is_drawn_in_its_colour_and_inside_the_picture() -> None:
    words = [f" <w{number}>" if number % 7 else " &\n\nA" for number in range(60)]
    pieces = [Piece(word, 1 + number % 8) for number, word in enumerate(words)]
    row = TextRow("The prompt", 8, pieces, [piece.loops for piece in pieces])
    page = html_page(TextGeneration([row], 5, 0.1, 0.5, 2048, halting=True), "title")
    picture = ElementTree.fromstring(draw(Page(page)))
    width, height = (float(picture.attrib[name]) for name in ("width", "height"))
    assert width == 460

    shown = [(one.text, float(one.attrib["x"]), float(one.attrib["y"])) for one in picture.iter(f"{SVG}text")]
    label, *numbers = shown[:9]
    assert label[0] == "loops per token:" and [text for text, _, _ in numbers] == [f" {n} " for n in range(1, 9)]
    assert shown[9][0] == "The prompt" and shown[-1][0].endswith("of 8 (45% saved)")
    text = " ".join(piece for piece, _, _ in shown[10:-1])
    assert text.split() == "".join(words).replace("\n\n", " ").split()
    for piece, x, y in shown:
        assert x >= MARGIN and x + CHARACTER * len(piece) <= width - MARGIN and 0 < y < height
        assert len(piece) <= COLUMNS
    places = sorted((y, x, x + CHARACTER * len(piece)) for piece, x, y in shown)
    assert all(a[0] < b[0] or a[2] <= b[1] for a, b in pairwise(places)), "no text over another"

    colours = dict(re.findall(r"\.(d\d) \{ background: (#\w+) \}", page))
    drawn = [one.attrib["fill"] for one in picture.iter(f"{SVG}rect")][1:]
    in_page = [colours[name] for name in re.findall(r'<span class="(d\d)"', page)]
    parts = [colour for colour, text in zip(in_page, [*"12345678", *words], strict=True) for _ in text.split("\n\n")]
    assert drawn == parts
