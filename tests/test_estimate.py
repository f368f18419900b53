"""Estimates against the built model and torch's own count of what a forward pass computes."""

import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mythos.estimate import count_parameters, forward_flops
from mythos.model.config import ModelConfig
from mythos.model.moe import MixtureOfExperts
from mythos.model.rdt import RecurrentDepthTransformer

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
    "v_head_dim": 24,  # as wide as the keys: unequal heads are padded, which costs more than is needed
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
]


def counted(model: RecurrentDepthTransformer, loops: int) -> int:
    """FLOPs of a forward pass over one sequence; of attention only the half that a causal mask leaves."""

    def attention(query, key, value, *args, out_val=None, **kwargs) -> float:
        rows, heads, length, dim = query
        return 2 * rows * heads * (dim + value[-1]) * length * (length + 1) // 2

    def grouped(a, b, *args, out_val=None, **kwargs) -> int:
        return 2 * math.prod(a) * b[-1]

    mapping = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
        torch.ops.aten._grouped_mm: grouped,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter, torch.no_grad():
        model(torch.zeros(1, LENGTH, dtype=torch.int64), loops=loops)
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
