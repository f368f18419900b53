"""Plans for many processes: bytes against hand counts and real allocations, and layouts that fit."""

import os
import re
import weakref
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos.cli.train import main
from mythos.config.loading import config_from_dict, load_config
from mythos.config.presets import PRESETS
from mythos.config.sections import Config
from mythos.distributed.layout import Layout, build_mesh, named_layout
from mythos.distributed.parallel import parallelize, shard_model
from mythos.distributed.ranks import Ranks, World
from mythos.errors import MythosError
from mythos.model.config import ModelConfig
from mythos.planning import collectives
from mythos.planning import layout as layouts
from mythos.planning import rank_state as states
from mythos.planning.collectives import fake_processes
from mythos.planning.fake_step import Step
from mythos.planning.flops import build_on_meta, count_parameters
from mythos.planning.layout import choose_layout
from mythos.planning.memory import Activations
from mythos.planning.plan import plan
from mythos.planning.rank_state import RankState, Unit, Working, activations, compute_dtype, rank_state, working_memory
from mythos.torch_internals import fsdp_param_groups
from mythos.training.optim import build_optimizer
from tests.runs import tiny

GIB = 2**30


def state_on(config: Config, ranks: int) -> RankState:
    return rank_state(config, choose_layout(config, ranks, min(ranks, 8), 80 * GIB))


def preset(name: str, **parallel: Any) -> Config:
    return config_from_dict(
        {
            "model": {"preset": name},
            "data": {"streams": 1024},
            "train": {"steps": 1, "global_batch": 1024},
            "parallel": parallel,
        }
    )


# --- bytes


FLOAT32 = re.compile(r"norm\.weight$|router\.weight$|\.dt$|\.log_a$|adapter\.scale$")
LAYOUTS = [
    (1, "single", None, 1),
    (4, "ddp", None, 1),
    (1024, "ddp", None, 1),
    (4, "fsdp", None, 4),
    (1024, "fsdp", None, 1024),
    (4, "hsdp", 2, 2),
    (1024, "hsdp", 16, 16),
]


@pytest.mark.parametrize(("ranks", "mode", "shard", "pieces"), LAYOUTS)
def test_bytes_are_those_of_rows_counted_by_hand(
    tmp_path: Path, ranks: int, mode: str, shard: int | None, pieces: int
) -> None:
    config = tiny(tmp_path, parallel__mode=mode, parallel__shard=shard, model__vocab_size=384)
    state = state_on(config, ranks)
    numbers, whole, tensors = 0, 0, 0
    for name, parameter in build_on_meta(config.model).named_parameters():
        rows, *rest = parameter.shape
        shards = 1 if FLOAT32.search(name) else pieces
        even = any(
            size % shards == 0 for size in parameter.shape
        )  # sharded along that dimension, else along rows, the last shard padded
        size = parameter.numel() // shards if even else ceil(rows / shards) * torch.Size(rest).numel()
        numbers, tensors = numbers + size, tensors + 1
        whole += size if FLOAT32.search(name) else 0
    assert state.parameters == state.gradients == 4 * numbers
    assert state.optimizer == 8 * numbers + 4 * tensors  # two moments, and a counter of steps for each
    assert state.replicated == (4 * whole if pieces > 1 else 0)
    assert not dist.is_initialized()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_keeps_one_moment_of_what_muon_updates(tmp_path: Path, name: str) -> None:
    config = tiny(tmp_path, optim__name=name, model__vocab_size=384)
    model = build_on_meta(config.model)
    projection = re.compile(r"(attention|ffn).*\.(query|key\w*|out|gate_up|down)(\.weight)?$")
    hidden = [p.numel() for n, p in model.named_parameters() if projection.search(n) and "norm" not in n]
    moments, counters = 2 * count_parameters(config.model).total, len(list(model.parameters()))
    assert len(hidden) == 20
    if name == "muon":
        moments, counters = moments - sum(hidden), counters - len(hidden)
    state = state_on(config, 1)
    assert state.optimizer == 4 * (moments + counters)
    parameters = sum(p.numel() for p in model.parameters())
    assert state.total - 4 * counters == 4 * (2 * parameters + moments), "weights, gradients and moments, all float32"


