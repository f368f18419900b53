"""The trace of a window of steps."""

import gzip
import json

import pytest
import torch

from mythos.config.sections import ProfileConfig
from mythos.training import profiling
from mythos.training.profiling import Profiler


def steps(run_dir, start: int, count: int, total: int, rank: int = 0) -> None:
    """Train `total` steps; the n-th multiplies matrices n times, and nothing else does."""
    matrix = torch.ones(32, 32)
    with Profiler(run_dir, ProfileConfig(start=start, steps=count), rank) as profiler:
        for step in range(1, total + 1):
            for _ in range(step):
                matrix @ matrix
            profiler.step()


def traced(run_dir, rank: int = 0) -> tuple[list[int], int]:
    """The steps marked in a trace, and its matrix products."""
    with gzip.open(run_dir / "profile" / f"rank-{rank:05d}.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    marks = [event["name"] for event in events if event["name"].startswith("ProfilerStep#")]
    return sorted(int(mark.split("#")[1]) for mark in marks), sum(event["name"] == "aten::mm" for event in events)


@pytest.mark.parametrize(("start", "count", "products"), [(1, 2, 1 + 2), (3, 2, 3 + 4), (5, 1, 5)])
def test_the_window_is_traced_and_nothing_else(tmp_path, capsys, start, count, products):
    steps(tmp_path, start, count, total=6)
    assert traced(tmp_path) == (list(range(start, start + count)), products)
    assert str(tmp_path / "profile" / "rank-00000.json.gz") in capsys.readouterr().out
    table = (tmp_path / "profile" / "rank-00000.txt").read_text()
    rows = [line.split() for line in table.splitlines() if "aten::" in line]
    (product,) = [row for row in rows if row[0] == "aten::mm"]
    assert int(product[-1]) == products
    assert len(rows) <= profiling.OPERATORS and "ProfilerStep" not in table


def test_a_run_that_ends_in_the_window(tmp_path, capsys):
    steps(tmp_path, 2, 10, total=3, rank=1)
    assert traced(tmp_path, rank=1) == ([2, 3, 4], 2 + 3)
    assert capsys.readouterr().out == "", "only rank 0 speaks"
    steps(tmp_path, 9, 2, total=3)
    assert not (tmp_path / "profile" / "rank-00000.json.gz").exists(), "a window that never began"


def test_a_failing_step_is_traced(tmp_path):
    with pytest.raises(RuntimeError, match="inner"), Profiler(tmp_path, ProfileConfig(start=1, steps=3), 0):
        torch.ones(2, 2) @ torch.ones(2, 2)
        raise RuntimeError("inner")
    assert traced(tmp_path) == ([1], 1)


def test_no_window_makes_no_profiler(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.profiler, "profile", None)  # any use now fails
    steps(tmp_path, 1, 0, total=2)
    assert not list(tmp_path.iterdir())


def test_a_trace_that_cannot_be_written(tmp_path, caplog):
    (tmp_path / "profile").write_text("a file where the folder should be")
    steps(tmp_path, 1, 1, total=2)
    assert "the trace of rank 0 cannot be written" in caplog.text
