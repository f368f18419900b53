import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mythos.config.loading import config_from_dict, describe, load_config, save_config
from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.model.config import ModelConfig
from mythos.section import Section

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def build(**sections: Any) -> Config:
    return config_from_dict({"train": {"steps": 10}, **sections})


def problems(data: dict[str, Any], overrides: tuple[str, ...] = (), path: Path | None = None) -> list[str]:
    """The lines of the error, without the first, which counts them."""
    with pytest.raises(MythosError) as caught:
        if path is None:
            config_from_dict(data)
        else:
            path.write_text(yaml.safe_dump(data))
            load_config(path, overrides)
    first, *lines = str(caught.value).split("\n")
    assert f"{len(lines)} problem" in first
    return [line.removeprefix("  ") for line in lines]


def problem(**sections: Any) -> str:
    (line,) = problems({"train": {"steps": 10}, **sections})
    return line


# --- single fields

# How YAML writes what Python writes otherwise.
WRITTEN = {"'128'": '"128"', "True": "true", "False": "false", "None": "null", "{'of': 128}": "{of: 128}"}
WRITTEN |= {repr(word): f'"{word}"' for word in ("wide", "large", "mha", "yes please", "sgd")}


@pytest.mark.parametrize(
    ("section", "field", "value", "allowed"),
    [
        ("model", "dim", "wide", "integer >= 1"),
        ("model", "dim", "128", "integer >= 1"),
        ("model", "dim", True, "integer >= 1"),
        ("model", "dim", 0, "integer >= 1"),
        ("model", "dim", 12.5, "integer >= 1"),
        ("model", "dim", None, "integer >= 1"),
        ("model", "dim", [128], "integer >= 1"),
        ("model", "dim", {"of": 128}, "integer >= 1"),
        ("model", "vocab_size", "large", "integer >= 1 or auto"),
        ("model", "attention", "mha", "gqa | mla"),
        ("model", "tie_embeddings", "yes please", "true or false"),
        ("model", "tie_embeddings", 1, "true or false"),
        ("run", "name", 7, "text"),
        ("run", "seed", -1, "integer >= 0"),
        ("depth", "mean", 0.5, "number >= 1 or null"),
        ("optim", "name", "sgd", "adamw | muon"),
        ("optim", "momentum", 1.0, "number >= 0 < 1"),
        ("optim", "lr", 0, "number > 0"),
        ("optim", "lr", False, "number > 0"),
        ("optim", "lr", float("nan"), "number > 0"),
        ("optim", "lr", float("inf"), "number > 0"),
        ("optim", "warmup", 1.5, "number >= 0 <= 1"),
        ("optim", "betas", [0.9], "list of 2: number >= 0 < 1, number >= 0 < 1"),
        ("optim", "betas", [0.9, 1.0], "list of 2: number >= 0 < 1, number >= 0 < 1"),
        ("eval", "loops", [1, 0], "list of (integer >= 1)"),
        ("eval", "loops", 4, "list of (integer >= 1)"),
        ("data", "path", 3, "text or list of (text) or null"),
    ],
)
def test_bad_value_names_path_value_and_what_is_allowed(section: str, field: str, value: Any, allowed: str) -> None:
    sections = {"train": {"steps": 10}} | {section: {field: value}}
    (line,) = problems(sections)
    assert line.startswith(f"{section}.{field}: got ")
    assert line.endswith(f"; allowed: {allowed}")
    assert f"got {WRITTEN.get(repr(value), value)}; " in line


@pytest.mark.parametrize(
    ("data", "path", "nearest"),
    [
        ({"modle": {}}, "modle", "model"),
        ({"model": {"n_head": 4}}, "model.n_head", "n_heads"),
        ({"depth": {"curriculum": {"shap": "linear"}}}, "depth.curriculum.shap", "shape"),
        ({"lr": 1e-3}, "lr", "optim.lr"),
        ({"data": {"lr": 1e-3}}, "data.lr", "optim.lr"),
        ({"log": {"project": "x"}}, "log.project", "log.wandb.project"),
    ],
)
def test_unknown_name_suggests_the_nearest(data: dict[str, Any], path: str, nearest: str) -> None:
    assert problem(**data) == f"{path}: unknown; did you mean {nearest}?"


