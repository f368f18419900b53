"""Parameters and FLOPs against a real model, and torch's own count of FLOPs."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mythos.config.data import DataConfig
from mythos.config.sections import Config, ParallelConfig
from mythos.distributed.parallel import prepare_model
from mythos.model.config import ModelConfig
from mythos.model.moe import MixtureOfExperts
from mythos.model.ops import device_choice
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.planning.budget import DepthMeans
from mythos.planning.fake_step import CHECKPOINTING, Step, _step_flops, recomputed_flops
from mythos.planning.flops import count_parameters, forward_flops
from mythos.planning.speed import executed_flops

LENGTH = 64

MODEL: dict[str, Any] = {
    "vocab_size": 256,
    "dim": 64,
    "prelude_layers": 2,
    "core_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 24,
    "kv_lora_rank": 40,
    "q_lora_rank": 48,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "ffn_dim": 96,
    "n_experts": 8,
    "experts_per_token": 3,
    "expert_dim": 40,
    "n_shared_experts": 2,
    "shared_expert_dim": 24,
    "lora_rank": 4,
}

VARIANTS: list[dict[str, Any]] = [
    {},
    {"attention": "gqa", "core_ffn": "dense"},
    {"attention": "gqa", "injection": "linear", "tie_embeddings": False},
    {"core_ffn": "dense", "injection": "add", "lora_rank": 0, "q_lora_rank": 0},
    {"injection": "none", "loops": 1, "lora_rank": 0, "attention": "gqa", "core_ffn": "dense"},
    {"injection": "none", "loops": 1, "lora_rank": 0, "n_shared_experts": 0},
    {
        **{"attention": "gqa", "core_ffn": "dense", "value_embeddings": True, "dense_ffn": "relu2", "qk_bias": True},
        **{"block_norm": "sandwich", "readout_norm": True},
    },
    {"lanes": 3, "attention": "gqa"},
    {"injection": "initial", "block_norm": "peri", "prelude_norm": False},
    {"injection": "orthogonal", "loop_over": "layer"},
    {"injection": "linear", "loop_over": "layer", "core_layers": 3},
    {"router_loop": "embedding", "router_bias_per_loop": True, "loop_norm": "adaptive", "residual_scale": 0.25},
    {"router_loop": "bias"},
]


def causal(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    """FLOPs of both matmuls of causal attention, whose mask leaves half."""
    rows, heads, length, dim = query
    return 2 * rows * heads * (dim + value[-1]) * length * (length + 1) // 2


FORMULAS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: causal,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda gradient, *shapes, **kwargs: (
        2 * causal(*shapes[:3])
    ),
    torch.ops.mythos.causal_attention: causal,
    torch.ops.mythos.causal_attention_backward: lambda gradient, *shapes, **kwargs: 2 * causal(*shapes[:3]),
    torch.ops.mkldnn._linear_pointwise: lambda x, w, *args, **kwargs: 2 * math.prod(x) * w[0],
    torch.ops.aten.addmm_: lambda total, a, b, **kwargs: 2 * math.prod(a) * b[-1],
    torch.ops.mythos.grouped_product: lambda x, weights, ends, **kwargs: 2 * math.prod(x) * weights[-1],
    torch.ops.mythos.grouped_outer: lambda x, y, ends, **kwargs: 2 * math.prod(x) * y[-1],
}
"""Formulas for operators that torch's counter does not know on a CPU."""


def counted(
    model: RecurrentDepthTransformer, loops: int | Sequence[int], backprop: int | None = None, rows: int = 1
) -> int:
    """FLOPs of a forward pass over `rows` sequences and, with `backprop`, of its backward pass."""
    ids = torch.zeros(rows, LENGTH + 1, dtype=torch.int64)
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
        if backprop is None:
            with torch.no_grad():
                model(ids[:, :-1], loops=loops)
        else:
            model(ids[:, :-1], ids[:, 1:], loops=loops, backprop=backprop).objective.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_forward_flops_are_those_torch_counts(changes):
    config = ModelConfig(**{**MODEL, **changes})
    model = RecurrentDepthTransformer(config).initialize(0)
    flops = forward_flops(config, LENGTH)
    for loops in (1, 5) if config.injection != "none" else (1,):
        needed = (flops.once + loops * flops.loop) * LENGTH
        executed = counted(model, loops)
        print(f"{loops} loops: executed / estimated {executed / needed:.4f}")
        assert executed == pytest.approx(needed, rel=1e-3)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@pytest.mark.parametrize(("loops", "backprop"), [([3], 1), ([5, 2, 1], 2), ([4, 4], 4)], ids=str)
