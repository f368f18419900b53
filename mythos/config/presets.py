"""Named model sizes: the fields that ``model.preset`` sets, unless other model fields override them."""

from typing import Any, NamedTuple

from mythos.errors import MythosError
from mythos.model.config import ModelConfig

BPE_VOCAB_SIZE = 4096
"""Vocabulary assumed for presets with ``vocab_size: auto``: the default size of the trained tokenizer."""


def _mythos(dim: int, kv_heads: int, experts: int, shared: int, top_k: int, expert_dim: int) -> dict[str, Any]:
    """Fields that the published sizes share, or that follow from their dimensions."""
    return {
        "dim": dim,
        "attention": "mla",
        "n_heads": dim // 128,
        "n_kv_heads": kv_heads,
        "head_dim": 128,
        "ffn_dim": _multiple_of_128(dim * 4 / 3),
        "core_layers": 1,
        "core_ffn": "moe",
        "n_experts": experts,
        "experts_per_token": top_k,
        "expert_dim": expert_dim,
        "n_shared_experts": shared,
        "shared_expert_dim": expert_dim * top_k,
        "tie_embeddings": True,
    }


def _dense_core(layers: int, dim: int) -> dict[str, Any]:
    """Fields of a looped dense-core size (arXiv 2604.12946): ``layers`` each in prelude, core and coda."""
    return {
        "vocab_size": 50_304,
        "dim": dim,
        "prelude_layers": layers,
        "core_layers": layers,
        "coda_layers": layers,
        "context_length": 2048,
        "tie_embeddings": False,
        "attention": "gqa",
        "n_heads": dim // 128,
        "n_kv_heads": dim // 128,
        "head_dim": 128,
        "ffn_dim": _multiple_of_128(dim * 16 / 3),
        "core_ffn": "dense",
        "loops": 8,
        "lora_rank": 0,
    }


def _parcae(layers: int, dim: int) -> dict[str, Any]:
    """Fields of a published Parcae (arXiv 2604.12946); see `mythos.hf.importers.parcae`."""
    return _dense_core(layers, dim) | {
        "vocab_size": 32_768,
        "tie_embeddings": True,
        "value_embeddings": True,
        "rope_theta": 5e4,
        "norm_eps": 1e-5,
        "ffn_dim": 4 * dim,
        "dense_ffn": "relu2",
        "halting": "none",
    }


def _multiple_of_128(width: float) -> int:
    return round(width / 128) * 128


def _layers(prelude_and_coda: int) -> dict[str, int]:
    return {"prelude_layers": prelude_and_coda, "coda_layers": prelude_and_coda}


def _latents(kv: int, q: int, rope: int, nope: int, v: int) -> dict[str, int]:
    """Ranks and head dimensions of multi-head latent attention."""
    names = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    return dict(zip(names, (kv, q, rope, nope, v), strict=True))


def _run(loops: int, context: int, lora: int, theta: float, vocab: int) -> dict[str, Any]:
    names = ("loops", "context_length", "lora_rank", "rope_theta", "vocab_size")
    return dict(zip(names, (loops, context, lora, theta, vocab), strict=True))


_NO_LOOP: dict[str, Any] = {"injection": "none", "loops": 1}
_LOOPED = {"140m": _dense_core(2, 768), "370m": _dense_core(4, 1024), "770m": _dense_core(6, 1280)}
_LOOPED["1b3"] = _dense_core(8, 1536)
_PARCAE = {"140m": _parcae(2, 768), "370m": _parcae(4, 1024), "770m": _parcae(6, 1280), "1b3": _parcae(8, 1536)}


class _Mixture(NamedTuple):
    """Dimensions of a budget-matched preset."""

    core_layers: int
    n_experts: int
    expert_dim: int
    dim: int
    ffn_dim: int
    kv_lora_rank: int

    def fields(self) -> dict[str, Any]:
        """The preset's fields."""
        return {
            **self._asdict(),
            **_latents(kv=self.kv_lora_rank, q=0, rope=32, nope=32, v=64),
            "n_heads": self.dim // 64,
            "experts_per_token": 4,
            "n_shared_experts": 1,
            "shared_expert_dim": 2 * self.expert_dim,
            "lora_rank": 0,
            "halting": "none",
        }


