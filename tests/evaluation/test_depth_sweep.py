"""The sweep compared with running the model by depth and document; the fit compared with known laws."""

import contextlib
import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from mythos.cli import main
from mythos.cli.sweep import report
from mythos.data.tasks import TaskSet
from mythos.data.validation import ValidationSet
from mythos.distributed.ranks import Ranks, World
from mythos.evaluation.depth_sweep import (
    DepthSweep,
    adaptive_losses,
    adaptive_metrics,
    default_rule,
    depth_sweep,
    document_groups,
    fit_losses,
    fit_metrics,
    sweep_depths,
    sweep_rules,
)
from mythos.evaluation.execution import Execution
from mythos.hf.export import export_model
from mythos.model import IGNORE_INDEX
from mythos.model.cache import DecodeCache
from mythos.model.config import ModelConfig
from mythos.model.halting import halting_rule
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.reports import plots, sweep_plots
from mythos.training.metrics import read_metrics
from tests.noise import name_generator
from tests.runs import SETTINGS, tiny
from tests.trainers import run

ROWS, LENGTH = 5, 16
DEPTHS = [1, 2, 4, 6, 8]
BYTES = torch.tensor([11, 70, 33, 25, 64])


def build(**changes: Any) -> RecurrentDepthTransformer:
    """A small model with seeded noise in every weight."""
    settings = {**SETTINGS["model"], "loops": 4, "vocab_size": 128, **changes}
    model = RecurrentDepthTransformer(ModelConfig(**settings)).initialize(0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=name_generator(1, name)), alpha=0.1)
    return model


