"""Rules between fields: each contradiction names all its fields."""

from pathlib import Path
from typing import Any

import pytest

from tests.config.problems import build, problem, problems

CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"model": {"attention": "gqa", "n_heads": 6, "n_kv_heads": 4}}, ("model.n_heads", "model.n_kv_heads")),
    ({"model": {"attention": "gqa", "head_dim": 33}}, ("model.head_dim",)),
    ({"model": {"qk_rope_head_dim": 15}}, ("model.qk_rope_head_dim",)),
    ({"model": {"dim": 100}}, ("model.dim",)),
    ({"model": {"ffn_dim": 100}}, ("model.ffn_dim",)),
    ({"model": {"expert_dim": 100}}, ("model.expert_dim",)),
    ({"model": {"shared_expert_dim": 100}}, ("model.shared_expert_dim",)),
    ({"model": {"experts_per_token": 1}}, ("model.experts_per_token",)),
    ({"model": {"experts_per_token": 9}}, ("model.experts_per_token", "model.n_experts")),
    ({"model": {"expert_groups": 3}}, ("model.expert_groups", "model.n_experts")),
    ({"model": {"expert_groups": 1, "groups_per_token": 2}}, ("model.groups_per_token", "model.expert_groups")),
    (
        {"model": {"expert_groups": 4, "groups_per_token": 2, "experts_per_token": 3}},
        ("model.groups_per_token", "model.experts_per_token"),
    ),
    ({"model": {"expert_groups": 8}}, ("model.experts_per_token", "model.groups_per_token")),
    ({"model": {"core_ffn": "dense", "expert_groups": 2}}, ("model.core_ffn", "model.expert_groups")),
    ({"model": {"preset": "dense_140m", "lanes": 2}}, ("model.lanes", "model.injection")),
    ({"model": {"injection": "linear", "lanes": 2}}, ("model.lanes", "model.injection")),
    ({"model": {"lanes": 2}, "depth": {"backprop": 1}}, ("model.lanes", "depth.backprop")),
    ({"model": {"preset": "dense_140m", "loops": 2}}, ("model.injection", "model.loops")),
    ({"model": {"preset": "dense_140m", "lora_rank": 4}}, ("model.injection", "model.lora_rank")),
    ({"model": {"preset": "dense_140m", "loop_embedding": True}}, ("model.injection", "model.loop_embedding")),
    ({"model": {"preset": "dense_140m", "loop_norm": "adaptive"}}, ("model.injection", "model.loop_norm")),
    ({"model": {"preset": "dense_140m", "residual_scale": 0.5}}, ("model.injection", "model.residual_scale")),
    ({"model": {"core_ffn": "dense", "router_loop": "bias"}}, ("model.core_ffn", "model.router_loop")),
    ({"model": {"core_ffn": "dense", "router_bias_per_loop": True}}, ("model.core_ffn", "model.router_bias_per_loop")),
    ({"model": {"loop_over": "layer"}}, ("model.loop_over", "model.core_layers")),
    ({"model": {"preset": "dense_140m", "loop_over": "layer"}}, ("model.injection", "model.loop_over")),
    ({"model": {"core_layers": 2, "loop_over": "layer", "halting": "gate"}}, ("model.loop_over", "model.halting")),
    ({"model": {"core_layers": 2, "loop_over": "layer", "halting": "act"}}, ("model.loop_over", "model.halting")),
    (
        {"data": {"kind": "reasoning"}, "depth": {"follow": "difficulty"}, "eval": {"tasks": ["a.jsonl"]}},
        ("data.kind", "eval.tasks"),
    ),
    ({"model": {"preset": "dense_140m"}, "eval": {"loops": [1, 2]}}, ("model.injection", "eval.loops")),
    ({"model": {"preset": "dense_140m"}, "depth": {"maximum": 2}}, ("model.injection", "depth.maximum")),
    ({"train": {}}, ("train.steps", "train.tokens")),
    ({"train": {"steps": 1, "max_time": "0s"}}, ("train.max_time",)),
    ({"train": {"steps": 1, "max_time": ""}}, ("train.max_time",)),
    ({"parallel": {"mode": "fsdp", "shard": 8}}, ("parallel.mode", "parallel.shard")),
    ({"parallel": {"replicate": 2}}, ("parallel.mode", "parallel.replicate")),
    ({"parallel": {"expert": 3}}, ("model.n_experts", "parallel.expert")),
    ({"parallel": {"expert": 2}, "model": {"core_ffn": "dense"}}, ("model.core_ffn", "parallel.expert")),
    ({"parallel": {"expert": 2, "mode": "ddp"}}, ("parallel.mode", "parallel.expert")),
    ({"parallel": {"expert": 2, "mode": "single"}}, ("parallel.mode", "parallel.expert")),
    ({"parallel": {"shared": 2}}, ("parallel.expert", "parallel.shared")),
    ({"parallel": {"expert": 2, "shared": 4}}, ("parallel.expert", "parallel.shared")),
    (
        {"parallel": {"expert": 3, "shared": 3}, "model": {"n_experts": 9, "shared_expert_dim": 32}},
        ("model.n_shared_experts", "model.shared_expert_dim", "parallel.shared"),
    ),
    (
        {"parallel": {"expert": 2, "shared": 2}, "model": {"n_shared_experts": 0}},
        ("model.n_shared_experts", "model.shared_expert_dim", "parallel.shared"),
    ),
    ({"parallel": {"expert": 4, "mode": "hsdp", "shard": 2}}, ("parallel.shard", "parallel.expert")),
    ({"optim": {"momentum": 0.9}}, ("optim.name", "optim.momentum")),
    ({"train": {"steps": 10, "tokens": 10}}, ("train.steps", "train.tokens")),
    ({"train": {"steps": 10, "global_batch": 96}}, ("train.global_batch", "data.streams")),
    ({"data": {"sequence_length": 2048}}, ("data.sequence_length", "model.context_length")),
    ({"data": {"kind": "files"}}, ("data.kind", "data.path")),
    ({"data": {"kind": "files", "path": []}}, ("data.kind", "data.path")),
    ({"data": {"kind": "hub"}}, ("data.kind", "data.dataset")),
    ({"data": {"path": "a.txt"}}, ("data.kind", "data.path")),
    ({"data": {"dataset": "a/b"}}, ("data.kind", "data.dataset")),
    ({"data": {"txt": "line"}}, ("data.kind", "data.txt")),
    ({"data": {"kind": "files", "path": "a.txt", "subset": "b"}}, ("data.kind", "data.subset")),
    ({"data": {"kind": "hub", "dataset": "a/b", "path": "a.txt"}}, ("data.kind", "data.path")),
    ({"data": {"validation": {"fraction": 0}}}, ("data.validation.fraction", "data.validation.path")),
    ({"depth": {"mean": 8, "maximum": 6}}, ("depth.maximum", "depth.mean")),
    ({"depth": {"mean": 8, "maximum": 10, "sampling": "uniform"}}, ("depth.maximum", "depth.mean")),
    ({"depth": {"maximum": 4}}, ("depth.maximum", "model.loops")),
    ({"model": {"preset": "dense_140m"}, "depth": {"backprop": 2}}, ("model.injection", "depth.backprop")),
    ({"depth": {"backprop": 17}}, ("depth.backprop", "model.loops")),
    ({"depth": {"backprop": 9, "maximum": 8}}, ("depth.backprop", "depth.maximum")),
    (
        {"model": {"injection": "initial"}, "depth": {"backprop": 8}},
        ("model.injection", "depth.backprop", "model.loops"),
    ),
    (
        {"model": {"injection": "initial"}, "depth": {"mean": 4, "maximum": 6, "backprop": 5}},
        ("model.injection", "depth.backprop", "depth.maximum"),
    ),
    (
        {"model": {"injection": "initial"}, "depth": {"sampling": "fixed", "mean": 4, "backprop": 3}},
        ("model.injection", "depth.backprop", "depth.mean"),
    ),
    (
        {"model": {"injection": "initial"}, "depth": {"backprop_curriculum": {"shape": "linear", "start": 2}}},
        ("model.injection", "depth.backprop_curriculum.start", "model.loops"),
    ),
    (
        {
            "model": {"injection": "initial"},
            "data": {"kind": "reasoning", "task": {"difficulty": [1, 5]}},
            "depth": {"follow": "difficulty", "backprop": 4},
        },
        ("model.injection", "depth.backprop", "data.task.difficulty"),
    ),
    ({"model": {"halting": "act"}, "depth": {"backprop": 1}}, ("model.halting", "depth.backprop")),
    ({"model": {"halting": "act", "loops": 2}}, ("model.halting", "model.loops")),
    ({"model": {"halting": "gate"}, "depth": {"mean": 1}}, ("model.halting", "depth.mean")),
    ({"model": {"preset": "dense_140m", "halting": "gate"}}, ("model.halting", "model.loops")),
    ({"depth": {"curriculum": {"shape": "linear", "start": 9}}}, ("depth.curriculum.start", "model.loops")),
    (
        {"depth": {"backprop": 2, "backprop_curriculum": {"shape": "steps", "start": 3}}},
        ("depth.backprop_curriculum.start", "depth.backprop"),
    ),
    ({"depth": {"backprop_curriculum": {"shape": "steps", "start": 1.5}}}, ("depth.backprop_curriculum.start",)),
    ({"optim": {"schedule": "wsd", "warmup": 0.5, "decay": 0.6}}, ("optim.warmup", "optim.decay")),
    (
        {"optim": {"schedule_steps": 9, "min_lr": 0.0}},
        ("optim.schedule_steps", "train.steps", "optim.min_lr"),
    ),
    (
        {"train": {"tokens": 64 * 1024 * 10}, "optim": {"schedule_steps": 9, "min_lr": 0.0}},
        ("optim.schedule_steps", "train.tokens", "optim.min_lr"),
    ),
    ({"tokenizer": {"vocab_size": 383}}, ("tokenizer.vocab_size",)),
    (
        {"tokenizer": {"vocab_size": 1025}, "model": {"vocab_size": 1000}},
        ("tokenizer.vocab_size", "model.vocab_size"),
    ),
    ({"eval": {"loops": [1, 4, 4]}}, ("eval.loops",)),
    ({"eval": {"loops": []}}, ("eval.loops",)),
    ({"eval": {"prompts": []}}, ("eval.samples", "eval.prompts")),
    ({"run": {"name": ""}}, ("run.name",)),
]


