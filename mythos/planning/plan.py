"""What a configuration amounts to before it runs: size, FLOPs, memory of a process, and what processes exchange."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import torch
import torch.distributed as dist

from mythos.checkpoints.init_from import planned_start
from mythos.config.loading import dump_config
from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.layout import (
    Layout,
    build_mesh,
    float32_parameters,
    fsdp_units,
    memory_of_device,
    named_layout,
    shard_numel,
)
from mythos.distributed.parallel import choose_dtype, shard_model
from mythos.distributed.ranks import World, check_fit
from mythos.errors import MythosError, without_credentials
from mythos.model.cache import cache_bytes_per_token
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.planning.estimate import (
    Activations,
    Step,
    build_on_meta,
    count_parameters,
    forward_flops,
    mean_depths,
    recomputed_flops,
    step_activations,
)
from mythos.torch_internals import count_ddp_buckets, init_fake_processes
from mythos.training.muon import Muon
from mythos.training.optim import build_optimizer

logger = logging.getLogger(__name__)

DEVICE_MEMORY = 80 * 2**30
"""Bytes of the device that is planned for unless another is named."""
BUCKET_BYTES = 25 * 2**20
"""What DDP packs into a bucket by default, after a smaller first one."""
ROOM = 0.95
"""Share of a device's memory that `parallel.mode: auto` plans to use. The plan counts tensors; the CUDA context, the
buffers of NCCL and fragmentation come on top (an assumption, not measured)."""
SMALL = 0.02
"""Share of a device's memory up to which a model's state is not worth sharding: that could free no more than this, and
the start saves the seconds that planning takes."""
MOST_RANKS = 2**16
"""Where the search for a number of processes that fits ends."""


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers and reduces together. Bytes are of all shards, which padding makes equally long."""

    gathered: int
    """Bytes of the weights, in the type they are gathered in."""
    gradient: int
    """Bytes of their whole gradient as the backward pass leaves it: in that type, without padding."""
    accumulated: int
    """Bytes of their whole gradient between micro-batches: in the type it is reduced in, without padding."""
    reduced: int
    """Bytes of what is reduced."""
    kept: bool
    """Stays gathered from its forward pass to the end of its backward pass."""
    looped: bool
    """A block of the core that is a unit of its own, so that every loop gathers it."""
    outer: bool
    """What the core owns beside such blocks: gathered while they run."""


