"""scripts/study.py: results of runs, and their table."""

import copy
import json
from math import exp, log
from pathlib import Path
from typing import Any

import pytest

from mythos.config.presets import preset_config
from scripts.study import main, table


def one(seed: int, perplexities: dict[int, float], tokens: int = 600_000, **model: Any) -> dict[str, Any]:
    loops = [{"loops": loops, "loss": log(value), "expert_overlap": 0.5} for loops, value in perplexities.items()]
    architecture = {"model": {"dim": 8, "lanes": 1, "loops": 8, "injection": "lti", **model}, "depth": {"backprop": 4}}
    figures = {"parameters": 1, "tokens": tokens, "training_flops": 1e13, "mean_loops": 2.0, "sequences": 8}
    return {"seed": seed, "architecture": architecture, "loops": loops, **figures}


def test_seeds_share_a_line_and_architectures_are_named_by_what_differs() -> None:
    results = {
        "a": one(0, {1: 50.0, 2: 40.0, 16: 40.5}, lanes=2),
        "b": one(1, {1: 52.0, 2: 42.0, 16: 42.5}, lanes=2),
        "c": one(0, {1: 60.0, 2: 44.0, 16: 44.0}),
        "d": one(1, {1: 60.0, 2: 44.0, 16: 44.0}),
        "e": one(2, {1: 60.0, 2: 44.0, 16: 44.0}),
        "f": one(0, {1: 30.0, 2: 20.0}, tokens=1_200_000),
    }
    lines = table(results).splitlines()[2:]
    others = "| (the defaults)"
    assert [line.split(" | ")[0] for line in lines] == [others, "| `model.lanes=2`", others]
    assert lines[1].startswith("| `model.lanes=2` | 0.6M | 1.00e+13 | 0, 1 | 51.00 (50.00 to 52.00) | 41.00 (40.00 to ")
    assert lines[1].endswith("42.00) | 41.50 (40.50 to 42.50) | 0.50 (0.50 to 0.50) |")
    assert "| 0, 1, 2 | 60.00 (60.00 to 60.00) | 44.00 (44.00 to 44.00) |" in lines[0]
    assert lines[2] == f"{others} | 1.2M | 1.00e+13 | 0 | 30.00 | 20.00 |  | 0.50 |"


def test_blocks_without_a_loop_are_named_so() -> None:
    results = {
        "a": one(0, {1: 50.0, 2: 40.0}, lanes=2),
        "b": one(0, {1: 52.0}, injection="none", loops=1, block_norm="pre"),
        "c": one(0, {1: 51.0}, injection="none", loops=1, block_norm="sandwich"),
    }
    for name in ("b", "c"):
        results[name]["mean_loops"] = 1.0
    names = [line.split(" | ")[0] for line in table(results).splitlines()[2:]]
    assert names == ["| not looped", "| not looped `model.block_norm=sandwich`", "| `model.lanes=2`"]


def test_a_preset_is_named_instead_of_its_fields() -> None:
    results = {}
    for name in ("few_visits_nano_2", "moe_nano_flops"):
        results[name] = one(0, {1: 50.0, 2: 40.0})
        fields = preset_config(name, vocab_size=77).model_dump(mode="json", exclude={"preset"})
        results[name]["architecture"]["model"] = fields
    changed = copy.deepcopy(results["few_visits_nano_2"])
    changed["architecture"]["model"]["lanes"] = 2
    names = {line.split(" | ")[0] for line in table(results).splitlines()[2:]}
    assert names == {"| `few_visits_nano_2`", "| not looped `moe_nano_flops`"}
    names = {line.split(" | ")[0] for line in table({**results, "changed": changed}).splitlines()[2:]}
    assert len(names) == 3 and any("`model.lanes=2`" in name and "few_visits" not in name for name in names)


def test_a_ramp_of_the_depth_is_a_line_of_its_own() -> None:
    results = {"a": one(0, {1: 50.0, 2: 40.0}), "b": one(0, {1: 50.0, 2: 39.0})}
    results["b"]["architecture"]["depth"]["curriculum"] = "linear over 0.5"
    names = [line.split(" | ")[0] for line in table(results).splitlines()[2:]]
    assert names == ["| (the defaults)", "| `depth.curriculum=linear over 0.5`"]


def test_committed_results_make_the_documented_tables() -> None:
    """All lines of all files, and no others."""
    docs = Path(__file__).parents[1] / "docs"
    made = [table(json.loads(file.read_text())) for file in (docs / "results").glob("architecture-study*.json")]
    paragraphs = (docs / "architecture-study.md").read_text().split("\n\n")
    documented = [paragraph for paragraph in paragraphs if paragraph.startswith("| architecture | tokens |")]
    assert sorted(documented) == sorted(made) and len(made) == 5


def test_committed_results_make_the_documented_figures_of_passes_that_differ() -> None:
    """Perplexity at 1, 8 and 32 loops; ratios to none by seed; overlap of passes 2 to 8 with those before."""
    docs = Path(__file__).parents[1] / "docs"
    results = json.loads((docs / "results" / "passes-study.json").read_text())

    def figures(name: str) -> tuple[list[list[float]], float]:
        runs = [results[f"rl-{name}-s{seed}"]["loops"] for seed in range(3)]
        by_loops = [{one["loops"]: one for one in loops} for loops in runs]
        overlap = [one[loops]["expert_overlap"] for one in by_loops for loops in range(2, 9)]
        return [[exp(one[n]["loss"]) for one in by_loops] for n in (1, 8, 32)], sum(overlap) / len(overlap)

    base = figures("none")[0][1]
    for name, title in {"none": "none", "bias": "`router_loop: bias`", "adaptive": "`loop_norm: adaptive`"}.items():
        values, overlap = figures(name)
        means = [f"{sum(each) / 3:.1f}" for each in values]
        ranges = [f"{mean} ({min(each):.1f} to {max(each):.1f})" for mean, each in zip(means[:2], values, strict=False)]
        ratios = ", ".join(f"{one / other - 1:+.1%}" for one, other in zip(values[1], base, strict=True))
        cells = [title, *ranges, means[2], "" if name == "none" else ratios, f"{overlap:.2f}"]
        assert " | ".join(cells).replace("|  |", "| |") in (docs / "depth.md").read_text()


def test_what_holds_no_results_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    assert main(["collect", str(tmp_path / "results.json"), str(tmp_path / "run")]) == 1
    assert "run: no depth sweep; run `mythos sweep " in capsys.readouterr().err
    assert not (tmp_path / "results.json").exists()
    (tmp_path / "other.json").write_text("[1]")
    assert main(["table", str(tmp_path / "other.json")]) == 1
    assert "other.json: no results of runs; give a file that `collect` wrote" in capsys.readouterr().err
