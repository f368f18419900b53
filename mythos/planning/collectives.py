"""Collectives of an optimizer step, counted before any process starts."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from mythos.config.sections import Config
from mythos.distributed.layout import Experts, Layout, build_mesh
from mythos.model.config import ModelConfig, loop_stages
from mythos.planning.expert_rows import rows_to_experts
from mythos.planning.flops import build_on_meta
from mythos.planning.rank_state import RankState, accumulates, compute_dtype, micro_batches
from mythos.torch_internals import init_fake_processes
from mythos.training.muon import Muon
from mythos.training.optim import build_optimizer

EXPERT_EXCHANGE = "token all-to-all"
"""Kind of the collectives of expert parallelism."""
TOKEN_GATHER = "token all-gather"
"""Kind of the collectives that bring tokens to the ranks that divide the shared experts."""


@dataclass
class Exchange:
    """Collectives of one kind in an optimizer step."""

    count: int = 0
    bytes: int = 0
    """Bytes gathered or reduced, counted whole on one rank; for an all-to-all, bytes that rank 0 sends or receives."""


Group = Literal["shard", "expert_shard", "shared_shard", "replicate", "expert", "shared", "world"]
"""Which ranks take part: those that share a copy of the model, the matrices of an expert, or one part of the shared
experts; those that hold the same shard of different copies; those that divide the experts, or the shared ones; or
all."""


@dataclass(frozen=True)
class Calls:
    """Equal collectives of an optimizer step; `bytes` are those of all of them, as in `Exchange`."""

    kind: str
    group: Group
    count: int
    bytes: int


@contextmanager
def fake_processes(size: int) -> Iterator[None]:
    """Act as rank 0 of `size` processes whose collectives do nothing.

    Raises RuntimeError if a process group exists already.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group exists already; plan before joining it, or in another process")
    init_fake_processes(size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def muon_exchanges(config: Config, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Bytes of each all-gather, and of each all-to-all that makes matrices whole, in a step of Muon.

    Under DDP each rank orthogonalizes some of the matrices, and the all-gathers distribute the results. Under FSDP2
    all-to-alls assemble the sharded matrices, and as many more shard them again. The figures are read off an optimizer
    on fake processes; raises RuntimeError if a process group exists already.
    """
    model, dtype = build_on_meta(config.model), compute_dtype(config)
    with fake_processes(layout.size):
        if layout.sharded:
            from mythos.distributed.sharding import shard_model  # takes half a second

            shard_model(config.parallel, model, build_mesh(layout, "cpu"), dtype)
        optimizer = build_optimizer(model, config.optim, dtype, layout.size)
        assert isinstance(optimizer, Muon)
        gathered = optimizer.sharing.bytes if optimizer.sharing else ()
        return gathered, tuple(exchange.bytes for exchange in optimizer.exchanges)


def expert_exchanges(config: Config, layout: Layout, loops: int, backprop: int) -> Exchange:
    """All-to-alls of expert parallelism in a step, and the bytes of the rows that a rank's own tokens make.

    Each micro-batch, block and loop exchanges counts, rows (with gates and numbers of experts, 4 bytes each) and
    results; a backward pass the gradients of rows, gates and results. Where loops are recomputed, rows and results are
    exchanged once more, except for results that no gradient needs (`blocks_without_results`). Of the rows there are as
    many as `rows_to_experts` says.
    """
    model, itemsize = config.model, compute_dtype(config).itemsize
    micro, blocks = micro_batches(config, layout.size), model.core_layers
    tokens = config.train.global_batch // layout.size * config.data.sequence_length // micro
    rows = rows_to_experts(model, layout.expert, tokens)
    result, of_choices = rows * model.dim * itemsize, rows * model.experts_per_token * 4
    forward, backward = loops * blocks, backprop * blocks
    again = again_results = 0
    if config.parallel.recomputes_loops:
        again = backward
        again_results = backprop * (blocks - blocks_without_results(model))
    size = forward * layout.expert * 4 * torch.int64.itemsize
    size += (forward + again) * (result + 2 * of_choices) + backward * (result + of_choices)
    size += (forward + backward + again_results) * result
    return Exchange(micro * (3 * forward + 2 * backward + again + again_results), micro * size)


def shared_exchanges(config: Config, layout: Layout, loops: int, backprop: int) -> tuple[Exchange, Exchange]:
    """All-gathers of tokens to the ranks that divide the shared experts, and the equally large all-to-alls back.

    Each micro-batch, block and loop has one of each, and a backward pass another. A loop that is recomputed gathers
    again, and sends back what gradients need (`blocks_without_results`).
    """
    model, blocks = config.model, config.model.core_layers
    tokens = config.train.global_batch // layout.size * config.data.sequence_length
    size = layout.shared * tokens * model.dim * compute_dtype(config).itemsize
    gathers = returns = (loops + backprop) * blocks
    if config.parallel.recomputes_loops:
        gathers += backprop * blocks
        returns += backprop * (blocks - blocks_without_results(model))
    micro = micro_batches(config, layout.size)
    return Exchange(micro * gathers, gathers * size), Exchange(micro * returns, returns * size)


def blocks_without_results(model: ModelConfig) -> int:
    """How many blocks of the core a recomputed loop does not finish, because no gradient needs their results.

    The last block of a pass, unless a norm follows or lanes are written. With `loop_over: layer` every layer is a pass.
    """
    return len(loop_stages(model)) if model.block_norm == "pre" and model.lanes == 1 else 0


def collectives(config: Config, state: RankState, loops: int, backprop: int) -> dict[str, Exchange]:
    """The collectives of :func:`step_calls`, summed by kind."""
    kinds = {kind: Exchange() for kind in ("all-gather", "reduce-scatter", "all-reduce", "all-to-all")}
    for call in (*step_calls(config, state, loops, backprop), *muon_calls(config, state.layout)):
        exchange = kinds.setdefault(call.kind, Exchange())
        exchange.count += call.count
        exchange.bytes += call.bytes
    return kinds


def muon_calls(config: Config, layout: Layout) -> Iterator[Calls]:
    """Collectives of an optimizer step of Muon; none for another optimizer."""
    if config.optim.name != "muon" or layout.size == 1:
        return
    gathered, exchanged = muon_exchanges(config, layout)
    yield Calls("all-gather", "world", len(gathered), sum(gathered))
    yield Calls("all-to-all", "shard", 2 * len(exchanged), 2 * sum(exchanged))


def step_calls(config: Config, state: RankState, loops: int, backprop: int) -> Iterator[Calls]:
    """Collectives of an optimizer step whose micro-batches all run `loops` loops, the last `backprop` with gradient.

    FSDP2 gathers a unit at its forward pass, and again at its backward pass unless it stays gathered in between; a
    backward pass always frees it. A block of the core that is a unit of its own runs forward in every loop and backward
    in the last `backprop`, and is gathered each time. With several such blocks and loops without gradient, the last
    block is gathered once more, in vain: FSDP2 prefetches, in a backward pass, the unit that ran before.

    A unit is reduced once a step (or micro-batch) whatever the loops, because autograd first adds up the gradients of
    all uses. But if such a block has several backward passes, the sum over earlier micro-batches is reduced separately,
    at the first of them. HSDP all-reduces what the last micro-batch reduces. With `loop_over: layer` the injection's
    unit has a backward pass for each core layer, and is gathered for each; and no block is gathered in vain, because
    the block that ran before is the same one. Muon's collectives are those of :func:`muon_calls`.
    """
    layout, micro = state.layout, micro_batches(config, state.layout.size)
    backprop = min(loops, backprop)
    if layout.mode == "ddp":
        yield Calls("all-reduce", "world", state.buckets, state.gradients)
    stages = len(loop_stages(config.model))
    looped_blocks = [index for index, unit in enumerate(state.units) if unit.looped and unit.experts is None]
    several, last = len(looped_blocks) > 1 and stages == 1, max(looped_blocks, default=-1)
    for index, unit in enumerate(state.units):
        if unit.looped:
            passes = backprop if unit.kept else loops + backprop
            in_vain = several and index >= last and loops > backprop  # its experts follow it
            times = passes + in_vain
        else:
            times = (stages if unit.injects else 1) if unit.kept else 2
        backward_passes = backprop if unit.looped else stages if unit.injects else 1
        separate = backward_passes > 1 and accumulates(config, layout.size)
        reductions = 2 if separate else 1
        if unit.ranks(layout) > 1:
            groups: dict[Experts | None, Group] = {None: "shard", "routed": "expert_shard", "shared": "shared_shard"}
            group = groups[unit.experts]
            yield Calls("all-gather", group, micro * times, micro * times * unit.gathered)
            scatters = reductions if config.parallel.reduce == "step" else micro
            yield Calls("reduce-scatter", group, scatters, scatters * unit.reduced)
        if layout.mode == "hsdp":
            yield Calls("all-reduce", "replicate", reductions, reductions * (unit.reduced // unit.ranks(layout)))
    if layout.sharded:
        yield Calls("all-reduce", "world", 1, state.replicated)
    if layout.size > 1:
        yield Calls("all-reduce", "world", 1, state.measured)
    if layout.expert > 1:
        exchange = expert_exchanges(config, layout, loops, backprop)
        yield Calls(EXPERT_EXCHANGE, "expert", exchange.count, exchange.bytes)
    if layout.shared > 1:
        exchanges = shared_exchanges(config, layout, loops, backprop)
        for kind, exchange in zip((TOKEN_GATHER, EXPERT_EXCHANGE), exchanges, strict=True):
            yield Calls(kind, "shared", exchange.count, exchange.bytes)
