"""Choose the parallel layout that fits in a device's memory."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from itertools import product

from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.layout import Layout, check_expert_ranks, memory_of_device, named_layout
from mythos.distributed.parallel import choose_dtype
from mythos.distributed.ranks import World
from mythos.errors import MythosError
from mythos.planning.fake_step import CHECKPOINTING
from mythos.planning.rank_state import activations, rank_state, working_memory
from mythos.torch_internals import has_mesh_placements

logger = logging.getLogger(__name__)

USABLE_SHARE = 0.95
"""Share of a device's memory that `parallel.mode: auto` plans to use. The plan counts tensors; the CUDA context, NCCL's
buffers and fragmentation need the rest (an assumption, not measured)."""
SMALL_SHARE = 0.02
"""If a model's state takes at most this share of a device's memory, `auto` chooses DDP without planning: sharding could
free no more than this, and planning takes seconds."""
BYTES_OF_WEIGHT, LEAST_DIVIDED = 8, 8 * 2**30
"""Bytes that a gathered weight takes while its gradient is reduced (bfloat16 weight and gradient, float32 sum); and
those of a block's shared experts from which on plans try to divide them: a tenth of a GPU of 80 GiB."""
MOST_RANKS = 2**16
"""Largest number of processes that `find_fit` tries."""


