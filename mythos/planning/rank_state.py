"""Bytes that a rank holds and allocates under a layout, computed before any process starts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from mythos.config.sections import Config
from mythos.distributed.layout import (
    Experts,
    Layout,
    divided_experts,
    float32_parameters,
    fsdp_units,
    matrix_dimension,
    shard_numel,
    slice_dimension,
)
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.planning.fake_step import Step
from mythos.planning.flops import build_on_meta
from mythos.planning.memory import Activations, step_activations
from mythos.planning.trace_cache import stored
from mythos.torch_internals import count_ddp_buckets
from mythos.training.optim import state_bytes

BUCKET_BYTES = 25 * 2**20
"""DDP's default bucket size; the first bucket is smaller."""


@dataclass(frozen=True)
class Unit:
    """Parameters that FSDP2 gathers and reduces together.

    `gathered` and `reduced` are bytes of all shards, padded to equal length; the others are bytes without padding.
    """

    gathered: int
    """Weights, in the type they are gathered in."""
    gradient: int
    """The whole gradient as the backward pass leaves it, in the type the weights are gathered in."""
    accumulated: int
    """The whole gradient as it is kept between micro-batches, in the type it is reduced in."""
    reduced: int
    """Input of the reduce-scatter."""
    kept: bool
    """Stays gathered from its forward pass to the end of its backward pass."""
    looped: bool
    """A block of the core that is a unit of its own, so that every loop gathers it."""
    outer: bool
    """The core's parameters outside such blocks, which stay gathered while the blocks run."""
    injects: bool = False
    """The injection, which runs once before each loop over core layers."""
    experts: Experts | None = None
    """Kind of the experts that it has, if ranks divide them: gathered together with the unit before, but over fewer
    ranks."""

    def ranks(self, layout: Layout) -> int:
        """Number of ranks that gather it together."""
        return layout.shard // holders(layout, self.experts)


def holders(layout: Layout, experts: Experts | None) -> int:
    """Number of ranks that divide experts of this kind; 1 for None, which is all that only FSDP2 divides."""
    return {None: 1, "routed": layout.expert, "shared": layout.shared}[experts]


@dataclass(frozen=True)
class RankState:
    """Training state under a layout; bytes on rank 0, which holds the most."""

    layout: Layout
    parameters: int
    gradients: int
    optimizer: int
    replicated: int
    """Part of `parameters` that is whole on every rank."""
    measured: int
    """Bytes that are summed over ranks in a step: loss, norms and the load of experts."""
    buckets: int
    """Buckets in which DDP reduces gradients."""
    units: tuple[Unit, ...]
    """FSDP2's units in the order of the forward pass, the root (embedding, head) first; empty without sharding."""

    @property
    def total(self) -> int:
        """Bytes that stay from step to step."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True)
class Working:
    """Bytes that a rank needs for gathering and reducing, beside its state and its activations."""

    gathered: int
    """Gathered weights: the largest unit, and the units that stay gathered."""
    accumulated: int
    """Whole gradients kept between micro-batches, less their shards, which do not exist before they are reduced."""
    in_transit: int
    """Buffers of collectives, and the largest unit's gradient before it is reduced."""

    @property
    def total(self) -> int:
        """The sum of all."""
        return self.gathered + self.accumulated + self.in_transit


def compute_dtype(config: Config) -> torch.dtype:
    """Type of matmuls to plan for: train.dtype, where auto means bfloat16, which every recent GPU has."""
    return torch.float32 if config.train.dtype == "float32" else torch.bfloat16


