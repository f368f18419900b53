"""Definitions, results, the runner and the check: everything of `mythos claims` but the verdicts of single claims."""

import json
import os
import shutil
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from mythos.claims import definition, judgement, runner
from mythos.claims.check import problems, updated_page
from mythos.claims.costs import cpu_seconds, gpu_hours
from mythos.claims.definition import SIZES, claim_names, load_claim
from mythos.claims.judgement import UNDECIDED, Judgement, Table, judge
from mythos.claims.plots import lines_panel
from mythos.claims.results import read_results
from mythos.cli.claims import main
from mythos.config.loading import load_config
from mythos.errors import MythosError
from mythos.trainer import Trainer
from tests.claims.handmade import results, run
from tests.runs import settings

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "results" / "claims"


@pytest.mark.parametrize("name", claim_names())
def test_every_definition_is_complete(name: str) -> None:
    for size in SIZES:
        if size not in load_claim(name).definition.sizes:
            continue
        claim = load_claim(name, size)
        seeds = claim.at_size.seeds
        planned = claim.runs(1, Path("runs/claims"), None)  # raises for an invalid configuration
        assert len({one.name for one in planned}) == len(planned)
        assert seeds >= 3 or not planned
        if size == "nano":
            # 60 minutes on two cores; with mixtures of experts at equal FLOPs and depth one claim takes 76.
            assert cpu_seconds(claim) <= (2.54 if name == "parameter-efficiency" else 2) * 3600
    assert callable(judgement.module_of(name, "judge")) and callable(judgement.module_of(name, "panels"))


def test_the_hash_is_of_the_definition_and_its_own_size(toy: Path) -> None:
    values = yaml.safe_load((toy / "toy.yaml").read_text())
    before = load_claim("toy").digest()
    values["sizes"]["small"] = {"seeds": 4}
    (toy / "toy.yaml").write_text(yaml.safe_dump(values))
    assert load_claim("toy").digest() == before != load_claim("toy", "small").digest()
    values["hypothesis"] = "another one, after the fact"
    (toy / "toy.yaml").write_text(yaml.safe_dump(values))
    assert load_claim("toy").digest() != before


