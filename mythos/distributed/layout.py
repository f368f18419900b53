"""How processes share the model: copies, shards, and which tensors are cut where."""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Literal, NamedTuple

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from mythos.config.sections import ParallelConfig
from mythos.distributed.ranks import World
from mythos.errors import MythosError
from mythos.model.halting import HaltingGate
from mythos.model.moe import MixtureOfExperts
from mythos.model.rdt import RecurrentDepthTransformer


class Layout(NamedTuple):
    """How the processes share the model."""

    mode: Literal["single", "ddp", "fsdp", "hsdp"]
    replicate: int
    """Copies of the model."""
    shard: int
    """Processes that share a copy."""
    why: str
    """The reason for the choice, in a few words for people."""
    fits: bool = True
    """Whether the layout chosen by `parallel.mode: auto` fits in the device's memory; not checked for a named mode."""
    expert: int = 1
    """Processes, among the `shard` of a copy, that share the experts and exchange tokens; 1 = each has all experts."""
    shared: int = 1
    """Processes, among these, that divide the shared experts by hidden width; 1 = each has them whole."""

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.replicate * self.shard

    @property
    def sharded(self) -> bool:
        """Whether parameters are shards (FSDP2)."""
        return self.mode in ("fsdp", "hsdp")

    @property
    def expert_shard(self) -> int:
        """Processes that share the matrices of one expert (FSDP2)."""
        return self.shard // self.expert

    @property
    def shared_shard(self) -> int:
        """Processes that share one part of the shared experts (FSDP2)."""
        return self.shard // self.shared

    @property
    def sizes(self) -> dict[str, str | int]:
        """Mode and numbers of processes, for records."""
        return {name: getattr(self, name) for name in ("mode", "replicate", "shard", "expert", "shared")}