def test_units_add_up_and_shards_are_padded_to_equal_length(tmp_path: Path) -> None:
    config = tiny(tmp_path, parallel__mode="fsdp", train__dtype="bfloat16", model__vocab_size=384)
    sharded = sum(p.numel() for name, p in build_on_meta(config.model).named_parameters() if not FLOAT32.search(name))
    injection = config.model.dim**2
    few, many = state_on(config, 4), state_on(config, 1024)
    for state in (few, many):
        assert sum(unit.accumulated for unit in state.units) == 4 * sharded
        assert sum(unit.gradient for unit in state.units) == 2 * sharded + 2 * injection
        assert sum(unit.reduced for unit in state.units) == state.layout.size * (state.parameters - state.replicated)
    assert sum(unit.reduced for unit in few.units) == pytest.approx(4 * sharded, rel=0.01), "few rows are padding"
    assert sum(unit.reduced for unit in many.units) > 10 * 4 * sharded, "a tensor of 32 rows takes 1,024 of them"


def read_off(config: Config, layout: Layout) -> tuple[int, int, int, list[Unit]]:
    """Measure a model sharded by FSDP2: bytes of parameters, of whole ones, of the optimizer; and its units."""

    def local(tensors: list[Tensor]) -> int:
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

    model = build_on_meta(config.model)
    with fake_processes(layout.size):
        shard_model(config.parallel, model, build_mesh(layout, "cpu"), compute_dtype(config))
        parameters = list(model.parameters())
        optimizer = build_optimizer(model, config.optim, compute_dtype(config))
        states = [value for state in optimizer.state.values() for value in state.values()]
        blocks = set(model.recurrence.blocks)
        split = any(isinstance(block, FSDPModule) for block in blocks)
        units = []
        for module in model.modules():
            for group in fsdp_param_groups(module) if isinstance(module, FSDPModule) else ():
                computed = group.mp_policy.param_dtype or torch.float32
                reduced = group.mp_policy.reduce_dtype or computed
                padded = group.mesh_info.shard_mesh_size * sum(
                    p.padded_sharded_param_size.numel() for p in group.fsdp_params
                )
                divided = layout.expert if group.fsdp_params[0].is_dtensor else 1
                real = sum(p.sharded_param.numel() for p in group.fsdp_params) // divided
                units.append(
                    Unit(
                        gathered=padded * computed.itemsize,
                        gradient=real * computed.itemsize,
                        accumulated=real * reduced.itemsize,
                        reduced=padded * reduced.itemsize,
                        kept=group.post_forward_mesh_info is None,
                        looped=module in blocks,
                        outer=module is model.recurrence and split,
                        experts=group.fsdp_params[0].is_dtensor,
                    )
                )
        whole = [p for p in parameters if not isinstance(p, DTensor)]
        return local(parameters), local(whole), local(states), units