def test_unknown_name_like_no_other_lists_the_valid_ones() -> None:
    line = problem(checkpoint={"zzz": 1})
    assert line == "checkpoint.zzz: unknown; allowed: every, keep, keep_every, asynchronous, dir"


def test_section_that_is_no_mapping() -> None:
    assert problem(depth=3).startswith("depth: got 3; allowed: a mapping of mean, backprop")


def test_unknown_preset_suggests_the_nearest_and_hides_what_follows_from_it() -> None:
    # Whether 5 heads are too many depends on what preset was meant.
    line = problem(model={"preset": "mythos_smal", "attention": "gqa", "n_heads": 5})
    assert line == 'model.preset: got "mythos_smal"; did you mean mythos_small?'


# --- fields against each other

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
    ({"model": {"preset": "dense_140m", "lanes": 2}}, ("model.lanes", "model.injection")),
    ({"model": {"injection": "linear", "lanes": 2}}, ("model.lanes", "model.injection")),
    ({"model": {"lanes": 2}, "depth": {"backprop": 1}}, ("model.lanes", "depth.backprop")),
    ({"model": {"preset": "dense_140m", "loops": 2}}, ("model.injection", "model.loops")),
    ({"model": {"preset": "dense_140m", "lora_rank": 4}}, ("model.injection", "model.lora_rank")),
    ({"model": {"preset": "dense_140m", "loop_embedding": True}}, ("model.injection", "model.loop_embedding")),
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


# --- files and overrides


def test_duplicate_keys_are_reported_with_their_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  steps: 10\nmodel:\n  dim: 128\n  loops: 2\n  dim: 256\ntrain:\n  steps: 20\n")
    with pytest.raises(MythosError) as caught:
        load_config(path)
    assert "2 problems" in str(caught.value)
    assert "model.dim: given again in line 6" in str(caught.value)
    assert "train: given again in line 7" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"# train:\n", "empty"),
        (b"- a\n- b\n", "mapping"),
        (b"just text", "mapping"),
        (b"train: [1, 2", "not valid YAML"),
        (b"train:\n\tsteps: 1", "not valid YAML"),
        (b"run: {name: 2024-13-45}", "not valid YAML"),
        (b"\xff\xfe\x00", "not valid YAML"),
    ],
)
def test_unusable_file(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(MythosError, match=says) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(MythosError, match="cannot be read"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(MythosError, match=r"a folder without config\.yaml"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "section", "field", "expected"),
    [
        ("optim.lr=3e-4", "optim", "lr", 3e-4),
        ("optim.lr=1", "optim", "lr", 1.0),
        ("train.tokens=1e9", "train", "tokens", 10**9),
        ("train.tokens=1.5e9", "train", "tokens", 1_500_000_000),
        ("train.tokens=2_000", "train", "tokens", 2000),
        ("optim.betas=[0.8, 1e-1]", "optim", "betas", (0.8, 0.1)),
        ("eval.loops=[1,4]", "eval", "loops", [1, 4]),
        ("depth.mean=none", "depth", "mean", None),
        ("depth.mean=null", "depth", "mean", None),
        ("depth.mean=4.5", "depth", "mean", 4.5),
        ("depth.curriculum.shape=none", "depth", "curriculum", {"shape": "none", "over": 0.5, "start": 1.0}),
        ("depth.curriculum={start: 2}", "depth", "curriculum", {"shape": "linear", "over": 0.5, "start": 2.0}),
        ("model.vocab_size=auto", "model", "vocab_size", "auto"),
        ("model.vocab_size=8e3", "model", "vocab_size", 8000),
        ("run.name=7", "run", "name", "7"),
        ("run.name=2024-01-02", "run", "name", "2024-01-02"),
        ("run.name=a=b", "run", "name", "a=b"),
        ("data.validation.path=*.txt", "data", "validation", {"path": "*.txt", "fraction": 0.01}),
        ("train.compile=true", "train", "compile", True),
    ],
)
def test_override(tmp_path: Path, override: str, section: str, field: str, expected: Any) -> None:
    path = tmp_path / "run.yaml"
    data = {"train": {"steps": 10}, "depth": {"mean": 6, "curriculum": {"shape": "linear", "over": 0.5}}}
    path.write_text(yaml.safe_dump(data))
    extra = ["train.steps=null"] if "tokens" in override else []
    value = getattr(getattr(load_config(path, [override, *extra]), section), field)
    value = value.model_dump() if isinstance(value, Section) else value
    assert value == expected
    assert type(value) is type(expected)


def test_last_override_wins_and_sections_may_be_empty(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 1}\noptim:\ndepth: {curriculum: &c {over: 0.5}, backprop_curriculum: *c}\n")
    config = load_config(path, ["train.steps=2", "train.steps=3", "optim.lr=1e-2", "depth.curriculum.over=0.1"])
    assert config.train.steps == 3
    assert config.optim.lr == 0.01
    assert (config.depth.curriculum.over, config.depth.backprop_curriculum.over) == (0.1, 0.5)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps", "steps: not an override; give key.path=value"),
        ("=3", "=3: not an override"),
        ("train..steps=3", "train..steps=3: not an override"),
        ("--train.steps=3", "--train: unknown; did you mean train?"),
        ("train.stps=3", "train.stps: unknown; did you mean steps?"),
        ("optim.lr.peak=3", "optim.lr: is not a section, so optim.lr.peak=3 cannot be set"),
        ("run.seed.value=3", "run.seed: got {value: 3}; allowed: integer >= 0"),
    ],
)
def test_bad_override(tmp_path: Path, override: str, says: str) -> None:
    (line,) = problems({"train": {"steps": 10}, "optim": {"lr": 0.1}}, (override,), tmp_path / "run.yaml")
    assert line.startswith(says)


