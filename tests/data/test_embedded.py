"""The embedded corpus: enough English, no code, no repetition; gathered once and atomically."""

import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from mythos.config.data import DataConfig
from mythos.data import embedded
from mythos.data.corpus import cache_directory, open_corpora

DOCSTRING = """
Solve the equation for every row of the matrix, as described by the authors of the method.

It uses :class:`~package.module.Solver` and ``numpy`` where the matrix is small, and falls back to the
`user guide <https://example.org/guide>`_ otherwise.

Parameters
----------
matrix : array_like, optional
    The coefficients of the equation, of which only the lower triangle is ever read by this function.

    - The first entry of a list is kept with the lines
      that continue it, as it is one sentence.

.. note:: This whole block is a directive and must be left out because it is not part of the text.

A block of code is introduced by this sentence and then it is left out of what is yielded here::

    this_line_is_code = "and it must not be seen in the text of a document, as it is not prose."

>>> solve([[1, 2], [3, 4]])
The result of an example must not be taken for a sentence of the text, even if it looks like one.
"""


def test_prose_of_a_docstring() -> None:
    assert list(embedded.prose(DOCSTRING)) == [
        "Solve the equation for every row of the matrix, as described by the authors of the method.",
        "It uses `Solver` and `numpy` where the matrix is small, and falls back to the user guide otherwise.",
        "The coefficients of the equation, of which only the lower triangle is ever read by this function.",
        "- The first entry of a list is kept with the lines that continue it, as it is one sentence.",
    ]


def test_literals_are_found_as_python_sees_them() -> None:
    body = "A text that is long enough to be kept, with words in it. " * 4
    source = (
        f'# a comment with """ opens nothing\nx = "\'\'\'"\ndef f():\n    """{body}"""\n'
        f"y = rb'''{body}'''\nz = r'''\\d {body}'''\nadd(f, \"\"\"{body}\\n\\x41\"\"\")\nw = f\"\"\"{body}\"\"\"\n"
    )
    assert list(embedded.literals(source)) == [body, f"\\d {body}", f"{body}\nA"]


@pytest.fixture(scope="module")
def gathered() -> list[dict]:
    (path,) = embedded.gather(cache_directory(DataConfig()), progress=False)
    return pq.read_table(path).to_pylist()


def test_enough_text_in_enough_row_groups(gathered: list[dict]) -> None:
    texts = [row["text"] for row in gathered]
    assert sum(len(text.encode()) for text in texts) >= 3 * 10**6
    assert all(500 <= len(text) <= 6000 for text in texts)
    assert len(open_corpora(DataConfig(kind="embedded"))["corpus"].shards) >= 64
    assert {row["source"].split()[0] for row in gathered} >= {"python", "torch", "numpy", "transformers"}


def test_text_is_english_and_not_repeated(gathered: list[dict]) -> None:
    paragraphs = [paragraph for row in gathered for paragraph in row["text"].split("\n\n")]
    assert len({paragraph.lower() for paragraph in paragraphs}) == len(paragraphs)
    words = re.findall(r"[a-z]+", " ".join(paragraphs).lower())
    # In English prose these three make up 10 to 13% of all words; in code and tables next to none.
    assert sum(word in ("the", "of", "and") for word in words) / len(words) > 0.07
    letters = sum(len(word) for word in words)
    assert letters / sum(map(len, paragraphs)) > 0.74, "English prose has about 0.79, code and tables much less"


def test_gathered_once_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def collect(packages: list[str], progress: bool) -> list[tuple[str, str]]:
        calls.append(packages)
        return [(f"text {index}", "here") for index in range(1000)]

    monkeypatch.setattr(embedded, "collect", collect)

    def fail(*_, **__) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pq, "write_table", fail)
        with pytest.raises(KeyboardInterrupt):
            embedded.gather(tmp_path, progress=False)
    assert list(tmp_path.iterdir()) == []
    first = embedded.gather(tmp_path, progress=False)
    assert embedded.gather(tmp_path, progress=False) == first == list(tmp_path.iterdir())
    assert len(calls) == 2 and "torch" in calls[0]
    texts = pq.read_table(first[0])["text"].to_pylist()
    assert sorted(texts) == sorted(text for text, _ in collect([], False)) and texts != sorted(texts)
    monkeypatch.setattr(embedded, "VERSION", embedded.VERSION + 1)
    assert embedded.gather(tmp_path, progress=False) != first
