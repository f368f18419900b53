"""Bytes of a rank against hand counts, FSDP2 itself, and what steps allocate."""

import re
import weakref
from math import ceil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mythos.distributed.layout import named_layout
from mythos.distributed.parallel import parallelize
from mythos.distributed.ranks import Ranks, World
from mythos.model.ops.expert_exchange import ExpertExchange
from mythos.planning.collectives import fake_processes
from mythos.planning.flops import build_on_meta, count_parameters
from mythos.planning.rank_state import rank_state, working_memory
from mythos.training.optim import build_optimizer
from tests.planning.helpers import WIDE, as_if_alike, preset, read_off, state_on
from tests.runs import tiny

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
        ("mythos_500b", 256, {"mode": "fsdp", "expert": 64, "shared": 8}),
        ("mythos_50b", 64, {"mode": "hsdp", "shard": 32, "expert": 8, "shared": 4, "wrap": "block"}),
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


@pytest.mark.parametrize(
    ("micro_batches", "changes"),
    [
        (1, {}),
        (2, {"parallel__reduce": "micro_batch"}),
        (2, {"parallel__wrap": "block"}),
        (2, {"train__dtype": "float32"}),
        (2, {"parallel__mode": "hsdp", "parallel__shard": 2, "model__vocab_size": 16384}),
        (2, {"parallel__mode": "hsdp", "parallel__shard": 2, "parallel__expert": 2, "parallel__reduce": "step"}),
        (2, {"parallel__expert": 2, "parallel__shared": 2}),
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
    with fake_processes(4), patch.object(ExpertExchange, "exchange_counts", as_if_alike()):
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
