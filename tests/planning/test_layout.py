"""The mode that `parallel.mode: auto` chooses, and the smallest layout that fits."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mythos.config.loading import config_from_dict
from mythos.config.sections import Config, ParallelConfig, TrainConfig
from mythos.distributed import parallel as distributed
from mythos.distributed.layout import Layout
from mythos.errors import MythosError
from mythos.model.config import ModelConfig
from mythos.planning import layout as layouts
from mythos.planning import rank_state as states
from mythos.planning.fake_step import Step
from mythos.planning.flops import build_on_meta, count_parameters
from mythos.planning.layout import choose_layout
from mythos.planning.memory import Activations
from mythos.planning.plan import plan
from mythos.planning.rank_state import activations, rank_state, working_memory
from tests.planning.helpers import GIB, WIDE, preset, read_off, shipped, state_on
from tests.runs import tiny


def test_fitting_layout_is_the_smallest(tmp_path: Path) -> None:
    """Compare with all hsdp layouts of 64 processes."""
    config = tiny(tmp_path, **{**WIDE, "data__streams": 64, "train__global_batch": 64})

    def needed(shard: int) -> int:
        parallel = {"parallel__mode": "hsdp", "parallel__shard": shard}
        changed = tiny(tmp_path, **{**WIDE, "data__streams": 64, "train__global_batch": 64, **parallel})
        state = state_on(changed, 64)
        return state.total + working_memory(changed, state).total

    by_shard = {shard: needed(shard) for shard in (2, 4, 8, 16, 32)}
    memory = by_shard[8]
    assert min(by_shard[2], by_shard[4]) > memory
    fit = layouts.find_fit(config, 64, 8, memory)
    assert isinstance(fit, layouts.Fit)
    assert (fit.ranks, fit.parallel.mode, fit.parallel.shard, fit.needed) == (64, "hsdp", 8, memory)
    assert isinstance(layouts.find_fit(config, 64, 8, memory // 10), int)


# --- the mode that is chosen


class Trace:
    """Replaces the trace of activations: returns `whole` bytes, or `sharded` bytes for a sharded model."""

    def __init__(self, whole: int, sharded: int) -> None:
        self.whole, self.sharded = whole, sharded
        self.asked: list[bool] = []

    def __call__(self, model: ModelConfig, step: Step) -> Activations:
        self.asked.append(step.gathered)
        return Activations(0, self.sharded if step.gathered else self.whole)


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    stand_in = Trace(whole=30 * GIB, sharded=25 * GIB)
    monkeypatch.setattr(states, "step_activations", stand_in)
    return stand_in


def needed_by_hand(config: Config, mode: str, size: int, local: int, trace: Trace) -> int:
    """Bytes: under ddp four values of 4 bytes per parameter and a step counter; otherwise measured on FSDP2."""
    if mode == "ddp":
        model = build_on_meta(config.model)
        return 16 * count_parameters(config.model).total + 4 * len(list(model.parameters())) + trace.whole
    shard = local if mode == "hsdp" else size
    layout = Layout("hsdp" if mode == "hsdp" else "fsdp", size // shard, shard, "")
    parameters, _, states, units = read_off(config, layout)
    state = replace(rank_state(config, layout), units=tuple(units))
    return 2 * parameters + states + working_memory(config, state).total + trace.sharded


@pytest.mark.parametrize(("name", "size", "local"), [("mythos_1b", 16, 8), ("mythos_3b", 64, 8), ("mythos_10b", 64, 8)])
def test_auto_takes_the_first_mode_that_fits(name: str, size: int, local: int, trace: Trace) -> None:
    config = preset(name)
    needs = {mode: needed_by_hand(config, mode, size, local, trace) for mode in ("ddp", "hsdp", "fsdp")}
    assert needs["fsdp"] < needs["hsdp"] < needs["ddp"]
    for mode, needed in needs.items():
        enough, short = (int(needed / layouts.USABLE_SHARE) + change for change in (2, -2))
        assert choose_layout(config, size, local, enough).mode == mode
        below = choose_layout(config, size, local, short)
        assert below.mode == {"ddp": "hsdp", "hsdp": "fsdp", "fsdp": "fsdp"}[mode]
        assert below.fits  # it fits in the 5% that are kept free
    least = choose_layout(config, size, local, needs["fsdp"] - 1)
    assert least.mode == "fsdp" and not least.fits
    assert f"needs {needs['fsdp'] / GIB:.3f} GiB" in least.why or f"needs {needs['fsdp'] / GIB:,.0f} GiB" in least.why


def test_more_memory_never_means_more_shards(trace: Trace) -> None:
    for name in ("mythos_1b", "mythos_10b", "mythos_50b"):
        shards, fits = [], []
        for gib in (8, 16, 24, 40, 80, 141, 180, 288, 600, 2000):
            layout = choose_layout(preset(name), 64, 8, gib * GIB)
            shards.append(layout.shard)
            fits.append(layout.fits)
        assert shards == sorted(shards, reverse=True) and fits == sorted(fits)
        assert shards[-1] == 1 and fits[-1] and not fits[0]


def test_one_machine_has_no_hsdp(trace: Trace) -> None:
    config = preset("mythos_10b")
    assert choose_layout(config, 8, 8, 141 * GIB).mode == "fsdp"
    assert choose_layout(config, 8, 3, 141 * GIB).mode == "fsdp", "three do not divide eight"


def test_nothing_is_traced_where_it_decides_nothing(tmp_path: Path, trace: Trace) -> None:
    assert choose_layout(preset("mythos_10b"), 1, 1, 80 * GIB).mode == "single"
    assert choose_layout(preset("mythos_10b", mode="ddp"), 8, 8, 80 * GIB).mode == "ddp"
    small = choose_layout(tiny(tmp_path, model__vocab_size=384), 2, 2, GIB)
    assert (small.mode, small.fits) == ("ddp", True), "sharding frees at most 2% of the memory"
    assert trace.asked == []
    assert choose_layout(preset("mythos_10b"), 64, 8, 141 * GIB).mode == "hsdp"
    assert trace.asked == [True], "a copy of the state alone is larger than the device"


def test_automatic_micro_batches_count_as_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(states, "step_activations", lambda model, step: rows.append(step.rows) or Activations(0, GIB))
    fields = preset("mythos_1b").model_dump(mode="json")
    fields["train"]["micro_batch"] = "auto"
    assert choose_layout(config_from_dict(fields), 8, 8, 80 * GIB).mode == "ddp"
    assert rows == [1]


def test_shipped_1b_is_copied_to_every_gpu() -> None:
    """16 bytes a parameter are 17 GiB; at least 10 GiB of activations are kept at 2,048 x 8 tokens."""
    layout = choose_layout(shipped("fineweb-edu-1b"), 8, 8, 80 * GIB)
    assert (layout.mode, layout.fits) == ("ddp", True)


def test_shipped_10b_fits_80_gib_with_divided_experts_only() -> None:
    """State takes 150 GiB, and whole float32 gradients of the core's experts 33 GiB at any number of ranks."""
    config = shipped("fineweb-edu-10b")
    layout = choose_layout(config, 64, 8, 80 * GIB)
    assert (layout.mode, layout.shard, layout.expert, layout.fits) == ("hsdp", 8, 8, True)
    whole = config.with_fields("parallel", expert=1)
    layout = choose_layout(whole, 64, 8, 80 * GIB)
    assert (layout.mode, layout.fits) == ("fsdp", False)
    experts = 4 * 3 * config.model.n_experts * config.model.expert_dim * config.model.dim
    assert activations(whole, layout).peak > experts == 33 * GIB
    text = plan(whole, 64)
    assert re.search(r"^does not fit; .*parallel\.expert=\d+.* would", text, re.MULTILINE) and f"({layout.why})" in text


