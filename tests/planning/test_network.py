"""Time of collectives by hand, and the arrangement of groups against device meshes."""

from math import prod

import pytest
import torch.distributed as dist

from mythos.distributed.layout import Layout, build_mesh
from mythos.planning.budget import Gpu
from mythos.planning.collectives import EXPERT_EXCHANGE, Calls, Group, fake_processes
from mythos.planning.network import CALL_SECONDS, EFFICIENCY, call_seconds, group_shape

GPU = Gpu(peak=1.0, memory=1, price=0.0, bandwidth=1.0, nvlink=400e9, infiniband=50e9)
LAYOUT = Layout("hsdp", 4, 16, "", expert=4)


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        # 16 ranks on 2 machines of 8: 15/16 of the bytes at 8 cards of 50 GB/s
        ("all-gather", "shard", 15 / 16 * 1e9 / 400e9),
        # ranks 0, 4, 8, 12: two on a machine
        ("reduce-scatter", "expert_shard", 3 / 4 * 1e9 / 100e9),
        # ranks 0, 16, 32, 48: one on a machine, and twice the bytes
        ("all-reduce", "replicate", 2 * 3 / 4 * 1e9 / 50e9),
        ("all-reduce", "world", 2 * 63 / 64 * 1e9 / 400e9),
        # four ranks of one machine
        (EXPERT_EXCHANGE, "expert", 3 / 4 * 1e9 / 400e9),
    ],
)
def test_time_by_hand(kind: str, group: Group, seconds: float) -> None:
    expected = 3 * CALL_SECONDS + seconds / EFFICIENCY
    assert call_seconds(Calls(kind, group, 3, 10**9), LAYOUT, GPU, 8) == pytest.approx(expected)


def test_tokens_that_leave_a_machine_pass_its_card() -> None:
    """Of 16 ranks 7 others are on the machine, and 8 on the next."""
    wide = Layout("fsdp", 1, 16, "", expert=16)
    seconds = call_seconds(Calls(EXPERT_EXCHANGE, "expert", 1, 10**9), wide, GPU, 8)
    assert seconds == pytest.approx(CALL_SECONDS + (7 / 16 * 1e9 / 400e9 + 8 / 16 * 1e9 / 50e9) / EFFICIENCY)
    assert call_seconds(Calls("all-gather", "expert_shard", 1, 10**9), wide, GPU, 8) == 0, "one rank gathers nothing"


def test_groups_are_those_of_the_mesh() -> None:
    with fake_processes(LAYOUT.size):
        meshes = build_mesh(LAYOUT, "cpu")
        assert meshes.experts is not None
        groups: dict[Group, list[int]] = {
            "replicate": dist.get_process_group_ranks(meshes.dense.get_group("replicate")),
            "shard": dist.get_process_group_ranks(meshes.dense.get_group("shard")),
            "expert_shard": dist.get_process_group_ranks(meshes.experts.get_group("shard")),
            "expert": dist.get_process_group_ranks(meshes.experts.get_group("expert")),
        }
    for name, ranks in groups.items():
        size, stride = group_shape(LAYOUT, name)
        assert ranks == list(range(0, prod((size, stride)), stride))
