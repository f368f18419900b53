"""Measurements of a step, against values computed by hand."""

from types import SimpleNamespace

import pytest
import torch

from mythos.planning.flops import forward_flops
from mythos.trainer import Trainer
from mythos.training.depth_schedule import DepthPlan
from mythos.training.measurements import expert_balance, loop_loads, over_ranks, peak_flops, peak_memory
from tests.runs import tiny


def test_expert_balance_by_hand():
    # (2 layers, 2 loop indices, 4 experts); layer sums [8, 0, 4, 4] and [2, 2, 12, 0], mean 4.
    load = torch.tensor([[[5, 0, 4, 1], [3, 0, 0, 3]], [[1, 1, 6, 0], [1, 1, 6, 0]]])
    assert expert_balance(load) == {"moe/load_max_over_mean": 3.0, "moe/dead_experts": 2}
    even = torch.full((1, 3, 8), 7)
    assert expert_balance(even) == {"moe/load_max_over_mean": 1.0, "moe/dead_experts": 0}


def test_loads_by_loop_by_hand():
    # (2 layers, 3 loop indices, 4 experts); means 2.5, 1.5 and none in the first layer, 2, 2 and none in the second.
    load = torch.tensor([[[5, 0, 4, 1], [3, 0, 0, 3], [0] * 4], [[1, 1, 6, 0], [1, 1, 5, 1], [0] * 4]])
    assert loop_loads(load) == {"moe/load_max_over_mean@1": 3.0, "moe/load_max_over_mean@2": 2.5}
    assert loop_loads(None) == {}
    # Experts 0 and 1 are on one rank: loads [5, 5] and [3, 3] in the first layer, [2, 6] and [2, 6] in the second.
    ranks = {"moe/rank_load_max_over_mean@1": 1.5, "moe/rank_load_max_over_mean@2": 1.5}
    assert loop_loads(load, 2) == loop_loads(load) | ranks


def test_peak_memory_is_the_process(tmp_path):
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    held = torch.ones(64 << 20)  # 256 MiB
    grown = peak_memory(cpu)
    del held
    assert 1e8 < before <= grown < 1e12
    assert peak_memory(cpu) == grown
    with open("/proc/self/status") as status:
        line = next((line for line in status if line.startswith("VmHWM")), None)
    if line is not None:
        assert grown == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "cuda", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-40GB", "cuda", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", "cuda", torch.float32, None),
        ("Some GPU", "cuda", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", "cpu", torch.bfloat16, None),
    ],
)
def test_peak_flops(monkeypatch, name, device, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device(device), dtype) == expected


def test_throughput(tmp_path, monkeypatch):
    """Utilisation counts every pass forward, twice that backward where gradient flows, and no recomputation."""
    config, world = tiny(tmp_path, model__vocab_size=384), SimpleNamespace(size=2)
    flops = forward_flops(config.model, 32)
    parallel = SimpleNamespace(dtype=None)
    trainer = SimpleNamespace(config=config, flops=flops, device=None, world=world, parallel=parallel)
    monkeypatch.setattr("mythos.trainer.peak_flops", lambda *_: 1e9)
    plan = DepthPlan((4, 2, 1, 1), 2)
    metrics = Trainer.throughput(trainer, plan, 0.5)
    passes = (4 + 2 + 1 + 1) / 4 + 2 * (2 + 2 + 1 + 1) / 4
    needed = (3 * flops.once + passes * flops.loop) * 8 * 32
    assert metrics["tokens_per_second"] == 8 * 32 / 0.5
    assert metrics["mfu"] == pytest.approx(needed / 0.5 / 2e9, rel=1e-12), "of two GPUs"
    monkeypatch.setattr("mythos.trainer.peak_flops", lambda *_: None)
    assert "mfu" not in Trainer.throughput(trainer, plan, 0.5)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([4.0], {}),
        ([4.0, 10.0, 5.0], {"straggler/seconds": 5.0, "straggler/rank": 1, "straggler/over_median": 2.0}),
        ([9.0, 2.0, 4.0, 3.0], {"straggler/seconds": 5.5, "straggler/rank": 0, "straggler/over_median": 9 / 3.5}),
        ([2.0, 2.0], {"straggler/seconds": 0.0, "straggler/rank": 0, "straggler/over_median": 1.0}),
        ([0.0, 0.0], {"straggler/seconds": 0.0, "straggler/rank": 0}),
    ],
)
def test_over_ranks_by_hand(own, expected):
    memory = [700, 900, 300, 800][: len(own)]
    reports = [
        {"peak_memory_bytes": held, "own_seconds": seconds, "wait_seconds": 1.0}
        for held, seconds in zip(memory, own, strict=True)
    ]
    assert over_ranks(reports) == {"peak_memory_bytes": max(memory), **expected}