# --- preset, round trip, derived values


def test_preset_gives_defaults_that_fields_override() -> None:
    config = build(model={"preset": "mythos_1b", "dim": 1024, "vocab_size": "auto"})
    assert (config.model.dim, config.model.vocab_size) == (1024, "auto")
    assert (config.model.n_experts, config.model.expert_dim, config.model.loops) == (64, 2048, 16)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configuration_loads_and_round_trips(tmp_path: Path, path: Path) -> None:
    config = load_config(path)
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert config.run.name == path.stem


def test_saved_file_has_every_field_and_survives_awkward_text(tmp_path: Path) -> None:
    config = build(
        run={"name": "1e3", "dir": "ä: #'\"\n"},
        model={"preset": "dense_140m"},
        optim={"lr": 1e-16, "betas": [0, 0.5]},
        eval={"prompts": ["null", "", " x"]},
    )
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config

    def fields(section: type[Section]) -> dict[str, Any]:
        return {
            name: fields(field.annotation)
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
            else ({} if field.default == {} else None)
            for name, field in section.model_fields.items()
        }

    def names(data: Any) -> Any:
        return {key: names(value) for key, value in data.items()} if isinstance(data, dict) else None

    assert names(yaml.safe_load((tmp_path / "saved.yaml").read_text())) == fields(Config)


def test_promised_configurations_are_shipped() -> None:
    promised = {"quickstart", "debug", "fineweb-edu-1b", "fineweb-edu-3b", "fineweb-edu-10b"}
    assert {path.stem for path in CONFIGS} >= promised


def test_derived_values() -> None:
    config = build(run={"name": "x"}, depth={"mean": 4.5})
    assert config.run_dir == Path("runs/x")
    assert build(run={"dir": "/a/b"}).run_dir == Path("/a/b")
    assert (config.depth_mean, config.depth_backprop, config.depth_maximum) == (4.5, 3, 9)
    assert isinstance(config.depth_mean, float)
    default = build()
    assert (default.depth_mean, default.depth_backprop, default.depth_maximum) == (8.0, 4, 16)
    explicit = build(depth={"mean": 4, "backprop": 1, "maximum": 5})
    assert (explicit.depth_mean, explicit.depth_backprop, explicit.depth_maximum) == (4.0, 1, 5)
    assert default.tokens_per_step == 64 * 1024
    assert default.train_steps == 10
    assert build(train={"tokens": 64 * 1024 * 3}).train_steps == 3
    assert build(train={"tokens": 64 * 1024 * 3 + 1}).train_steps == 4
    assert default.schedule_steps == 10
    assert build(optim={"schedule_steps": 7}).schedule_steps == 7
    with pytest.raises(MythosError, match=r"train\.steps, train\.tokens"):
        _ = Config().train_steps