def micro_batches(config: Config, ranks: int) -> int:
    """Micro-batches of an optimizer step on a rank; train.micro_batch: auto counts as one."""
    rows = max(1, config.train.global_batch // ranks)
    return 1 if config.train.micro_batch == "auto" else -(-rows // config.train.micro_batch)


def accumulates(config: Config, ranks: int) -> bool:
    """Whether whole gradients are kept between micro-batches and reduced once a step."""
    return config.parallel.reduce == "step" and micro_batches(config, ranks) > 1


def deepest_micro_batch(config: Config, ranks: int) -> tuple[int, int]:
    """Rows of a micro-batch, and the most loops of a row that carry gradient."""
    rows = max(1, config.train.global_batch // ranks)
    micro = config.train.micro_batch
    return rows if micro == "auto" else min(rows, micro), min(config.depth_maximum, config.depth_backprop)


def _decoded(value: dict[str, Any]) -> RankState:
    units = tuple(Unit(**unit) for unit in value["units"])
    return RankState(**{**value, "layout": Layout(*value["layout"]), "units": units})


@stored(_decoded)
def rank_state(config: Config, layout: Layout) -> RankState:
    """Compute the training state of rank 0 from the shapes of a model on the meta device.

    Raises MythosError if experts cannot be divided as the layout says.
    """
    model = build_on_meta(config.model)
    parameters = list(model.parameters())
    whole = set(float32_parameters(model) if layout.sharded else parameters)
    divided = divided_experts(model, layout)

    def held(name: str, parameter: nn.Parameter) -> int:
        kind = divided.get(parameter)
        if kind is None:
            return parameter.numel() if parameter in whole else shard_numel(parameter, layout.shard)
        if kind == "routed":  # evenly, or this raises
            matrix_dimension(parameter, layout.expert_shard)
        else:
            slice_dimension(name, parameter, layout.shared_shard)
        return parameter.numel() // layout.shard

    numel: dict[torch.Tensor, int] = {p: held(name, p) for name, p in model.named_parameters()}
    load = model.empty_load(torch.device("meta"))
    size = sum(p.itemsize * count for p, count in numel.items())
    return RankState(
        layout,
        parameters=size,
        gradients=size,  # a gradient has its parameter's type and shards
        optimizer=sum(state_bytes(config.optim, name, p, numel[p]) for name, p in model.named_parameters()),
        replicated=sum(p.nbytes for p in whole) if layout.sharded else 0,
        measured=torch.float64.itemsize * (4 + (0 if load is None else load.numel())),
        # DDP packs gradients in about the order in which the backward pass yields them.
        buckets=count_ddp_buckets(parameters[::-1], BUCKET_BYTES) if layout.mode == "ddp" else 0,
        units=tuple(_units(config, model, layout)) if layout.sharded else (),
    )


def _units(config: Config, model: RecurrentDepthTransformer, layout: Layout) -> Iterator[Unit]:
    """Sizes of the units of :func:`fsdp_units`, in the order of the forward pass."""
    order = {module: number for number, module in enumerate(model.modules())}
    blocks, split = set(model.recurrence.blocks), config.parallel.wrap == "block"
    divided = divided_experts(model, layout)
    units = fsdp_units(config.parallel, model, compute_dtype(config))
    for unit in sorted(units, key=lambda unit: order[unit.module]):
        if not unit.parameters:
            continue
        computed = unit.param_dtype or unit.parameters[0].dtype
        reduced = unit.reduce_dtype or computed
        kinds: tuple[Experts | None, ...] = (None, "shared", "routed")
        for experts in kinds:
            parameters = [p for p in unit.parameters if divided.get(p) == experts]
            if not parameters:
                continue
            unpadded = padded = sum(p.numel() for p in parameters) // holders(layout, experts)
            if experts is None:
                padded = layout.shard * sum(shard_numel(p, layout.shard) for p in parameters)
            yield Unit(
                gathered=padded * computed.itemsize,
                gradient=unpadded * computed.itemsize,
                accumulated=unpadded * reduced.itemsize,
                reduced=padded * reduced.itemsize,
                kept=not unit.reshard,
                looped=unit.module in blocks,
                outer=unit.module is model.recurrence and split,
                experts=experts,
                injects=unit.module is model.recurrence.injection,
            )


def gathered_together(units: Sequence[Unit]) -> list[Unit]:
    """The units, with divided experts added to the unit that they are gathered with."""
    joined: list[Unit] = []
    for unit in units:
        if unit.experts is None:
            joined.append(unit)
            continue
        sizes = ("gathered", "gradient", "accumulated", "reduced")
        joined[-1] = replace(joined[-1], **{name: getattr(joined[-1], name) + getattr(unit, name) for name in sizes})
    return joined


def working_memory(config: Config, state: RankState) -> Working:
    """Memory for gathering and reducing under FSDP2; zero for layouts without shards.

    In the forward pass a unit exists twice: its weights, and the all-gather's buffer, which is freed once the next unit
    is gathered. In the backward pass there are its weights, its whole gradient, and the prefetched weights of the unit
    before it; then the reduce-scatter's buffer replaces its weights. Whole gradients of the core's blocks stay until
    the backward pass has reached the first loop, and those of the root (embedding and head) throughout.
    """
    units = gathered_together(state.units)
    if not units:
        return Working(0, 0, 0)
    accumulating = accumulates(config, state.layout.size)
    passing = [unit for unit in units if not (unit.kept or unit.outer)]
    staying = sum(unit.gathered for unit in units if unit.kept or unit.outer)
    looped = sum(unit.gradient for unit in units if unit.looped)
    peaks = [unit.reduced for unit in units if unit.kept or unit.outer]
    for before, unit in zip([None, *passing], passing, strict=False):
        prefetched = before.gathered if before else 0
        gradient = looped if unit.looped else unit.gradient
        peaks += [2 * unit.gathered, prefetched + unit.gathered + gradient]
        peaks += [prefetched + unit.reduced + (0 if accumulating else gradient)]
    largest = max((unit.gathered for unit in passing), default=0)
    root = 0 if accumulating else units[0].gradient
    return Working(
        gathered=staying + largest,
        accumulated=sum(unit.accumulated - unit.reduced // unit.ranks(state.layout) for unit in state.units)
        if accumulating
        else 0,
        in_transit=max(0, max(peaks) - largest) + root,
    )


def activations(config: Config, layout: Layout, checkpointing: str | None = None) -> Activations:
    """Activation memory of a rank's deepest micro-batch, with `checkpointing` instead of the configured mode.

    All rows are assumed to have the largest depth, and all experts of an expert-parallel layout equally many tokens.
    Document masks are not counted. Under DDP the gradients always
    exist, because its buckets do.
    """
    rows, backprop = deepest_micro_batch(config, layout.size)
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
            expert=layout.expert,
            sharers=layout.shared,
        ),
    )
