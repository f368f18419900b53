"""Every parameter of every combination of options learns: within three steps it has had a gradient to speak of."""

import itertools
import re
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import get_total_norm

from mythos.config.loading import config_from_dict
from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.model.config import INJECTIONS, ModelConfig
from mythos.model.halting import build_halting
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.training.lr import learning_rate
from mythos.training.optim import build_optimizer

ROWS, LENGTH, STEPS = (4, 4, 3, 2), 6, 3
"""Loops of each row; tokens of each; output projections start at zero, so the first step gives others no gradient."""

ROUNDING = 1e-8
"""A gradient with less than this share of the whole gradient's norm is what rounding leaves of zero: the router of a
single chosen expert gets 4e-12, and the smallest of all others here 2e-6 (the adapter's)."""

# Untied: otherwise the embedding would get a gradient as the head, whatever reaches it as the embedding.
TINY: dict[str, Any] = {
    **{"vocab_size": 128, "dim": 8, "tie_embeddings": False, "ffn_dim": 8, "readout_norm": True},
    **{"n_heads": 2, "n_kv_heads": 1, "head_dim": 4, "q_lora_rank": 4, "kv_lora_rank": 4},
    **{"qk_rope_head_dim": 2, "qk_nope_head_dim": 2, "v_head_dim": 4},
    **{"n_experts": 3, "experts_per_token": 2, "expert_dim": 8, "shared_expert_dim": 8},
}
LOOPED = {"loops": 4, "lora_rank": 2, "loop_embedding": True, "router_loop": "embedding", "loop_norm": "adaptive"}
FIXED_DEPTH = {"loops": 1, "lora_rank": 0, "loop_embedding": False}
ATTENTIONS: dict[str, dict[str, Any]] = {
    "gqa": {"attention": "gqa", "value_embeddings": True, "qk_bias": True, "dense_ffn": "relu2"},
    "mla": {"attention": "mla"},
}
HALTINGS = ("none", "gate", "act")
"""`convergence` and `second_difference` add nothing to the model: to its parameters they are `none`."""


def refusal(injection: str, halting: str, backprop: int | None) -> str | None:
    """The error for a combination in which some parameter cannot learn; None for all others."""
    if injection == "initial" and backprop == 1:  # the input is read in the first loop, which carries no gradient
        return "model.injection, depth.backprop, model.loops: got initial, 1 and sequences of up to 8 loops"
    if injection == "none" and halting != "none":  # nothing can stop before the only loop
        return f"model.halting, model.loops: got {halting} and a mean of 1 loop"
    if halting == "act" and backprop == 1:  # the last loop takes what probability is left, whatever its own is
        return "model.halting, depth.backprop: got act and gradient through 1 loop"
    return None


def configured(injection: str, halting: str, backprop: int | None) -> Config:
    looped = LOOPED if injection != "none" else FIXED_DEPTH
    return config_from_dict(
        {
            "model": {**TINY, **looped, "injection": injection, "halting": halting},
            "depth": {"backprop": backprop},
            "tokenizer": {"name": "some/tokenizer"},
            "data": {"streams": 4, "sequence_length": LENGTH},
            "train": {"steps": STEPS, "global_batch": 4},
        }
    )


def without_gradient(
    model: RecurrentDepthTransformer, config: Config, rows: Sequence[int] = ROWS, backprop: int | None = None
) -> set[str]:
    """Parameters that get no gradient but rounding in three steps of training; backprop: default the config's."""
    optimizer, generator = build_optimizer(model, config.optim), torch.Generator().manual_seed(0)
    looped = config.model.injection != "none"
    missing = dict(model.named_parameters())
    for step in range(STEPS):
        ids = torch.randint(0, model.vocabulary, (len(rows), LENGTH + 1), generator=generator)
        output = model(
            ids[:, :-1],
            ids[:, 1:],
            loops=rows if looped else 1,
            backprop=backprop or config.depth_backprop,
            state=torch.randn(len(rows), LENGTH, config.model.dim, generator=generator),
            early_rows=[0, 1] if looped else [],
            early_by=2,
        )
        output.objective.backward()
        least = ROUNDING * get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        missing = {name: p for name, p in missing.items() if p.grad is None or p.grad.norm() <= least}
        if not missing:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return set(missing)


def models(config: Config) -> Iterator[ModelConfig]:
    """The configured model with every norm, attention and feed-forward."""
    for norm, attention, ffn in itertools.product(("pre", "peri", "sandwich"), ATTENTIONS, ("moe", "dense")):
        yield config.model.model_copy(update=ATTENTIONS[attention] | {"block_norm": norm, "core_ffn": ffn})


@pytest.mark.parametrize("backprop", [None, 1])
@pytest.mark.parametrize("halting", HALTINGS)
@pytest.mark.parametrize("injection", INJECTIONS.names)
def test_every_parameter_learns_or_the_configuration_is_refused(injection, halting, backprop):
    if (refused := refusal(injection, halting, backprop)) is not None:
        with pytest.raises(MythosError, match=re.escape(refused)):
            configured(injection, halting, backprop)
        return
    config = configured(injection, halting, backprop)
    for model_config in models(config):
        model = RecurrentDepthTransformer(model_config).initialize(0)
        assert not without_gradient(model, config), model_config


def test_router_of_a_single_expert_learns_nothing():
    """Why one expert per token is refused."""
    config = configured("lti", "none", None)
    single = config.model.model_copy(update={"experts_per_token": 1})
    missing = without_gradient(RecurrentDepthTransformer(single).initialize(0), config)
    assert missing == {f"recurrence.blocks.0.ffn.router.{name}" for name in ("weight", "loop_embedding")}


def test_bias_of_the_loop_learns_from_a_start_at_zero():
    config = configured("lti", "none", None)
    biased = config.model.model_copy(update={"router_loop": "bias", "router_loop_start": 0.0})
    assert not without_gradient(RecurrentDepthTransformer(biased).initialize(0), config)


def test_every_parameter_of_lanes_learns():
    config = configured("lti", "gate", None)
    model = RecurrentDepthTransformer(config.model.model_copy(update={"lanes": 2})).initialize(0)
    assert not without_gradient(model, config)


@pytest.mark.parametrize(("backprop", "learns"), [(1, False), (2, True)])
def test_what_is_written_to_lanes_learns_where_a_next_pass_carries_gradient(backprop, learns):
    """Why gradient through one loop is refused."""
    config = configured("lti", "none", None)
    model = RecurrentDepthTransformer(config.model.model_copy(update={"lanes": 2})).initialize(0)
    nn.init.normal_(model.recurrence.blocks[0].attention.out.weight)  # starts at zero: the core would change nothing
    ids = torch.randint(0, 128, (2, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    model(ids[:, :-1], ids[:, 1:], loops=8, backprop=backprop).objective.backward()
    assert model.recurrence.lanes.bias.grad[:2].any()
    assert bool(model.recurrence.lanes.bias.grad[2:].any()) == learns


@pytest.mark.parametrize("halting", ["convergence", "second_difference"])
def test_rules_without_training_add_no_parameters(halting):
    assert build_halting(ModelConfig(halting=halting)) is None


@pytest.mark.parametrize(("backprop", "learns"), [(4, False), (8, True)])
def test_input_of_initial_learns_only_where_first_loops_carry_gradient(backprop, learns):
    """Why less than all loops is refused."""
    config = configured("initial", "none", None)
    model = RecurrentDepthTransformer(config.model).initialize(0)
    assert ("embedding.weight" not in without_gradient(model, config, [8, 8, 7, 6], backprop)) == learns