def test_shipped_50b_fits_80_gib_as_configured() -> None:
    """51 billion parameters with gradients and AdamW take 16 bytes each, 6 GiB on each of 128 processes."""
    layout = choose_layout(shipped("fineweb-edu-50b"), 128, 8, 80 * GIB)
    assert (layout.mode, layout.shard, layout.expert, layout.fits) == ("fsdp", 128, 32, True)


def test_a_torch_that_cannot_divide_experts_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = preset("mythos_10b")
    assert layouts.expert_counts(config)[:3] == [1, 2, 4]
    monkeypatch.setattr(layouts, "has_mesh_placements", lambda: False)
    layouts._warn_of_torch.cache_clear()
    assert layouts.expert_counts(config) == layouts.expert_counts(config) == [1]
    (message,) = caplog.messages
    assert message.startswith("plans leave out parallel.expert above 1: torch 2.")


def test_experts_are_divided_among_processes_that_their_number_divides() -> None:
    for size in (2, 6):
        with pytest.raises(MythosError, match=f"parallel.expert: got 4, which does not divide the {size} processes"):
            choose_layout(preset("mythos_10b", expert=4), size, size, 80 * GIB)


def test_one_process_compiles_the_core_whatever_parallel_expert_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has all experts; only an exchange cannot be in a graph."""
    monkeypatch.setattr(distributed, "prepare_compiler", lambda: None)
    config = Config(parallel=ParallelConfig(expert=8), train=TrainConfig(compile=True))
    for expert in (1, 8):
        model = build_on_meta(preset("mythos_nano").model)
        distributed.prepare_model(config, model, torch.device("cpu"), expert)
        assert (model.recurrence.compiled_step is not None) == (expert == 1)
