"""Reading configurations: errors of single fields, files, overrides, presets, help."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from mythos.config.loading import describe, load_config, save_config
from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.model.config import ModelConfig
from mythos.section import Section
from tests.config.problems import build, problem, problems

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


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
        ("optim", "momentum", 1.0, "number >= 0 and < 1"),
        ("optim", "lr", 0, "number > 0"),
        ("optim", "lr", False, "number > 0"),
        ("optim", "lr", float("nan"), "number > 0"),
        ("optim", "lr", float("inf"), "number > 0"),
        ("optim", "warmup", 1.5, "number >= 0 and <= 1"),
        ("optim", "betas", [0.9], "list of 2: number >= 0 and < 1, number >= 0 and < 1"),
        ("optim", "betas", [0.9, 1.0], "list of 2: number >= 0 and < 1, number >= 0 and < 1"),
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
    promised = {"quickstart", "debug", "fineweb-edu-1b", "fineweb-edu-3b", "fineweb-edu-10b", "fineweb-edu-50b"}
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