def data(masked: bool) -> ValidationSet:
    ids = torch.randint(0, 128, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    # Documents of 5, 1 and 10 tokens, in another order in every row.
    places = (torch.arange(LENGTH) + 3 * torch.arange(ROWS)[:, None]) % LENGTH
    documents = ((places >= 5).int() + (places >= 6).int()) if masked else None
    return ValidationSet(ids, documents, BYTES)


def measure(model: RecurrentDepthTransformer, rows: ValidationSet, **changes: Any) -> DepthSweep:
    options: dict[str, Any] = {"depths": DEPTHS, "mean_loops": 4, "micro_batch": 2, "progress": False, **changes}
    return depth_sweep(model, rows, autocast=contextlib.nullcontext(), **options)


# The fit


@pytest.mark.parametrize("rate", [0.01, 0.3, 2.5])
@pytest.mark.parametrize(("limit", "amplitude"), [(3.8, 0.4), (0.02, 7.0)])
def test_fit_finds_the_law(limit, amplitude, rate):
    fit = fit_losses({loops: limit + amplitude * math.exp(-rate * loops) for loops in (64, 1, 2, 4, 8, 16, 32)})
    assert (fit.limit, fit.amplitude, fit.rate) == pytest.approx((limit, amplitude, rate), rel=1e-6)
    assert fit.residual < 1e-9
    assert fit.loops == [1, 2, 4, 8, 16, 32, 64]
    assert fit.loss(3) == pytest.approx(limit + amplitude * math.exp(-3 * rate))


def test_fit_is_the_least_squares_one():
    """No small step in any parameter lowers the error, and the error is the residual."""
    noise = np.random.default_rng(0).normal(scale=0.003, size=7)
    curve = {2**n: 3.8 + 0.4 * math.exp(-0.6 * 2**n) + noise[n] for n in range(7)}
    fit = fit_losses(curve)

    def error(limit: float, amplitude: float, rate: float) -> float:
        return sum((limit + amplitude * math.exp(-rate * t) - loss) ** 2 for t, loss in curve.items()) / len(curve)

    fitted = (fit.limit, fit.amplitude, fit.rate)
    assert math.sqrt(error(*fitted)) == pytest.approx(fit.residual)
    assert 0.0005 < fit.residual < 0.004
    for index in range(3):
        for step in (0.999, 1.001):
            assert error(*(value * step if i == index else value for i, value in enumerate(fitted))) > error(*fitted)
    assert fitted == pytest.approx((3.8, 0.4, 0.6), rel=0.05)


def test_fit_ends_where_depth_harms():
    curve = {1: 4.2, 2: 4.0, 4: 3.85, 8: 3.8, 16: 3.9, 32: 4.5}
    assert fit_losses(curve) == fit_losses({loops: curve[loops] for loops in (1, 2, 4, 8)})
    for broken in ({16: math.nan, 32: math.inf}, {16: math.inf, 32: math.nan}):
        assert fit_losses(curve | broken).loops == [1, 2, 4, 8]
    assert fit_losses(curve | {16: 3.802, 32: 3.804}).loops == list(curve), "within 1% of perplexity all count"


@pytest.mark.parametrize(
    "losses", [{1: 4.0}, {1: 4.0, 2: 3.0, 4: 2.9}, {1: 3.0, 2: 3.2, 4: 3.5, 8: 4.0}, {1: math.nan, 2: math.nan}]
)
def test_no_fit_of_too_few_losses(losses):
    assert fit_losses(losses) is None


def test_fit_for_metrics():
    law = {loops: 2 + math.exp(-0.5 * loops) for loops in (1, 2, 4, 8)}
    expected = {"val/fit_limit": 2, "val/fit_amplitude": 1, "val/fit_rate": 0.5, "val/fit_residual": 0}
    assert fit_metrics(law) == pytest.approx(expected, abs=1e-9)
    assert fit_metrics({1: 3.0}) == {}


# Depths


def test_depths_of_a_sweep():
    assert sweep_depths(8) == [1, 2, 4, 8, 16, 32, 64]
    assert sweep_depths(3) == [1, 2, 3, 4, 8, 16, 24]
    assert sweep_depths(1) == [1, 2, 4, 8]


@pytest.mark.parametrize("masked", [False, True])
def test_every_depth_equals_a_run_by_hand(masked):
    model, rows = build(core_layers=2, loops=8), data(masked)
    sweep = measure(model, rows)
    assert [measures.loops for measures in sweep.loops] == list(range(1, 9))
    assert [measures.loops for measures in sweep.read_out] == DEPTHS
    chosen: list[Tensor] = []
    for block in model.recurrence.blocks:
        block.ffn.router.register_forward_hook(lambda _, __, out: chosen.append(out[1]))
    for measures in sweep.loops:
        chosen.clear()
        with torch.no_grad():
            output = model(rows.ids[:, :-1], loops=measures.loops, document_ids=rows.document_ids)
        assert measures.state_norm == pytest.approx(output.state_norm.item(), rel=1e-5)
        assert measures.state_delta == pytest.approx(output.state_delta.item(), rel=1e-4)
        counts = output.expert_load[:, measures.loops - 1].double()
        assert measures.load_max_over_mean == pytest.approx((counts.amax(1) / counts.mean(1)).max().item())
        if measures.loops > 1:
            pairs = zip(torch.cat(chosen[-4:-2]).tolist(), torch.cat(chosen[-2:]).tolist(), strict=True)
            shares = [len({*before} & {*after}) / 2 for before, after in pairs]
            assert measures.expert_overlap == pytest.approx(sum(shares) / len(shares), rel=1e-5)
        else:
            assert measures.expert_overlap is None
        if measures.loops in DEPTHS:
            total = F.cross_entropy(output.logits.flatten(0, 1), rows.ids[:, 1:].flatten(), reduction="sum").item()
            assert measures.loss == pytest.approx(total / (ROWS * LENGTH), rel=1e-5)
            assert measures.perplexity == pytest.approx(math.exp(measures.loss))
            assert measures.bits_per_byte == pytest.approx(total / math.log(2) / int(BYTES.sum()), rel=1e-5)
        else:
            assert measures.loss is None
    assert sweep.fit == fit_losses({measures.loops: measures.loss for measures in sweep.read_out})


def test_passes_of_a_model_that_repeats_layer_by_layer():
    """Those of the deepest run, averaged over the layers; losses are those of runs of each depth."""
    model, rows = build(core_layers=2, loop_over="layer"), data(False)
    sweep, ids = measure(model, rows), rows.ids[:, :-1]
    norms: dict[int, list[float]] = {}

    def observe(after: Any) -> None:
        norms.setdefault(after.loop, []).append(after.state.norm(dim=-1).log().mean().item())

    with torch.no_grad():
        model.hidden_states(ids, [8] * ROWS, 8, observe=observe)
        load = model(ids, loops=8).expert_load.double()
    for measures in sweep.loops:
        assert len(norms[measures.loops]) == 2
        assert measures.state_norm == pytest.approx(sum(norms[measures.loops]) / 2, rel=1e-5)
    counts = load[:, 2]
    assert sweep.loops[2].load_max_over_mean == pytest.approx((counts.amax(1) / counts.mean(1)).max().item())
    assert 0 < sweep.loops[2].expert_overlap <= 1 and sweep.loops[0].expert_overlap is None
    for measures in sweep.read_out:
        with torch.no_grad():
            logits = model(ids, loops=measures.loops).logits
        expected = F.cross_entropy(logits.flatten(0, 1), rows.ids[:, 1:].flatten()).item()
        assert measures.loss == pytest.approx(expected, rel=1e-5)


def test_a_reasoning_task():
    """Only answers count, and they have no bytes."""
    model = build()
    ids = data(False).ids[:, :-1]
    targets = torch.full_like(ids, IGNORE_INDEX)
    targets[:, -1] = 7
    sweep = measure(model, TaskSet(ids, targets, torch.ones(ROWS)), rules=[("convergence", 1e-9)])
    with torch.no_grad():
        expected = F.cross_entropy(model(ids, loops=4).logits[:, -1], targets[:, -1]).item()
    assert sweep.loops[3].loss == pytest.approx(expected, rel=1e-5)
    assert sweep.halting[0].loss == pytest.approx(expected, rel=1e-5)
    assert sweep.loops[3].bits_per_byte is sweep.halting[0].bits_per_byte is None
    assert sweep.sequence_length == LENGTH
    assert "bits" in report(sweep)


def test_dense_and_fixed_cores():
    dense = measure(build(core_ffn="dense"), data(False))
    assert {measures.load_max_over_mean for measures in dense.loops} == {None}
    assert {measures.expert_overlap for measures in dense.loops} == {None}
    fixed = build(injection="none", loops=1, lora_rank=0)
    assert sweep_rules(fixed) == []
    sweep = measure(fixed, data(False), depths=[1], mean_loops=1)
    assert len(sweep.loops) == 1 and sweep.fit is None


def test_depths_that_cannot_be_run():
    model, rows = build(), data(False)
    for bad in ({"depths": [0, 1]}, {"most": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            measure(model, rows, **bad)
    with pytest.raises(ValueError, match="fixed-depth"):
        measure(build(injection="none", loops=1, lora_rank=0), rows, depths=[1, 2], mean_loops=1)


# Halting


def test_groups_hold_every_document_once():
    documents = data(True).document_ids
    seen = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    for rows, columns, mask in document_groups(documents):
        assert rows.shape == columns.shape == mask.shape and mask.numel() <= documents.numel()
        for row, column, real in zip(rows, columns, mask, strict=True):
            row, column = row[real], column[real]
            assert len(row.unique()) == 1 and column.diff().eq(1).all()
            number = documents[row[0], column[0]]
            assert documents[row, column].eq(number).all()
            ends = (column[0] - 1, column[-1] + 1)
            assert all(not 0 <= end < LENGTH or documents[row[0], end] != number for end in ends), "the whole document"
            seen[row, column] += 1
    assert seen.eq(1).all()


@pytest.mark.parametrize("masked", [False, True])
def test_without_a_rule_it_is_the_loss_at_that_depth(masked):
    model, rows = build(), data(masked)
    ids, targets = rows.ids[:, :-1], rows.ids[:, 1:].clone()
    targets[0, :3] = IGNORE_INDEX
    losses, used = adaptive_losses(model, ids, targets, rows.document_ids, None, 4)
    expected = model.read_depths(ids, targets, [4], rows.document_ids)[0].losses
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    assert losses[0, :3].eq(0).all() and used.eq(4).all()


def test_each_document_is_a_row_of_its_own():
    model, rows = build(), data(True)
    ids, targets = rows.ids[:, :-1], rows.ids[:, 1:]
    rule = halting_rule(model, "convergence", 0.3)
    losses, used = adaptive_losses(model, ids, targets, rows.document_ids, rule, 6)
    assert len(used.unique()) > 1, "positions must differ"
    for row in range(ROWS):
        lengths = rows.document_ids[row].unique_consecutive(return_counts=True)[1].tolist()
        parts = zip(ids[row].split(lengths), targets[row].split(lengths), strict=True)
        alone = [
            (
                model.extend(part[None], DecodeCache(model.config, 1, loops=6), loops=6, halting=rule, logits="all"),
                wanted,
            )
            for part, wanted in parts
        ]
        expected = torch.cat([F.cross_entropy(out.logits[0], wanted, reduction="none") for out, wanted in alone])
        torch.testing.assert_close(losses[row], expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(used[row], torch.cat([out.loops[0] for out, _ in alone]))


def test_points_of_a_rule():
    model, rows = build(), data(False)
    rules = [("convergence", 1e9), ("convergence", 0.3), ("convergence", 1e-9)]
    first, middle, never = measure(model, rows, rules=rules, most=6).halting
    at = {measures.loops: measures for measures in measure(model, rows).read_out}
    assert first.exits == [ROWS * LENGTH, 0, 0, 0, 0, 0] and (first.loops, first.saved) == (1, pytest.approx(5 / 6))
    assert never.exits == [0, 0, 0, 0, 0, ROWS * LENGTH] and (never.loops, never.saved) == (6, 0)
    assert first.loss == pytest.approx(at[1].loss, rel=1e-5)
    assert never.loss == pytest.approx(at[6].loss, rel=1e-5)
    assert never.bits_per_byte == pytest.approx(at[6].bits_per_byte, rel=1e-5)
    assert sum(middle.exits) == ROWS * LENGTH and 1 < middle.loops < 6
    assert middle.loops == pytest.approx(sum((n + 1) * count for n, count in enumerate(middle.exits)) / (ROWS * LENGTH))
    assert not any(point.default for point in (first, middle, never))


def test_rules_of_a_model():
    model = build()
    name, threshold = default_rule(model)
    assert (name, threshold) in sweep_rules(model)
    assert {rule for rule, _ in sweep_rules(model, ["second_difference"])} == {"second_difference"}
    assert len(sweep_rules(model, ["convergence"])) == 5
    with pytest.raises(ValueError, match="never"):
        sweep_rules(model, ["never"])
    with pytest.raises(ValueError, match="gate"):
        sweep_rules(model, ["gate"])
    assert sweep_rules(model, ["none"]) == []
    gated = build(halting="gate")
    assert {rule for rule, _ in sweep_rules(gated)} == {"convergence", "second_difference", "gate"}
    assert default_rule(gated) in sweep_rules(gated)
    assert all(threshold <= 1 for _, threshold in sweep_rules(build(halting="act"), ["act"])), "a probability"
    assert default_rule(build(halting="none")) is None


def test_metrics_are_the_default_point():
    model, rows = build(halting="convergence"), data(True)
    point = measure(model, rows, rules=[default_rule(model)]).halting[0]
    assert point.default
    world = World(torch.device("cpu"), Ranks(), Ranks())
    execution = Execution(3, world, contextlib.nullcontext())
    metrics = adaptive_metrics(model, rows, execution, most=4)
    assert metrics == pytest.approx(
        {"val/auto_loss": point.loss, "val/auto_loops": point.loops, "val/auto_saved": point.saved}, rel=1e-5
    )
    assert adaptive_metrics(build(halting="none"), rows, execution, most=4) == {}


# Files and the command line


def test_files(tmp_path):
    sweep = measure(build(), data(False), rules=[("convergence", 0.3)])
    sweep.loops[7] = replace(sweep.loops[7], perplexity=math.inf)
    sweep = replace(sweep, fit=fit_losses({1: 4.0, 2: 3.0, 4: 2.5, 8: 2.4}))
    paths = sweep.save(tmp_path / "step-1", {"step": 1})
    assert [path.name for path in paths] == ["step-1.json", "step-1.csv"]
    content = json.loads(paths[0].read_text())
    assert content["step"] == 1 and content["fit"]["rate"] == sweep.fit.rate
    assert [loop["loss"] for loop in content["loops"]] == [measures.loss for measures in sweep.loops]
    assert content["loops"][7]["perplexity"] is None, "JSON has no infinity"
    assert content["halting"][0]["exits"] == sweep.halting[0].exits
    with paths[1].open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rule"] for row in rows] == [""] * 8 + ["convergence"]
    assert float(rows[3]["loss"]) == sweep.loops[3].loss and rows[2]["loss"] == ""
    assert float(rows[8]["loops"]) == sweep.halting[0].loops


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """Collects every figure that is saved."""
    seen: list[Figure] = []
    save = plots.save

    def keep(figure: Figure, path: Path) -> Path:
        seen.append(figure)
        return save(figure, path)

    for module in (plots, sweep_plots):
        monkeypatch.setattr(module, "save", keep)
    return seen


def test_a_run_shows_its_default_point(tmp_path, figures):
    record = {"step": 1, "tokens": 9, "loss": 3.0, "val/loss": 2.5, "val/loss@1": 2.9, "val/loss@8": 2.5}
    record |= {"val/auto_loss": 2.6, "val/auto_loops": 3.5, "val/auto_saved": 0.5625}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    plots.draw_plots(tmp_path, 8)
    stars = [line for line in figures[0].axes[0].lines if line.get_label() == "with halting: 3.50 loops"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in stars] == [(3.5, 2.6)]


def test_picture(tmp_path, figures):
    model = build()
    sweep = measure(model, data(False), rules=sweep_rules(model, ["convergence"]))
    assert sweep_plots.draw_sweep(sweep, tmp_path / "sweep.png").stat().st_size > 10_000
    loss, exits, *others = figures[0].axes
    lines = {line.get_label(): line for line in loss.lines}
    losses = [measures.loss for measures in sweep.read_out]
    assert list(lines["every position alike"].get_ydata()) == pytest.approx([loss - min(losses) for loss in losses])
    assert list(lines["convergence"].get_ydata()) == pytest.approx([p.loss - min(losses) for p in sweep.halting])
    assert list(lines["convergence"].get_xdata()) == [point.loops for point in sweep.halting]
    bars = {}
    for bar in exits.patches:
        bars.setdefault(round(bar.get_y() + bar.get_height() / 2), []).append(bar.get_width())
    shares = [[100 * count / sum(point.exits) for count in point.exits] for point in sweep.halting]
    assert [bars[row] for row in range(5)] == [pytest.approx(row) for row in shares]
    assert len(others) == 4
    dense = measure(build(core_ffn="dense"), data(False))
    sweep_plots.draw_sweep(dense, tmp_path / "dense.png")
    assert len(figures[1].axes) == 3, "no panels of exits and experts"


@pytest.fixture(scope="module")
def trained(tmp_path_factory, no_plots) -> Path:
    directory = tmp_path_factory.mktemp("sweep")
    run(tiny(directory, data__mask_documents=True))
    return directory / "run"


def test_command_line_on_a_run(trained, capsys):
    """The losses equal those of the trainer's validation."""
    assert main(["sweep", str(trained)]) == 0
    printed = capsys.readouterr().out
    stem = trained / "sweep" / "step-00000004"
    assert all(f"{stem}.{kind}" in printed and stem.with_suffix(f".{kind}").exists() for kind in ("json", "csv", "png"))
    content = json.loads(stem.with_suffix(".json").read_text())
    depths = {loop["loops"]: loop for loop in content["loops"] if loop["loss"] is not None}
    assert list(depths) == sweep_depths(3)
    metrics = read_metrics(trained / "metrics.jsonl")[-1]
    assert {1: metrics["val/loss@1"], 3: metrics["val/loss@3"]} == pytest.approx({n: depths[n]["loss"] for n in (1, 3)})
    assert depths[3]["bits_per_byte"] == pytest.approx(metrics["val/bits_per_byte"])
    assert any(point["default"] for point in content["halting"])
    assert "<- training mean" in printed and "<- default" in printed


def test_command_line_on_a_checkpoint_and_other_text(trained, tmp_path):
    texts = tmp_path / "other.txt"
    texts.write_text("\n\n".join(f"Quite another text about number {n}, and no river." for n in range(60)))
    options = [
        "--loops",
        "2,1",
        "--rules",
        "convergence",
        "--thresholds",
        "0.5,0.05",
        "--sequences",
        "3",
        "--most",
        "2",
    ]
    checkpoint = next((trained / "checkpoints").glob("step-*"))
    assert main(["sweep", str(checkpoint), *options, "--data", str(texts), "--out", str(tmp_path / "out")]) == 0
    content = json.loads((tmp_path / "out" / "step-00000004.json").read_text())
    assert (content["sequences"], content["fit"], len(content["loops"])) == (3, None, 2)
    assert [(p["rule"], p["threshold"], len(p["exits"])) for p in content["halting"]] == [
        ("convergence", 0.5, 2),
        ("convergence", 0.05, 2),
    ]


def test_command_line_on_an_exported_model(trained, tmp_path, capsys, monkeypatch):
    export_model(trained, tmp_path / "exported")
    assert main(["sweep", str(tmp_path / "exported")]) == 1
    assert "--data" in capsys.readouterr().err
    options = ["--data", str(trained.parent / "corpus.jsonl"), "--sequences", "2", "--loops", "1", "--rules", "none"]
    options += ["--dtype", "float32"]  # that of training, which an export does not know
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", str(tmp_path / "exported"), *options]) == 0
    assert main(["sweep", str(trained), *options, "--out", str(tmp_path)]) == 0
    of_export, of_run = (
        json.loads((folder / "step-00000004.json").read_text())
        for folder in (tmp_path / "sweep" / "exported", tmp_path)
    )
    assert (of_export["sequences"], of_export["sequence_length"], of_export["halting"]) == (2, 32, [])
    assert of_export["loops"] == of_run["loops"], "sequences as long, and masked, as in training"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--loops", "0,1"], "at least 1"),
        (["--thresholds", "0.1"], "--rules"),
        (["--rules", "convergence", "--thresholds", "0"], "above 0"),
        (["--sequences", "0"], "at least 1"),
        (["--rules", "never"], "never"),
        (["--rules", "act", "--thresholds", "0.5"], "act"),
        (["--rules", "convergence", "--thresholds", "inf"], "--thresholds: got 'inf'; give numbers above 0"),
        (["--rules", "none", "--thresholds", "0.1"], "--thresholds: exit threshold 0.1: halting is none"),
        (["--most", "0"], "at least 1"),
        (["--data", ""], "--data: got no name"),
        (["--data", "nothing-*.txt"], "--data: nothing-*.txt matches no file"),
        (["--data", "README.md"], "--data: README.md has an unknown extension"),
        (["--data", "short.txt"], "--data: the text does not fill one sequence of 32 tokens. Give files with more"),
        (["--device", "cuda"], "--device is cuda, but torch finds no CUDA GPU: set --device=auto or cpu"),
        (["--loops", "-2"], "--loops: got '-2'"),
        (["--loops", "2.5"], "--loops: got '2.5'"),
        (["--micro-batch", "0"], "--micro-batch: got 0"),
    ],
)
def test_bad_options(trained, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("README.md", "short.txt"):
        Path(name).write_text("The end.\n")
    assert main(["sweep", str(trained), *options]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --") and message in error and "data.validation" not in error


def test_bad_path(tmp_path, capsys):
    assert main(["sweep", str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


def test_what_cannot_be_written(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    arguments = ["--loops", "1", "--rules", "none", "--sequences", "1", "--out", str(tmp_path / "file")]
    assert main(["sweep", str(trained), *arguments]) == 1
    assert f"error: {tmp_path / 'file'} cannot be written: " in capsys.readouterr().err


def test_a_checkpoint_beside_no_run(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(next((trained / "checkpoints").glob("step-*")), tmp_path / "alone" / "step-00000004")
    assert main(["sweep", "alone/step-00000004", "--loops", "1", "--rules", "none", "--sequences", "1"]) == 0
    first = tmp_path / "sweep" / "step-00000004" / "step-00000004.json"
    before = first.read_bytes()
    # A second sweep of that step does not replace the first.
    assert main(["sweep", "alone/step-00000004", "--loops", "2", "--rules", "none", "--sequences", "1"]) == 0
    assert first.read_bytes() == before and len(list(first.parent.iterdir())) == 6
    second = json.loads(first.with_stem("step-00000004-2").read_text())
    assert [loop["loops"] for loop in second["loops"] if loop["loss"] is not None] == [2]