def _budget_matched(
    size: str,
    common: dict[str, Any],
    two: _Mixture,
    four: _Mixture,
    flops: _Mixture,
    cache: _Mixture,
    parameters: _Mixture | None = None,
) -> dict[str, dict[str, Any]]:
    """Mixtures of experts looped for 2 and 4 visits, beside unlooped ones that share budgets with both.

    All have the parameters of `two`. `parameters` are the blocks of `two`, which it defaults to, run once. `flops` is
    wider, with fewer experts, and needs as many training FLOPs. `cache` has a layer for each visit, with fewer experts,
    so that its cache is as large; its training FLOPs are equal, too. FLOPs are those of a fixed number of visits that
    all carry gradient.
    After SMELT (arXiv 2609.01343), which has few visits, narrow layers and many experts; the dimensions are ours.
    """
    looped = {f"few_visits_{size}_2": two.fields() | {"loops": 2}, f"few_visits_{size}_4": four.fields() | {"loops": 4}}
    unlooped = {"params": parameters or two, "flops": flops, "cache": cache}
    looped |= {f"moe_{size}_{budget}": mixture.fields() | _NO_LOOP for budget, mixture in unlooped.items()}
    return {name: fields | common for name, fields in looped.items()}


_MATCHED = {
    **_budget_matched(
        "nano",
        {**_layers(1), "context_length": 1024},
        two=_Mixture(2, 48, 32, dim=128, ffn_dim=256, kv_lora_rank=48),
        four=_Mixture(1, 102, 32, dim=128, ffn_dim=256, kv_lora_rank=48),
        parameters=_Mixture(2, 49, 32, dim=128, ffn_dim=256, kv_lora_rank=48),
        flops=_Mixture(2, 16, 48, dim=160, ffn_dim=448, kv_lora_rank=64),
        cache=_Mixture(4, 21, 32, dim=128, ffn_dim=320, kv_lora_rank=48),
    ),
    **_budget_matched(
        "140m",
        {**_layers(1), "context_length": 2048, "vocab_size": 32_000},
        two=_Mixture(4, 52, 256, dim=640, ffn_dim=1792, kv_lora_rank=192),
        four=_Mixture(2, 108, 256, dim=640, ffn_dim=1792, kv_lora_rank=192),
        flops=_Mixture(4, 30, 288, dim=832, ffn_dim=2176, kv_lora_rank=256),
        cache=_Mixture(8, 24, 256, dim=640, ffn_dim=1792, kv_lora_rank=192),
    ),
    **_budget_matched(
        "1b",
        {**_layers(2), "context_length": 4096, "vocab_size": 32_000},
        two=_Mixture(8, 40, 512, dim=1536, ffn_dim=4096, kv_lora_rank=384),
        four=_Mixture(4, 85, 512, dim=1536, ffn_dim=4096, kv_lora_rank=384),
        flops=_Mixture(8, 21, 576, dim=2048, ffn_dim=5632, kv_lora_rank=512),
        cache=_Mixture(16, 18, 512, dim=1536, ffn_dim=4096, kv_lora_rank=384),
    ),
}

