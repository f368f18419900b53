"""mythos evaluate on a run, a checkpoint and an export, and the same questions in training."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from mythos.cli import main
from mythos.errors import MythosError
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.results import COLUMNS, Result, append_to_table, file_name, save, table
from mythos.reports import evaluation_plots
from mythos.reports.evaluation_plots import MOST_PANELS, draw_scores
from mythos.trainer import Trainer
from mythos.training.metrics import read_metrics
from tests.runs import tiny
from tests.trainers import run, saved

pytestmark = pytest.mark.usefixtures("no_plots")

LINES = [
    {"query": "The river crosses the", "choices": ["garden.", "signal and more"], "gold": 0},
    {"query": "The stone finds the " * 20, "choices": ["morning.", "engine", "letter."], "gold": 2},
    {"query": "Page", "choices": ["1.", "river"], "gold": 1},
]


def questions(folder: Path) -> Path:
    path = folder / "local.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> Trainer:
    """A run that scores its questions after two and four steps."""
    folder = tmp_path_factory.mktemp("evaluate")
    return run(tiny(folder, eval__every=2, eval__tasks=[str(questions(folder))], optim__lr=0.02, depth__mean=2))


def scores(path: Path) -> dict[tuple[str, str, int, str | None], Any]:
    content = json.loads(path.read_text())
    return {(r["task"], r["metric"], r["loops"], r["rule"]): r for r in content["results"]}


def json_of(stem: Path) -> Path:
    return stem.with_name(stem.name + ".json")


def png_of(stem: Path) -> Path:
    return stem.with_name(stem.name + ".png")


def lines_of(sheet: Path) -> list[dict[str, str]]:
    with sheet.open(newline="") as file:
        return list(csv.DictReader(file))


def test_training_scores_its_questions_at_every_validation(trained: Trainer) -> None:
    keys = {f"val/local_{metric}@{loops}" for metric in ("acc", "acc_norm") for loops in (1, 3)}
    validations = [record for record in read_metrics(trained.run_dir / "metrics.jsonl") if "val/loss" in record]
    assert [record["step"] for record in validations] == [2, 4]
    for record in validations:
        assert keys <= record.keys() and all(record[key] * 3 == pytest.approx(round(record[key] * 3)) for key in keys)


def test_a_run(trained: Trainer, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Questions as the trainer scored them, bits per byte as it validated and as the depth sweep measures them."""
    arguments = ["--tasks", str(trained.run_dir.parent / "local.jsonl"), "--loops", "3,1,auto"]
    corpus = str(trained.run_dir.parent / "corpus.jsonl")
    assert main(["evaluate", str(trained.run_dir), *arguments, "--exit-threshold", "1.5,0.001"]) == 0
    stem = trained.run_dir / "evaluation" / "step-00000004_local_loops-3+1+convergence-1.5+convergence-0.001"
    printed = capsys.readouterr().out
    sheet = stem.with_name("results.csv")
    assert all(str(path) in printed and path.exists() for path in (json_of(stem), png_of(stem), sheet))
    assert "3 of 7 prompts do not fit in the context of 64 tokens" in caplog.text
    record = read_metrics(trained.run_dir / "metrics.jsonl")[-1]
    scored = scores(json_of(stem))
    for metric in ("acc", "acc_norm"):
        for loops in (1, 3):
            assert scored["local", metric, loops, None]["value"] == record[f"val/local_{metric}@{loops}"]
    lines = lines_of(sheet)
    assert [line["threshold"] for line in lines[4:]] == ["1.5", "1.5", "0.001", "0.001"]
    assert [float(line["mean_loops"]) for line in lines[4:]] == [1.0, 1.0, 2.0, 2.0]

    assert main(["evaluate", str(trained.run_dir), "--loops", "1,2,auto", "--out", str(stem.parent / "text")]) == 0
    text = scores(stem.parent / "text" / "step-00000004_validation_loops-1+2+convergence-0.13.json")
    assert {key[0] for key in text} == {"validation"}
    assert text["validation", "bits_per_byte", 2, None]["value"] == pytest.approx(record["val/bits_per_byte"])
    assert text["validation", "perplexity", 1, None]["value"] == pytest.approx(math.exp(record["val/loss@1"]))
    halted = text["validation", "perplexity", 2, "convergence"]
    assert halted["value"] == pytest.approx(math.exp(record["val/auto_loss"]), rel=1e-4)
    assert halted["mean_loops"] == pytest.approx(record["val/auto_loops"])

    options = ["--data", corpus, "--loops", "2", "--out", str(stem.parent / "other")]
    assert main(["evaluate", str(trained.run_dir), *options, "--limit", "3"]) == 0
    [document] = (stem.parent / "other").glob("step-00000004_*-corpus.jsonl_loops-2_limit-3.json")
    other = scores(document)
    assert other[corpus, "bits_per_byte", 2, None]["samples"] == 3
    options[-1] = str(stem.parent / "sweep")
    assert main(["sweep", str(trained.run_dir), *options, "--sequences", "3", "--rules", "none"]) == 0
    measured = json.loads((stem.parent / "sweep" / "step-00000004.json").read_text())["loops"][-1]
    assert other[corpus, "bits_per_byte", 2, None]["value"] == pytest.approx(measured["bits_per_byte"])


