"""Attentions, cores and halting rules that are registered from outside of the package, in one place each."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mythos.checkpoints.stored_model import open_model
from mythos.config.loading import config_from_dict
from mythos.errors import MythosError
from mythos.hf.export import export_model
from mythos.model.attention.base import Attention, build_attention
from mythos.model.attention.context import AttentionContext, attend
from mythos.model.cache import DecodeCache, cache_bytes_per_token
from mythos.model.config import ATTENTIONS, CORES, HALTING_RULES, INJECTIONS, ModelConfig
from mythos.model.decoding import CachedContext
from mythos.model.halting import HaltingRule, halting_rule
from mythos.model.layers import Linear, zeros
from mythos.model.moe import CoreFeedForward
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.model.registry import Contradiction, Registry, TrainingDepth
from mythos.planning.fake_step import Step
from mythos.planning.flops import count_parameters, forward_flops
from mythos.planning.memory import step_activations
from scripts.benchmarks.products import executed_flops
from tests.model.conftest import scrambled
from tests.runs import settings
from tests.trainers import run


class TiedAttention(Attention):
    """All heads share one rotated key, which is the value too: half the cache of multi-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.width = config.n_heads, config.head_dim
        self.query = Linear(config.dim, self.heads * self.width)
        self.key = Linear(config.dim, self.width)
        self.out = Linear(self.heads * self.width, config.dim, zeros)

    @staticmethod
    def rotary_width(config: ModelConfig) -> int:
        return config.head_dim

    @staticmethod
    def entry_width(config: ModelConfig) -> int:
        return config.head_dim

    @staticmethod
    def pair_products(config: ModelConfig) -> int:
        return 2 * config.n_heads * config.head_dim

    def forward(self, x: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        query = context.rotate(self.query(x).unflatten(-1, (self.heads, self.width)))
        key = context.rotate(self.key(x).unsqueeze(2))
        if not isinstance(context, CachedContext):
            return self.out(attend(query, key, key, context).flatten(-2))
        entries = context.store(key.flatten(1)).unsqueeze(1)
        return self.out(context.attend(query.squeeze(1), entries, entries, self.width**-0.5).flatten(1).unsqueeze(1))


def tied_rules(config: ModelConfig) -> Iterator[Contradiction]:
    if config.value_embeddings:
        yield ("attention", "value_embeddings"), "got tied and true; tied attention has no value embeddings"


@pytest.fixture
def tied(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(ATTENTIONS, "entries", dict(ATTENTIONS.entries))
    ATTENTIONS.add("tied", TiedAttention, tied_rules)
    return "tied"


@pytest.mark.usefixtures("no_plots")
def test_a_registered_attention_trains_and_is_exported(tied: str, tmp_path: Path) -> None:
    trainer = run(config_from_dict(settings(tmp_path, model__attention=tied, train__steps=3)))
    blocks = (*trainer.model.prelude, *trainer.model.recurrence.blocks, *trainer.model.coda)
    assert trainer.step == 3 and {type(block.attention) for block in blocks} == {TiedAttention}
    export_model(trainer.run_dir, tmp_path / "exported")
    opened = open_model(tmp_path / "exported").model
    assert opened.config.attention == tied
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, open_model(trainer.run_dir).model(ids).logits)


def test_decoding_with_a_registered_attention_equals_the_forward_pass(tied: str, small: Any) -> None:
    model = scrambled(RecurrentDepthTransformer(small(attention=tied, n_experts=2)), 0.15)
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    cache = DecodeCache(model.config, 2, loops=4, block=1)
    pieces = [model.extend(part, cache, loops=4, logits="all").logits for part in ids.split([5, 1, 3], dim=1)]
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids, loops=4).logits, rtol=1e-5, atol=1e-5)
    assert cache.entries.shape[-1] == model.config.head_dim
    assert cache_bytes_per_token(model.config, 4, torch.float32) == (2 + 4 * 2) * model.config.head_dim * 4


