from collections.abc import Callable
from typing import Any

import pytest
import torch

from mythos.model.config import ModelConfig
from mythos.model.rdt import RecurrentDepthTransformer
from tests.noise import name_generator

SMALL: dict[str, Any] = {
    "vocab_size": 128,
    "dim": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "ffn_dim": 48,
    "n_experts": 8,
    "expert_dim": 24,
    "shared_expert_dim": 24,
    "core_layers": 2,
    "loops": 4,
}


def scrambled(module: torch.nn.Module, scale: float = 0.3) -> Any:
    """Fill every parameter with seeded noise, so that no branch is silenced by starting at zero."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=name_generator(7, name)) * scale
            parameter.copy_(noise + (1 if name.endswith("norm.weight") else 0))
    return module


@pytest.fixture
def small() -> Callable[..., ModelConfig]:
    """Build a small model configuration with every mechanism on, fields replaced by name."""
    return lambda **changes: ModelConfig(**{**SMALL, **changes})


@pytest.fixture
def model(small: Callable[..., ModelConfig]) -> Callable[..., RecurrentDepthTransformer]:
    """Build a small model whose weights are all seeded noise."""
    return lambda **changes: scrambled(RecurrentDepthTransformer(small(**changes)).initialize(0), 0.15)
