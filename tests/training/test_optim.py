"""Parameter groups and learning-rate schedules against written-out values."""

import math

import pytest
import torch

from mythos.config.presets import preset_config
from mythos.config.sections import OptimConfig
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.training.lr import learning_rate
from mythos.training.optim import build_optimizer


def test_decay_on_matrices_only():
    model = RecurrentDepthTransformer(preset_config("mythos_nano", vocab_size=128, tie_embeddings=False)).initialize(0)
    optimizer = build_optimizer(model, OptimConfig(weight_decay=0.3))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(p)] for p in group["params"]} for group in optimizer.param_groups}
    assert groups.keys() == {0.3, 0.0}
    decayed, undecayed = groups[0.3], groups[0.0]
    assert decayed | undecayed == set(names.values())
    for name in ("head.weight", "recurrence.blocks.0.ffn.gate_up", "recurrence.blocks.0.ffn.router.weight",
                 "prelude.0.attention.out.weight", "recurrence.adapter.up.weight"):  # fmt: skip
        assert name in decayed
    injection = [f"recurrence.injection.{name}" for name in ("log_a", "dt", "weight")]
    for name in (*injection, "readout.weight", "embedding.weight", "prelude_norm.weight", "recurrence.adapter.scale"):
        assert name in undecayed
    assert not any("norm" in name for name in decayed)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_tables_of_the_loop_are_neither_decayed_nor_orthogonalised(name):
    config = preset_config("mythos_nano", vocab_size=128, router_loop="bias", loop_norm="adaptive")
    model = RecurrentDepthTransformer(config).initialize(0)
    optimizer = build_optimizer(model, OptimConfig(name=name, weight_decay=0.3))
    tables = {parameter for name, parameter in model.named_parameters() if ".loop_" in name}
    assert len(tables) == 5 and all(table.shape[0] == config.loops for table in tables)
    for group in optimizer.param_groups:
        if tables & set(group["params"]):
            assert group["weight_decay"] == 0 and "momentum" not in group


def test_step_equals_adamw_written_out():
    model = RecurrentDepthTransformer(preset_config("mythos_nano", vocab_size=128)).initialize(0)
    config = OptimConfig(lr=0.01, weight_decay=0.5, betas=(0.8, 0.9))
    optimizer = build_optimizer(model, config)
    weight = model.prelude[0].attention.query.weight
    start, m, v = weight.detach().clone(), torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(1, 4):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.1 * step)
        optimizer.step()
        m, v = 0.8 * m + 0.2 * 0.1 * step, 0.9 * v + 0.1 * (0.1 * step) ** 2
        start = start * (1 - 0.01 * 0.5) - 0.01 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-8)
        torch.testing.assert_close(weight, start, rtol=1e-5, atol=1e-6)


def test_cosine_schedule():
    config = OptimConfig(lr=1.0, warmup=0.1, min_lr=0.1, schedule="cosine")
    rates = [learning_rate(config, step, 1000) for step in range(1000)]
    assert rates[0] == pytest.approx(1 / 101)
    assert rates[49] == pytest.approx(50 / 101)
    assert rates[100] == pytest.approx(1.0)
    assert rates[999] == pytest.approx(0.1)
    half = 100 + 899 / 2
    assert rates[round(half)] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * (round(half) - 100) / 899)) / 2)
    assert rates[100:] == sorted(rates[100:], reverse=True)


def test_wsd_schedule():
    config = OptimConfig(lr=1.0, warmup=0.1, decay=0.2, min_lr=0.0, schedule="wsd")
    rates = [learning_rate(config, step, 1000) for step in range(1000)]
    assert rates[100:799] == [1.0] * 699
    assert rates[899] == pytest.approx(0.5)
    assert rates[999] == 0.0


@pytest.mark.parametrize(("schedule", "min_lr"), [("cosine", 0.1), ("wsd", 0.1), ("cosine", 0.0), ("wsd", 0.0)])
def test_steps_after_the_schedule_keep_its_last_rate(schedule, min_lr):
    config = OptimConfig(lr=2.0, schedule=schedule, min_lr=min_lr)
    for step in (99, 100, 101, 150, 10_000):
        assert learning_rate(config, step, 100) == pytest.approx(2.0 * min_lr, abs=1e-12)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_stay_in_range(schedule, steps):
    config = OptimConfig(lr=1.0, schedule=schedule, warmup=0.5)
    assert all(0 < learning_rate(config, step, steps) <= 1 for step in range(steps))