def test_initial_injection_backpropagates_through_all_loops_by_default(tmp_path: Path) -> None:
    initial = {"injection": "initial", "loops": 4}
    assert build(model=initial).depth_backprop == build(model=initial).depth_maximum == 8
    assert build(model=initial, depth={"maximum": 6}).depth_backprop == 6
    assert build(model=initial, depth={"sampling": "fixed"}).depth_backprop == 4
    # The injection of a run that starts from a model on a disk is that model's.
    save_config(build(model=initial), tmp_path / "config.yaml")
    start = {"steps": 10, "init_from": str(tmp_path)}
    assert build(train=start).depth_backprop == 8
    line = problem(train=start, depth={"backprop": 4})
    assert line.startswith(
        "model.injection, depth.backprop, model.loops: got initial, 4 and sequences of up to 8 loops;"
    )


def test_fixed_depth_model_is_evaluated_and_drawn_at_one_loop() -> None:
    config = build(model={"preset": "dense_140m"})
    assert config.eval.loops == [1]
    assert (config.depth_mean, config.depth_backprop, config.depth_maximum) == (1.0, 1, 1)
    assert build(model={"preset": "looped_140m"}).eval.loops == [1, 4, 8, 16]


def test_configuration_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build().optim.lr = 1.0


# --- help


def test_help_lists_sections_and_where_to_read_on() -> None:
    text = describe()
    for section in Config.model_fields:
        assert f"\n  {section} " in text
    assert "mythos/config/sections.py" in text
    assert "mythos/model/config.py" in text


def test_help_of_a_section_shows_every_field_with_type_default_and_meaning() -> None:
    text = describe("model")
    for name, field in ModelConfig.model_fields.items():
        assert f"\nmodel.{name}: " in text
        assert field.description
        assert field.description.splitlines()[0] in text
    assert "model.rope_theta: number > 1 (default 10000.0)" in text
    assert 'model.attention: gqa | mla (default "mla")' in text
    assert "depth.curriculum.shape: none | linear" in describe("depth")
    with pytest.raises(MythosError, match="did you mean model"):
        describe("modle")


# --- hostile values


HUGE = [
    ("model.dim=1e15", "integer >= 1 <= 1048576"),
    ("model.vocab_size=1e18", "integer >= 1 <= 2000000000 or auto"),
    ("model.core_layers=100000", "integer >= 1 <= 1024"),
    ("model.n_experts=1e9", "integer >= 1 <= 65536"),
    ("model.loops=1e9", "integer >= 1 <= 65536"),
    ("model.context_length=1e30", "integer >= 1 <= 2000000000"),
    ("model.norm_eps=1e300", "number >= 1e-30 <= 1"),
    ("model.norm_eps=1e-300", "number >= 1e-30 <= 1"),
    ("model.rope_theta=1e308", "number > 1 <= 1e+15"),
    ("depth.mean=1e300", "number >= 1 <= 65536 or null"),
    ("depth.mean=1e400", "number >= 1 <= 65536 or null"),
    ("depth.curriculum.start=1e300", "number >= 1 <= 65536"),
    ("optim.lr=1e308", "number > 0 <= 1e+30"),
    ("optim.weight_decay=1e308", "number >= 0 <= 1000000.0"),
    ("optim.clip=1e308", "number >= 0 <= 1e+30"),
    ("train.steps=1e30", "integer >= 1 <= 1e+15 or null"),
    ("train.steps=" + "9" * 400, "integer >= 1 <= 1e+15 or null"),
    ("train.tokens=1e30", "integer >= 1 <= 1e+15 or null"),
    ("train.global_batch=1e15", "integer >= 1 <= 16777216"),
    ("run.seed=1e30", "integer >= 0 <= 4294967295"),
    ("data.streams=1e15", "integer >= 1 <= 65536"),
    ("data.workers=1e15", "integer >= 0 <= 65536"),
    ("data.patience=1e300", "number > 0 <= 1000000000.0"),
    ("parallel.timeout=1e300", "number > 0 <= 1000000000.0"),
    ("eval.loops=[1, 1e15]", "list of (integer >= 1 <= 65536)"),
    (f"train.max_time={'9' * 400}s", "text such as 90s or 3h30m or null"),
    ("train.max_time=\u0661s", "text such as 90s or 3h30m or null"),
    ("optim.lr=.inf", "number > 0"),
    ("optim.lr=-.inf", "number > 0"),
    ("optim.lr=.nan", "number > 0"),
]


