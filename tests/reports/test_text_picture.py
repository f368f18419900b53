"""The picture of generated text: every character at its place, on the colour of its loops."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from mythos.generation.depth_view import PALETTE, shade
from mythos.generation.text import Piece, TextGeneration, TextRow
from mythos.reports import text_picture
from mythos.reports.text_picture import COLUMNS, draw_text, wrapped


@given(st.lists(st.tuples(st.text("ab \n", max_size=2 * COLUMNS + 5), st.integers(1, 8)), max_size=12))
def test_all_text_is_on_the_lines_once_and_in_order(pieces: list[tuple[str, int]]) -> None:
    parts = list(wrapped(pieces))
    drawn = "".join(text for _, _, text, _ in parts)
    assert drawn.replace(" ", "") == "".join(text for text, _ in pieces).replace(" ", "").replace("\n", "")
    end = (0.0, 0)
    for column, line, text, _ in parts:
        assert column + len(text) <= COLUMNS and (line, column) >= end
        end = line, column + len(text)


def test_places_of_a_text() -> None:
    pieces = [("ab", None), (" cd\n\n", 1), ("x" * (COLUMNS - 1), 2), (" y", 3), ("z" * (COLUMNS + 1), 4)]
    assert list(wrapped(pieces)) == [
        (0, 0, "ab", None),
        (2, 0, " cd", 1),
        (0, 1.5, "x" * (COLUMNS - 1), 2),
        (0, 2.5, "y", 3),
        (1, 2.5, "z" * (COLUMNS - 1), 4),
        (0, 3.5, "zz", 4),
    ]


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Figure] = []
    save = text_picture.save
    monkeypatch.setattr(text_picture, "save", lambda figure, path: seen.append(figure) or save(figure, path))
    rows = [
        TextRow("a $b$ \x1b[2J", 8, [Piece(" one", 1), Piece(" $x$ \u4e16", 8)], [1, 8]),
        TextRow("c", 4, [Piece(" two", 4)], [4]),
    ]
    generation = TextGeneration(rows, 5, 0.1, 0.5, 2048, halting=True)
    for kind, begin in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        assert draw_text(generation, tmp_path / f"a.{kind}").read_bytes().startswith(begin)
    [axes] = seen[0].axes
    texts = [text.get_text() for text in axes.texts]
    assert texts[:7] == ["loops", " 1 ", "33%", " 4 ", "33%", " 8 ", "33%"]
    assert [text.replace("\\", "") for text in texts[7:-1]] == [
        *("a $b$ \u241b[2J", " one", " $x$ \u4e16", "c", " two"),
    ]
    assert texts[-1] == "4.33 loops per token on average of 6.67 (35% saved)"
    boxes = [to_hex(patch.get_facecolor()) for patch in axes.patches[1:]]  # after the frame
    assert boxes == [PALETTE[shade(loops, 8)][1] for loops in (1, 4, 8, 1, 8, 4)]
