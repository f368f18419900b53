"""Comparisons of runs: figures and table against the records."""

import csv
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from mythos.cli import main
from mythos.config.loading import load_config
from mythos.planning.flops import count_parameters, forward_flops
from mythos.reports.comparison import compare
from mythos.reports.comparison_page import comparison_page
from tests.reports.drawn import titles
from tests.reports.handmade import Page, records, write_run

HOPS = Path(__file__).parents[2] / "configs" / "reasoning-hops.yaml"


def validated(steps: int, scale: float, bits: float) -> list[dict]:
    """Records with a validation in every second one; `bits` are bits per byte for a nat per token."""
    lines = records(steps)
    for record in lines[1::2]:
        losses = {loops: scale * (2 + 1 / (loops + record["step"])) for loops in (1, 3, 6)}
        record |= {f"val/loss@{loops}": loss for loops, loss in losses.items()}
        record |= {"val/loss": losses[3], "val/bits_per_byte": losses[3] * bits, "val/auto_loops": 2.5}
    return lines


@pytest.fixture
def folders(tmp_path: Path) -> list[str]:
    """Two runs with one tokenizer; the second has another width and depth and fewer validations."""
    written = validated(8, 1.0, 0.4), validated(5, 1.5, 0.4)
    for record in written[1]:
        record["loops"] += 2
    folders = [
        write_run(tmp_path / "_a$b", written[0]),
        write_run(tmp_path / "wide" / "run", written[1], model__dim=64),
    ]
    for folder in folders:
        set_tokenizer(folder, "{}")
    return [str(folder) for folder in folders]


def set_tokenizer(folder: Path, content: str) -> None:
    (folder / "tokenizer").mkdir(exist_ok=True)
    (folder / "tokenizer" / "tokenizer.json").write_text(content)


def lines_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def flops_of(folder: str) -> list[float]:
    """FLOPs up to each record: every step is logged and costs 256 tokens at its own loops."""
    costs = forward_flops(load_config(Path(folder) / "config.yaml").model, 32)
    each = [
        256 * (3 * costs.once + (line["loops"] + 2 * line["backprop_loops"]) * costs.loop) for line in lines_of(folder)
    ]
    return list(np.cumsum(each))


