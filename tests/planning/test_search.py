"""The search for a layout against trying all of them, with activations and traffic that cost no trace."""

from typing import Any

import pytest

from mythos.cli.estimate import fastest_layout, layout_lines, least_figures, least_line
from mythos.config.sections import Config
from mythos.distributed.layout import Layout
from mythos.planning import search as searches
from mythos.planning import speed
from mythos.planning.budget import GPUS
from mythos.planning.expert_rows import rows_to_experts
from mythos.planning.fake_step import RecomputedFlops
from mythos.planning.layout import USABLE_SHARE, shared_counts
from mythos.planning.memory import Activations
from mythos.planning.rank_state import deepest_micro_batch
from mythos.planning.search import Candidate, Search, at_length
from mythos.planning.traffic import StepTraffic, Traffic
from tests.planning.helpers import GIB, preset

PER_TOKEN = {"none": 900_000, "selective": 600_000, "loop": 200_000, "all": 150_000}
RECOMPUTED = {
    "none": RecomputedFlops(0.0, 0.0),
    "selective": RecomputedFlops(0.0, 1e7),
    "loop": RecomputedFlops(0.0, 5e8),
    "all": RecomputedFlops(8e8, 5e8),
}


def activations_by_hand(config: Config, layout: Layout, checkpointing: str | None = None) -> Activations:
    """Proportional to tokens, of which more come to a rank's experts the more ranks divide them; and to the experts."""
    rows, _ = deepest_micro_batch(config, layout.size)
    tokens = rows * config.data.sequence_length
    peak = tokens * PER_TOKEN[config.parallel.activation_checkpointing] + 2 * GIB // layout.expert
    if layout.expert > 1:
        peak += 100_000 * rows_to_experts(config.model, layout.expert, tokens)
    return Activations(peak // 2, peak)


def traffic_by_hand(model: Any, length: int, rows: int, mode: str) -> StepTraffic:
    size = 1e5 + 4e5 / rows
    return StepTraffic(Traffic(10, 5, size, 20, 10, size), Traffic(10, 5, size, 20, 10, size))


@pytest.fixture(autouse=True)
def no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(searches, "activations", activations_by_hand)
    monkeypatch.setattr(searches, "step_traffic", traffic_by_hand)
    monkeypatch.setattr(speed, "recomputed_flops", lambda model, length, mode: RECOMPUTED[mode])


def needed(candidate: Candidate) -> int:
    return candidate.held + activations_by_hand(candidate.config, candidate.layout).peak


@pytest.mark.parametrize(("name", "gpus", "gpu"), [("mythos_1b", 8, "A100"), ("mythos_10b", 128, "H100")])
def test_fastest_of_all_that_fit(name: str, gpus: int, gpu: str) -> None:
    search = Search(preset(name), gpus, 8)
    found = search.fastest(GPUS[gpu])
    assert found is not None
    candidates = list(search.candidates("loop"))
    usable = USABLE_SHARE * GPUS[gpu].memory
    times = [search.model(GPUS[gpu]).time(each.config, each.state).total for each in candidates]
    fitting = [time for each, time in zip(candidates, times, strict=True) if needed(each) <= usable]
    assert 0 < len(fitting) < len(candidates) == found.tried, "some fit, some do not"
    chosen = found.candidate
    assert search.model(GPUS[gpu]).time(chosen.config, chosen.state).total == min(fitting)
    assert found.needed == needed(chosen)
    modes = {(each.layout.mode, each.layout.shard, each.layout.expert) for each in candidates}
    assert {("ddp", 1, 1), ("fsdp", gpus, 1), ("fsdp", gpus, 8), ("hsdp", 4, 2)} <= modes


def test_more_bandwidth_between_machines_never_costs_time() -> None:
    search = Search(preset("mythos_10b"), 128, 8)
    candidates = list(search.candidates("loop"))[::20]
    one_machine = Search(preset("mythos_10b"), 128, 128)
    for candidate in candidates:
        across = search.model(GPUS["H100"]).time(candidate.config, candidate.state)
        within = one_machine.model(GPUS["H100"]).time(candidate.config, candidate.state)
        assert within.communication < across.communication
        assert within.products == across.products


def test_fields_that_are_set_are_kept() -> None:
    config = preset("mythos_10b", mode="hsdp", shard=16, expert=4)
    search = Search(config, 64, 8, frozenset({"mode", "shard", "expert", "activation_checkpointing"}))
    candidates = list(search.candidates("loop"))
    assert candidates
    for candidate in candidates:
        parallel = candidate.config.parallel
        assert (parallel.mode, parallel.shard, parallel.expert) == ("hsdp", 16, 4)
        assert parallel.activation_checkpointing == "none"


def test_the_least_memory_keeps_fields_that_are_set() -> None:
    config = preset("mythos_10b").with_fields("train", micro_batch=2).with_fields("parallel", reduce="step")
    least = Search(config, 64, 8, frozenset({"micro_batch", "reduce"})).least()
    assert least is not None
    assert {"parallel.reduce=step", "train.micro_batch=2"} <= {*least.candidate.overrides}


def test_least_memory_and_the_fewest_gpus() -> None:
    search = Search(preset("mythos_100b"), 8, 8)
    assert search.fastest(GPUS["H100"]) is None
    nearest, more = search.least(), search.fewest_gpus(80 * GIB)
    assert nearest is not None and more is not None
    assert nearest.needed > USABLE_SHARE * 80 * GIB >= more.needed == needed(more.candidate)
    figures = fastest_layout(search, None, GPUS["H100"])
    run = {"gpus": 8, "gpu": "H100"}
    first, of_nearest, second, of_more = layout_lines({"run": run, "fastest": figures, "longest_context": None})
    assert first == "no layout fits on 8 H100. The one that needs least memory:"
    assert second == f"{more.candidate.layout.size:,} GPUs are enough:"
    assert of_nearest == "  " + least_line(least_figures(nearest) or {}) and " parallel.expert=" in of_nearest
    assert of_more.startswith(f"  {more.needed / GIB:,.1f} GiB, {more.activations / GIB:,.1f} of them activations: ")
    half = search.least(more.candidate.layout.size // 2)
    assert half is not None and half.needed > USABLE_SHARE * 80 * GIB
    for wrap in ("loop", "block"):
        for candidate in search.candidates(wrap):
            assert nearest.needed <= needed(candidate)


def test_least_memory_where_only_copies_can_divide_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """12 ranks that share one copy leave 3 for a weight of an expert, which has no multiple of 3 rows."""
    monkeypatch.setattr(searches, "activations", lambda config, *_: Activations(0, config.data.sequence_length * 1000))
    search = Search(preset("mythos_10b"), 12, 8)
    every = [candidate for wrap in ("loop", "block") for candidate in search.candidates(wrap)]
    assert {each.layout.expert for each in every if each.layout.mode == "fsdp"} == {1}
    least = search.least()
    assert least is not None and least.candidate.layout.mode == "hsdp" and least.candidate.layout.expert == 4
    assert least.held == min(each.held for each in every)
    found = search.fastest(GPUS["H100"])
    (longest,) = search.longest_contexts([80 * GIB])
    assert found is not None and longest.tokens == 8192, "what fits has a length"
    fewer = Search(preset("mythos_10b"), 6, 8)
    enough = fewer.fewest_gpus(80 * GIB)
    assert fewer.fastest(GPUS["H100"]) is None and enough is not None and enough.candidate.layout.size == 12


def test_500b_fits_only_with_divided_shared_experts() -> None:
    """Else the shared experts of its core, 3 x 12,288 x 64 x 23,040 weights, and their gradient are gathered whole."""
    shared = 3 * 12_288 * 64 * 23_040
    search = Search(preset("mythos_500b"), 1024, 8)
    found = search.fastest(GPUS["B200"])
    assert found is not None and found.candidate.layout.shared == 8, "the GPUs of a machine are enough"
    assert "parallel.shared=8" in found.candidate.overrides
    # Gathered weights in bfloat16; their gradient too, while it is reduced in float32.
    assert 8 * shared // 8 < found.candidate.held < 8 * shared // 8 + 24 * GIB
    least = search.least()
    assert least is not None and least.candidate.layout.shared == 32
    whole = Search(preset("mythos_500b"), 1024, 8, frozenset({"shared"}))
    assert whole.fastest(GPUS["B200"]) is None and whole.fewest_gpus(GPUS["B200"].memory) is None
    run = {"gpus": 1024, "gpu": "B200"}
    lines = layout_lines({"run": run, "fastest": fastest_layout(whole, None, GPUS["B200"]), "longest_context": None})
    assert lines[-1] == "nor does any on up to 4,096 GPUs" and "parallel.shared" not in "".join(lines)
    undivided = whole.least()
    assert undivided is not None and undivided.held > 2 * 2 * shared > GPUS["B200"].memory


def test_shared_experts_are_divided_in_plans_where_they_are_large() -> None:
    assert shared_counts(preset("mythos_10b", expert=64), 8) == [1]
    assert shared_counts(preset("mythos_500b", expert=64), 8) == [1, 8, 32]
    assert shared_counts(preset("mythos_500b", expert=16), 6) == [1, 4, 16]
    assert shared_counts(preset("mythos_500b", expert=8), 8) == [1, 8]
    assert shared_counts(preset("mythos_500b", expert=8, shared=2), 8) == [2]
    assert shared_counts(preset("mythos_500b"), 8) == [1]


def test_longest_context_by_hand() -> None:
    search = Search(at_length(preset("mythos_100b"), 4096), 256, 8)
    least = search.least()
    assert least is not None
    for memory in (80 * GIB, 141 * GIB):
        expert = least.candidate.layout.expert
        free = USABLE_SHARE * memory - least.held - 2 * GIB / expert
        expected = int(free / (PER_TOKEN["all"] + rows_to_experts(search.config.model, expert, 100_000)))
        assert expected - 1024 < search.longest_context(least, memory) <= expected
    assert search.longest_context(least, 10_000 * GIB) == 1_000_000, "the model's own limit"
    assert search.longest_context(least, GIB) == 0


def test_longest_context_of_every_division_of_the_shared_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory decides: divided among more ranks, weights take less and tokens more."""

    def proportional(config: Config, layout: Layout, checkpointing: str | None = None) -> Activations:
        return Activations(0, config.data.sequence_length * 800_000 * layout.shared)

    monkeypatch.setattr(searches, "activations", proportional)
    search = Search(at_length(preset("mythos_500b"), 4096), 1024, 8)
    held = {least.candidate.layout.shared: least.held for least in map(search.least, [None] * 3, range(3)) if least}
    assert sorted(held) == [1, 8, 32] and held[1] > held[8] > held[32]
    memories = {32: 61 * GIB, 8: 141 * GIB, 1: 1000 * GIB}
    for shared, longest in zip(memories, search.longest_contexts([*memories.values()]), strict=True):
        expected = int((USABLE_SHARE * memories[shared] - held[shared]) / (800_000 * shared))
        assert expected - 1024 < longest.tokens <= expected
        assert (f"parallel.shared={shared}" in longest.overrides) == (shared > 1)