@dataclass(frozen=True)
class Laid:
    """A model laid out over processes; bytes on rank 0, which holds the most."""

    layout: Layout
    parameters: int
    gradients: int
    optimizer: int
    replicated: int
    """Of the parameters, those that are whole on every rank."""
    measured: int
    """What ranks sum up in a step to know loss, norms and the experts' load."""
    buckets: int
    """Parts in which DDP reduces gradients."""
    units: tuple[Unit, ...]
    """In the order of the forward pass, the root (embedding, head) first; none where nothing is sharded."""

    @property
    def state(self) -> int:
        """What stays from step to step."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Working:
    """What training a rank's share takes beside its state and its activations, in bytes."""

    gathered: int
    """Weights in the type they are computed with: the largest unit, and those that stay gathered."""
    accumulated: int
    """Whole gradients kept between micro-batches."""
    in_transit: int
    """What more the largest unit takes at its peak: buffers of collectives, and its gradient before it is reduced."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.gathered + self.accumulated + self.in_transit


@dataclass
class Exchange:
    """Collectives of one kind in an optimizer step."""

    count: int = 0
    bytes: int = 0
    """Of what is gathered or reduced, as one rank sees it whole; of what rank 0 sends or receives in an all-to-all."""

    def add(self, times: int, size: int) -> None:
        """Count `times` collectives of `size` bytes each."""
        self.count += times
        self.bytes += times * size


def plan(config: Config, ranks: int | None = None, machine_ranks: int = 8, device_memory: int = DEVICE_MEMORY) -> str:
    """What a configuration amounts to, for `--dry-run`.

    Every resolved field, parameters, steps, FLOPs by depth and what decoding caches; then for `ranks` processes
    (default: WORLD_SIZE, or 1), `machine_ranks` of them on each machine, on devices of `device_memory` bytes: the
    layout, the memory a process needs, what would fit if that does not, and the collectives of a step.

    Raises MythosError if so many processes cannot share the batches, if parallel.mode does not fit their number, or if
    the run cannot start from train.init_from.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if ranks is None else ranks
    if ranks < 1 or machine_ranks < 1 or device_memory <= 0:
        raise MythosError(
            f"a plan for {ranks} processes, {machine_ranks} on a machine, with {device_memory / 2**30:g} GiB each: "
            "--ranks and --machine-ranks must be at least 1, --device-memory above 0"
        )
    check_fit(config, ranks)
    parameters = count_parameters(config.model)
    local = min(machine_ranks, ranks)
    layout = choose_layout(config, ranks, local, device_memory)
    laid = lay_out(config, layout)
    automatic = config.model.vocab_size == "auto"
    vocabulary = ", without the vocabulary, whose size the tokenizer decides" if automatic else ""
    flops = forward_flops(config.model, config.data.sequence_length)
    depths = sorted({*config.eval.loops, round(config.depth_mean)})
    lines = [
        without_credentials(dump_config(config)),
        *(f"{'start' if number == 0 else '':15} {line}" for number, line in enumerate(planned_start(config))),
        f"parameters      {parameters.total:,} ({parameters.active:,} active per token and loop){vocabulary}",
        f"training        {config.train_steps:,} steps of {config.tokens_per_step:,} tokens, "
        f"{config.train_steps * config.tokens_per_step:,} in all",
        *([f"schedule        over {config.schedule_steps:,} steps"] if config.optim.schedule_steps is not None else []),
        f"run directory   {config.run_dir}",
        f"FLOPs per token at {config.data.sequence_length} tokens, forward, by loops",
        *(f"{depth:16d}  {flops.once + depth * flops.loop:.3e}" for depth in depths),
        _training_line(config),
        _cache_line(config),
        f"processes       {ranks:,}, {local} on a machine: {_named(layout)} ({layout.why})",
        *_memory_lines(config, laid, local, device_memory),
        *_collective_lines(config, laid),
    ]
    return "\n".join(lines)


def _training_line(config: Config) -> str:
    cost = training_cost(config)
    again = f", {cost.executed:.3e} executed with what {cost.checkpointing} checkpointing computes again"
    return (
        f"FLOPs per token of training, at {cost.loops:.2f} loops and {cost.backprop:.2f} with gradient in the mean: "
        f"{cost.needed:.3e} needed{again if cost.executed > cost.needed else ''}"
    )


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs of a token in training, mean over the run's steps and rows."""

    loops: float
    backprop: float
    checkpointing: str
    needed: float
    executed: float
    """With the passes that checkpointing computes again."""


def training_cost(config: Config) -> TrainingCost:
    """What a token of the configured run costs; depths are those of its schedule."""
    length, checkpointing = config.data.sequence_length, config.parallel.activation_checkpointing
    means, flops = mean_depths(config), forward_flops(config.model, length)
    needed = 3 * flops.once + flops.loop * (means.loops + 2 * means.backprop)
    again = means.backprop * recomputed_flops(config.model, length, checkpointing)
    return TrainingCost(means.loops, means.backprop, checkpointing, needed, needed + again)


