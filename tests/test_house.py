"""Sizes that a reader can take in: of files and of functions. Complexity is ruff's to measure (pyproject.toml)."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE, LONGEST_FUNCTION = 600, 80
SOURCES = [ROOT / "train.py", *sorted((ROOT / "mythos").rglob("*.py")), *sorted((ROOT / "scripts").rglob("*.py"))]


def too_long(source: str) -> Iterator[str]:
    """Yield what is longer than allowed: the file, or functions by their names."""
    length = len(source.splitlines())
    if length > LONGEST_FILE:
        yield f"{length} lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{node.name}: {length} lines"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path: Path) -> None:
    assert list(too_long(path.read_text("utf-8"))) == []


def test_long_functions_and_files_are_detected() -> None:
    body = "    pass\n" * 80
    assert list(too_long(f"def f():\n{body}")) == ["f: 81 lines"]
    assert list(too_long("pass\n" * 601)) == ["601 lines"]