@pytest.mark.parametrize(("sections", "paths"), CONTRADICTIONS)
def test_contradiction_names_all_its_fields(sections: dict[str, Any], paths: tuple[str, ...]) -> None:
    line = problem(**sections)
    named, _, message = line.partition(": ")
    assert named.split(", ") == list(paths)
    assert message.startswith("got ")


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"n_heads": 5, "n_kv_heads": 2, "head_dim": 33}},  # of gqa, and attention is mla
        {"model": {"core_ffn": "dense", "experts_per_token": 99, "expert_dim": 3}},
        {"model": {"core_ffn": "dense", "experts_per_token": 1}},
        {"model": {"core_ffn": "dense", "router_loop_start": 0.5}},
        {"model": {"expert_groups": 4, "groups_per_token": 2, "experts_per_token": 4}},
        {"model": {"preset": "dense_140m", "core_ffn": "moe", "expert_groups": 2}},
        {"model": {"n_shared_experts": 0, "shared_expert_dim": 3}},
        {"tokenizer": {"vocab_size": 1024}, "model": {"vocab_size": 1000}},  # padded to 1,024
        {"tokenizer": {"name": "some/tokenizer", "vocab_size": 1}},
        {"optim": {"schedule": "cosine", "warmup": 0.5, "decay": 0.6}},
        {"optim": {"schedule_steps": 9}},
        {"optim": {"schedule_steps": 11, "min_lr": 0.0}},
        {"depth": {"curriculum": {"shape": "none", "start": 99}}},
        {"depth": {"backprop": 12}},
        {"model": {"injection": "initial"}, "depth": {"backprop": 16}},
        {"model": {"injection": "initial"}, "depth": {"sampling": "fixed", "backprop": 8}},
        {"model": {"injection": "initial"}, "depth": {"backprop_curriculum": {"shape": "linear", "start": 16}}},
        {"data": {"validation": {"fraction": 0, "path": "a.txt"}}},
        {"eval": {"samples": 0, "prompts": []}},
        {"model": {"preset": "dense_140m"}, "depth": {"mean": 1, "maximum": 1, "backprop": 1}},
    ],
)
def test_values_that_can_be_used_together_are_accepted(sections: dict[str, Any]) -> None:
    build(**sections)