def choose_layout(config: Config, size: int, local_size: int, memory: int) -> Layout:
    """Resolve `parallel.mode` for `size` processes, `local_size` per machine, on devices of `memory` bytes.

    auto takes the first of ddp (unless parallel.expert divides the experts), hsdp within each machine, and fsdp (least
    communication first) whose training state, buffers and activations of the deepest micro-batch fit in USABLE_SHARE of
    the memory. If none fits it takes the one that needs least; the layout's `fits` is false if that exceeds the memory.
    Activations are traced, which takes seconds, only where they decide. Raises MythosError for a mode that does not
    suit the number of processes.
    """
    if size == 1 or config.parallel.mode != "auto":
        return named_layout(config.parallel, size, local_size)
    if config.train.micro_batch == "auto":  # The trainer fits it to the memory that is left, which must hold one row.
        config = config.with_fields("train", micro_batch=1)
    expert, shared = config.parallel.expert, config.parallel.shared
    check_expert_ranks(expert, size)
    candidates = [Layout("ddp", size, 1, "")] if expert == 1 else []
    if 1 < local_size < size and size % local_size == 0 and local_size % expert == 0:
        candidates.append(Layout("hsdp", size // local_size, local_size, "", expert=expert, shared=shared))
    candidates.append(Layout("fsdp", 1, size, "", expert=expert, shared=shared))

    @cache
    def traced(sharded: bool) -> int:
        return activations(config, candidates[-1 if sharded else 0]).peak

    usable = USABLE_SHARE * memory
    needed: dict[Layout, int] = {}  # bytes without activations
    for layout in candidates:
        state = rank_state(config, layout)
        if layout.mode == "ddp" and state.total <= SMALL_SHARE * memory:
            return layout._replace(why=f"auto: training state is {gib(state.total)} GiB of {gib(memory)}")
        needed[layout] = state.total + working_memory(config, state).total
        if needed[layout] <= usable and needed[layout] + traced(layout.sharded) <= usable:
            return layout._replace(why=_reason(needed, layout, traced(layout.sharded), memory))
    least, least_bytes = candidates[-1], needed[candidates[-1]] + traced(True)
    for layout in candidates[:-1]:
        if needed[layout] < least_bytes and needed[layout] + traced(layout.sharded) < least_bytes:
            least, least_bytes = layout, needed[layout] + traced(layout.sharded)
    return least._replace(why=_reason(needed, least, traced(least.sharded), memory), fits=least_bytes <= memory)


def _reason(needed: dict[Layout, int], chosen: Layout, activation_bytes: int, memory: int) -> str:
    others = [f"{layout.mode} {gib(size)}" for layout, size in needed.items() if layout is not chosen]
    rejected = f"; without activations {', '.join(others)}" if others else ""
    total = needed[chosen] + activation_bytes
    return f"auto: needs {gib(total)} GiB of {gib(int(USABLE_SHARE * memory))} usable{rejected}"


def agree_on_layout(config: Config, world: World) -> Layout:
    """:func:`choose_layout` for the running processes: the same layout on all, for the smallest device among them.

    Rank 0 plans for all, because ranks that differ by a byte could choose differently. It warns if nothing fits.
    Raises MythosError on all ranks as :func:`choose_layout` does.
    """
    memory = min(world.ranks.gather(memory_of_device(world)))

    def choose() -> Layout | None:
        if not world.ranks.main:
            return None
        dtype = choose_dtype(config.train.dtype, world.device)
        planned = config.with_fields("train", device=world.device.type, dtype=str(dtype).removeprefix("torch."))
        layout = choose_layout(planned, world.size, world.local_size, memory)
        if not layout.fits:
            advice = shortage(planned, world.size, world.local_size, memory)
            logger.warning("parallel.mode=%s: %s; %s", layout.mode, layout.why, advice)
        return layout

    return world.ranks.broadcast(world.ranks.agreed(choose))


@dataclass(frozen=True)
class Fit:
    """A layout that fits."""

    parallel: ParallelConfig
    ranks: int
    needed: int
    """Bytes, without activations."""


def find_fit(config: Config, ranks: int, machine_ranks: int, device_memory: int) -> Fit | int:
    """Find a layout that fits on `ranks` processes, or on 2, 4, 8... times as many, with parallel.expert as configured.

    Settings that communicate least are tried first: as configured, then gradients reduced in every micro-batch, then
    the core's blocks gathered one at a time; for each, copies of the model over as few processes as possible. If none
    fits, returns the bytes that gathering and reducing need in the layout that needs least.
    """
    settings = config.parallel
    ways = list(product(dict.fromkeys((settings.wrap, "block")), dict.fromkeys((settings.reduce, "micro_batch"))))
    working_bytes: list[int] = []
    size = max(2, ranks, settings.expert)
    while not working_bytes or size <= MOST_RANKS:
        shards = [n for n in range(2, size + 1) if size % n == 0] if size == ranks else [size]
        open_ways = len(ways)
        for wrap, reduce in ways:
            for shard in (n for n in shards if n % settings.expert == 0):
                mode = {"mode": "fsdp", "shard": None} if shard == size else {"mode": "hsdp", "shard": shard}
                changes = {**mode, "replicate": None, "wrap": wrap, "reduce": reduce, "reshard_after_forward": True}
                changed = config.with_fields("parallel", **changes)
                layout = named_layout(changed.parallel, size, min(size, machine_ranks))
                try:
                    state = rank_state(changed, layout)
                except MythosError:  # so many processes cannot divide an expert's matrices, nor can more
                    return min(working_bytes, default=device_memory)
                working = working_memory(changed, state).total
                if state.total + working <= device_memory:
                    return Fit(changed.parallel, size, state.total + working)
                working_bytes.append(working)
                if working > device_memory:  # More shards do not shrink what is gathered at once.
                    open_ways -= 1
                    break
        if not open_ways:
            break
        size *= 2
    return min(working_bytes)


def expert_counts(config: Config) -> list[int]:
    """Values of parallel.expert to try: the configured one, then powers of 2 above it that divide the experts.

    With a torch that cannot divide experts it is the configured one alone, and a warning says so.
    """
    experts = config.model.n_experts if config.model.core_ffn == "moe" else 1
    if experts > 1 and not has_mesh_placements():
        _warn_of_torch()
        experts = 1
    powers = [2**power for power in range(1, experts.bit_length()) if experts % 2**power == 0]
    return [config.parallel.expert, *(power for power in powers if power > config.parallel.expert)]


def shared_counts(config: Config, machine_ranks: int) -> list[int]:
    """Values of parallel.shared to try, rising: the configured one if it is above 1, else 1 and others.

    The others are powers of 2 that divide parallel.expert and the hidden width: the largest on one machine, where
    tokens travel between its GPUs only, and four times as many. None are tried for shared experts of less than
    LEAST_DIVIDED bytes.
    """
    model, shared = config.model, config.parallel.shared
    width = model.n_shared_experts * model.shared_expert_dim if model.core_ffn == "moe" else 0
    if shared > 1 or BYTES_OF_WEIGHT * 3 * model.dim * width < LEAST_DIVIDED:
        return [shared]
    limit = math.gcd(width, config.parallel.expert)
    power = 2 ** (min(machine_ranks, limit).bit_length() - 1)
    while limit % power:
        power //= 2
    return [1, *(count for count in (power, 4 * power) if count > 1 and limit % count == 0)]


@cache
def _warn_of_torch() -> None:
    logger.warning(
        "plans leave out parallel.expert above 1: torch %s cannot divide experts over processes, 2.13 and later can",
        version("torch"),
    )


def shortage(config: Config, ranks: int, machine_ranks: int, device_memory: int) -> str:
    """Say that a configuration does not fit, and what would fit on devices of `device_memory` bytes."""
    least: list[tuple[int, int]] = []  # bytes of what is gathered and reduced, and of activations
    alone: list[int] = []  # bytes of activations that do not fit alone
    for changed in smaller(config, machine_ranks):
        expert, shared = changed.parallel.expert, changed.parallel.shared
        size = max(2, ranks, expert)
        step = activations(changed, Layout("fsdp", 1, size - size % expert, "", expert=expert, shared=shared)).peak
        if step >= device_memory:
            alone.append(step)
            continue
        fit = find_fit(changed, ranks, machine_ranks, device_memory - step)
        if isinstance(fit, Fit):
            overrides = [
                f"parallel.{name}={'null' if value is None else str(value).lower()}"
                for name, value in fit.parallel
                if value != getattr(config.parallel, name)
            ]
            where = "" if fit.ranks == ranks else f" on {fit.ranks:,} processes"
            return f"does not fit; {' '.join(overrides)}{where} would, with {gib(fit.needed + step)} GiB"
        least.append((fit, step))
    if not least:
        return (
            f"does not fit, for activations alone take {gib(min(alone))} GiB, whatever is recomputed: lower "
            "train.micro_batch or data.sequence_length"
        )
    working, step = min(least, key=sum)
    return (
        f"does not fit, nor would any mode on any number of processes: each needs at least {gib(working)} GiB for the "
        f"unit it gathers and reduces, and {gib(step)} for activations. Lower train.micro_batch or "
        "data.sequence_length, or use devices of more memory."
    )


def smaller(config: Config, machine_ranks: int) -> Iterator[Config]:
    """The configuration, and with settings that need less memory; those that compute least come first.

    Activation checkpointing as configured, then of loops, then of all; for each, values of parallel.expert, and with
    the most of these, which takes least memory, of parallel.shared.
    """
    configured = config.parallel.activation_checkpointing
    for mode in CHECKPOINTING[CHECKPOINTING.index(configured) :]:
        if mode not in (configured, "loop", "all"):
            continue
        recomputing = config.with_fields("parallel", activation_checkpointing=mode)
        counts = [count for count in expert_counts(config) if count % config.parallel.shared == 0]
        ways = [recomputing.with_fields("parallel", expert=expert) for expert in counts]
        yield from ways
        for count in shared_counts(ways[-1], machine_ranks)[1:]:
            yield ways[-1].with_fields("parallel", shared=count)


def gib(size: int) -> str:
    """Bytes in GiB, for messages."""
    return f"{size / 2**30:,.3f}" if size < 100 * 2**30 else f"{size / 2**30:,.0f}"
