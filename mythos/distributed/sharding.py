"""FSDP2: shards a model as a layout says. Imported only where a model is sharded, because its imports take long."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from mythos.config.sections import ParallelConfig
from mythos.distributed.layout import (
    Meshes,
    float32_parameters,
    fsdp_units,
    matrix_dimension,
    routed_stacks,
    shard_dimension,
    shared_slices,
    slice_dimension,
)
from mythos.model.moe import MixtureOfExperts
from mythos.model.ops.expert_exchange import ExpertExchange
from mythos.model.ops.shared_experts import SharedExpertGroup
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.torch_internals import interleaved_shard, mesh_placements


def divide_experts(model: RecurrentDepthTransformer, mesh: DeviceMesh, shared: DeviceMesh | None = None) -> None:
    """Replace the experts of a model on the meta device by the share of this rank, along the dimension "expert".

    With `shared` the shared experts too, by a part of their hidden width along the dimension "shared".
    """
    mesh = mesh["expert"]
    sharers = 1 if shared is None else shared["shared"].size()
    for module in model.recurrence.modules():
        if not isinstance(module, MixtureOfExperts):
            continue
        for name in ("gate_up", "down"):
            setattr(module, name, _share(getattr(module, name), mesh, Shard(0)))
        module.exchange = ExpertExchange(mesh.get_group(), mesh.size(), sharers)
        if shared is not None and module.shared is not None:
            of_shared, linears = shared["shared"], (module.shared.gate_up, module.shared.down)
            for linear, placement in zip(linears, (interleaved_shard(0, 2), Shard(1)), strict=True):
                linear.weight = _share(linear.weight, of_shared, placement)
            module.shared_group = SharedExpertGroup(of_shared.get_group(), sharers)
            model.recurrence.exclude(linears)


def _share(whole: Tensor, mesh: DeviceMesh, placement: Any) -> nn.Parameter:
    """A rank's share of a parameter on the meta device, cut evenly."""
    shape = list(whole.shape)
    shape[placement.dim] //= mesh.size()
    return nn.Parameter(DTensor.from_local(whole.new_empty(shape), mesh, [placement], run_check=False))


def _placements(model: RecurrentDepthTransformer, meshes: Meshes) -> dict[nn.Parameter, Any]:
    """For the parameters of divided experts, how `fully_shard` cuts their matrices: along "shard" of their own mesh."""
    placements: dict[nn.Parameter, Any] = {}
    if meshes.experts is not None:
        over, on_mesh = _shard_mesh(meshes.experts)
        placements = {stack: on_mesh(Shard(matrix_dimension(stack, over))) for stack in routed_stacks(model)}
    if meshes.shared is not None:
        over, on_mesh = _shard_mesh(meshes.shared)
        slices = set(shared_slices(model))
        for name, parameter in model.named_parameters():
            if parameter in slices:
                placements[parameter] = on_mesh(Shard(slice_dimension(name, parameter, over)))
    return placements


def _shard_mesh(mesh: DeviceMesh) -> tuple[int, Callable[[Any], Any]]:
    """Size of the dimension "shard", and `mesh_placements` of it and of "replicate"."""
    over = mesh["replicate", "shard"] if mesh.ndim == 3 else mesh["shard"]
    return over.size(over.ndim - 1), mesh_placements(over)


def prefetch(settings: ParallelConfig, model: RecurrentDepthTransformer) -> None:
    """Let each unit gather the next one before it runs forward, so that the gathering hides behind its computation.

    FSDP2 does so by itself in a backward pass. In a forward pass it relies on a host that runs ahead, which it does not
    while it waits for the counts of an exchange. Blocks of the core that are units are not prefetched: their order in a
    loop is not that of the model.
    """
    core = [model.recurrence] if settings.wrap == "loop" else []
    for chain in ((*model.prelude, *core), (*core, *model.coda)):
        units = [module for module in chain if isinstance(module, FSDPModule)]
        for unit, following in pairwise(units):
            unit.set_modules_to_forward_prefetch([following])


def shard_model(settings: ParallelConfig, model: RecurrentDepthTransformer, meshes: Meshes, dtype: torch.dtype) -> None:
    """Apply `fully_shard` to the units of :func:`~mythos.distributed.layout.fsdp_units`.

    Raises MythosError if the experts' matrices cannot be divided.
    """
    shards, experts = meshes.dense.size(meshes.dense.ndim - 1), {}
    if meshes.experts is not None:
        divide_experts(model, meshes.experts, meshes.shared)
        experts = _placements(model, meshes)
    common: dict[str, Any] = {
        "mesh": meshes.dense,
        "ignored_params": set(float32_parameters(model)),
        "shard_placement_fn": lambda parameter: experts.get(parameter) or Shard(shard_dimension(parameter, shards)),
    }
    if settings.wrap == "block":
        model.recurrence.share_weights = False
    # A list, because fully_shard replaces the parameters by whose identity the generator separates units.
    for unit in list(fsdp_units(settings, model, dtype)):
        policy = MixedPrecisionPolicy(unit.param_dtype, unit.reduce_dtype, cast_forward_inputs=False)
        fully_shard(unit.module, mp_policy=policy, reshard_after_forward=unit.reshard, **common)
    prefetch(settings, model)
    for module, method in ((model, "read_depths"), (model, "extend"), (model.recurrence, "extend")):
        register_fsdp_forward_method(module, method)
    for block in model.recurrence.blocks if settings.wrap == "block" else ():
        register_fsdp_forward_method(block, "serve_experts")


def reduce_gradients(model: nn.Module, reduce: bool, *, over_copies: bool) -> None:
    """Whether the next backward pass reduces gradients over shards, and with HSDP over copies of the model."""
    assert isinstance(model, FSDPModule)
    model.set_requires_gradient_sync(reduce)
    model.set_requires_all_reduce(over_copies)


def reshard(model: nn.Module) -> None:
    """Free all weights that are still gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