def test_a_registered_attention_is_planned(tied: str, small: Any) -> None:
    config = small(attention=tied, core_ffn="dense", lora_rank=0)
    model = RecurrentDepthTransformer(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    length, ids = 64, torch.zeros(1, 64, dtype=torch.int64)

    def step() -> None:
        with torch.no_grad():
            model(ids, loops=2)

    flops = forward_flops(config, length)
    assert executed_flops(step).total == (flops.once + 2 * flops.loop) * length
    assert step_activations(config, Step(1, length, 2, 2, "none", torch.float32, "cpu")).peak > 0


def test_configurations_accept_registered_names_only(tied: str, tmp_path: Path) -> None:
    with pytest.raises(MythosError, match=r"model\.attention: got \"tide\"; allowed: gqa \| mla \| tied$"):
        config_from_dict(settings(tmp_path, model__attention="tide"))
    with pytest.raises(MythosError, match="tied attention has no value embeddings"):
        config_from_dict(settings(tmp_path, model__attention=tied, model__value_embeddings=True))
    with pytest.raises(ValueError, match="Input should be 'gqa', 'mla' or 'tied'"):
        ModelConfig(attention="tide")
    with pytest.raises(ValueError, match="TiedAttention does not support value embeddings"):
        build_attention(ModelConfig(attention=tied), value_embedding=True)


def test_a_name_is_registered_once() -> None:
    registry = Registry()
    registry.add("one", None)
    with pytest.raises(ValueError, match="'one' is registered already; choose another name"):
        registry.add("one", TiedAttention)


def test_every_registered_class_can_be_imported() -> None:
    for registry in (ATTENTIONS, CORES, HALTING_RULES):
        assert all(registry[name] is None or isinstance(registry[name], type) for name in registry.names)


def test_configurations_are_checked_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from mythos.config.loading import load_config; load_config('configs/quickstart.yaml');"
        "print('torch' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    output = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert output.stdout == "False\n"


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class DoublingCore(CoreFeedForward):
    @staticmethod
    def build(config: ModelConfig) -> nn.Module:
        return Doubling()


def test_a_registered_core_runs_and_is_planned(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CORES, "entries", dict(CORES.entries))
    CORES.add("doubling", DoublingCore, summary=lambda config: f"twice {config.dim}")
    config = small(core_ffn="doubling")
    assert CORES.summary("doubling", config) == f"twice {config.dim}" and CORES.summary("dense", config) == "dense"
    assert CORES.summary("moe", small(n_experts=8, n_shared_experts=0)) == "2 of 8 experts per token"
    model = RecurrentDepthTransformer(config).initialize(0)
    ids = torch.arange(12).view(2, 6)
    output = model(ids, ids)
    output.objective.backward()
    assert output.expert_load is None and model.recurrence.blocks[0].ffn.__class__ is Doubling
    dense = forward_flops(small(core_ffn="dense"), 64).loop - forward_flops(config, 64).loop
    assert dense == 2 * config.core_layers * 3 * config.dim * config.ffn_dim
    count = count_parameters(config)
    assert count.total == count.active


def test_weights_whose_flops_cannot_be_counted_are_refused(
    small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left out, they would make every figure of speed wrong."""

    class Mixing(Doubling):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mix = nn.Parameter(torch.empty(width, width))

    class MixingCore(CoreFeedForward):
        @staticmethod
        def build(config: ModelConfig) -> nn.Module:
            return Mixing(config.dim)

    monkeypatch.setattr(CORES, "entries", dict(CORES.entries))
    for name, core in (("doubling", DoublingCore), ("mixing", MixingCore)):
        CORES.add(name, core, summary=lambda config: "")
    none = forward_flops(small(core_ffn="doubling"), 64)
    config = small(core_ffn="mixing")
    with pytest.raises(MythosError, match="Mixing: the FLOPs of mix cannot be counted"):
        forward_flops(config, 64)
    with pytest.raises(MythosError, match="Mixing: the FLOPs of mix"):
        run(config_from_dict(settings(tmp_path, model__core_ffn="mixing")))
    monkeypatch.setattr(Mixing, "matmul_weights", config.dim**2, raising=False)
    counted = forward_flops(config, 64)
    assert counted.once == none.once and counted.loop - none.loop == 2 * config.core_layers * config.dim**2


def test_rules_of_training_hold_for_training_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def three_loops(config: ModelConfig, depth: TrainingDepth) -> Iterator[Contradiction]:
        if depth.mean.loops < 3:
            yield ("model.injection", depth.mean.path), f"got {config.injection} and {depth.mean.loops:g}"

    monkeypatch.setattr(INJECTIONS, "entries", dict(INJECTIONS.entries))
    INJECTIONS.add("third", INJECTIONS["add"], training_rules=three_loops)
    values = settings(tmp_path, model__injection="third", model__loops=2)
    with pytest.raises(MythosError, match=r"model\.injection, model\.loops: got third and 2$"):
        config_from_dict(values)
    assert config_from_dict(values, to_train=False).model.injection == "third"
    assert config_from_dict(settings(tmp_path, model__injection="third", depth__mean=3)).depth_mean == 3


class Halfway(HaltingRule):
    """Stop after `threshold` loops."""

    default_threshold = 2.0

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, None]:
        return torch.full((len(after),), loop >= self.threshold, device=after.device), None


def test_a_registered_halting_rule_stops_positions(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HALTING_RULES, "entries", dict(HALTING_RULES.entries))
    HALTING_RULES.add("halfway", Halfway)
    model = scrambled(RecurrentDepthTransformer(small(halting="halfway")), 0.15)
    ids = torch.arange(6).view(1, 6)
    for threshold, loops in ((None, 2), (3.0, 3)):
        cache = DecodeCache(model.config, 1, loops=4)
        result = model.extend(ids, cache, loops=4, halting=halting_rule(model, threshold=threshold))
        assert (result.loops == loops).all()
    with pytest.raises(ValueError, match="allowed: none, convergence, second_difference, halfway"):
        halting_rule(model, "gate")