@pytest.mark.parametrize(
    ("name", "ranks", "changes"),
    [
        ("mythos_nano", 2, {"mode": "fsdp"}),
        ("mythos_nano", 1024, {"mode": "fsdp", "wrap": "block"}),
        ("mythos_small", 6, {"mode": "fsdp", "wrap": "block", "reshard_after_forward": False}),
        ("mythos_1b", 64, {"mode": "hsdp", "shard": 8}),
        ("mythos_3b", 96, {"mode": "hsdp", "shard": 6, "wrap": "block"}),
        ("mythos_10b", 64, {"mode": "fsdp"}),
        ("mythos_10b", 64, {"mode": "fsdp", "expert": 8}),
        ("mythos_50b", 64, {"mode": "hsdp", "shard": 32, "expert": 32, "wrap": "block"}),
        ("mythos_500b", 1000, {"mode": "fsdp", "wrap": "block"}),
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_bytes_are_those_of_fsdp_itself(name: str, ranks: int, changes: dict[str, Any], optimizer: str) -> None:
    config = preset(name, **changes)
    config = config.model_copy(update={"optim": config.optim.model_copy(update={"name": optimizer})})
    layout = named_layout(config.parallel, ranks, 8)
    state = rank_state(config, layout)
    parameters, whole, states, units = read_off(config, layout)
    assert (state.parameters, state.replicated, state.optimizer) == (parameters, whole, states)
    assert list(state.units) == units


def test_units_of_a_gate_and_of_float32_are_those_of_fsdp_itself(tmp_path: Path) -> None:
    for changes in ({"model__halting": "gate"}, {"train__dtype": "float32"}, {"model__injection": "linear"}):
        config = tiny(tmp_path, parallel__mode="fsdp", model__vocab_size=384, model__coda_layers=1, **changes)
        layout = named_layout(config.parallel, 4, 4)
        assert list(rank_state(config, layout).units) == read_off(config, layout)[3]


# --- what training really allocates


class Peak(TorchDispatchMode):
    """Peak bytes of all tensors that are alive at once."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self.bytes = 0
        for tensor in tensors:
            self.note(tensor)

    def note(self, tensor: Tensor) -> None:
        storage = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).untyped_storage()
        known = self.alive.get(storage._cdata)
        if known is None or known() is None:
            self.alive[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, result)):
            if isinstance(value, Tensor):
                self.note(value)
        storages = {key: reference() for key, reference in self.alive.items()}
        self.alive = {key: self.alive[key] for key, storage in storages.items() if storage is not None}
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in storages.values() if storage is not None))
        return result


WIDE = {
    "model__dim": 256,
    "model__ffn_dim": 768,
    "model__core_layers": 2,
    "model__prelude_layers": 1,
    "model__coda_layers": 1,
    "model__n_experts": 8,
    "model__expert_dim": 256,
    "model__shared_expert_dim": 256,
    "model__vocab_size": 1024,
    "data__streams": 4,
    "train__micro_batch": 1,
    "train__dtype": "bfloat16",
    "parallel__mode": "fsdp",
    "parallel__activation_checkpointing": "loop",
}


@pytest.mark.parametrize(
    ("micro_batches", "changes"),
    [
        (1, {}),
        (2, {"parallel__reduce": "micro_batch"}),
        (2, {"parallel__wrap": "block"}),
        (2, {"train__dtype": "float32"}),
        (2, {"parallel__mode": "hsdp", "parallel__shard": 2, "model__vocab_size": 16384}),
    ],
    ids=str,
)
def test_memory_is_what_steps_allocate(tmp_path: Path, micro_batches: int, changes: dict[str, Any]) -> None:
    """Rank 0 of four fake processes: collectives do nothing, but tensors are real; activations are negligible."""
    config = tiny(tmp_path, **{**WIDE, "train__global_batch": 4 * micro_batches, **changes})
    layout = named_layout(config.parallel, 4, 4)
    state = rank_state(config, layout)
    planned = state.total + working_memory(config, state).total
    ids = torch.zeros(1, 3, dtype=torch.int64)
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=config.train.dtype == "bfloat16")
    with fake_processes(4):
        model = build_on_meta(config.model)
        parallel = parallelize(config, model, layout, World(torch.device("cpu"), Ranks(), Ranks()))
        optimizer = build_optimizer(model, config.optim)
        states = [value for state in optimizer.state.values() for value in state.values()]
        with Peak([*model.parameters(), *states]) as peak:
            for micro in range(micro_batches):
                with parallel.accumulating(micro == micro_batches - 1):
                    with autocast:
                        loss = parallel(ids[:, :-1], ids[:, 1:], loops=2, backprop=2).loss
                    loss.backward()
            optimizer.step()
    print(f"planned {planned:,} bytes, allocated {peak.bytes:,}: {planned / peak.bytes:.3f}")
    # With blocks as units torch 2.11 allocates 5% more (ratio 0.828): it frees a unit's reduce-scatter input only when
    # another unit is reduced, later versions already when a block's next loop has nothing to reduce.
    keeps_input = torch.__version__.startswith("2.11.") and config.parallel.wrap == "block"
    assert (0.82 if keeps_input else 0.85) < planned / peak.bytes < 1.2


# --- what fits


@pytest.fixture
def no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan layouts without activations."""
    monkeypatch.setattr(states, "step_activations", lambda model, step: Activations(0, 0))


def memory_table(text: str) -> dict[str, float]:
    """GiB in the memory table, by line."""
    return {
        what: float(size.replace(",", "")) for size, what in re.findall(r"^ +([\d.,]+)  ([a-z].*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.usefixtures("no_activations")
def test_every_preset_is_planned_for_1024_processes(name: str) -> None:
    text = plan(preset(name), 1024)
    table = memory_table(text)
    assert re.search(r"^processes +1,024, 8 on a machine: (ddp|hsdp|fsdp)", text, re.MULTILINE)
    assert all(table[what] > 0 for what in ("parameters", "gradients", "optimizer state", "in all, of 80"))
    assert sum(size for what, size in table.items() if "in all" not in what) == pytest.approx(
        table["in all, of 80"], rel=2e-3, abs=0.01
    )
    too_large = name in ("mythos_50b", "mythos_100b", "mythos_500b", "mythos_1t")
    assert (table["in all, of 80"] > 80) == too_large
    assert ("parallel.expert=" in text) == (name in ("mythos_50b", "mythos_100b")), "with divided experts these fit"
    # Of these the shared experts are too large.
    assert ("nor would any mode" in text) == (name in ("mythos_500b", "mythos_1t"))
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("ranks", "memory", "mode", "expected"),
    [
        (1, 80, "auto", "on 8 processes"),  # 149 GiB of state and 18 of weights
        (
            8,
            80,
            "auto",
            "parallel.reduce=micro_batch",
        ),  # sharded over eight it fits, but not with 37 GiB of whole gradients
        (64, 60, "hsdp", "parallel.shard="),  # the eight ranks of a machine do not suffice
    ],
)
@pytest.mark.usefixtures("no_activations")
def test_what_would_fit_does(ranks: int, memory: int, mode: str, expected: str) -> None:
    def config(*parallel: tuple[str, str]) -> Config:
        values = {"reduce": "step", "mode": mode} | {name: yaml.safe_load(value) for name, value in parallel}
        fields = preset("mythos_10b", **values).model_dump(mode="json")
        fields["data"]["streams"] = 64
        fields["train"]["global_batch"] = 64 * 8
        return config_from_dict(fields)

    text = plan(config(), ranks, device_memory=memory * GIB)
    advice = re.search(r"^does not fit; (.*) would, with ([\d.]+) GiB$", text, re.MULTILINE)
    assert advice and expected in advice[1], text[text.index("processes ") :]
    assert float(advice[2]) <= memory
    elsewhere = re.search(r"on ([\d,]+) processes", advice[1])
    there = int(elsewhere[1].replace(",", "")) if elsewhere else ranks
    again = plan(config(*re.findall(r"parallel\.(\w+)=(\w+)", advice[1])), there, device_memory=memory * GIB)
    assert "does not fit" not in again
    assert memory_table(again)[f"in all, of {memory}"] == pytest.approx(float(advice[2]), abs=0.001)


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


def test_activations_count_against_the_memory(tmp_path: Path) -> None:
    """The figures of the memory table add up, and checkpointing lowers activations."""
    long = {"data__sequence_length": 32768, "model__context_length": 32768, "train__global_batch": 2}
    long |= {"depth__backprop": 2, "depth__maximum": 3}
    none = memory_table(plan(tiny(tmp_path, **long)))
    loop = memory_table(plan(tiny(tmp_path, **long, parallel__activation_checkpointing="loop")))
    kept = "activations that 2 passes of 2 rows keep"
    for table in (none, loop):
        parts = sum(size for what, size in table.items() if "in all" not in what)
        assert parts == pytest.approx(table["in all, of 80"], abs=0.003)
    assert 0 < loop[kept] < none[kept] / 2
    text = plan(tiny(tmp_path, **long), device_memory=16 * 2**20)
    assert re.search(r"does not fit, for activations alone take [\d.]+ GiB: lower train\.micro_batch", text)


def test_a_context_of_a_million_tokens_is_planned() -> None:
    """A small model with such a context; an S x S table or mask of bytes would take 931 GiB."""
    fields = preset("mythos_100b", activation_checkpointing="loop", mode="fsdp").model_dump(mode="json")
    fields["data"]["sequence_length"] = fields["model"]["context_length"]
    fields["model"] |= {"dim": 64, "ffn_dim": 64, "expert_dim": 8, "shared_expert_dim": 8, "n_heads": 1, "loops": 2}
    fields["model"] |= {"prelude_layers": 1, "coda_layers": 1, "n_experts": 8, "q_lora_rank": 16, "kv_lora_rank": 16}
    fields["train"]["micro_batch"] = 1
    table = memory_table(plan(config_from_dict(fields), 1024))
    assert 0 < table["activations of the rest, at their peak: head, casts, gradients on their way"] < 100


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


def test_micro_batches_to_be_found_count_as_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    monkeypatch.setattr(states, "step_activations", lambda model, step: rows.append(step.rows) or Activations(0, GIB))
    fields = preset("mythos_1b").model_dump(mode="json")
    fields["train"]["micro_batch"] = "auto"
    assert choose_layout(config_from_dict(fields), 8, 8, 80 * GIB).mode == "ddp"
    assert rows == [1]


def shipped(name: str) -> Config:
    return load_config(str(Path(__file__).parents[2] / "configs" / f"{name}.yaml"), ["model.vocab_size=49152"])


def test_shipped_1b_is_copied_to_every_gpu() -> None:
    """16 bytes a parameter are 17 GiB; at least 10 GiB of activations are kept at 2,048 x 8 tokens."""
    layout = choose_layout(shipped("fineweb-edu-1b"), 8, 8, 80 * GIB)
    assert (layout.mode, layout.fits) == ("ddp", True)


def test_shipped_10b_fits_80_gib_with_divided_experts_only() -> None:
    """State takes 150 GiB, and whole float32 gradients of the core's experts 33 GiB at any number of ranks."""
    config = shipped("fineweb-edu-10b")
    layout = choose_layout(config, 64, 8, 80 * GIB)
    assert (layout.mode, layout.shard, layout.expert, layout.fits) == ("hsdp", 8, 8, True)
    whole = layouts.with_parallel(config, expert=1)
    layout = choose_layout(whole, 64, 8, 80 * GIB)
    assert (layout.mode, layout.fits) == ("fsdp", False)
    experts = 4 * 3 * config.model.n_experts * config.model.expert_dim * config.model.dim
    assert activations(whole, layout).peak > experts == 33 * GIB
    text = plan(whole, 64)
    assert re.search(r"^does not fit; .*parallel\.expert=\d+.* would", text, re.MULTILINE) and f"({layout.why})" in text


# --- what decoding caches


@pytest.mark.usefixtures("no_activations")
def test_cache_of_a_token_is_told(tmp_path: Path) -> None:
    """An mla layer caches a latent and one rotated key, a gqa layer keys and values of its kv heads."""
    assert "cache bytes per token in bfloat16: 16,640 (16.25 KiB) at 16 loops\n" in plan(preset("mythos_3b"))
    small = {"train__dtype": "float32", "model__prelude_layers": 2, "model__core_layers": 3, "depth__mean": 5.0}
    entries = 2 + 3 * 5 + 1
    mla = plan(tiny(tmp_path, **small, model__coda_layers=1, model__kv_lora_rank=20, model__qk_rope_head_dim=4))
    assert f"cache bytes per token in float32: {4 * entries * (20 + 4):,} (" in mla and "at 5 loops\n" in mla
    heads = {"model__attention": "gqa", "model__n_heads": 6, "model__n_kv_heads": 3, "model__head_dim": 10}
    gqa = plan(tiny(tmp_path, **small, model__coda_layers=1, **heads))
    assert f"cache bytes per token in float32: {4 * entries * 2 * 3 * 10:,} (" in gqa


# --- collectives, whose counts tests/distributed/test_collectives.py compares with real steps


@pytest.mark.usefixtures("no_activations")
def test_collectives_of_both_wraps_are_shown(tmp_path: Path) -> None:
    text = plan(tiny(tmp_path, data__streams=8, parallel__mode="fsdp", parallel__wrap="block"), 8)
    loop, block = re.findall(r"^  wrap=(?:loop|block) .*$", text, re.MULTILINE)
    assert "configured" in block and "configured" not in loop
    assert int(re.search(r"(\d+) all-gathers", block)[1]) > int(re.search(r"(\d+) all-gathers", loop)[1])
    assert "of 1 micro-batch at 3 loops" in text
    assert "collectives of" not in plan(tiny(tmp_path), 1)


# --- processes


@pytest.mark.usefixtures("no_activations")
def test_processes_are_those_of_the_environment_unless_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "processes       1, 1 on a machine: single" in plan(tiny(tmp_path))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "processes       2, 2 on a machine: ddp" in plan(tiny(tmp_path))
    assert "processes       1, 1 on a machine: single" in plan(tiny(tmp_path), 1)


@pytest.mark.usefixtures("no_activations")
def test_layout_depends_on_machine_and_memory() -> None:
    config = preset("mythos_10b")
    assert "hsdp, 128 x 8" in plan(config, 1024)
    assert ": fsdp" in plan(config, 1024, machine_ranks=4)
    assert ": ddp" in plan(config, 1024, device_memory=500 * GIB)


def test_number_of_processes_that_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(MythosError, match=r"data\.streams: 2 is not a multiple of the 3 processes"):
        plan(tiny(tmp_path), 3)
    with pytest.raises(MythosError, match=r"single and 2 processes"):
        plan(tiny(tmp_path, parallel__mode="single"), 2)
    with pytest.raises(MythosError, match=r"0 processes.*at least 1"):
        plan(tiny(tmp_path), 0)
    with pytest.raises(MythosError, match=r"--device-memory above 0"):
        plan(tiny(tmp_path), 1, device_memory=0)


@pytest.mark.usefixtures("no_activations")
def test_no_process_group_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Only the exchanges of Muon need fake processes.
    config = tiny(tmp_path, parallel__mode="fsdp", optim__name="muon")

    def fails(*arguments: Any) -> Working:
        assert dist.is_initialized()
        raise KeyError

    plan(config, 2)
    assert not dist.is_initialized()
    monkeypatch.setattr(collectives, "shard_model", fails)
    with pytest.raises(KeyError):
        plan(config, 2)
    assert not dist.is_initialized()
    with fake_processes(2):
        with pytest.raises(RuntimeError, match="plan before joining it"):
            plan(config, 2)
        assert dist.get_world_size() == 2


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "configs" / "debug.yaml"
    arguments = ["data.streams=64", "train.global_batch=64", "parallel.mode=hsdp", "--dry-run", "--ranks", "64"]
    assert main([str(path), *arguments, "--machine-ranks", "16", "--device-memory", "24"]) == 0
    text = capsys.readouterr().out
    assert "64, 16 on a machine: hsdp, 4 x 16" in text and "in all, of 24" in text
    assert main([str(path), *arguments]) == 0
    assert "in all, of 80\n" in capsys.readouterr().out
    assert main([str(path), "--dry-run", "--ranks", "3"]) == 1
    assert "not a multiple of the 3 processes" in capsys.readouterr().err


def test_the_plan_is_for_the_device_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug", "--dry-run", "train.device=cpu", f"run.dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    assert text.startswith("parameters ") and "global_batch:" not in text
    found = re.search(r"in all, of ([\d.]+) \(this machine\)", text)
    assert found and float(found[1]) == pytest.approx(memory, rel=0.01)


def test_a_plan_for_gpus_needs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["debug", "--dry-run", "train.device=cuda", f"run.dir={tmp_path}"]) == 0
    assert "in all, of 80 (assumed, for there is no GPU)\n" in capsys.readouterr().out


def test_the_configuration_follows_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.device=cpu", f"run.dir={tmp_path}"]
    assert main(["debug", *overrides, "--dry-run", "-v"]) == 0
    text = capsys.readouterr().out
    written = yaml.safe_load(text[text.index("\nrun:\n") :])
    assert config_from_dict(written) == load_config("debug", overrides)
    assert main(["debug", *overrides, "-v"]) == 1
    assert "--verbose: only for --dry-run" in capsys.readouterr().err