@pytest.mark.parametrize(("override", "allowed"), HUGE, ids=lambda value: value[:40])
def test_a_number_beyond_all_sense_is_reported_with_its_field(tmp_path: Path, override: str, allowed: str) -> None:
    (line,) = problems({"train": {"steps": 10}}, (override,), tmp_path / "run.yaml")
    assert line.startswith(f"{override.partition('=')[0]}: got ") and line.endswith(f"; allowed: {allowed}")


@pytest.mark.parametrize("text", ["0100", "0x10", "0o17", "0b11", "1:30", "-0100"])
def test_numbers_are_decimal(tmp_path: Path, text: str) -> None:
    """YAML 1.1 reads them as 64, 16, 15, 3 and 90."""
    rule = "allowed: integer >= 1 or null, in decimal and without leading zeros"
    (line,) = problems({"train": {}}, (f"train.steps={text}",), tmp_path / "run.yaml")
    assert line == f'train.steps: got "{text}"; {rule}'
    (tmp_path / "run.yaml").write_text(f"train: {{steps: {text}}}")
    with pytest.raises(MythosError, match=rule):
        load_config(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    ("written", "read"), [("1_000", 1000), ("+7", 7), ("10.", 10), ("1e3", 1000), ("1.5e+3", 1500), ("2.0", 2)]
)
def test_decimal_numbers_are_read(tmp_path: Path, written: str, read: int) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train: {{steps: {written}}}\nrun: {{name: 0100}}")
    config = load_config(path)
    assert config.train.steps == read and config.run.name == "0100"
    assert load_config(path, [f"train.steps={written}"]) == config


def levels(count: int) -> str:
    return "[" * count + "]" * count


