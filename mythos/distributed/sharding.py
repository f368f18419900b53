"""FSDP2: shards a model as a layout says. Imported only where a model is sharded, because its imports take long."""

from itertools import pairwise
from typing import Any

import torch
from torch import nn
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
)
from mythos.model.moe import MixtureOfExperts
from mythos.model.ops.expert_exchange import ExpertExchange
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.torch_internals import mesh_placements


def divide_experts(model: RecurrentDepthTransformer, mesh: DeviceMesh) -> None:
    """Replace the experts of a model on the meta device by the share of this rank, along the dimension "expert"."""
    mesh = mesh["expert"]
    for module in model.recurrence.modules():
        if not isinstance(module, MixtureOfExperts):
            continue
        for name in ("gate_up", "down"):
            whole = getattr(module, name)
            share = whole.new_empty(len(whole) // mesh.size(), *whole.shape[1:])
            setattr(module, name, nn.Parameter(DTensor.from_local(share, mesh, [Shard(0)], run_check=False)))
        module.exchange = ExpertExchange(mesh.get_group(), mesh.size())


def _expert_placements(model: RecurrentDepthTransformer, mesh: DeviceMesh) -> dict[nn.Parameter, Any]:
    """For the parameters of divided experts, how `fully_shard` cuts their matrices: along "shard" of their own mesh."""
    over = mesh["replicate", "shard"] if mesh.ndim == 3 else mesh["shard"]
    on_mesh = mesh_placements(over)
    return {stack: on_mesh(Shard(matrix_dimension(stack, over.size(over.ndim - 1)))) for stack in routed_stacks(model)}


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
        divide_experts(model, meshes.experts)
        experts = _expert_placements(model, meshes.experts)
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
