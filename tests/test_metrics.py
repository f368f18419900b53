"""The record of a run: metrics.jsonl over restarts, W&B, and what is computed from counts and times."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

from mythos import trainer
from mythos.depth import DepthPlan
from mythos.errors import MythosError
from mythos.estimate import forward_flops
from mythos.metrics import MetricsLog, expert_balance, peak_flops, peak_memory, read_metrics
from mythos.trainer import Trainer
from tests.runs import tiny


def test_continuing_drops_later_and_broken_lines(tmp_path):
    config = tiny(tmp_path)
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(tmp_path, config, 0)
    for step in (2, 4, 6):
        log.write({"step": step, "loss": step / 10})
        assert json.loads(path.read_text().splitlines()[-1])["step"] == step, "written at once, not at the end"
    log.close()
    with path.open("a") as file:
        file.write('{"step": 8, "loss"')
    assert [record["step"] for record in read_metrics(path)] == [2, 4, 6]
    log = MetricsLog(tmp_path, config, 4)
    log.write({"step": 6, "loss": 0.5})
    log.close()
    assert read_metrics(path) == [
        {"step": 2, "loss": 0.2},
        {"step": 4, "loss": 0.4},
        {"step": 6, "loss": 0.5},
    ]
    MetricsLog(tmp_path, config, 0).close()
    assert path.read_text() == "", "a run that starts anew has no records of another"
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_expert_balance_by_hand():
    # (2 layers, 2 loop indices, 4 experts); layer sums [8, 0, 4, 4] and [2, 2, 12, 0], mean 4.
    load = torch.tensor([[[5, 0, 4, 1], [3, 0, 0, 3]], [[1, 1, 6, 0], [1, 1, 6, 0]]])
    assert expert_balance(load) == {"moe/load_max_over_mean": 3.0, "moe/dead_experts": 2}
    even = torch.full((1, 3, 8), 7)
    assert expert_balance(even) == {"moe/load_max_over_mean": 1.0, "moe/dead_experts": 0}


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
    made = SimpleNamespace(config=tiny(tmp_path, model__vocab_size=384), device=None, dtype=None)
    monkeypatch.setattr(trainer, "peak_flops", lambda *_: 1e9)
    plan = DepthPlan((4, 2, 1, 1), 2)
    metrics = Trainer.throughput(made, plan, 0.5)
    flops = forward_flops(made.config.model, 32)
    passes = (4 + 2 + 1 + 1) / 4 + 2 * (2 + 2 + 1 + 1) / 4
    needed = (3 * flops.once + passes * flops.loop) * 8 * 32
    assert metrics["tokens_per_second"] == 8 * 32 / 0.5
    assert metrics["mfu"] == pytest.approx(needed / 0.5 / 1e9, rel=1e-12)
    monkeypatch.setattr(trainer, "peak_flops", lambda *_: None)
    assert "mfu" not in Trainer.throughput(made, plan, 0.5)


def test_disabled_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import now fails
    Trainer(tiny(tmp_path, train__steps=1)).run()
    with pytest.raises(ImportError):
        Trainer(tiny(tmp_path, train__steps=2, log__wandb={"mode": "offline"}))


def test_offline_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    made = Trainer(tiny(tmp_path, train__steps=2, log__wandb={"mode": "offline"}))
    name = made.log.wandb_run.id
    made.run()
    run_dir = tmp_path / "run"
    (offline,) = (run_dir / "wandb").glob("offline-run-*")
    (stored,) = offline.glob("*.wandb")
    contents = stored.read_bytes()
    assert name.encode() in contents
    for key in (b"val/loss@3", b"grad_norm", b"moe/load_max_over_mean", b"tiny"):
        assert key in contents
    assert (run_dir / "wandb_id").read_text() == name
    assert "wandb" not in {key for record in read_metrics(run_dir / "metrics.jsonl") for key in record}


def test_wandb_that_cannot_be_started(tmp_path, monkeypatch):
    import wandb

    def no_account(**_) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", no_account)
    with pytest.raises(MythosError, match=r"log\.wandb\.mode is online.*No API key.*offline or disabled"):
        Trainer(tiny(tmp_path, log__wandb={"mode": "online"}))