def activations(config: Config, layout: Layout, checkpointing: str | None = None) -> Activations:
    """What a rank's deepest micro-batch takes beyond weights, gradients and optimizer state.

    Its rows are all taken to be as deep as may be. Masks of documents are not counted. Under DDP the gradients are
    always there, because its buckets are.
    """
    rows, backprop = _deepest(config, layout)
    return step_activations(
        config.model,
        Step(
            rows=rows,
            length=config.data.sequence_length,
            loops=config.depth_maximum,
            backprop=backprop,
            checkpointing=checkpointing or config.parallel.activation_checkpointing,
            dtype=compute_dtype(config),
            device="cpu" if config.train.device == "cpu" else "cuda",
            accumulating=layout.mode == "ddp" or micro_batches(config, layout.size) > 1,
            gathered=layout.sharded,
            shared=not (layout.sharded and config.parallel.wrap == "block"),
        ),
    )


def choose_layout(config: Config, size: int, local_size: int, memory: int) -> Layout:
    """What `parallel.mode` means for `size` processes, `local_size` of them a machine, on devices of `memory` bytes.

    auto takes the mode that communicates least among those whose plan fits in ROOM of the memory: state, what FSDP2
    gathers and reduces, and activations of the deepest micro-batch. The order is ddp, hsdp within each machine, fsdp.
    If none fits it takes the one that needs least, and the layout says that it does not fit. Tracing the activations
    takes seconds, and is left out where it decides nothing. Raises MythosError for a mode that does not fit the number
    of processes.
    """
    if size == 1 or config.parallel.mode != "auto":
        return named_layout(config.parallel, size, local_size)
    if config.train.micro_batch == "auto":  # found by trial later, from what memory is left: at least a row
        config = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": 1})})
    candidates = [Layout("ddp", size, 1, "")]
    if 1 < local_size < size and size % local_size == 0:
        candidates.append(Layout("hsdp", size // local_size, local_size, ""))
    candidates.append(Layout("fsdp", 1, size, ""))

    @cache
    def traced(sharded: bool) -> int:
        return activations(config, candidates[-1 if sharded else 0]).peak

    usable = ROOM * memory
    without: dict[Layout, int] = {}  # bytes without activations
    for layout in candidates:
        laid = lay_out(config, layout)
        if layout.mode == "ddp" and laid.state <= SMALL * memory:
            return layout._replace(why=f"auto: training state is {_gib(laid.state)} GiB of {_gib(memory)}")
        without[layout] = laid.state + working_memory(config, laid).total
        if without[layout] <= usable and without[layout] + traced(layout.sharded) <= usable:
            return layout._replace(why=_reason(without, layout, traced(layout.sharded), memory))
    least, needed = candidates[-1], without[candidates[-1]] + traced(True)
    for layout in candidates[:-1]:
        if without[layout] < needed and without[layout] + traced(layout.sharded) < needed:
            least, needed = layout, without[layout] + traced(layout.sharded)
    return least._replace(why=_reason(without, least, traced(least.sharded), memory), fits=needed <= memory)


def agree_on_layout(config: Config, world: World) -> Layout:
    """:func:`choose_layout` for the processes that are running, the same on all, for the smallest of their devices.

    Rank 0 plans for all of them, because ranks that differed by a byte could choose differently, and warns if nothing
    fits. Raises MythosError on all ranks as :func:`choose_layout` does.
    """
    memory = min(world.ranks.gather(memory_of_device(world)))

    def choose() -> Layout | None:
        if not world.ranks.main:
            return None
        dtype = choose_dtype(config.train.dtype, world.device)
        settings = {"device": world.device.type, "dtype": str(dtype).removeprefix("torch.")}
        planned = config.model_copy(update={"train": config.train.model_copy(update=settings)})
        layout = choose_layout(planned, world.size, world.local_size, memory)
        if not layout.fits:
            told = shortage(planned, world.size, world.local_size, memory)
            logger.warning("parallel.mode=%s: %s; %s", layout.mode, layout.why, told)
        return layout

    return world.ranks.broadcast(world.ranks.agreed(choose))


def _reason(without: dict[Layout, int], chosen: Layout, traced: int, memory: int) -> str:
    others = [f"{layout.mode} {_gib(size)}" for layout, size in without.items() if layout is not chosen]
    more = f"; without activations {', '.join(others)}" if others else ""
    return f"auto: needs {_gib(without[chosen] + traced)} GiB of {_gib(int(ROOM * memory))} usable{more}"


def lay_out(config: Config, layout: Layout) -> Laid:
    """The bytes of a model laid out as in training, on rank 0, from the shapes of its parameters on the meta device."""
    model = build_on_meta(config.model)
    parameters = list(model.parameters())
    whole = set(float32_parameters(model) if layout.sharded else parameters)
    numel: dict[torch.Tensor, int] = {p: p.numel() if p in whole else shard_numel(p, layout.shard) for p in parameters}
    optimizer = build_optimizer(model, config.optim, compute_dtype(config))
    # A moment has its parameter's shape and is cut like it; a counter of steps is a scalar.
    states = [
        value.itemsize * (numel[p] if value.shape == p.shape else value.numel())
        for p, state in optimizer.state.items()
        for value in state.values()
    ]
    load = model.empty_load(torch.device("meta"))
    size = sum(p.itemsize * count for p, count in numel.items())
    return Laid(
        layout,
        parameters=size,
        gradients=size,  # a gradient has its parameter's type and shards
        optimizer=sum(states),
        replicated=sum(p.nbytes for p in whole) if layout.sharded else 0,
        measured=torch.float64.itemsize * (4 + (0 if load is None else load.numel())),
        # Gradients are packed in about the order in which the backward pass yields them.
        buckets=count_ddp_buckets(parameters[::-1], BUCKET_BYTES) if layout.mode == "ddp" else 0,
        units=tuple(_units(config, model, layout)) if layout.sharded else (),
    )


def _units(config: Config, model: RecurrentDepthTransformer, layout: Layout) -> Iterator[Unit]:
    """What FSDP2 makes of :func:`fsdp_units`, in the order of the forward pass."""
    order = {module: number for number, module in enumerate(model.modules())}
    blocks, split = set(model.recurrence.blocks), config.parallel.wrap == "block"
    units = fsdp_units(config.parallel, model, compute_dtype(config))
    for unit in sorted(units, key=lambda unit: order[unit.module]):
        if not unit.parameters:
            continue
        computed = unit.policy.param_dtype or unit.parameters[0].dtype
        reduced = unit.policy.reduce_dtype or computed
        padded = layout.shard * sum(shard_numel(p, layout.shard) for p in unit.parameters)
        real = sum(p.numel() for p in unit.parameters)
        yield Unit(
            gathered=padded * computed.itemsize,
            gradient=real * computed.itemsize,
            accumulated=real * reduced.itemsize,
            reduced=padded * reduced.itemsize,
            kept=not unit.reshard,
            looped=unit.module in blocks,
            outer=unit.module is model.recurrence and split,
        )


def compute_dtype(config: Config) -> torch.dtype:
    """The type of matrix products that a plan is made for: train.dtype, where auto is what every recent GPU has."""
    return torch.float32 if config.train.dtype == "float32" else torch.bfloat16


@contextmanager
def fake_processes(size: int) -> Iterator[None]:
    """Be rank 0 of `size` processes whose collectives do nothing. Raises RuntimeError beside real ones."""
    if dist.is_initialized():
        raise RuntimeError("a plan is made before the processes meet, not among them")
    init_fake_processes(size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def muon_exchanges(config: Config, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What Muon sends in a step: bytes of each all-gather, and of each all-to-all by which matrices become whole.

    Under DDP the all-gathers bring the matrices that ranks have made orthogonal for each other. Where FSDP2 has cut
    matrices, all-to-alls make them whole, and as many more cut them again. Read off an optimizer over processes that
    need not exist; raises RuntimeError beside real ones.
    """
    model, dtype = build_on_meta(config.model), compute_dtype(config)
    with fake_processes(layout.size):
        if layout.sharded:
            shard_model(config.parallel, model, build_mesh(layout, "cpu"), dtype)
        optimizer = build_optimizer(model, config.optim, dtype, layout.size)
        assert isinstance(optimizer, Muon)
        shared = optimizer.sharing.bytes if optimizer.sharing else ()
        return shared, tuple(exchange.bytes for exchange in optimizer.exchanges)


def micro_batches(config: Config, ranks: int) -> int:
    """Micro-batches of an optimizer step on a rank; train.micro_batch: auto counts as one."""
    rows = max(1, config.train.global_batch // ranks)
    return 1 if config.train.micro_batch == "auto" else -(-rows // config.train.micro_batch)


def accumulates(config: Config, ranks: int) -> bool:
    """Whether whole gradients are kept between micro-batches, to be reduced once a step."""
    return config.parallel.reduce == "step" and micro_batches(config, ranks) > 1


def working_memory(config: Config, laid: Laid) -> Working:
    """What a rank needs beside its state and activations where FSDP2 gathers and reduces.

    Forward, a unit is there twice: its weights, and the buffer they came in, which is freed when the next unit has
    come. Backward, there are its weights, its whole gradient and the weights of the unit before, prefetched; then its
    weights make room for the buffer that is reduced. Whole gradients of the blocks of a core stay until its first loop
    is done, and the root's (embedding and head) all the time.
    """
    units = laid.units
    if not units:
        return Working(0, 0, 0)
    summed = accumulates(config, laid.layout.size)
    passing = [unit for unit in units if not (unit.kept or unit.outer)]
    staying = sum(unit.gathered for unit in units if unit.kept or unit.outer)
    looped = sum(unit.gradient for unit in units if unit.looped)
    peaks = [unit.reduced for unit in units if unit.kept or unit.outer]
    for before, unit in zip([None, *passing], passing, strict=False):
        ahead = before.gathered if before else 0
        gradient = looped if unit.looped else unit.gradient
        peaks += [2 * unit.gathered, ahead + unit.gathered + gradient]
        peaks += [ahead + unit.reduced + (0 if summed else gradient)]
    largest = max((unit.gathered for unit in passing), default=0)
    root = 0 if summed else units[0].gradient
    return Working(
        gathered=staying + largest,
        accumulated=sum(unit.accumulated for unit in units) if summed else 0,
        in_transit=max(0, max(peaks) - largest) + root,
    )


def collectives(config: Config, laid: Laid, loops: int, backprop: int) -> dict[str, Exchange]:
    """Collectives of an optimizer step whose micro-batches all run `loops` loops, the last `backprop` with gradient.

    FSDP2 gathers a unit when its forward pass begins, and again when its backward pass does unless it stays gathered
    between; a backward pass always frees it. A block of the core that is a unit of its own has a forward pass in every
    loop and a backward pass in the last `backprop`, so it is gathered in each of them. Its last block is also gathered
    once in vain where the core has several and loops without gradient came before: FSDP2 prefetches, in a backward
    pass, the unit that ran before. A unit is reduced once a step (or micro-batch), whatever the loops, because autograd
    adds up the gradients of all uses first. But where such a block has several backward passes, the sum over earlier
    micro-batches is reduced apart, at the first of them. HSDP all-reduces what is reduced in the last micro-batch.
    """
    gathers, scatters, sums, exchanges = Exchange(), Exchange(), Exchange(), Exchange()
    layout, micro = laid.layout, micro_batches(config, laid.layout.size)
    backprop = min(loops, backprop)
    if layout.mode == "ddp":
        sums = Exchange(laid.buckets, laid.gradients)
    several = sum(unit.looped for unit in laid.units) > 1
    last = max((index for index, unit in enumerate(laid.units) if unit.looped), default=-1)
    for index, unit in enumerate(laid.units):
        if unit.looped:
            passes = backprop if unit.kept else loops + backprop
            in_vain = several and index == last and loops > backprop
            times = passes + in_vain
        else:
            times = 1 if unit.kept else 2
        apart = unit.looped and backprop > 1 and accumulates(config, layout.size)
        at_end = 2 if apart else 1
        if layout.shard > 1:
            gathers.add(micro * times, unit.gathered)
            scatters.add(at_end if config.parallel.reduce == "step" else micro, unit.reduced)
        if layout.mode == "hsdp":
            sums.add(at_end, unit.reduced // layout.shard)
    if layout.sharded:
        sums.add(1, laid.replicated)
    if layout.size > 1:
        sums.add(1, laid.measured)
    if config.optim.name == "muon" and layout.size > 1:
        shared, exchanged = muon_exchanges(config, layout)
        for size in shared:
            gathers.add(1, size)
        exchanges = Exchange(2 * len(exchanged), 2 * sum(exchanged))
    return {"all-gather": gathers, "reduce-scatter": scatters, "all-reduce": sums, "all-to-all": exchanges}


@dataclass(frozen=True)
class Fit:
    """A layout that fits."""

    parallel: ParallelConfig
    ranks: int
    needed: int
    """Bytes, without activations."""


def find_fit(config: Config, ranks: int, machine_ranks: int, device_memory: int) -> Fit | int:
    """The layout of `ranks` processes, or failing that of 2, 4, 8 ... times as many, whose memory suffices.

    The settings that exchange least come first: as configured, then gradients reduced in every micro-batch, then the
    blocks of the core gathered one at a time; in each, copies over as few processes as possible. Where none fits, the
    bytes that a process needs at once, beside its share of the state, in the layout that needs least.
    """
    settings = config.parallel
    ways = list(product(dict.fromkeys((settings.wrap, "block")), dict.fromkeys((settings.reduce, "micro_batch"))))
    least: list[int] = []
    size = max(2, ranks)
    while not least or size <= MOST_RANKS:
        shards = [n for n in range(2, size + 1) if size % n == 0] if size == ranks else [size]
        open_ways = len(ways)
        for wrap, reduce in ways:
            for shard in shards:
                mode = {"mode": "fsdp", "shard": None} if shard == size else {"mode": "hsdp", "shard": shard}
                changes = {**mode, "replicate": None, "wrap": wrap, "reduce": reduce, "reshard_after_forward": True}
                changed = _with_parallel(config, **changes)
                layout = named_layout(changed.parallel, size, min(size, machine_ranks))
                laid = lay_out(changed, layout)
                working = working_memory(changed, laid).total
                if laid.state + working <= device_memory:
                    return Fit(changed.parallel, size, laid.state + working)
                least.append(working)
                if working > device_memory:  # sharing among more does not shrink what is gathered at once
                    open_ways -= 1
                    break
        if not open_ways:
            break
        size *= 2
    return min(least)


def _with_parallel(config: Config, **changes: Any) -> Config:
    return config.model_copy(update={"parallel": config.parallel.model_copy(update=changes)})


def _named(layout: Layout) -> str:
    return f"hsdp, {layout.replicate} x {layout.shard}" if layout.mode == "hsdp" else layout.mode


def _cache_line(config: Config) -> str:
    dtype, loops = compute_dtype(config), round(config.depth_mean)
    size = cache_bytes_per_token(config.model, loops, dtype)
    unit = str(dtype).removeprefix("torch.")
    return f"cache bytes per token in {unit}: {size:,} ({size / 2**10:,.2f} KiB) at {loops} loop{'s' * (loops != 1)}"


def _gib(size: int) -> str:
    return f"{size / 2**30:,.3f}" if size < 100 * 2**30 else f"{size / 2**30:,.0f}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{('es' if what.endswith('s') else 's') * (number != 1)}"


def _deepest(config: Config, layout: Layout) -> tuple[int, int]:
    """Rows of a micro-batch, and the most passes of a row that carry gradient."""
    rows = max(1, config.train.global_batch // layout.size)
    micro = config.train.micro_batch
    return rows if micro == "auto" else min(rows, micro), min(config.depth_maximum, config.depth_backprop)


def _memory_lines(config: Config, laid: Laid, machine_ranks: int, device_memory: int) -> list[str]:
    layout, dtype = laid.layout, str(compute_dtype(config)).removeprefix("torch.")
    working, passing = working_memory(config, laid), activations(config, layout)
    rows, loops = _deepest(config, layout)
    total = laid.state + working.total + passing.peak
    rows = {
        "parameters": laid.parameters,
        "gradients": laid.gradients,
        "optimizer state": laid.optimizer,
        f"weights in {dtype}: the largest unit and what stays gathered": working.gathered,
        "whole gradients kept between micro-batches": working.accumulated,
        "buffers of collectives, and gradients before they are reduced": working.in_transit,
        f"activations that {_count(loops, 'pass')} of {_count(rows, 'row')} keep": passing.kept,
        "activations of the rest, at their peak: head, casts, gradients on their way": passing.peak - passing.kept,
        f"in all, of {device_memory / 2**30:g}": total,
    }
    mode = config.parallel.activation_checkpointing
    lines = [f"memory of rank 0 at activation_checkpointing={mode}, GiB"]
    lines += [f"{_gib(size):>16}  {what}" for what, size in rows.items() if size or "in all" in what]
    return lines if total <= device_memory else [*lines, shortage(config, layout.size, machine_ranks, device_memory)]


def shortage(config: Config, ranks: int, machine_ranks: int, device_memory: int) -> str:
    """A line for a configuration that does not fit: what would fit on devices of `device_memory` bytes."""
    shared = activations(config, Layout("fsdp", 1, max(2, ranks), ""))
    if shared.peak >= device_memory:
        return (
            f"does not fit, for activations alone take {_gib(shared.peak)} GiB: lower train.micro_batch or "
            "data.sequence_length, or set parallel.activation_checkpointing=loop"
        )
    fit = find_fit(config, ranks, machine_ranks, device_memory - shared.peak)
    if isinstance(fit, int):
        return (
            f"does not fit, nor would any mode on any number of processes: each needs at least {_gib(fit)} GiB for the "
            f"unit it gathers and reduces, and {_gib(shared.peak)} for activations. That takes expert parallelism, "
            "which is planned, smaller micro-batches, or devices of more memory."
        )
    overrides = [
        f"parallel.{name}={'null' if value is None else str(value).lower()}"
        for name, value in fit.parallel
        if value != getattr(config.parallel, name)
    ]
    others = "" if fit.ranks == ranks else f" on {fit.ranks:,} processes"
    return f"does not fit; {' '.join(overrides)}{others} would, with {_gib(fit.needed + shared.peak)} GiB"


def _collective_lines(config: Config, laid: Laid) -> list[str]:
    layout, loops = laid.layout, round(config.depth_mean)
    if layout.size == 1:
        return []
    times = micro_batches(config, layout.size)
    title = f"collectives of an optimizer step of {times} micro-batch{'es' * (times > 1)}"
    lines = [title + (f" at {loops} loops" if layout.sharded else "") + ", and GiB that they gather or reduce"]
    for wrap in ("loop", "block") if layout.sharded else (None,):
        changed = config if wrap in (None, config.parallel.wrap) else _with_parallel(config, wrap=wrap)
        name = layout.mode if wrap is None else f"wrap={wrap}"
        exchanges = collectives(
            changed, laid if changed is config else lay_out(changed, layout), loops, config.depth_backprop
        )
        told = [f"{e.count} {kind}{'s' * (e.count != 1)} ({_gib(e.bytes)})" for kind, e in exchanges.items() if e.count]
        lines.append(f"  {name:14}{', '.join(told)}{'  <- configured' if changed is config and wrap else ''}")
    return lines