PRESETS: dict[str, dict[str, Any]] = {
    # Small enough to run anywhere. Fused attention on CPU needs query and key heads as wide as value heads.
    "mythos_nano": {},
    "mythos_tiny": {
        "dim": 256,
        "attention": "mla",
        **_latents(kv=96, q=0, rope=32, nope=32, v=64),
        "n_heads": 4,
        "n_kv_heads": 2,
        "head_dim": 64,
        "ffn_dim": 1024,
        "n_experts": 16,
        "experts_per_token": 2,
        "expert_dim": 320,
        "n_shared_experts": 1,
        "shared_expert_dim": 640,
        "loops": 8,
        "lora_rank": 8,
    },
    "mythos_small": {
        **_layers(2),
        "core_layers": 2,
        "dim": 768,
        "context_length": 2048,
        "attention": "mla",
        **_latents(kv=256, q=0, rope=32, nope=32, v=64),
        "n_heads": 12,
        "n_kv_heads": 4,
        "head_dim": 64,
        "ffn_dim": 2048,
        "n_experts": 32,
        "experts_per_token": 4,
        "expert_dim": 512,
        "n_shared_experts": 1,
        "shared_expert_dim": 2048,
        "loops": 8,
        "lora_rank": 16,
    },
    # The seven published sizes.
    "mythos_1b": {
        **_mythos(2048, kv_heads=4, experts=64, shared=2, top_k=4, expert_dim=2048),
        **_layers(2),
        **_latents(kv=256, q=512, rope=32, nope=64, v=64),
        **_run(loops=16, context=4096, lora=8, theta=5e5, vocab=32_000),
    },
    "mythos_3b": {
        **_mythos(3072, kv_heads=6, experts=64, shared=2, top_k=4, expert_dim=4096),
        **_layers(2),
        **_latents(kv=384, q=768, rope=32, nope=96, v=96),
        **_run(loops=16, context=4096, lora=8, theta=5e5, vocab=32_000),
    },
    "mythos_10b": {
        **_mythos(4096, kv_heads=8, experts=128, shared=2, top_k=4, expert_dim=5632),
        **_layers(2),
        **_latents(kv=512, q=1024, rope=64, nope=128, v=128),
        **_run(loops=24, context=8192, lora=16, theta=5e5, vocab=32_000),
    },
    "mythos_50b": {
        **_mythos(6144, kv_heads=8, experts=256, shared=4, top_k=4, expert_dim=9728),
        **_layers(3),
        **_latents(kv=512, q=1536, rope=64, nope=128, v=128),
        **_run(loops=32, context=8192, lora=32, theta=5e5, vocab=32_000),
    },
    "mythos_100b": {
        **_mythos(8192, kv_heads=8, experts=256, shared=4, top_k=8, expert_dim=13_568),
        **_layers(4),
        **_latents(kv=512, q=2048, rope=64, nope=128, v=128),
        **_run(loops=32, context=1_000_000, lora=64, theta=1e6, vocab=32_000),
    },
    "mythos_500b": {
        **_mythos(12_288, kv_heads=16, experts=512, shared=8, top_k=8, expert_dim=23_040),
        **_layers(4),
        **_latents(kv=1024, q=3072, rope=64, nope=128, v=128),
        **_run(loops=48, context=1_000_000, lora=128, theta=1e6, vocab=100_000),
    },
    "mythos_1t": {
        **_mythos(16_384, kv_heads=16, experts=512, shared=8, top_k=8, expert_dim=34_560),
        **_layers(6),
        **_latents(kv=1024, q=4096, rope=64, nope=128, v=128),
        **_run(loops=64, context=1_000_000, lora=256, theta=2e6, vocab=100_000),
    },
    # Looped dense cores, and fixed-depth baselines with as many parameters whose core runs once.
    **{f"looped_{size}": fields for size, fields in _LOOPED.items()},
    **{f"dense_{size}": {**fields, **_NO_LOOP} for size, fields in _LOOPED.items()},
    # Mixtures of experts looped for few visits, and unlooped ones of equal budgets.
    **_MATCHED,
    # Published models that `mythos import` converts.
    **{f"parcae_{size}": fields for size, fields in _PARCAE.items()},
}


def preset_config(name: str, **overrides: Any) -> ModelConfig:
    """Build the model configuration of a preset, with fields overridden by name.

    Raises MythosError for an unknown preset.
    """
    if name not in PRESETS:
        raise MythosError(f"preset {name!r} does not exist; allowed: {', '.join(PRESETS)}")
    return ModelConfig(**{"preset": name, **PRESETS[name], **overrides})


def model_name(config: ModelConfig) -> str:
    """Name the preset of a model, and how many fields differ from it, not counting the size of the vocabulary."""
    if config.preset not in PRESETS:  # inherited from train.init_from
        return config.preset
    preset = preset_config(config.preset, vocab_size=config.vocab_size)
    changed = sum(getattr(config, name) != value for name, value in preset)
    return config.preset + (f" with {changed} field{'s' * (changed > 1)} changed" if changed else "")