def named_layout(settings: ParallelConfig, size: int, local_size: int) -> Layout:
    """The layout that `parallel.mode` names for `size` processes, `local_size` of them on each machine.

    auto with several processes is resolved by `mythos.planning.plan.choose_layout`. Raises MythosError for a mode that
    does not fit the number of processes.
    """
    mode = settings.mode
    if mode == "single" and size > 1:
        raise MythosError(
            f"parallel.mode: got single and {size} processes, each of which would train alone: start one process, or "
            "set parallel.mode to auto, ddp, fsdp or hsdp"
        )
    if size == 1:
        return Layout("single", 1, 1, "one process")
    if mode == "hsdp":
        shard = settings.shard or (size // settings.replicate if settings.replicate else local_size)
        replicate = settings.replicate or size // shard
        if replicate * shard != size:
            raise MythosError(
                f"parallel.replicate, parallel.shard: {replicate} x {shard} is not the {size} processes: give numbers "
                "whose product is, or only one of them"
            )
        why = f"{replicate} copies, each over {shard} processes"
    elif mode == "ddp":
        return Layout("ddp", size, 1, "a copy each")
    else:
        shard, replicate, why = size, 1, "one copy over all"
    expert = settings.expert
    check_expert_ranks(expert, shard)
    why += f"; {expert} processes share the experts" if expert > 1 else ""
    why += f", {settings.shared} each shared expert" if settings.shared > 1 else ""
    return Layout("hsdp" if mode == "hsdp" else "fsdp", replicate, shard, why, expert=expert, shared=settings.shared)


def check_expert_ranks(expert: int, shard: int) -> None:
    """Raise MythosError if `expert` does not divide the `shard` processes that share a copy of the model."""
    if shard % expert:
        raise MythosError(
            f"parallel.expert: got {expert}, which does not divide the {shard} processes that share a copy of the "
            "model (parallel.shard): the experts of a copy are divided among processes of that copy"
        )


def memory_of_device(world: World) -> int:
    """Bytes that a process can use: its GPU's memory, or its share of the machine's."""
    return usable_bytes(world.device, world.local_size)


def usable_bytes(device: torch.device, local_size: int) -> int:
    """Bytes of a GPU, or of the machine's memory divided by its `local_size` processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // local_size


class Meshes(NamedTuple):
    """The processes as the dimensions that parameters are cut or copied along."""

    dense: DeviceMesh
    """(shard,) or (replicate, shard)."""
    experts: DeviceMesh | None
    """(shard, expert) or (replicate, shard, expert), where the last two divide the `shard` of `dense`; None without
    expert parallelism. Ranks that exchange tokens are adjacent, so within a machine if it has enough of them."""
    shared: DeviceMesh | None
    """(shard, shared) or (replicate, shard, shared), likewise for shared experts; None if they are not divided."""

    @property
    def groups(self) -> list[dist.ProcessGroup]:
        """The groups of this process along all dimensions."""
        return [mesh.get_group(dimension) for mesh in self if mesh is not None for dimension in range(mesh.ndim)]


def build_mesh(layout: Layout, device_type: str) -> Meshes:
    """The processes as one row, or as `replicate` rows of `shard`; and once more for each kind of divided experts."""

    def mesh(**sizes: int) -> DeviceMesh:
        copies = {"replicate": layout.replicate} if layout.mode == "hsdp" else {}
        shape = copies | sizes
        return init_device_mesh(device_type, tuple(shape.values()), mesh_dim_names=tuple(shape))

    return Meshes(
        mesh(shard=layout.shard),
        mesh(shard=layout.expert_shard, expert=layout.expert) if layout.expert > 1 else None,
        mesh(shard=layout.shared_shard, shared=layout.shared) if layout.shared > 1 else None,
    )


Experts = Literal["routed", "shared"]
"""Kinds of experts that are divided."""


class FsdpUnit(NamedTuple):
    """A module whose parameters FSDP2 gathers and reduces together."""

    module: nn.Module
    parameters: list[nn.Parameter]
    """The module's parameters, without those of units inside it and those that are not sharded."""
    param_dtype: torch.dtype | None
    """The type that weights are gathered and used in; None: their own."""
    reduce_dtype: torch.dtype | None
    """The type that gradients are reduced in; None: that of the weights used."""
    reshard: bool
    """Free the gathered weights after the forward pass."""


def fsdp_units(settings: ParallelConfig, model: RecurrentDepthTransformer, dtype: torch.dtype) -> Iterator[FsdpUnit]:
    """The units that the model is sharded in, from the inside out: blocks, injection, the core as a whole, the rest.

    The core's unit is the module that owns the loop: it is gathered once before the first loop and reduced once after
    the last, whatever the number of loops. Parameters are gathered in `dtype`, gradients reduced in float32. Parameters
    that are never used in bfloat16 are small and not sharded (see `ParallelModel.finish_gradients`), except for the
    injection's matrix, which is a unit of its own.
    """
    unsharded = frozenset(float32_parameters(model))
    param_dtype = None if dtype == torch.float32 else dtype
    recurrence, reshard = model.recurrence, settings.reshard_after_forward
    # A halting gate reads out once or twice in a step; and the backward pass begins with the coda anyway.
    read_twice = isinstance(model.halting, HaltingGate)
    modules: list[tuple[nn.Module, bool]] = [(block, reshard) for block in model.prelude]
    if recurrence.injection is not None:
        # Its output may be the matrix itself, which the loops then use: keep it until the backward pass is over.
        modules.append((recurrence.injection, False))
    if settings.wrap == "block":
        modules += [(block, reshard) for block in recurrence.blocks]
    modules.append((recurrence, reshard))
    modules += [(block, reshard and not read_twice) for block in model.coda]
    # The root's parameters (embedding, head) are used at both ends of the forward pass, and right after it.
    modules.append((model, False))
    taken = set(unsharded)
    for module, frees in modules:
        if module is model or any(p not in unsharded for p in module.parameters()):
            own = [p for p in module.parameters() if p not in taken]
            taken.update(own)
            as_stored = module is recurrence.injection
            yield FsdpUnit(module, own, None if as_stored else param_dtype, None if as_stored else torch.float32, frees)


def shard_dimension(parameter: nn.Parameter, shards: int) -> int:
    """The dimension to cut: the first that divides evenly, else the first, padded to a multiple.

    64 experts on 1,024 ranks, cut along the first dimension, would be stored and sent 16 times over.
    """
    return next((d for d, size in enumerate(parameter.shape) if size % shards == 0), 0)


def routed_stacks(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that have one matrix per routed expert."""
    return [stack for module in model.modules() if isinstance(module, MixtureOfExperts) for stack in module.stacks]


def shared_slices(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of shared experts, which can be divided by hidden width."""
    return [slice_ for module in model.modules() if isinstance(module, MixtureOfExperts) for slice_ in module.slices]


def divided_experts(model: nn.Module, layout: Layout) -> dict[nn.Parameter, Experts]:
    """The parameters that a layout divides by another dimension of the mesh than FSDP2's."""
    divided: dict[nn.Parameter, Experts] = {}
    if layout.expert > 1:
        divided |= dict.fromkeys(routed_stacks(model), "routed")
    if layout.shared > 1:
        divided |= dict.fromkeys(shared_slices(model), "shared")
    return divided


def slice_dimension(name: str, parameter: nn.Parameter, shards: int) -> int:
    """The dimension along which FSDP2 cuts a slice of shared experts: that of the model's width, not the hidden one.

    `name` is the parameter's. Raises MythosError if the width cannot be divided.
    """
    dimension = 0 if name.endswith("down.weight") else 1
    if parameter.shape[dimension] % shards:
        raise MythosError(
            f"parallel.shared: {shards} processes share each part of the shared experts, and the model's width "
            f"{parameter.shape[dimension]} cannot be divided by that: raise parallel.shared, or set "
            "parallel.mode=hsdp with a smaller parallel.shard"
        )
    return dimension


def matrix_dimension(stack: nn.Parameter, shards: int) -> int:
    """The dimension along which the matrices of a stack of experts are cut: their rows, else their columns.

    Not the experts themselves, which another dimension of the mesh divides. Raises MythosError if neither is possible.
    """
    dimension = next((d for d in (1, 2) if stack.shape[d] % shards == 0), None)
    if dimension is None:
        raise MythosError(
            f"parallel.expert: {shards} processes share each expert's matrices, and neither {stack.shape[1]} rows nor "
            f"{stack.shape[2]} columns can be divided by that: raise parallel.expert, or set parallel.mode=hsdp with a "
            "smaller parallel.shard"
        )
    return dimension


def shard_numel(parameter: nn.Parameter, shards: int) -> int:
    """Elements of the largest of a parameter's shards, to which FSDP2 pads the others; rank 0 has it."""
    dimension, shape = shard_dimension(parameter, shards), list(parameter.shape)
    shape[dimension] = -(-shape[dimension] // shards)
    return prod(shape)


def float32_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that modules declare as `float32`: norms, routers, parts of the injection, loop scales."""
    for module in model.modules():
        names: Iterable[str] = getattr(module, "float32", ())
        for name in names:
            yield getattr(module, name)
