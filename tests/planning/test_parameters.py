"""Formulas of parameters against the model on the meta device, and a table of presets without torch."""

import subprocess
import sys
from typing import Any

import pytest

from mythos.cli.presets import counted
from mythos.config.presets import PRESETS, preset_config
from mythos.model.config import ATTENTIONS, CORES, FEED_FORWARDS, HALTING_RULES, INJECTIONS, LOOP_NORMS, ROUTERS
from mythos.planning.flops import count_parameters
from mythos.planning.parameters import Parameters, parameters_by_formula

VARIATIONS: list[dict[str, Any]] = [
    *({"attention": name} for name in ATTENTIONS.names),
    *({"core_ffn": name} for name in CORES.names),
    *({"dense_ffn": name} for name in FEED_FORWARDS.names),
    *({"injection": name} for name in INJECTIONS.names if name != "none"),
    {"injection": "none", "loops": 1, "lora_rank": 0, "readout_norm": True},
    *({"halting": name} for name in HALTING_RULES.names),
    *({"attention": "gqa", name: True} for name in ("qk_bias", "value_embeddings", "loop_embedding", "readout_norm")),
    {"attention": "gqa", "value_embeddings": True, "dim": 16, "core_layers": 2},
    {"q_lora_rank": 24},
    {"lanes": 3},
    {"qk_norm": False},
    {"attention": "gqa", "qk_norm": False},
    {"block_norm": "peri"},
    {"block_norm": "sandwich", "prelude_norm": False},
    {"tie_embeddings": False, "vocab_size": 1000},
    {"n_shared_experts": 0},
    {"core_layers": 3, "prelude_layers": 0, "coda_layers": 2},
    {"core_layers": 3, "loop_over": "layer"},
    {"core_layers": 3, "loop_over": "layer", "prelude_norm": False},
    *({"router_loop": name, "core_layers": 2} for name in ROUTERS.names),
    {"router_loop": "bias", "router_bias_per_loop": True, "residual_scale": 0.5},
    {"expert_groups": 4, "groups_per_token": 2},
    *({"loop_norm": name, "core_layers": 2, "block_norm": "peri"} for name in LOOP_NORMS.names),
]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_counted_as_its_model(name: str) -> None:
    config = preset_config(name)
    assert parameters_by_formula(config) == count_parameters(config)


@pytest.mark.parametrize("changes", VARIATIONS, ids=str)
def test_every_part_is_counted_as_its_model(changes: dict[str, Any]) -> None:
    config = preset_config("mythos_nano", **changes)
    assert parameters_by_formula(config) == count_parameters(config)


def test_a_part_without_formula_is_counted_on_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CORES, "entries", dict(CORES.entries))
    CORES.add("ours", CORES["dense"])
    config = preset_config("mythos_nano", core_ffn="ours")
    assert parameters_by_formula(config) is None
    assert counted(config) == count_parameters(preset_config("mythos_nano", core_ffn="dense"))
    CORES.add("formula", CORES["dense"], parameters=lambda config: 1000, idle_parameters=lambda config: 10)
    total = count_parameters(preset_config("mythos_nano", core_ffn="dense")).total - 3 * config.dim * config.ffn_dim
    changed = config.model_copy(update={"core_ffn": "formula"})
    assert parameters_by_formula(changed) == Parameters(total + 1000, total + 990)


def test_a_dense_core_of_an_unknown_feed_forward_has_no_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FEED_FORWARDS, "entries", dict(FEED_FORWARDS.entries))
    FEED_FORWARDS.add("ours", FEED_FORWARDS["swiglu"])
    config = preset_config("mythos_nano", core_ffn="dense", dense_ffn="ours")
    assert parameters_by_formula(config) is None
    assert counted(config) == count_parameters(preset_config("mythos_nano", core_ffn="dense"))


def test_the_table_of_presets_needs_no_torch() -> None:
    code = "import sys; from mythos.cli import main; status = main(['presets']); assert 'torch' not in sys.modules"
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert all(name in printed for name in PRESETS)
