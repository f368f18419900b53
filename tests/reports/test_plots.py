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
from tests.reports.drawn import points


def write(run_dir: Path, validated: set[int], steps: int = 12) -> None:
    records = []
    for step in range(1, steps + 1):
        record = {"step": step, "tokens": 100 * step, "loss": 6 / step}
        if step in validated:
            record |= {"val/loss": 7 / step, "val/loss@8": 7 / step, "val/loss@1": 9 / step, "val/loss@16": 6.5 / step}
        records.append(record)
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def drawn(monkeypatch) -> dict[str, list[Axes]]:
    """The plots of every picture that is saved, by file name."""
    seen: dict[str, list[Axes]] = {}
    save = plots.save

    def keep(figure: Figure, path: Path) -> Path:
        seen[path.name] = figure.axes
        return save(figure, path)

    monkeypatch.setattr(plots, "save", keep)
    return seen


def test_both_plots(tmp_path, drawn):
    write(tmp_path, {4, 8, 12})
    written = draw_plots(tmp_path, 8)
    assert written == [tmp_path / "plots" / "loss.png", tmp_path / "plots" / "depth.png"]
    [loss], (depth, gains) = drawn["loss.png"], drawn["depth.png"]
    assert points(loss) == {
        "training": [(100 * step, 6 / step) for step in range(1, 13)],
        "validation\nat 8 loops": [(100 * step, 7 / step) for step in (4, 8, 12)],
    }
    assert depth.get_title("left") == "Validation loss by loops, step 12"
    assert points(depth)["every position alike"] == [(1, 9 / 12), (8, 7 / 12), (16, 6.5 / 12)]
    assert {name: line for name, line in points(gains).items() if name.startswith("step")} == {
        f"step {step}": [(1, 0), (8, 9 / step - 7 / step), (16, 9 / step - 6.5 / step)] for step in (4, 8, 12)
    }
    for axes in (depth, gains):
        assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "8", "16"]
        assert list(axes.get_lines()[-1].get_xdata()) == [8, 8], "the training mean"
    for path in written:
        height, width, _ = imread(path).shape
        assert width == 960 and 500 < height < 1200
        assert imread(path)[..., :3].std() > 0.05, "not a blank page"
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"loss.png", "depth.png"}


def test_many_validations_are_thinned_and_the_last_is_shown(tmp_path, drawn):
    write(tmp_path, set(range(1, 41)), steps=40)
    draw_plots(tmp_path, 8)
    labels = [name for name in points(drawn["depth.png"][1]) if name.startswith("step")]
    assert 5 <= len(labels) <= 7 and labels[0] == "step 1" and labels[-1] == "step 40"
    assert len(points(drawn["loss.png"][0])["validation\nat 8 loops"]) == 40


def test_before_the_first_validation(tmp_path, drawn):
    write(tmp_path, set())
    assert draw_plots(tmp_path, 8) == [tmp_path / "plots" / "loss.png"]
    assert list(points(drawn["loss.png"][0])) == ["training"]


def test_single_points_are_not_drawn(tmp_path, drawn):
    write(tmp_path, set(), steps=1)
    assert draw_plots(tmp_path, 8) == []
    lines = [{"step": step, "tokens": step, "loss": 3.0, "val/loss": 2.5, "val/loss@8": 2.5} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert draw_plots(tmp_path, 8) == [tmp_path / "plots" / "loss.png"], "one depth is no curve"


def test_the_fast_loss_of_the_beginning_does_not_decide_the_range(tmp_path, drawn):
    write(tmp_path, {40, 80}, steps=100)  # training loss 6 / step
    draw_plots(tmp_path, 8)
    low, high = drawn["loss.png"][0].get_ylim()
    assert low < 6 / 100 and 6 / 5 < high < 6 / 4


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
