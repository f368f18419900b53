"""Plots show the values of the records."""

import gc
import json
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from mythos.reports import plots
from mythos.reports.plots import draw_plots


def write(run_dir: Path, validated: set[int], steps: int = 12) -> None:
    records = []
    for step in range(1, steps + 1):
        record = {"step": step, "tokens": 100 * step, "loss": 6 / step}
        if step in validated:
            record |= {"val/loss": 7 / step, "val/loss@8": 7 / step, "val/loss@1": 9 / step, "val/loss@16": 6.5 / step}
        records.append(record)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def drawn(monkeypatch) -> dict[str, Axes]:
    """The axes of every figure that is saved, by file name."""
    seen: dict[str, Axes] = {}
    finish = plots.finish

    def keep(figure: Figure, path: Path) -> Path:
        seen[path.name] = figure.axes[0]
        return finish(figure, path)

    monkeypatch.setattr(plots, "finish", keep)
    return seen


def points(axes: Axes) -> dict[str, list[tuple[float, float]]]:
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.lines
        if line.get_label() != "training mean"
    }


def test_both_plots(tmp_path, drawn):
    write(tmp_path, {4, 8, 12})
    written = draw_plots(tmp_path, 8)
    assert written == [tmp_path / "plots" / "loss.png", tmp_path / "plots" / "depth.png"]
    assert points(drawn["loss.png"]) == {
        "training": [(100 * step, 6 / step) for step in range(1, 13)],
        "validation at 8 loops": [(100 * step, 7 / step) for step in (4, 8, 12)],
    }
    assert points(drawn["depth.png"]) == {
        f"step {step}": [(1, 9 / step), (8, 7 / step), (16, 6.5 / step)] for step in (4, 8, 12)
    }
    assert [tick.get_text() for tick in drawn["depth.png"].get_xticklabels()] == ["1", "8", "16"]
    for path in written:
        assert imread(path).shape[:2] == (540, 840)
        assert imread(path)[..., :3].std() > 0.05, "not a blank page"
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"loss.png", "depth.png"}


def test_many_validations_are_thinned_and_the_last_is_shown(tmp_path, drawn):
    write(tmp_path, set(range(1, 41)), steps=40)
    draw_plots(tmp_path, 8)
    labels = list(points(drawn["depth.png"]))
    assert 5 <= len(labels) <= 7 and labels[0] == "step 1" and labels[-1] == "step 40"
    assert len(points(drawn["loss.png"])["validation at 8 loops"]) == 40


def test_before_the_first_validation(tmp_path, drawn):
    write(tmp_path, set())
    assert draw_plots(tmp_path, 8) == [tmp_path / "plots" / "loss.png"]
    assert list(points(drawn["loss.png"])) == ["training"]


def test_drawing_leaves_nothing_in_memory(tmp_path):
    """A run draws at every validation, so figures must be freed at once, not by a later garbage collection."""
    write(tmp_path, {4, 8, 12})
    gc.collect()
    before = sum(isinstance(thing, Figure) for thing in gc.get_objects())
    gc.disable()
    try:
        draw_plots(tmp_path, 8)
        assert sum(isinstance(thing, Figure) for thing in gc.get_objects()) == before
    finally:
        gc.enable()
