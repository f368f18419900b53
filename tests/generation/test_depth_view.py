"""Text coloured by loops, on a terminal and as a page."""

from mythos.generation.depth_view import PALETTE, coloured, harmless, html_page, legend, shade
from mythos.generation.text import Piece, TextGeneration, TextRow
from tests.generation.page import Page


def test_colours_go_from_few_loops_to_many() -> None:
    assert [shade(loops, 7) for loops in range(1, 8)] == list(range(len(PALETTE)))
    assert shade(1, 1) == 0 and shade(64, 64) == shade(80, 64) == len(PALETTE) - 1
    assert legend(5) == [1, 2, 3, 4, 5]
    assert legend(64)[0] == 1 and legend(64)[-1] == 64 and len(legend(64)) <= 14
    assert coloured(Piece("on", 1), 8) == "\x1b[38;5;33mon\x1b[0m"


def test_no_escape_sequence_of_a_model_reaches_the_terminal() -> None:
    assert harmless("a\x1b[2J\x07\x9b1m\n\tz") == "a␛[2J␇\ufffd1m\n\tz"


def test_the_page_is_escaped_and_whole() -> None:
    row = TextRow("<script>alert('p')</script> & ", 4, [Piece("<b>", 1), Piece(" &amp;\n", 4)], [1, 4, 4])
    generation = TextGeneration([row], 5, 0.1, 0.5, 2048, halting=True)
    page = html_page(generation, "a <title>")
    shown = Page(page)
    assert "<script>alert('p')</script> & <b> &amp;\n" in shown.text
    assert shown.tags <= {"html", "head", "meta", "title", "style", "body", "h1", "p", "span", "footer", "pre"}
    assert shown.titles == ["1 loop", "4 loops"]
    assert "loops: 1 4\n" in shown.text, "counts that did not occur are not named"
    assert "     1 loop        1  ####################\n     4 loops       2" in shown.text
    assert "http" not in page, "nothing is loaded from elsewhere"
    assert "3.00 loops per token on average of 4 (25% saved); cache 2.0 KiB" in shown.text
