"""How processes share the model: copies, shards, and which tensors are cut where."""

from collections.abc import Iterable, Iterator
from math import prod
from typing import Literal, NamedTuple

import psutil
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import Shard

from mythos.config.sections import ParallelConfig
from mythos.distributed.ranks import World
from mythos.errors import MythosError
from mythos.model.halting import HaltingGate
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

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.replicate * self.shard

    @property
    def sharded(self) -> bool:
        """Whether parameters are shards (FSDP2)."""
        return self.mode in ("fsdp", "hsdp")


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
        return Layout("hsdp", replicate, shard, f"{replicate} copies, each over {shard} processes")
    return Layout("ddp", size, 1, "a copy each") if mode == "ddp" else Layout("fsdp", 1, size, "one copy over all")


def memory_of_device(world: World) -> int:
    """Bytes that a process can use: its GPU's memory, or its share of the machine's."""
    return usable_bytes(world.device, world.local_size)


def usable_bytes(device: torch.device, local_size: int) -> int:
    """Bytes of a GPU, or of the machine's memory divided by its `local_size` processes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total // local_size


def build_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The processes as one row, or as `replicate` rows of `shard`; expert parallelism would add a dimension here."""
    if layout.mode == "hsdp":
        return init_device_mesh(device_type, (layout.replicate, layout.shard), mesh_dim_names=("replicate", "shard"))
    return init_device_mesh(device_type, (layout.size,), mesh_dim_names=("shard",))


class FsdpUnit(NamedTuple):
    """A module whose parameters FSDP2 gathers and reduces together."""

    module: nn.Module
    parameters: list[nn.Parameter]
    """The module's parameters, without those of units inside it and those that are not sharded."""
    policy: MixedPrecisionPolicy
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
    mixed = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    recurrence, reshard = model.recurrence, settings.reshard_after_forward
    # A halting gate reads out once or twice in a step; and the backward pass begins with the coda anyway.
    read_twice = isinstance(model.halting, HaltingGate)
    modules: list[tuple[nn.Module, MixedPrecisionPolicy, bool]] = [(block, mixed, reshard) for block in model.prelude]
    if recurrence.injection is not None:
        # Its output may be the matrix itself, which the loops then use: keep it until the backward pass is over.
        modules.append((recurrence.injection, MixedPrecisionPolicy(cast_forward_inputs=False), False))
    if settings.wrap == "block":
        modules += [(block, mixed, reshard) for block in recurrence.blocks]
    modules.append((recurrence, mixed, reshard))
    modules += [(block, mixed, reshard and not read_twice) for block in model.coda]
    # The root's parameters (embedding, head) are used at both ends of the forward pass, and right after it.
    modules.append((model, mixed, False))
    taken = set(unsharded)
    for module, policy, frees in modules:
        if module is model or any(p not in unsharded for p in module.parameters()):
            own = [p for p in module.parameters() if p not in taken]
            taken.update(own)
            yield FsdpUnit(module, own, policy, frees)


def shard_placement(parameter: nn.Parameter, shards: int) -> Shard | None:
    """The dimension to cut: the first that divides evenly; None = the first dimension, padded to a multiple.

    64 experts on 1,024 ranks, cut along the first dimension, would be stored and sent 16 times over.
    """
    dimension = next((d for d, size in enumerate(parameter.shape) if size % shards == 0), 0)
    return Shard(dimension) if dimension else None


def shard_numel(parameter: nn.Parameter, shards: int) -> int:
    """Elements of the largest of a parameter's shards, to which FSDP2 pads the others; rank 0 has it."""
    placement = shard_placement(parameter, shards)
    shape = list(parameter.shape)
    dimension = 0 if placement is None else placement.dim
    shape[dimension] = -(-shape[dimension] // shards)
    return prod(shape)


def float32_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters that modules declare as `float32`: norms, routers, parts of the injection, loop scales."""
    for module in model.modules():
        names: Iterable[str] = getattr(module, "float32", ())
        for name in names:
            yield getattr(module, name)