def test_training_flops_are_those_torch_counts(changes: dict[str, Any], loops: list[int], backprop: int) -> None:
    config = ModelConfig(**{**MODEL, **changes})
    loops = loops if config.injection != "none" else [1] * len(loops)
    model = RecurrentDepthTransformer(config).initialize(0)
    needed = forward_flops(config, LENGTH).training(loops, backprop) * LENGTH * len(loops)
    executed = counted(model, loops, backprop, len(loops))
    print(f"executed / needed {executed / needed:.4f}")
    assert executed == pytest.approx(needed, rel=0.01)


@pytest.mark.parametrize("changes", [*VARIANTS[:2], *VARIANTS[6:9]], ids=str)
def test_recomputed_flops_are_those_torch_counts(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU's choice of matmuls; values are as wide as keys, because a GPU's kernel may pad them to that width."""
    monkeypatch.setattr(device_choice, "float32_by_onednn", lambda *_: False)
    config = ModelConfig(**{**MODEL, "v_head_dim": 24, **changes})
    for checkpointing in CHECKPOINTING:
        model = RecurrentDepthTransformer(config).initialize(0)
        plain = counted(model, 4, 3)
        prepare_model(
            Config(parallel=ParallelConfig(activation_checkpointing=checkpointing)), model, torch.device("cpu")
        )
        more = (counted(model, 4, 3) - plain) / LENGTH
        again = recomputed_flops(config, LENGTH, checkpointing)
        assert again.once + 3 * again.loop == pytest.approx(more, rel=0.01), checkpointing
        assert (again.once > 0) == (checkpointing == "all")


def test_training_flops():
    flops = forward_flops(ModelConfig(**MODEL), LENGTH)
    loops = [8, 3, 1, 4]
    expected = 3 * flops.once + flops.loop * ((8 + 3 + 1 + 4) / 4 + 2 * (3 + 3 + 1 + 3) / 4)
    assert flops.training(loops, 3) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters(changes):
    config = ModelConfig(**{**MODEL, **changes})
    model = RecurrentDepthTransformer(config).initialize(0)
    parameters = count_parameters(config)
    assert parameters.total == sum(p.numel() for p in model.parameters())
    idle = sum(
        module.gate_up[3:].numel() + module.down[3:].numel()  # 3 of 8 experts are used
        for module in model.modules()
        if isinstance(module, MixtureOfExperts)
    )
    assert parameters.active == parameters.total - idle
    assert (idle > 0) == (config.core_ffn == "moe")


@pytest.mark.parametrize("changes", [{}, {"injection": "orthogonal", "loop_over": "layer"}], ids=str)
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_flops_of_processes_that_divide_experts(checkpointing: str, changes: dict[str, Any]) -> None:
    """Divided shared experts compute gates and up-projections again, in each backward pass; dividing adds no others."""
    config, length = ModelConfig(**{**MODEL, **changes}), 16

    def planned(mode: str, divided: bool) -> float:
        return executed_flops(
            Config(model=config, data=DataConfig(sequence_length=length)), DepthMeans(2, 2), mode, divided
        )

    def traced(mode: str, expert: int, sharers: int) -> float:
        step = Step(1, length, 2, 2, mode, torch.bfloat16, expert=expert, sharers=sharers)
        return _step_flops(config, step) / length

    for expert, sharers in ((1, 1), (2, 1), (2, 2)):
        more = planned(checkpointing, sharers > 1) - planned("none", False)
        assert traced(checkpointing, expert, sharers) - traced("none", 1, 1) == more
        assert more > 0 or (checkpointing, sharers) == ("none", 1)
