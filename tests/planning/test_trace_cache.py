"""Traced steps are kept on disk, and traced again after any change."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from mythos.cli.estimate import estimate, parser
from mythos.config.loading import load_config
from mythos.config.presets import preset_config
from mythos.distributed.layout import Layout
from mythos.planning import fake_step, memory, trace_cache, traffic
from mythos.planning.plan import plan
from mythos.planning.rank_state import rank_state
from mythos.planning.trace_cache import SHIPPED, kept_on_disk, recorded, stored
from scripts.trace_presets import shipped_plans
from tests.runs import tiny


@dataclass(frozen=True)
class Figure:
    value: float


def test_a_figure_is_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    @stored(lambda value: Figure(**value))
    def figure(config: object, times: int) -> Figure:
        calls.append(times)
        return Figure(times / 3)

    config = preset_config("mythos_nano")
    for _ in range(2):
        figure(config, 2)  # outside of the context nothing is kept
    with kept_on_disk(tmp_path):
        for _ in range(3):
            assert figure(config, 1) == Figure(1 / 3)
        assert figure(config, 4) == Figure(4 / 3)
        figure(config.model_copy(update={"norm_eps": 1e-5}), 1)
        monkeypatch.setattr(trace_cache, "_versions", lambda: ("another source",))
        figure(config, 1)
        for path in tmp_path.iterdir():
            path.write_text("damaged")
        assert figure(config, 1) == Figure(1 / 3)
    assert calls == [2, 2, 1, 4, 1, 1, 1]


@pytest.mark.parametrize("layout", [Layout("single", 1, 1, ""), Layout("fsdp", 1, 2, "why")])
def test_the_state_of_a_rank_is_read_as_it_was_computed(layout: Layout, tmp_path: Path) -> None:
    config = tiny(tmp_path)
    expected = rank_state(config, layout)
    with kept_on_disk(tmp_path / "cache"):
        assert rank_state(config, layout) == expected
        (file,) = (tmp_path / "cache").iterdir()
        before = file.stat().st_mtime_ns
        assert rank_state(config, layout) == expected
        assert file.stat().st_mtime_ns == before


def test_a_folder_that_cannot_be_written_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()

    @stored(int)
    def figure(times: int) -> int:
        return 2 * times

    with kept_on_disk(tmp_path / "file" / "traces"):
        assert [figure(1), figure(2)] == [2, 4]
    (record,) = caplog.records
    assert f"{tmp_path / 'file' / 'traces'} cannot be written" in record.getMessage()


def test_a_trace_that_cannot_be_written_names_the_folder_of_traces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @stored(int)
    def figure(times: int) -> int:
        return 2 * times

    with kept_on_disk(tmp_path / "traces"):
        shutil.rmtree(tmp_path / "traces")
        (tmp_path / "traces").touch()
        assert figure(1) == 2
    (record,) = caplog.records
    assert record.getMessage().startswith(f"$MYTHOS_CACHE: {tmp_path / 'traces'}")


REMEMBERED = (fake_step._step_flops, memory.step_activations, traffic._trace)


@pytest.fixture
def forgotten() -> None:
    """What earlier tests of this process have traced."""
    for function in REMEMBERED:
        function.cache_clear()


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch) -> dict[str, int | dict[str, float]]:
    """The shipped results, taken for current."""
    entry = json.loads(SHIPPED.read_text())
    monkeypatch.setattr(trace_cache, "made_with", lambda: entry["made_with"])
    trace_cache.shipped_values.cache_clear()
    return entry["values"]


def test_shipped_results_are_those_of_a_trace(forgotten: None, shipped: dict[str, int | dict[str, float]]) -> None:
    made_with = json.loads(SHIPPED.read_text())["made_with"]["torch"]
    if not trace_cache.torch.__version__.startswith(f"{made_with}."):
        pytest.skip(f"traced with torch {made_with}")
    with recorded() as values:
        estimate(parser().parse_args(["mythos_nano"]))
        for machine in (["train.device=cuda"], ["train.device=cpu", "train.dtype=float32"]):
            plan(load_config("debug", machine), 1)
    assert len(values) > 8
    assert {key: shipped.get(key) for key in values} == values, "run scripts/trace_presets.py"


def test_shipped_plans_need_no_trace(
    forgotten: None, shipped: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a step is traced: run scripts/trace_presets.py")

    for module in (fake_step, memory, traffic):
        monkeypatch.setattr(module, "fake_model", fail)
    with kept_on_disk(tmp_path):
        for _, plan_it in shipped_plans():
            plan_it()


def test_results_of_other_code_are_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    entry = {"made_with": trace_cache.made_with(), "values": {"key": 1}}
    path = tmp_path / "traces.json"
    path.write_text(json.dumps(entry))
    monkeypatch.setattr(trace_cache, "SHIPPED", path)
    trace_cache.shipped_values.cache_clear()
    assert trace_cache.shipped_values() == {"key": 1}
    model = tmp_path / "package" / "model"
    model.mkdir(parents=True)
    (model / "block.py").write_text("changed = True")
    monkeypatch.setattr(trace_cache, "PACKAGE", tmp_path / "package")
    trace_cache.shipped_values.cache_clear()
    assert trace_cache.shipped_values() == {}
    trace_cache.shipped_values.cache_clear()