def test_an_export_gives_the_scores_of_its_checkpoint(trained: Trainer, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(trained.run_dir), str(tmp_path / "export")]) == 0
    arguments = ["--tasks", str(questions(tmp_path)), "--data", str(trained.run_dir.parent / "corpus.jsonl")]
    arguments += ["--limit", "2"]
    values = []
    for path in (tmp_path / "export", saved(trained, 4)):
        out = tmp_path / f"{path.name}-scores"
        assert main(["evaluate", str(path), *arguments, "--out", str(out)]) == 0
        [document] = out.glob("step-00000004_*.json")
        content = json.loads(document.read_text())
        values.append([r["value"] for r in content["results"] if r["task"] == "local"])
    assert values[0] == values[1] and len(values[0]) == 6, "by default 1, the mean and auto"
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "export")]) == 1
    assert "an exported model knows no data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loops", "0,1"], "--loops: got '0'; give auto, or whole numbers of at least 1"),
        (["--loops", "deep"], "--loops: got 'deep'"),
        (["--loops", "1", "--exit-threshold", "0.1"], "--exit-threshold is for auto: add it to --loops"),
        (["--loops", "1", "--halting", "convergence"], "--halting is for auto"),
        (["--loops", "auto", "--halting", "never"], "halting: got 'never'"),
        (["--exit-threshold", "0"], "above 0"),
        (["--limit", "0"], "--limit: got 0"),
        (["--tasks", "a.jsonl,"], "--tasks: got 'a.jsonl,'"),
        (["--tasks", "nothing.jsonl"], "--tasks: nothing.jsonl cannot be read"),
        (["--data", "nothing-*.txt"], "--data: nothing-*.txt matches no file"),
        (["--out", "file"], "file cannot be written: "),
    ],
)
def test_bad_options(
    trained: Trainer, tmp_path: Path, capsys: Any, monkeypatch: Any, options: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert main(["evaluate", str(trained.run_dir), *options]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_harness_that_is_not_installed(trained: Trainer, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mythos.evaluation.harness", None)  # as where its first import fails
    assert main(["evaluate", str(trained.run_dir), "--tasks", "hellaswag"]) == 1
    message = capsys.readouterr().err
    assert "'hellaswag' is no .jsonl file" in message and "pip install 'mythos-rdt[eval]'" in message


def test_a_checkpoint_without_its_tokenizer(trained: Trainer, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved(trained, 4), "alone/step-00000004")
    (trained.run_dir / "tokenizer").rename(trained.run_dir / "elsewhere")
    try:
        assert main(["evaluate", "alone/step-00000004"]) == 1
    finally:
        (trained.run_dir / "elsewhere").rename(trained.run_dir / "tokenizer")
    assert "there is no tokenizer beside it" in capsys.readouterr().err and not Path("evaluation").exists()


def test_questions_that_cannot_be_read_stop_a_run_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 7}\n')
    with pytest.raises(MythosError, match=r"eval.tasks: .*bad.jsonl, line 1: gold: got 7"):
        Trainer(tiny(tmp_path, eval__tasks=[str(path)]))
    assert not (tmp_path / "run").exists()


# Tables, files and pictures

HALTING = DepthSetting(8, "gate", 0.01)
RESULTS = [
    Result("a", "acc", DepthSetting(1), 1.0, 0.25, 0.1, 8),
    Result("a", "acc", DepthSetting(8), 8.0, 0.5, 0.125, 8),
    Result("a", "acc", HALTING, 3.5, 0.375, None, 8),
    Result("b", "perplexity", DepthSetting(1), 1.0, math.inf, None, None),
    Result("b", "perplexity", DepthSetting(8), 8.0, 12.0, None, None),
    Result("b", "perplexity", HALTING, 4.0, 13.0, None, None),
]


def test_table() -> None:
    assert table(RESULTS).splitlines() == [
        "  task  metric            1        8  gate 0.01",
        "  a     mean loops     1.00     8.00       3.50",
        "        acc          0.2500   0.5000     0.3750",
        "  b     mean loops     1.00     8.00       4.00",
        "        perplexity      inf  12.0000    13.0000",
    ]
    assert table(RESULTS[:2]).splitlines()[1:] == ["  a     acc      0.2500   0.5000"]


def test_files(tmp_path: Path) -> None:
    save(RESULTS, tmp_path / "step-1", {"step": 1})
    content = json.loads((tmp_path / "step-1.json").read_text())
    assert content["step"] == 1 and content["results"][3]["value"] is None, "JSON has no infinity"
    assert content["results"][2] == {
        **{"task": "a", "metric": "acc", "loops": 8, "rule": "gate", "threshold": 0.01},
        **{"mean_loops": 3.5, "value": 0.375, "stderr": None, "samples": 8},
    }


def test_every_call_keeps_its_results(trained: Trainer, tmp_path: Path) -> None:
    """Three calls: of one depth, of another, and of the first again."""
    arguments = [str(trained.run_dir), "--tasks", str(questions(tmp_path)), "--out", str(tmp_path / "out")]
    for loops in ("1", "2", "1"):
        assert main(["evaluate", *arguments, "--loops", loops]) == 0
    stems = ["step-00000004_local_loops-1", "step-00000004_local_loops-1-2", "step-00000004_local_loops-2"]
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert files.keys() == {"results.csv", *(f"{stem}.json" for stem in stems)}, "a single depth is no picture"
    for stem, loops in zip(stems, (1, 1, 2), strict=True):
        assert {r["loops"] for r in json.loads(files[f"{stem}.json"].read_text())["results"]} == {loops}
    lines = lines_of(files["results.csv"])
    assert [line["file"] for line in lines[::2]] == [f"{stems[n]}.json" for n in (0, 2, 1)]
    assert lines[0].keys() == set(COLUMNS) and lines[0]["step"] == "4" and lines[0]["source"].endswith("step-00000004")
    for line in lines:
        [score] = [r for r in json.loads(files[line["file"]].read_text())["results"] if r["metric"] == line["metric"]]
        assert float(line["value"]) == score["value"] and line["loops"] == str(score["loops"])


ABOUT = {"source": "runs/a", "step": 1, "dtype": "float32", "limit": None, "fewshot": 2}


def test_the_table_only_grows(tmp_path: Path) -> None:
    sheet = append_to_table(RESULTS[:2], tmp_path / "a.json", ABOUT)
    before = sheet.read_text()
    sheet.write_text(before + "cut off by a kill")
    assert append_to_table(RESULTS[2:4], tmp_path / "b.json", ABOUT) == sheet
    assert sheet.read_text().startswith(before + "cut off by a kill\n")
    assert [line["file"] for line in lines_of(sheet)] == ["a.json", "a.json", None, "b.json", "b.json"]
    assert [line["value"] for line in lines_of(sheet)[3:]] == ["0.375", ""] and lines_of(sheet)[0]["fewshot"] == "2"
    sheet.write_text("task,score\nmine,1\n")
    assert append_to_table(RESULTS[:1], tmp_path / "c.json", ABOUT) == tmp_path / "results-2.csv"
    assert sheet.read_text() == "task,score\nmine,1\n" and len(lines_of(tmp_path / "results-2.csv")) == 1


def test_names_of_files() -> None:
    settings = [DepthSetting(1), DepthSetting(8, "gate", 0.05)]
    assert file_name(3, ["arc_easy", "../texts/*.parquet"], settings, None, 5) == (
        "step-00000003_arc_easy+texts-.parquet_loops-1+gate-0.05_fewshot-5"
    )
    long = [file_name(3, [f"task{n}" for n in range(count)], settings, None, None) for count in (99, 100)]
    assert long[0] != long[1] and all(len(name) < 200 for name in long)
    assert "/" not in file_name(3, ["/", "", "a/../b"], settings, None, None)


def test_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Figure] = []
    save_figure = evaluation_plots.save
    monkeypatch.setattr(evaluation_plots, "save", lambda figure, path: seen.append(figure) or save_figure(figure, path))
    assert draw_scores(RESULTS, tmp_path / "a.png").stat().st_size > 5_000
    first, second = seen[0].axes
    assert [axes.get_title("left") for axes in (first, second)] == ["a: acc", "b: perplexity"]
    line, star = (container.lines[0] for container in first.containers)
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1, 8], [0.25, 0.5])
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([3.5], [0.375])
    many = [
        Result(f"task {n}", "acc", DepthSetting(d), d, 0.5, None, 1) for n in range(MOST_PANELS + 3) for d in (1, 2)
    ]
    draw_scores(many, tmp_path / "b.png")
    assert len(seen[1].axes) == MOST_PANELS
    at_one_depth = [Result(f"task {n}", "acc", DepthSetting(1), 1.0, n / 8, 0.1, 9) for n in range(8)]
    draw_scores(at_one_depth, tmp_path / "c.png")
    bars = [container.lines[0].get_xydata().tolist() for container in seen[2].axes[0].containers]
    assert bars == [[[n / 8, n]] for n in range(8)]
    assert draw_scores(RESULTS[:1], tmp_path / "d.png") is None, "a single score is no picture"
