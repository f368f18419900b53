import pytest
import torch

from mythos.config.loading import config_from_dict
from mythos.config.presets import BPE_VOCAB_SIZE, PRESETS, model_name, preset_config
from mythos.config.sections import TokenizerConfig
from mythos.errors import MythosError
from mythos.model.cache import cache_bytes_per_token
from mythos.model.config import ModelConfig
from mythos.planning.flops import count_parameters, forward_flops

# The fields below, and the total in billions.
PUBLISHED = {
    "mythos_1b": (2048, 16, 4, 2, 2, 64, 2, 4, 2048, 256, 512, 32, 64, 64, 16, 4096, 8, 5e5, 32_000, 1.06),
    "mythos_3b": (3072, 24, 6, 2, 2, 64, 2, 4, 4096, 384, 768, 32, 96, 96, 16, 4096, 8, 5e5, 32_000, 3.04),
    "mythos_10b": (4096, 32, 8, 2, 2, 128, 2, 4, 5632, 512, 1024, 64, 128, 128, 24, 8192, 16, 5e5, 32_000, 9.98),
    "mythos_50b": (6144, 48, 8, 3, 3, 256, 4, 4, 9728, 512, 1536, 64, 128, 128, 32, 8192, 32, 5e5, 32_000, 50.4),
    "mythos_100b": (8192, 64, 8, 4, 4, 256, 4, 8, 13568, 512, 2048, 64, 128, 128, 32, 10**6, 64, 1e6, 32_000, 99.6),
    "mythos_500b": (12288, 96, 16, 4, 4, 512, 8, 8, 23040, 1024, 3072, 64, 128, 128, 48, 10**6, 128, 1e6, 100_000, 498),
    "mythos_1t": (16384, 128, 16, 6, 6, 512, 8, 8, 34560, 1024, 4096, 64, 128, 128, 64, 10**6, 256, 2e6, 100_000, 999),
}
FIELDS = [
    *("dim", "n_heads", "n_kv_heads", "prelude_layers", "coda_layers"),
    *("n_experts", "n_shared_experts", "experts_per_token", "expert_dim"),
    *("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"),
    *("loops", "context_length", "lora_rank", "rope_theta", "vocab_size"),
]


def counted(name: str) -> ModelConfig:
    config = preset_config(name)
    return config if config.vocab_size != "auto" else preset_config(name, vocab_size=BPE_VOCAB_SIZE)


def written_out(c: ModelConfig) -> int:
    """Parameters by the formulas of the papers, without building anything."""
    assert isinstance(c.vocab_size, int)
    vocab = (c.vocab_size + 127) // 128 * 128
    if c.attention == "mla":
        qk = c.qk_nope_head_dim + c.qk_rope_head_dim
        query = c.dim * c.n_heads * qk
        if c.q_lora_rank:
            query = c.dim * c.q_lora_rank + c.q_lora_rank + c.q_lora_rank * c.n_heads * qk
        latent = c.dim * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank
        expand = c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
        attention = query + latent + expand + c.n_heads * c.v_head_dim * c.dim
        attention += c.qk_norm * (qk + c.qk_rope_head_dim)
    else:
        attention = 2 * c.dim * c.head_dim * (c.n_heads + c.n_kv_heads) + c.qk_norm * 2 * c.head_dim
    dense = {"swiglu": 3, "relu2": 2}[c.dense_ffn] * c.dim * c.ffn_dim
    experts = c.n_experts * c.expert_dim + c.n_shared_experts * c.shared_expert_dim
    routed = c.dim * c.n_experts + 3 * c.dim * experts
    core = routed if c.core_ffn == "moe" else dense
    blocks = (c.prelude_layers + c.coda_layers) * (attention + dense + 2 * c.dim)
    blocks += c.core_layers * (attention + core + 2 * c.dim)
    looped = c.injection != "none"
    injection = {"lti": c.dim**2 + 2 * c.dim, "linear": 2 * c.dim**2, "add": 0, "none": 0}[c.injection]
    around = injection + looped * (c.dim**2 + c.prelude_norm * c.dim) + c.dim
    adapter = c.lora_rank and 2 * c.dim * c.lora_rank + c.loops * c.lora_rank + c.dim
    layers = c.prelude_layers + c.core_layers + c.coda_layers
    values = c.value_embeddings * -(-layers // 2) * c.n_kv_heads * (vocab * c.head_dim + 32)
    return vocab * c.dim * (1 if c.tie_embeddings else 2) + blocks + around + adapter + values


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_dimensions_and_total(name: str) -> None:
    *dimensions, billions = PUBLISHED[name]
    config = preset_config(name)
    assert [getattr(config, field) for field in FIELDS] == dimensions
    assert (config.attention, config.core_ffn, config.core_layers, config.tie_embeddings) == ("mla", "moe", 1, True)
    assert config.head_dim == config.dim // config.n_heads
    assert config.shared_expert_dim == config.expert_dim * config.experts_per_token
    assert config.ffn_dim % 128 == 0
    assert config.ffn_dim == pytest.approx(config.dim * 4 / 3, abs=64)
    assert count_parameters(config).total / 1e9 == pytest.approx(billions, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_meta_device_count_is_what_the_formulas_say(name: str) -> None:
    config = counted(name)
    count = count_parameters(config)
    assert count.total == written_out(config)
    unused = config.n_experts - config.experts_per_token if config.core_ffn == "moe" else 0
    assert count.total - count.active == config.core_layers * unused * 3 * config.dim * config.expert_dim


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("mythos_nano", 0.9e6, 1.2e6), ("mythos_tiny", 7e6, 9e6), ("mythos_small", 110e6, 130e6)],
)
def test_small_ones(name: str, least: float, most: float) -> None:
    config = counted(name)
    assert least <= count_parameters(config).total <= most
    assert (config.attention, config.core_ffn) == ("mla", "moe")
    assert config.qk_nope_head_dim + config.qk_rope_head_dim == config.v_head_dim