def test_fixed_depth_model_from_any_preset_must_give_up_everything_of_the_loop() -> None:
    lines = problems({"train": {"steps": 1}, "model": {"injection": "none"}, "depth": {"mean": 4}})
    assert {line.split(":")[0] for line in lines} == {
        "model.injection, model.loops",
        "model.injection, model.lora_rank",
        "model.injection, depth.mean",
    }


def test_options_of_the_loop_are_refused_together() -> None:
    model = {"injection": "none", "loops": 1, "lora_rank": 0, "router_loop": "embedding", "router_bias_per_loop": True}
    lines = problems({"train": {"steps": 1}, "model": {**model, "loop_norm": "adaptive", "residual_scale": 0.5}})
    options = ("loop_norm", "residual_scale", "router_loop", "router_bias_per_loop")
    assert {line.split(":")[0] for line in lines} >= {f"model.injection, model.{name}" for name in options}
    lines = problems({"train": {"steps": 1}, "model": {"core_ffn": "dense", "router_loop": "bias", "dim": 100}})
    assert {line.split(":")[0] for line in lines} == {"model.core_ffn, model.router_loop", "model.dim"}
    assert "got dense and bias; a dense core has no router: set router_loop to none, or core_ffn to moe" in lines[1]


def test_all_problems_come_in_one_message(tmp_path: Path) -> None:
    data = {
        "model": {"dim": "wide", "n_head": 4, "attention": "gqa", "n_heads": 6, "n_kv_heads": 4},
        "depht": {},
        "optim": {"warmup": 0.5, "decay": -1, "schedule": "wsd"},
        "train": {"steps": 10, "tokens": 10},
    }
    lines = problems(data, ("eval.loops=[4,1]", "log.evry=1", "nonsense"), tmp_path / "run.yaml")
    assert {line.split(": ")[0] for line in lines} == {
        "nonsense",
        "model.dim",
        "model.n_head",
        "depht",
        "optim.decay",
        "log.evry",
        "model.n_heads, model.n_kv_heads",
        "train.steps, train.tokens",
        "eval.loops",
    }


def test_contradiction_of_a_field_reported_already_is_not_added() -> None:
    # With n_kv_heads replaced by the preset's 2, 5 heads would not divide evenly.
    line = problem(model={"preset": "mythos_tiny", "attention": "gqa", "n_heads": 5, "n_kv_heads": "many"})
    assert line.startswith("model.n_kv_heads: ")
    # With mean replaced by its default, model.loops, the maximum would be below it.
    line = problem(depth={"mean": "deep", "maximum": 2})
    assert line.startswith("depth.mean: ")
    line = problem(depth={"maximum": "all", "backprop": 13})
    assert line.startswith("depth.maximum: ")