def test_runs_of_one_vocabulary(folders, tmp_path, capsys):
    assert main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "vocabularies" not in printed and str(tmp_path / "out" / "compare.png") in printed
    assert "not validated on the same sequences: they differ in data.path" in printed
    assert imread(tmp_path / "out" / "compare.png")[..., :3].std() > 0.05, "not a blank page"
    with (tmp_path / "out" / "compare.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["_a$b", "run"]
    for row, folder in zip(rows, folders, strict=True):
        lines, parameters = lines_of(folder), count_parameters(load_config(Path(folder) / "config.yaml").model)
        validations = [line for line in lines if "val/loss" in line]
        expected = {
            "parameters": parameters.total,
            "active": parameters.active,
            "step": lines[-1]["step"],
            "tokens": 256 * len(lines),
            "flops": flops_of(folder)[-1],
            "loss": lines[-1]["loss"],
            "val_loss": validations[-1]["val/loss"],
            "val_loss_lowest": min(line["val/loss"] for line in validations),
            "bits_per_byte": validations[-1]["val/bits_per_byte"],
            "auto_loops": 2.5,
            "tokens_per_second": lines[-1]["tokens_per_second"],
            "peak_memory_bytes": lines[-1]["peak_memory_bytes"],
            "skipped_steps": 0,
        }
        assert {key: float(row[key]) for key in expected} == pytest.approx(expected, rel=1e-12)
        assert row["accuracy"] == ""
        assert f"{expected['val_loss']:.4f}" in printed and f"{expected['flops']:.3e}" in printed


def test_every_plot_has_a_title(folders):
    assert sorted(titles(compare(folders).figure())) == [
        "Last validation by loops",
        *(f"{kind} loss over {unit}" for kind in ("Training", "Validation") for unit in ("FLOPs", "tokens")),
    ]


def test_curves_are_the_records(folders):
    panels = {}
    for axes in compare(folders).figure().axes:
        panels[axes.get_title("left")] = [list(zip(*map(list, line.get_data()), strict=True)) for line in axes.lines]
    for key, title in (("loss", "Training loss"), ("val/loss", "Validation loss")):
        for unit in ("tokens", "FLOPs"):
            drawn = panels[f"{title} over {unit}"]
            for line, folder in zip(drawn, folders, strict=True):
                lines = lines_of(folder)
                places = flops_of(folder) if unit != "tokens" else [r["tokens"] for r in lines]
                expected = [(x, r[key]) for x, r in zip(places, lines, strict=True) if key in r]
                assert np.allclose(line, expected, rtol=1e-12)
    for line, folder in zip(panels["Last validation by loops"], folders, strict=True):
        last = [r for r in lines_of(folder) if "val/loss" in r][-1]
        assert line == [(loops, last[f"val/loss@{loops}"]) for loops in (1, 3, 6)]


def test_runs_of_different_vocabularies_are_compared_by_bytes(folders, tmp_path, capsys):
    set_tokenizer(Path(folders[1]), '{"another": 1}')
    comparison = compare(folders)
    for axes in comparison.figure().axes:
        assert "nats" not in axes.get_ylabel()
        if axes.get_xlabel() in ("tokens", "FLOPs needed"):
            for line, folder in zip(axes.lines, folders, strict=True):
                assert list(line.get_ydata()) == [
                    record["val/bits_per_byte"] for record in lines_of(folder) if "val/loss" in record
                ]
        if axes.get_xlabel() == "loops":
            for line, folder in zip(axes.lines, folders, strict=True):
                last = [record for record in lines_of(folder) if "val/loss" in record][-1]
                expected = [0.4 * last[f"val/loss@{loops}"] for loops in (1, 3, 6)]
                assert list(line.get_ydata()) == pytest.approx(expected, rel=1e-12)
    assert main(["compare", *folders, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "different vocabularies" in printed and "bits per byte are compared" in printed
    assert "loss" not in printed.splitlines()[0] and "bits/byte" in printed.splitlines()[0]


def test_the_page_has_table_curves_and_differences(folders):
    comparison = compare(folders)
    page = Page(comparison_page(comparison))
    page.assert_self_contained()
    assert page.raw.count("<svg") == 5 and page.raw.count("Note: ") == 1
    _, *rows = (line.split("  ") for line in comparison.table().splitlines())
    shown = page.table("run", "parameters")
    assert [[cell.strip() for cell in row if cell.strip()] for row in rows] == [
        [cell for cell in row if cell] for row in shown
    ]
    configs = [load_config(Path(folder) / "config.yaml") for folder in folders]
    assert page.table("field", "_a$b", "run") == [
        ["model.dim", "32", "64"],
        ["data.path", *(str(config.data.path) for config in configs)],
    ]
    drawn = re.findall(r'<path d="([^"]*)"[^>]*stroke: #0072b2', page.raw)
    lines = lines_of(folders[0])
    points = np.array(re.findall(r"[ML] (\S+) (\S+)", drawn[0]), dtype=float)
    expected = np.array([[line["tokens"], line["loss"]] for line in lines])
    for axis in (0, 1):
        scale, shift = np.polyfit(expected[:, axis], points[:, axis], 1)
        assert np.abs(scale * expected[:, axis] + shift - points[:, axis]).max() < 1e-3


def test_a_comparison_of_other_runs_is_kept(folders, tmp_path):
    out = tmp_path / "out"
    for runs in (folders, folders[:1], folders, folders[:1]):
        assert main(["compare", *runs, "--out", str(out)]) == 0
    names = {f"{stem}.{kind}" for stem in ("compare", "compare-2") for kind in ("csv", "png", "html")}
    assert {path.name for path in out.iterdir()} == names
    for stem, runs in (("compare", folders), ("compare-2", folders[:1])):
        with (out / f"{stem}.csv").open() as file:
            assert [row["directory"] for row in csv.DictReader(file)] == runs
    (out / "compare.csv").write_text("run,parameters\n_a$b,1\nrun,2\n")  # as an earlier version wrote it
    (out / "compare-3.png").write_text("mine")
    assert main(["compare", *folders, "--out", str(out)]) == 0
    assert (out / "compare.csv").read_text().endswith("run,2\n") and (out / "compare-4.html").exists()
    assert (out / "compare-3.png").read_text() == "mine" and not (out / "compare-3.csv").exists()


def test_a_run_that_has_no_validation_yet(folders, tmp_path):
    folders.append(str(write_run(tmp_path / "begun", records(2))))
    set_tokenizer(Path(folders[-1]), "{}")
    comparison = compare(folders)
    row = comparison.rows()[-1]
    assert row["val_loss"] is None and row["tokens"] == 512
    assert all(len(axes.lines) == 3 for axes in comparison.figure().axes if axes.get_xlabel())
    assert comparison.table().splitlines()[-1].split()[:3] == ["begun", f"{row['parameters']:,}", "512"]


def test_runs_on_a_task(tmp_path):
    written = records(3)
    written[-1] |= {"val/loss": 0.5, "val/loss@3": 0.5, "val/accuracy": 0.75, "val/accuracy@3": 0.75}
    config = load_config(HOPS)
    folders = [str(write_run(tmp_path / name, written, config)) for name in ("one", "two")]
    assert "75.00%" in compare(folders).table() and compare(folders).notes() == []


def test_what_cannot_be_compared(folders, tmp_path, capsys):
    def refused(*arguments: str) -> str:
        assert main(["compare", *arguments, "--out", str(tmp_path / "out")]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "got no runs; give run directories" in refused()
    assert "no such file or folder. Give a run directory" in refused(folders[0], str(tmp_path / "none"))
    task = write_run(tmp_path / "task", records(3), load_config(HOPS))
    assert "whose tokens are no text" in refused(folders[0], str(task))
    (Path(folders[1]) / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in refused(*folders)
    (tmp_path / "file").write_text("")
    assert main(["compare", folders[0], "--out", str(tmp_path / "file")]) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_losses_that_are_not_finite_are_drawn_as_gaps(tmp_path):
    written = validated(4, 1.0, 0.4)
    written[-1]["val/loss"] = math.nan
    folder = write_run(tmp_path / "run", written)
    assert compare([str(folder)]).write(tmp_path / "out")