# The check


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the committed results of two claims, which are judged within a moment."""
    for name in ("memory", "stability"):
        shutil.copytree(COMMITTED / name, tmp_path / "claims" / name)
    return tmp_path / "claims"


def test_the_committed_results_yield_the_committed_verdicts_and_page() -> None:
    assert list(problems(COMMITTED, ROOT / "docs" / "claims.md")) == []


def test_a_tampered_number_fails_the_check(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied / "memory"
    assert list(problems(copied, Path("none"))) == []
    verdict, stored = (folder / "verdict.md").read_text(), (folder / "results.json").read_text()
    (folder / "verdict.md").write_text(verdict.replace("3.6", "9.6"))
    assert list(problems(copied, Path("none"))) == [f"{folder / 'verdict.md'}: not what the results yield"]
    (folder / "verdict.md").write_text(verdict)
    (folder / "results.json").write_text(stored.replace('"entry": 2048', '"entry": 4096'))
    assert [line.partition(": ")[0] for line in problems(copied, Path("none"))] == [
        str(folder / "verdict.md"),
        str(folder / "figure.png"),
    ]
    (folder / "results.json").write_text(stored + " ")
    assert list(problems(copied, Path("none"))) == [f"{folder / 'results.json'}: not as `mythos claims` writes it"]
    (folder / "results.json").write_text(stored)
    assert main(["check", "--results", str(copied)]) == 0
    definitions = copied.parent / "definitions"
    shutil.copytree(definition.FOLDER, definitions)
    changed = (definitions / "memory.yaml").read_text().replace("factor: 10", "factor: 3")
    (definitions / "memory.yaml").write_text(changed)
    monkeypatch.setattr(definition, "FOLDER", definitions)
    [problem] = problems(copied, Path("none"))
    assert "made with definition" in problem and "run the claim anew" in problem


def edited(folder: Path, name: str, places: list[Any], value: Any) -> None:
    path = folder / name / "results.json"
    content = json.loads(path.read_text())
    *outer, key = places
    inner = content
    for place in outer:
        inner = inner[place]
    inner[key] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("name", "places", "value", "message"),
    [
        ("stability", ["runs", 0, "arm"], 5, "results.json cannot be read as results of a claim: 0.arm: Input should"),
        ("stability", ["runs", 0, "seconds"], 10**400, "a whole number has more than 64 bits"),
        ("stability", ["runs", 0, "seconds"], float("inf"), "results.json cannot be read as results of a claim: "),
        ("stability", ["runs", 0, "point"], [], "results.json cannot be read as results of a claim: "),
        ("stability", ["runs", 0, "point"], {}, "stability: no verdict can be computed from its results (KeyError: "),
        (
            "stability",
            ["runs", 0, "validations", 0, "val/loss@4"],
            "x",
            "no verdict can be computed from its results (",
        ),
        ("memory", ["once"], {}, "memory: no verdict can be computed from its results (KeyError: 'cache')"),
        ("memory", ["once", "cache", "rows", 0, "measured"], None, "no verdict can be computed from its results ("),
    ],
)
def test_damaged_results_are_named(
    copied: Path, capsys: pytest.CaptureFixture[str], name: str, places: list[Any], value: Any, message: str
) -> None:
    edited(copied, name, places, value)
    for action in ("check", "list"):
        assert main([action, "--results", str(copied)]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", None])
def test_what_is_damaged_beside_the_results_is_reported(copied: Path, content: bytes | None) -> None:
    for name in ("verdict.md", "figure.png"):
        path = copied / "memory" / name
        sound = path.read_bytes()
        path.unlink()
        os.mkfifo(path) if content is None else path.write_bytes(content)
        assert [line.partition(": ")[0] for line in problems(copied, Path("none"))] == [str(path)]
        path.unlink()
        path.write_bytes(sound)
    page = copied / "claims.md"
    page.write_bytes(b"\xff")
    with pytest.raises(MythosError, match="cannot be read"):
        list(problems(copied, page))


def test_the_page_has_the_table_of_the_results(copied: Path) -> None:
    page = copied.parent / "claims.md"
    shutil.copy(ROOT / "docs" / "claims.md", page)
    page.write_text(updated_page(page, copied))
    assert list(problems(copied, page)) == []
    page.write_text(page.read_text().replace("not supported", "supported", 1))
    assert list(problems(copied, page)) == [f"{page}: not what the results yield"]
    page.write_text("# Claims")
    with pytest.raises(MythosError, match="the marks"):
        updated_page(page, copied)


# The runner, on a claim of two arms of the tests' smallest model


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the definition of a claim `toy`; runs and results go to the current directory, an empty one."""
    base = settings(tmp_path, train__steps=4, checkpoint__every=1, eval__loops=[1, 3], model__core_ffn="dense")
    del base["run"]
    words = dict.fromkeys(("claim", "source", "hypothesis", "metric", "falsified_by"), "words")
    arms = {"a": {}, "b": {"model.loops": 2}}
    values = words | {
        "base": base,
        "arms": arms,
        "measure": {"sweep": {"loops": [1, 2]}},
        "sizes": {"nano": {"seeds": 1}},
    }
    folder = tmp_path / "definitions"
    folder.mkdir()
    (folder / "toy.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(definition, "FOLDER", folder)
    monkeypatch.chdir(tmp_path)
    judged = {"judge": lambda claim, found: Judgement("supported", "1", "It is so.", [Table("t", ["x"], [["1"]])])}
    points = [(1, 2.0), (2, 3.0)]
    judged["panels"] = lambda claim, found: [lines_panel("Toy", "x", "y", {"a": points})]
    monkeypatch.setattr(judgement, "module_of", lambda name, function: judged[function])
    yield folder


def without_times(path: Path) -> dict[str, Any]:
    stored = json.loads((path / "results.json").read_text())
    return stored | {"runs": [{**one, "seconds": 0} for one in stored["runs"]]}


def test_a_claim_is_run_judged_and_not_run_again(toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert main(["toy", "--dry-run"]) == 0
    assert "2 (2 arms x 1 grid points x 1 seeds), 0 recorded" in capsys.readouterr().out
    assert main(["toy"]) == 0
    assert "toy: undecided. 1 of the 3 seeds" in capsys.readouterr().out
    folder = Path("results/claims/toy")
    found = read_results(folder)
    assert found is not None and list(found.runs) == ["a-seed0", "b-seed0"]
    first = found.runs["a-seed0"]
    # Losses of the ordinary trainer, and the same model measured once more by the sweep.
    metrics = [json.loads(line) for line in next(Path("runs/claims").glob("toy-nano-*/a-seed0/metrics.jsonl")).open()]
    assert first.last("val/loss@3") == pytest.approx(metrics[-1]["val/loss@3"], rel=1e-5)
    assert first.measured["sweep"]["loops"][0]["loss"] == pytest.approx(metrics[-1]["val/loss@1"], rel=1e-5)
    assert first.tokens == 4 * 8 * 32 and 0 < first.core_flops < first.flops
    assert (folder / "figure.png").is_file() and "# toy: undecided" in (folder / "verdict.md").read_text()
    assert list(problems(Path("results/claims"), Path("none"))) == []

    def fail(*_: Any) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(runner, "train", fail)
    assert main(["toy"]) == 0
    shutil.rmtree(folder)
    assert main(["toy"]) == 0  # results come from the runs that are there
    assert read_results(folder) is not None


def test_an_interrupted_claim_continues_to_the_same_results(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["toy", "--out", "whole"]) == 0
    shutil.rmtree("runs")
    step_done, steps = runner.CountingConsole.step_done, []

    def stop_in_second_run(console: runner.CountingConsole) -> None:
        step_done(console)
        steps.append(console.step)
        if len(steps) == 6:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner.CountingConsole, "step_done", stop_in_second_run)
    assert main(["toy", "--out", "parts"]) == 130
    found = read_results(Path("parts"))
    assert found is not None and list(found.runs) == ["a-seed0"]
    assert main(["toy", "--out", "parts"]) == 0
    assert len(steps) == 8  # the second run went on from its third step
    whole, parts = without_times(Path("whole")), without_times(Path("parts"))
    assert whole == parts


def test_a_run_that_diverges_is_recorded(toy: Path) -> None:
    values = yaml.safe_load((toy / "toy.yaml").read_text())
    values["arms"] = {"a": {}, "b": {"optim.lr": 1e30, "optim.clip": 0, "train.steps": 12, "optim.warmup": 0}}
    (toy / "toy.yaml").write_text(yaml.safe_dump(values))
    assert main(["toy"]) == 0
    found = read_results(Path("results/claims/toy"))
    assert found is not None
    bad = found.runs["b-seed0"]
    assert bad.diverged is not None and bad.diverged <= 12 and bad.validations == [] and bad.skipped == 5


def test_tuned_arms_get_their_best_value_for_further_seeds(toy: Path) -> None:
    values = yaml.safe_load((toy / "toy.yaml").read_text()) | {"tune": {"optim.lr": [0.1, 0.2, 0.3]}}
    (toy / "toy.yaml").write_text(yaml.safe_dump(values))
    claim = load_claim("toy")
    losses = {("a", 0.1): 3.0, ("a", 0.2): 2.0, ("a", 0.3): 2.5, ("b", 0.1): 1.0, ("b", 0.2): 2.0, ("b", 0.3): 9.0}
    runs = [run(arm, 0, {"optim.lr": lr}, loss) for (arm, lr), loss in losses.items()]
    found = results(claim, runs)
    assert found.best(claim) == {"a": {"optim.lr": 0.2}, "b": {"optim.lr": 0.1}}
    planned = claim.runs(2, Path("runs"), None, found.best(claim))
    assert [one.name for one in planned if one.seed == 1] == ["a-lr=0.2-seed1", "b-lr=0.1-seed1"]
    assert [one.config.optim.lr for one in planned if one.seed == 1] == [0.2, 0.1]
    later = results(claim, [*runs, run("a", 1, {"optim.lr": 0.2}), run("b", 1, {"optim.lr": 0.1})])
    assert later.seeds(claim) == 2 and len(list(later.chosen(claim))) == 4


def test_runs_of_size_full_are_launched_seed_0_first_and_collected(toy: Path, capsys: Any) -> None:
    """Other seeds wait for the values that seed 0 chooses; what has finished is collected by the next call."""
    values = yaml.safe_load((toy / "toy.yaml").read_text()) | {"tune": {"optim.lr": [0.01, 0.02]}}
    values |= {"sizes": {"full": {"seeds": 2}}, "arms": {"a": {}}}
    (toy / "toy.yaml").write_text(yaml.safe_dump(values))

    def launched() -> list[Path]:
        capsys.readouterr()
        assert main(["toy", "--size", "full"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [Path(line.split()[1]) for line in lines if line.startswith("./launch.sh ")]

    first = launched()
    assert [path.stem for path in first] == ["a-lr=0.01-seed0", "a-lr=0.02-seed0"]
    for path in first:
        Trainer(load_config(path)).run()
    second = launched()
    assert [path.stem[:5] for path in second] == ["a-lr="] and second[0].stem.endswith("-seed1")
    Trainer(load_config(second[0])).run()
    assert launched() == []
    found = read_results(Path("results/claims/toy-full"))
    assert found is not None and len(found.runs) == 3


def test_small_models_take_the_time_to_launch_kernels(toy: Path) -> None:
    """4 steps of 3 ms, and 2 ms for prelude, coda and each of the 3 loops of two blocks of the core."""
    shape = {"model.prelude_layers": 1, "model.core_layers": 2, "model.coda_layers": 1, "model.loops": 3}
    values = yaml.safe_load((toy / "toy.yaml").read_text())
    values["arms"] = {"a": shape | {"depth.sampling": "fixed", "depth.curriculum": {"shape": "none"}}}
    (toy / "toy.yaml").write_text(yaml.safe_dump(values))
    [one] = load_claim("toy").runs(1, Path("runs"), None)
    assert gpu_hours(one.config, 1) == pytest.approx(4 * (0.003 + (2 + 3 * 2) * 0.002) / 3600)


def test_fewer_than_three_seeds_or_a_missing_arm_is_undecided(toy: Path) -> None:
    claim = load_claim("toy")
    missing = judge(claim, results(claim, [run("a", seed) for seed in range(3)]))
    assert missing.outcome == UNDECIDED and "no run of b" in missing.why
    both = [run(arm, seed) for arm in "ab" for seed in range(3)]
    assert judge(claim, results(claim, both)).outcome == "supported"
    assert judge(claim, results(claim, both[:-1])).outcome == UNDECIDED


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["to"], "to: unknown claim; did you mean toy?"),
        (["toy", "--size", "large"], "--size: got large; allowed: nano, small, full"),
        (["toy", "--size", "small"], "--size: got small; toy has nano"),
        (["toy", "--seeds", "0"], "--seeds: got 0; give at least 1"),
        (["toy", "--data", "nothing.txt"], "--data: nothing.txt: there is no such file"),
        (["toy", "--write"], "--write: not for `mythos claims toy`"),
        (["check", "--seeds", "2"], "--seeds: not for `mythos claims check`"),
        (["check"], "results/claims: no results of claims"),
    ],
)
def test_wrong_use_is_one_message_before_any_work(toy: Path, words: list[str], message: str, capsys: Any) -> None:
    assert main(words) == 1
    assert message in capsys.readouterr().err
    assert not Path("runs").exists() and not Path("results").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": {"data": 5}}, "base.data: got 5; allowed: a section"),
        (
            {"arms": {"../../x": {}}},
            "../../x-seed0 cannot name a run's folder: arms and values of a grid must have no /",
        ),
        ({"arms": {"a" * 300: {}}}, "cannot name a run's folder"),
        ({"arms": {"a\ud800": {}}}, "arms': allowed: text without the character NUL"),
        ({"grid": {"optim.lr": []}}, "grid.optim.lr: got []; allowed: a list of one value or more"),
        ({"tune": {"optim.lr": []}}, "tune.optim.lr: got []; allowed: a list of one value or more"),
        ({"grid": {"optim.lr": [date(2020, 1, 1)]}}, "grid: Object of type date is not JSON serializable; allowed: "),
        ({"grid": {"optim.lr": [0.1] * 101, "model.dim": [32] * 101}}, "got 20,402 runs; at most 10,000 are allowed"),
        ({"thresholds": {"x": float("nan")}}, "thresholds: Out of range float values"),
    ],
)
def test_a_hostile_definition_is_refused(toy: Path, changes: dict[str, Any], message: str, capsys: Any) -> None:
    values = yaml.safe_load((toy / "toy.yaml").read_text())
    (toy / "toy.yaml").write_text(yaml.safe_dump(values | changes))
    assert main(["toy", "--dry-run"]) == 1 and message in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"measure": {"weight": {}}}, "measure: got weight; allowed: sweep, "),
        ({"measure": {"sweep": {"loop": [1]}}}, "measure: sweep: missing a required argument: 'loops'"),
        ({"measure": {"sweep": {"loops": "all"}}}, "measure: sweep: loops: Input should be a valid list"),
        ({"measure": {"sweep": {"loops": [0]}}}, "measure: sweep: loops: allowed: numbers above 0"),
        ({"once": {"cache": {"presets": [], "tokens": 1}}}, "measure: cache: presets: allowed: numbers above 0"),
    ],
)
def test_measurements_are_checked_before_anything_is_trained(
    toy: Path, changes: dict[str, Any], message: str, capsys: Any
) -> None:
    values = yaml.safe_load((toy / "toy.yaml").read_text())
    (toy / "toy.yaml").write_text(yaml.safe_dump(values | changes))
    assert main(["toy"]) == 1 and message in capsys.readouterr().err
    assert not Path("runs").exists()


def test_results_of_another_definition_or_text_are_kept(toy: Path, capsys: Any) -> None:
    claim = load_claim("toy")
    results(claim, [run("a", 0)]).write(Path("old"))
    changed = yaml.safe_load((toy / "toy.yaml").read_text()) | {"hypothesis": "another"}
    (toy / "toy.yaml").write_text(yaml.safe_dump(changed))
    before = Path("old/results.json").read_bytes()
    assert main(["toy", "--out", "old"]) == 1
    assert "old/results.json: results of another configuration (config " in capsys.readouterr().err
    assert Path("old/results.json").read_bytes() == before and not Path("runs").exists()


def test_a_damaged_file_of_results_is_named(toy: Path, capsys: Any) -> None:
    folder = Path("results/claims/toy")
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"runs": [{"arm": "a"}]}')
    assert main(["toy"]) == 1
    assert "results.json cannot be read as results of a claim" in capsys.readouterr().err