@pytest.mark.parametrize(
    ("size", "layers", "dim", "millions"),
    [("140m", 2, 768, 140), ("370m", 4, 1024, 370), ("770m", 6, 1280, 770), ("1b3", 8, 1536, 1300)],
)
def test_looped_dense_core_and_its_fixed_depth_baseline(size: str, layers: int, dim: int, millions: int) -> None:
    looped, dense = preset_config(f"looped_{size}"), preset_config(f"dense_{size}")
    for config in (looped, dense):
        assert (config.prelude_layers, config.core_layers, config.coda_layers) == (layers, layers, layers)
        assert (config.dim, config.head_dim, config.n_heads, config.n_kv_heads) == (dim, 128, dim // 128, dim // 128)
        assert (config.attention, config.core_ffn, config.tie_embeddings) == ("gqa", "dense", False)
        assert (config.vocab_size, config.context_length, config.lora_rank) == (50_304, 2048, 0)
        assert config.ffn_dim == pytest.approx(dim * 16 / 3, abs=64)
    assert (looped.loops, looped.injection) == (8, "lti")
    assert (dense.loops, dense.injection) == (1, "none")
    totals = count_parameters(looped).total, count_parameters(dense).total
    assert totals[0] / 1e6 == pytest.approx(millions, rel=0.1)
    assert totals[1] == pytest.approx(totals[0], rel=0.02)


@pytest.mark.parametrize("size", ["nano", "140m", "1b"])
def test_few_visits_and_unlooped_mixtures_of_equal_budgets(size: str) -> None:
    """Parameters, training FLOPs a token, and cache bytes a token, each against the model of two visits."""
    budgets: dict[str, tuple[float, float, float]] = {}
    for name in ("few_visits_{}_2", "few_visits_{}_4", "moe_{}_params", "moe_{}_flops", "moe_{}_cache"):
        config = counted(name.format(size))
        flops = forward_flops(config, config.context_length).training([config.loops], config.loops)
        cache = cache_bytes_per_token(config, config.loops, torch.bfloat16)
        budgets[name] = (count_parameters(config).total, flops, cache)
        ratios = [value / first for value, first in zip(budgets[name], budgets["few_visits_{}_2"], strict=True)]
        print(f"{name.format(size)}: {budgets[name]} " + " ".join(f"{ratio:.3f}" for ratio in ratios))
        equal = [abs(ratio - 1) <= 0.02 for ratio in ratios]
        expected = {"moe_{}_params": [True, False, False], "moe_{}_flops": [True, True, False]}
        assert equal == expected.get(name, [True, True, True])
    two, four = counted(f"few_visits_{size}_2"), counted(f"few_visits_{size}_4")
    assert (two.loops, four.loops, two.core_layers) == (2, 4, 2 * four.core_layers)
    once, wide, deep = (counted(f"moe_{size}_{budget}") for budget in ("params", "flops", "cache"))
    assert {once.injection, wide.injection, deep.injection} == {"none"}
    assert two.dim == four.dim == once.dim == deep.dim < wide.dim
    assert (once.core_layers, wide.core_layers, deep.core_layers) == (two.core_layers,) * 2 + (2 * two.core_layers,)
    assert four.n_experts > two.n_experts > wide.n_experts and two.n_experts > deep.n_experts


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_the_checks_of_a_run(name: str) -> None:
    config = config_from_dict({"model": {"preset": name}, "train": {"steps": 1}})
    assert config.model == preset_config(name)


def test_no_parameter_depends_on_context_length_and_only_the_adapter_on_loops() -> None:
    config = counted("mythos_nano")
    longer = config.model_copy(update={"context_length": 10**6})
    deeper = config.model_copy(update={"loops": config.loops + 1})
    assert count_parameters(longer) == count_parameters(config)
    assert count_parameters(deeper).total - count_parameters(config).total == config.lora_rank


def test_defaults_are_those_of_nano_and_of_the_trained_tokenizer() -> None:
    assert preset_config("mythos_nano") == ModelConfig()
    assert TokenizerConfig().vocab_size == BPE_VOCAB_SIZE


def test_preset_that_does_not_exist() -> None:
    with pytest.raises(MythosError, match=r"mythos_2b.*mythos_1b"):
        preset_config("mythos_2b")


def test_name_says_how_many_fields_are_changed() -> None:
    assert model_name(preset_config("mythos_tiny", vocab_size=300)) == "mythos_tiny"
    assert model_name(preset_config("mythos_tiny", n_heads=2)) == "mythos_tiny with 1 field changed"
    assert model_name(preset_config("mythos_nano", dim=64, ffn_dim=192)) == "mythos_nano with 2 fields changed"
    assert model_name(ModelConfig(preset="somebody_elses")) == "somebody_elses"