BOMB = "{a0: &a0 [x, x], " + ", ".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)) + "}"
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: !!int ''", "cannot be read as int"),
        ("train: {steps: !!int 0100}", "cannot be read as int"),
        ("train: {steps: !!int x}", "cannot be read as int"),
        ("train: {steps: !!float 1:30.5}", "cannot be read as float"),
        ("train: {compile: !!bool perhaps}", "cannot be read as bool"),
        ("run: {name: !!timestamp foo}", "cannot be read as timestamp"),
        ("run: {name: !!binary é}", "binary"),
        ("run: {name: !!binary YQ==}", "run.name: got b'a'; allowed: text"),
        ("run: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("run: !!python/name:os.system", "could not determine a constructor"),
        ("run: !!set {name}", "allowed: a mapping"),
        ("? [a, {b: c}]\n: 1", "unhashable"),
        ("run: &a {name: *a}", "an alias refers to the value that contains it"),
        ("&a {run: 1, ? *a : 1}", "an alias refers to the value that contains it"),
        ("run: &a {<<: *a}", "an alias refers to the value that contains it"),
        (BOMB, "stands for more than 100,000 values"),
        (MERGE_BOMB, "stands for more than 100,000 values"),
        (f"run: {levels(80)}", "nested more than 64 deep"),
        (f"run: {levels(100_000)}", "nested too deeply"),
        ("? " * 10_000, "nested too deeply"),
        ("train: {steps: " + "9" * 5000 + "}", "cannot be read as int"),
        ("run: {name: a\0b}", "not valid YAML"),
        ('run: {name: "a\\0b"}', 'run.name: got "a\\\\u0000b"; allowed: text without the character NUL'),
        ('run: {dir: "a\\ud800b"}', 'run.dir: got "a\\\\ud800b"; allowed: text without'),
        ('eval: {prompts: ["\\ud800"]}', r"eval.prompts: got .* allowed: text without"),
        ('data: {kind: mixture, sources: {"\\0": {}}}', r"data.sources: got the names .* allowed: text without"),
        ('"\\ud800": 1', "unknown"),
        ("run: {name: " + "x" * 600_000 + "}", "more than 524,288 bytes"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path: Path, text: str, says: str) -> None:
    """In one error, within a second or so, that can be printed."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(MythosError, match=says) as caught:
        load_config(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 5000
    str(caught.value).encode("utf-8", "backslashreplace")


@pytest.mark.parametrize(
    "override",
    [
        "run=&a {name: *a}",
        "run=" + levels(5000),
        "data=" + BOMB,
        ".".join(["run"] * 5000) + "=1",
        "run.dir=a\0b",
        "run.dir=a\udcffb",
        "run.\udcff=1",
        "train.steps=!!int ''",
        "train.steps=!!timestamp foo",
        "x" * 100_000 + "=1",
    ],
    ids=lambda value: ascii(value[:30]),
)
def test_hostile_overrides_are_refused(tmp_path: Path, override: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 1}")
    with pytest.raises(MythosError) as caught:
        load_config(path, [override])
    assert len(str(caught.value)) < 2000


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 7}", encoding="utf-8-sig")
    assert load_config(path).train.steps == 7


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    """Opening a FIFO would wait for whoever writes to it."""
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", Path("/dev/zero")):
        with pytest.raises(MythosError, match="cannot be read \\(it is not a regular file"):
            load_config(path)


def test_many_problems_give_a_message_of_bounded_length() -> None:
    data = {f"field{n}": n for n in range(20_000)}
    with pytest.raises(MythosError, match="20000 problems") as caught:
        config_from_dict({"train": {"steps": 1}, "model": data})
    assert len(str(caught.value).split("\n")) == 52


def test_aliases_are_values(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 1}\ndepth: {curriculum: &c {over: 0.5}, backprop_curriculum: {<<: *c, start: 2.0}}")
    depth = load_config(path).depth
    assert (depth.curriculum.over, depth.backprop_curriculum.over, depth.backprop_curriculum.start) == (0.5, 0.5, 2.0)


# --- conveniences


def test_one_name_stands_for_a_list(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 1}\nlog: {trackers: tensorboard}")
    assert load_config(path).log.trackers == ["tensorboard"]
    assert load_config(path, ["log.trackers=mlflow", "eval.prompts=The"]).log.trackers == ["mlflow"]
    assert load_config(path, ["eval.prompts=The"]).eval.prompts == ["The"]
    assert load_config(path, ["data.kind=files", "data.path=*.txt"]).data.path == "*.txt"


@pytest.mark.parametrize(
    ("in_file", "override", "expected"),
    [
        ("{steps: 70}", "train.tokens=1e6", (None, 10**6)),
        ("{tokens: 1000000}", "train.steps=7", (7, None)),
    ],
)
def test_an_override_replaces_the_field_that_it_excludes(
    in_file: str,
    override: str,
    expected: tuple[int | None, int | None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train: {in_file}")
    config = load_config(path, [override])
    assert (config.train.steps, config.train.tokens) == expected
    (record,) = caplog.records
    replaced = in_file.strip("{}").replace(": ", "=")
    assert record.getMessage() == f"{override} on the command line replaces train.{replaced} of {path}"


@pytest.mark.parametrize(
    "overrides", [["train.tokens=null"], ["train.steps=5"], ["train.steps=null", "train.tokens=9"]]
)
def test_nothing_is_replaced_where_nothing_is_excluded(
    overrides: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("train: {steps: 70}")
    load_config(path, overrides)
    assert not caplog.records


def test_both_lengths_on_the_command_line_are_refused(tmp_path: Path) -> None:
    (line,) = problems({"train": {"steps": 1}}, ("train.steps=3", "train.tokens=9"), tmp_path / "run.yaml")
    assert line.startswith("train.steps, train.tokens: ")


def test_tokens_bring_their_tokenizer() -> None:
    tokens = {"kind": "tokens", "path": "some/tokens"}
    assert build(data=tokens).tokenizer.name == "some/tokens/tokenizer"
    mixture = {"kind": "mixture", "sources": {"web": {"kind": "embedded"}, "shards": tokens}}
    assert build(data=mixture).tokenizer.name == "some/tokens/tokenizer"
    assert build(data=tokens, tokenizer={"name": "gpt2"}).tokenizer.name == "gpt2"
    assert build(data={"kind": "embedded"}).tokenizer.name == "bpe"
    assert "leave out tokenizer.name" in problem(data=tokens, tokenizer={"name": "bpe"})
