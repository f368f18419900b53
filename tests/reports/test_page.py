"""The page of a run against its files."""

import json
import math
import re
import statistics
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from mythos.checkpoints.stored_model import open_model
from mythos.cli import main, report
from mythos.config.loading import load_config
from mythos.distributed.run_lock import RunLock
from mythos.errors import MythosError
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.depth_sweep import DepthSweep, fit_metrics
from mythos.evaluation.reasoning import AccuracyMap
from mythos.evaluation.results import Result, load, save
from mythos.planning.flops import forward_flops
from mythos.reports import figures
from mythos.reports.evaluation_plots import score_panels
from mythos.reports.page import run_page
from mythos.reports.recorded import open_run
from mythos.reports.style import separate
from tests.reports.drawn import titles
from tests.reports.handmade import Page, records, write_run
from tests.runs import tiny
from tests.trainers import run

HOPS = Path(__file__).parents[2] / "configs" / "reasoning-hops.yaml"


def page_of(directory: Path) -> Page:
    page = Page(run_page(open_run(directory)))
    page.assert_self_contained()
    return page


def lines_of(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped at step 4 and continued, and swept after its end."""
    directory = tmp_path_factory.mktemp("trained")
    changes = {"eval__every": 2, "eval__samples": 2, "eval__loops": [1, 2, 3, 6], "checkpoint__every": 2}
    changes["eval__prompts"] = ["The river", "<b>Page"]
    for steps in (4, 6):
        run(tiny(directory, train__steps=steps, **changes))
    assert main(["sweep", str(directory / "run"), "--loops", "1,2,3,6", "--rules", "convergence"]) == 0
    return directory / "run"


def test_a_real_run(trained, capsys):
    assert main(["report", str(trained)]) == 0
    path = trained / "report.html"
    assert capsys.readouterr().out == f"{path}\n"
    page, lines = Page(path.read_text(encoding="utf-8")), lines_of(trained)
    page.assert_self_contained()

    last, opened = lines[-1], open_model(trained)
    shown = page.headline
    assert shown["parameters"] == f"{sum(p.numel() for p in opened.model.parameters()):,}"
    assert shown["steps"] == "6 of 6" and shown["tokens"] == f"{6 * 8 * 32:,}"
    assert shown["last training loss"] == f"{last['loss']:.4f}"
    assert shown["validation loss at 3 loops"] == f"{last['val/loss']:.4f}" == f"{last['val/loss@3']:.4f}"
    assert shown["bits per byte"] == f"{last['val/bits_per_byte']:.4f}"
    halted = f"{last['val/auto_loops']:.2f} ({last['val/auto_saved']:.0%} saved)"
    assert shown["loops where convergence halts"] == halted
    median = statistics.median(line["tokens_per_second"] for line in lines)
    assert shown["tokens per second, median"] == f"{median:,.0f}"
    assert shown["peak memory"] == f"{max(line['peak_memory_bytes'] for line in lines) / 2**30:.2f} GiB"
    assert (shown["restarts"], shown["skipped updates"]) == ("1", "0") and "rollbacks" not in shown

    assert page.table("loops", "loss", "perplexity") == [
        [str(loops), f"{last[f'val/loss@{loops}']:.4f}", f"{math.exp(last[f'val/loss@{loops}']):.2f}", mark]
        for loops, mark in ((1, ""), (2, ""), (3, "training mean"), (6, ""))
    ]
    assert page.table("step", "tokens", "loss at 3 loops", "bits per byte") == [
        [str(line["step"]), f"{line['tokens']:,}", f"{line['val/loss']:.4f}", f"{line['val/bits_per_byte']:.4f}"]
        for line in lines
        if line["step"] in (2, 4, 6)
    ]
    sweep = json.loads((trained / "sweep" / "step-00000006.json").read_text())
    assert page.table("rule", "threshold") == [
        [
            point["rule"] + " (default)" * point["default"],
            f"{point['threshold']:g}",
            f"{point['loops']:.2f}",
            f"{point['saved']:.0%}",
            f"{point['loss']:.4f}",
        ]
        for point in sweep["halting"]
    ]

    events = page.table("step", "time (UTC)", "event")
    sizes = {
        step: sum(file.stat().st_size for file in (trained / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
        for step in (4, 6)
    }
    assert [(step, what) for step, _, what in events] == [
        ("4", f"checkpoint, {sizes[4] / 2**20:,.1f} MiB"),
        ("5", "continued from step 4"),
        ("6", f"checkpoint, {sizes[6] / 2**20:,.1f} MiB"),
    ]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", moment) for _, moment, _ in events)
    for step in (2, 4, 6):
        sample = (trained / "samples" / f"step-{step:08d}.txt").read_text().rstrip("\n")
        # A control character is shown as its Unicode picture; that of DEL is separate.
        pictures = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}
        assert sample.translate(pictures) in page.texts
    assert page.texts[-1] == (trained / "config.yaml").read_text()
    titles = [
        "Training",
        "Depth",
        "Depth sweep",
        "Evaluations",
        "Experts",
        "Throughput and memory",
        "Samples",
        "Events",
    ]
    assert page.headings == [*titles, "Configuration"]


def test_records_mark_where_a_run_continued(trained):
    assert [line.get("resumed_from") for line in lines_of(trained)] == [None] * 4 + [4, None]


def test_curves_on_the_page_are_the_records(tmp_path):
    """The path of the training loss in the page is an affine image of the records."""
    written = records(12)
    page = page_of(write_run(tmp_path / "run", written))
    path = re.search(r'<path d="([^"]*)"[^>]*stroke: #56b4e9', page.raw)[1]
    drawn = np.array(re.findall(r"[ML] (\S+) (\S+)", path), dtype=float)
    expected = np.array([[record["tokens"], record["loss"]] for record in written])
    assert drawn.shape == expected.shape
    for axis, sign in ((0, 1), (1, -1)):
        scale, shift = np.polyfit(expected[:, axis], drawn[:, axis], 1)
        assert sign * scale > 0
        assert np.abs(scale * expected[:, axis] + shift - drawn[:, axis]).max() < 1e-3


def test_panels_show_what_was_measured(tmp_path):
    written = records(5)
    written[2]["grad_norm"] = written[2]["loss"] = None
    for record in written[3:]:
        record |= {"moe/load_max_over_mean": 1.5, "moe/dead_experts": record["step"] - 4}
    written[2] |= {"val/auto_loops": 3.0}
    opened = open_run(write_run(tmp_path / "run", written))
    panels = [*figures.panels(opened, figures.TRAINING), *figures.panels(opened, figures.EXPERTS)]
    drawn = {titles(figure)[0]: figure.axes[0] for figure in separate([*panels, *figures.rate_panels(opened)])}
    keys = {
        "Learning rate": ["lr"],
        "Loops of a sequence": ["loops", "backprop_loops"],
        "Norm of the gradient": ["grad_norm"],
        "Size of the state": ["state_norm"],
        "Change of the state in its last loop": ["state_delta"],
        "Spectral radius of the injection": ["rho_a"],
        "Load of the busiest expert": ["moe/load_max_over_mean"],
        "Experts that no token reached": ["moe/dead_experts"],
    }
    assert drawn.keys() == keys.keys() | {"Throughput", "Peak memory"}
    for title, names in keys.items():
        expected = [[(r["tokens"], r[name]) for r in written if r.get(name) is not None] for name in names]
        assert [list(zip(*line.get_data(), strict=True)) for line in drawn[title].lines] == expected
    [line] = drawn["Throughput"].lines
    assert np.allclose(line.get_xdata(), range(5)) and drawn["Throughput"].get_xlabel().startswith("minutes")
    assert list(line.get_ydata()) == [record["tokens_per_second"] for record in written]
    [line] = drawn["Peak memory"].lines
    assert list(line.get_ydata()) == [record["peak_memory_bytes"] / 2**30 for record in written]


def test_load_of_the_experts_by_loop(trained):
    by_loop, *_ = separate(figures.expert_panels(open_run(trained)))
    measured = [line for line in lines_of(trained) if "val/loss" in line]
    for drawn, line in zip(by_loop.axes[0].lines, measured, strict=True):
        expected = [(loop, line[f"moe/load_max_over_mean@{loop}"]) for loop in (1, 2, 3)]
        assert list(zip(*drawn.get_data(), strict=True)) == expected and all(load >= 1 for _, load in expected)


def test_depth_curve_with_its_law_and_the_halting_point(tmp_path):
    written = records(4)
    losses = {loops: 3 + math.exp(-0.7 * loops) for loops in (1, 2, 3, 6, 12)}
    written[-1] |= {f"val/loss@{loops}": loss for loops, loss in losses.items()}
    written[-1] |= {"val/loss": losses[3], "val/bits_per_byte": 1.0, **fit_metrics(losses)}
    written[-1] |= {"val/auto_loss": 3.3, "val/auto_loops": 1.75, "val/auto_saved": 0.4}
    directory = write_run(tmp_path / "run", written)
    figure, *_ = separate(figures.run_depth_panels(open_run(directory)))
    curve, law, star, _ = figure.axes[0].lines
    assert dict(zip(*curve.get_data(), strict=True)) == losses
    loops, values = (np.asarray(numbers) for numbers in law.get_data())
    assert (loops[0], loops[-1]) == (1, pytest.approx(12))
    assert np.allclose(values, 3 + np.exp(-0.7 * loops), atol=1e-6)
    assert [float(x[0]) for x in star.get_data()] == [1.75, 3.3]
    assert "L(T) = 3.0000 +1.0000 exp(-0.7000 T)" in page_of(directory).raw


def test_experts_without_tokens(tmp_path):
    """Zeros are said in words, because a plot of zeros would range from -0.04 to 0.04."""
    for name, counts, said in (("none", [0, 0, 0], True), ("some", [0, 2, 0], False)):
        written = [line | {"moe/dead_experts": count} for line, count in zip(records(3), counts, strict=True)]
        raw = page_of(write_run(tmp_path / name, written)).raw
        assert ("Every expert received tokens in every recorded step." in raw) == said
        assert ("Experts that no token reached" in raw) != said


def test_evaluations_are_shown_as_pictures(tmp_path):
    directory = write_run(tmp_path / "run", records(3))
    folder, results = directory / "evaluation", []
    folder.mkdir()
    for step in (2, 3):
        results = [
            Result(task, "acc", setting, loops, 0.25 + step / 16, 0.5, 40)
            for task in ("river", NASTY)
            for setting, loops in ((DepthSetting(1), 1.0), (DepthSetting(8, "gate", 0.05), 3.5))
        ]
        about = {"step": step, "dtype": "float32", "limit": None, "fewshot": None}
        save(results, folder / f"step-{step:08d}_a", about)
    page = page_of(directory)
    evaluations = page.raw[page.raw.index("<h2>Evaluations") : page.raw.index("<h2>Throughput")]
    assert evaluations.count("<svg") == 4, "each task by loops, and over training"
    assert evaluations.count("over training") == 4, "as title and as label"
    drawn = {titles(figure)[0]: figure.axes[0] for figure in separate(score_panels(results))}
    assert [c.lines[0].get_xydata().tolist() for c in drawn["river: acc"].containers] == [
        [[1, 0.4375]],
        [[3.5, 0.4375]],
    ]


def test_reasoning_map_on_the_page(tmp_path):
    directory = write_run(tmp_path / "run", records(3), load_config(HOPS))
    one = AccuracyMap("hops", "hops", 3, (1, 2), [1, 2, 3], [1, 2], 10, [[1.0, 0.5], [0.25, 1.0], [0.0, 0.125]])
    one.write(directory / "reasoning" / "step-00000003")
    replace(one, step=2, sequences=9).write(directory / "reasoning" / "step-00000002")
    (directory / "reasoning" / "step-00000001.json").write_text(json.dumps(asdict(one) | {"accuracy": [[1.0]]}))
    page = page_of(directory)
    reasoning = page.raw[page.raw.index("<h2>Reasoning") : page.raw.index("<h2>Throughput")]
    assert "step-00000003.json: step 3, 10 sequences" in reasoning and reasoning.count("<svg") == 1
    cells = re.findall(r"<text [^>]*>(\d+)</text>", reasoning)
    assert [cell for cell in cells if cell in ("100", "50", "25", "0", "12")] == ["100", "50", "25", "100", "0", "12"]
    assert "step-00000001.json cannot be read as a map of accuracies" in reasoning


def test_flops_are_those_of_the_loops_that_ran(tmp_path):
    written = records(6)[1::2]  # not every step is logged
    opened = open_run(write_run(tmp_path / "run", written))
    costs, total, before, expected = forward_flops(opened.config.model, 32), 0.0, 0, []
    for record in written:
        needed = 3 * costs.once + (record["loops"] + 2 * record["backprop_loops"]) * costs.loop
        total += (record["tokens"] - before) * needed
        before = record["tokens"]
        expected.append(total)
    assert opened.flops == pytest.approx(expected, rel=1e-12)
    assert page_of(opened.directory).headline["FLOPs needed"] == f"{total:.3e}"


def test_skipped_updates_restarts_and_rollbacks(tmp_path):
    written = records(8)
    for record in written[2:]:
        record["skipped_steps"] = 1
    for record in written[5:]:
        record["skipped_steps"] = 4
    written[2]["loss"] = written[2]["grad_norm"] = None
    written[3]["resumed_from"] = 3
    for record in written[6:]:
        record["rollbacks"] = 1
    page = page_of(write_run(tmp_path / "run", written))
    assert page.table("step", "time (UTC)", "event") == [
        ["3", "2025-10-09 08:56:20", "1 update skipped since step 2: not finite"],
        ["4", "2025-10-09 08:57:20", "continued from step 3"],
        ["6", "2025-10-09 08:59:20", "3 updates skipped since step 5: not finite"],
        ["7", "2025-10-09 09:00:20", "1 x back to the weights of the newest checkpoint"],
    ]
    shown = page.headline
    assert (shown["restarts"], shown["skipped updates"], shown["rollbacks"]) == ("1", "4", "1")
    assert shown["last training loss"] == f"{written[-1]['loss']:.4f}"
    assert shown["first to last record"] == "0:07:00"


def test_a_run_that_has_just_begun(tmp_path):
    """One record, whose update was skipped; the next record is incomplete."""
    written = records(1)
    written[0] |= {"loss": None, "grad_norm": None, "state_norm": None, "skipped_steps": 1}
    directory = write_run(tmp_path / "run", written)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "tok')
    page = page_of(directory)
    assert page.headline["steps"] == "1 of 100" and "last training loss" not in page.headline
    assert "No validation yet." in page.raw and "curves begin with the second" in page.raw
    assert not page.tags & {"svg"}, "no plot of single points"
    assert page.table("step", "time (UTC)", "event") == [
        ["1", "2025-10-09 08:54:20", "1 update skipped: not finite"],
    ]


def test_a_reasoning_run_has_answers_instead_of_text(tmp_path):
    written = records(4)
    accuracy = {1: 0.125, 3: 0.75, 5: 0.5}
    written[-1] |= {f"val/accuracy@{loops}": value for loops, value in accuracy.items()}
    written[-1] |= {f"val/loss@{loops}": 1 / loops for loops in accuracy} | {"val/loss": 0.25, "val/accuracy": 0.875}
    directory = write_run(tmp_path / "run", written, load_config(HOPS))
    page = page_of(directory)
    assert page.headline["validation loss at as many loops as steps"] == "0.2500"
    assert page.headline["sequences answered right"] == "87.50%"
    assert "bits per byte" not in page.headline
    rows = page.table("loops", "loss", "right answers")
    assert [(int(loops), right) for loops, _, right, _ in rows] == [(1, "12.50%"), (3, "75.00%"), (5, "50.00%")]
    assert not {"Samples", "Depth sweep", "Experts", "Evaluations"} & set(page.headings)
    assert "None yet: mythos reasoning measures right answers" in page.raw
    drawn = {titles(figure)[0]: figure.axes[0] for figure in separate(figures.run_depth_panels(open_run(directory)))}
    by_loops = drawn["Right answers by loops, step 4"].lines[0]
    assert dict(zip(*by_loops.get_data(), strict=True)) == {loops: 100 * share for loops, share in accuracy.items()}
    assert "Right answers at as many loops as steps" not in drawn, "one validation is no curve"


NASTY = '</title><script>alert("x")</script>&<img src=x onerror=alert(1)>'


def test_what_comes_from_files_is_escaped(tmp_path):
    directory = tmp_path / "run"
    url = "https://me:hidden-word@host/a.jsonl?X-Signature=hidden-word"
    write_run(directory, records(3), run__name=NASTY, data__path=url, eval__prompts=[NASTY])
    (directory / "samples").mkdir()
    sample = f"{NASTY}</pre><script>\x1b[31m\x00 'quoted'"
    (directory / "samples" / "step-00000003.txt").write_text(sample + "\n")
    (directory / "samples" / "step-00000002.txt").write_bytes(b"caf\xe9 \xff")
    (directory / "sweep").mkdir()
    (directory / "sweep" / "step-00000003.json").write_text(json.dumps({NASTY: 1}))
    page = page_of(directory)
    assert page.raw.count("<title>") == 1 and "<img" not in page.raw
    assert page.texts[0] == sample.replace("\x1b", "\u241b").replace("\x00", "\u2400")
    assert page.texts[1] == "caf\ufffd \ufffd"
    assert NASTY in page.texts[-1] and "hidden-word" not in page.raw
    assert "cannot be read as a depth sweep" in page.raw


def test_samples_are_thinned_from_the_newest(tmp_path):
    directory = write_run(tmp_path / "run", records(3))
    (directory / "samples").mkdir()
    for step in range(1, 101):
        (directory / "samples" / f"step-{step:08d}.txt").write_text(f"text {step}\n")
    texts = page_of(directory).texts[:-1]
    assert texts == [f"text {step}" for step in range(100, 0, -13)]


def test_a_measurement_that_is_not_finite(tmp_path):
    written = records(3)
    written[-1] |= {"val/loss": math.nan, "val/loss@1": math.inf, "val/loss@3": math.nan, "val/bits_per_byte": math.nan}
    page = page_of(write_run(tmp_path / "run", written))
    assert page.headline["validation loss at 3 loops"] == "nan"
    assert page.table("loops", "loss", "perplexity")[0][:3] == ["1", "inf", "inf"]


@pytest.mark.parametrize(
    ("place", "message"),
    [("nosuch://bucket/run", "nosuch://bucket/run cannot be read: "), (None, "meta.json")],
)
def test_checkpoints_that_cannot_be_read_are_reported(tmp_path, place, message):
    directory = write_run(tmp_path / "run", records(3), checkpoint__dir=place)
    damaged = directory / "checkpoints" / "step-00000002"
    damaged.mkdir(parents=True)
    (damaged / "committed").write_text("{}")
    assert message in page_of(directory).raw


def test_loaded_sweep_is_the_one_saved(trained, tmp_path):
    path = trained / "sweep" / "step-00000006.json"
    sweep, about = DepthSweep.load(path)
    assert about["step"] == 6 and about["dtype"] == "float32"
    sweep.save(tmp_path / path.stem, about)
    assert json.loads((tmp_path / path.name).read_text()) == json.loads(path.read_text())
    values = json.loads(path.read_text())
    for spoil in ({"loops": 3}, {"loops": [{"loops": 1}]}, {"fit": {"limit": 1}}):
        (tmp_path / "spoilt.json").write_text(json.dumps(values | spoil))
        with pytest.raises(MythosError, match=r"spoilt\.json cannot be read as a depth sweep"):
            DepthSweep.load(tmp_path / "spoilt.json")


def test_the_newest_sweep_is_shown(trained, tmp_path):
    """By step, then by number: -10 is newer than -9."""
    directory = write_run(tmp_path / "run", records(3))
    (directory / "sweep").mkdir()
    content = (trained / "sweep" / "step-00000006.json").read_text()
    for name in ("step-00000006", "step-00000006-9", "step-00000006-10", "step-00000005-11", "step-other"):
        (directory / "sweep" / f"{name}.json").write_text(content)
    assert "step-00000006-10.json: step 6" in page_of(directory).raw


def test_stored_evaluations_are_shown(trained, tmp_path):
    """Newest checkpoint first, whole calls, every number as in the files that `mythos evaluate` wrote."""
    directory = write_run(tmp_path / "run", records(3))
    folder = directory / "evaluation"
    for arguments in (["--loops", "1,3"], ["--loops", "3,auto", "--exit-threshold", "0.2", "--limit", "2"]):
        assert main(["evaluate", str(trained), "--out", str(folder), *arguments]) == 0
    (folder / "step-00000002_mine.json").write_text(json.dumps({"results": [{"task": NASTY}]}))
    (folder / "notes.json").write_text("mine")
    page = page_of(directory)
    plain, limited = (
        {(r["metric"], r["loops"], r["rule"]): r for r in json.loads(file.read_text())["results"]}
        for file in sorted(folder.glob("step-00000006*.json"))
    )
    shown = [
        page.table("task", "metric", *depths) for depths in (("1 loop", "3 loops"), ("3 loops", "convergence 0.2"))
    ]
    metrics = ("bits_per_byte", "perplexity")
    assert [row[1:4] for row in shown[0]] == [
        [metric, *(f"{plain[metric, loops, None]['value']:.4f}" for loops in (1, 3))] for metric in metrics
    ]
    halted = [limited[metric, 3, "convergence"] for metric in metrics]
    assert [row[3] for row in shown[1]] == [f"{r['value']:.4f} ({r['mean_loops']:.2f} loops)" for r in halted]
    assert [row[-1] for row in shown[1]] == ["2", "2"]
    text = page.raw[page.raw.index("<h2>Evaluations") : page.raw.index("<h2>", page.raw.index("<h2>Evaluations") + 1)]
    order = [text.index(name) for name in ("step-00000006_", "limit 2", "step-00000002_mine.json cannot be read as")]
    assert order == sorted(order) and "notes.json" not in text and text.count("<details open>") == 2


def test_scores_are_read_as_they_were_written(tmp_path):
    results = [
        Result("a", "acc", DepthSetting(4), 4.0, 0.25, 0.125, 8),
        Result("b", "perplexity", DepthSetting(8, "convergence", 0.13), 2.5, 3.5, None, None),
    ]
    about = {"source": "runs/x", "step": 3, "dtype": "float32", "limit": None, "fewshot": 2}
    assert load(save(results, tmp_path / "step-3", about)) == (results, about)
    listed = '{"results": [], "dtype": ["float32"]}'
    for content in ("5", "{}", '{"results": [{}]}', '{"results": 3}', listed, "not JSON"):
        (tmp_path / "other.json").write_text(content)
        with pytest.raises(MythosError, match=r"other\.json cannot be read as results of an evaluation"):
            load(tmp_path / "other.json")


def test_watching_a_run(tmp_path, monkeypatch, capsys):
    """A run without configuration, then without records, then with three, with five, and at last ended with six."""
    directory = write_run(tmp_path / "run", [])
    page, lock, seen = directory / "report.html", RunLock(directory), []
    config = (directory / "config.yaml").rename(tmp_path / "config.yaml")  # written after the lock is taken

    def sleep(seconds):
        assert seconds == 2
        seen.append(Page(page.read_text()) if page.exists() else None)
        steps = (0, 3, 5, 6)[len(seen) - 1]
        if not steps:
            config.rename(directory / "config.yaml")
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records(steps)))
        if steps == 6:
            lock.__exit__()

    monkeypatch.setattr(report.time, "sleep", sleep)
    with lock:
        assert main(["report", str(directory), "--watch", "--every", "2"]) == 0
    assert seen[:2] == [None, None]
    assert [view.headline["steps"] for view in seen[2:]] == ["3 of 100", "5 of 100"]
    assert all('<meta http-equiv="refresh" content="2">' in view.raw for view in seen[2:])
    last = Page(page.read_text())
    assert last.headline["steps"] == "6 of 100" and "http-equiv" not in last.raw
    printed = capsys.readouterr().out.splitlines()
    assert [line.startswith("waiting: ") for line in printed] == [True, True, False, False]
    assert printed[2] == str(page)

    assert main(["report", str(directory), "--watch"]) == 0, "a run that does not train gets one page"
    assert main(["report", str(tmp_path / "none"), "--watch"]) == 1
    for arguments, message in ((["--every", "5"], "only with --watch"), (["--watch", "--every", "0"], "give 1 to")):
        assert main(["report", str(directory), *arguments]) == 1
        assert message in capsys.readouterr().err


def test_a_page_replaces_pages_only(tmp_path, capsys):
    directory = write_run(tmp_path / "run", records(3))
    out = tmp_path / "page.html"
    for _ in range(2):
        assert main(["report", str(directory), "--out", str(out)]) == 0
    out.write_text("<p>My notes</p>")
    assert main(["report", str(directory), "--out", str(out)]) == 1
    assert "page.html exists and is no page of `mythos report`" in capsys.readouterr().err
    assert out.read_text() == "<p>My notes</p>"


def test_runs_that_are_none(tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert main(["report", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "no such file or folder. Give a run directory" in refused(tmp_path / "none")
    assert "no config.yaml in it" in refused(tmp_path)
    directory = write_run(tmp_path / "run", [])
    assert "metrics.jsonl has no records yet" in refused(directory)
    needed = '"tokens": 2, "loops": 1, "backprop_loops": 1}'
    for line in ("5", '{"step": 1, "tokens": 2}', '{"step": true, ' + needed, '{"step": 1, "loss": "low", ' + needed):
        (directory / "metrics.jsonl").write_text(line + "\n")
        assert "metrics.jsonl: line 1 has no number for " in refused(directory)
    (directory / "metrics.jsonl").unlink()
    assert "metrics.jsonl is missing" in refused(directory)
    (directory / "metrics.jsonl").write_text(json.dumps(records(1)[0]) + "\n")
    (directory / "config.yaml").write_text("run: {nam: x}\n")
    assert "did you mean name?" in refused(directory)
    whole = write_run(tmp_path / "whole", records(2))
    assert "cannot be written" in refused(whole, "--out", tmp_path / "no" / "folder.html")
    assert main(["report", str(whole), "--out", str(tmp_path / "page.html")]) == 0
    assert not (whole / "report.html").exists() and (tmp_path / "page.html").exists()


def test_damaged_records_are_left_out(tmp_path, capsys, caplog):
    """Damaged lines are left out, as resuming does; if no line is sound, the error names the damage."""
    sound, damaged = write_run(tmp_path / "sound", records(3)), write_run(tmp_path / "damaged", records(3))
    file = damaged / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], b"[1]", b"\xff", b'{"step": 2}', *lines[1:], bytes(50)]))
    for directory in (sound, damaged):
        assert main(["report", str(directory)]) == 0
    assert "line 2 has no number for step" in caplog.text and "3 others" in caplog.text
    expected, recovered = (open_run(directory) for directory in (sound, damaged))
    assert recovered.records == expected.records
