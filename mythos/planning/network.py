"""Time of a step's collectives on NVLink and InfiniBand: a model, not a measurement."""

from mythos.distributed.layout import Layout
from mythos.planning.budget import Gpu
from mythos.planning.collectives import EXPERT_EXCHANGE, Calls, Group

EFFICIENCY = 0.8
"""Share of a link's bandwidth that collectives of many megabytes are assumed to reach, until measured."""
CALL_SECONDS = 2e-5
"""Time of a collective beside its bytes (an assumption)."""


def group_shape(layout: Layout, group: Group) -> tuple[int, int]:
    """Number of ranks of a group, and the distance between two of them, as `build_mesh` arranges them."""
    return {
        "shard": (layout.shard, 1),
        "expert_shard": (layout.expert_shard, layout.expert),
        "shared_shard": (layout.shared_shard, layout.shared),
        "expert": (layout.expert, 1),
        "shared": (layout.shared, 1),
        "replicate": (layout.replicate, layout.shard),
        "world": (layout.size, 1),
    }[group]


def call_seconds(calls: Calls, layout: Layout, gpu: Gpu, machine_gpus: int) -> float:
    """Time of some collectives on machines of `machine_gpus` GPUs.

    Of g ranks, each sends and receives (g - 1) / g of the bytes, for an all-reduce twice. If the group spans machines,
    its ranks on a machine share the traffic between machines, because NCCL runs a ring through each of their network
    cards. In an exchange of tokens each rank sends through its own card the rows that leave its machine.
    """
    size, stride = group_shape(layout, calls.group)
    if size == 1:
        return 0.0
    near = min(size, max(1, machine_gpus // stride))
    if calls.kind == EXPERT_EXCHANGE:
        per_byte = (near - 1) / size / gpu.nvlink + (size - near) / size / gpu.infiniband
    else:
        bandwidth = gpu.nvlink if near == size else min(gpu.nvlink, near * gpu.infiniband)
        per_byte = (2 if calls.kind == "all-reduce" else 1) * (size - 1) / size / bandwidth
    return calls.count * CALL_SECONDS + calls.bytes * per_byte / EFFICIENCY
