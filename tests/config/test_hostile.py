"""Values, YAML and overrides that no configuration has."""

import os
from pathlib import Path

import pytest

from mythos.config.loading import config_from_dict, load_config
from mythos.errors import MythosError
from tests.config.problems import problems

HUGE = [
    ("model.dim=1e15", "integer >= 1 and <= 1048576"),
    ("model.vocab_size=1e18", "integer >= 1 and <= 2000000000 or auto"),
    ("model.core_layers=100000", "integer >= 1 and <= 1024"),
    ("model.n_experts=1e9", "integer >= 1 and <= 65536"),
    ("model.loops=1e9", "integer >= 1 and <= 65536"),
    ("model.context_length=1e30", "integer >= 1 and <= 2000000000"),
    ("model.norm_eps=1e300", "number >= 1e-30 and <= 1"),
    ("model.norm_eps=1e-300", "number >= 1e-30 and <= 1"),
    ("model.rope_theta=1e308", "number > 1 and <= 1e+15"),
    ("depth.mean=1e300", "number >= 1 and <= 65536 or null"),
    ("depth.mean=1e400", "number >= 1 and <= 65536 or null"),
    ("depth.curriculum.start=1e300", "number >= 1 and <= 65536"),
    ("optim.lr=1e308", "number > 0 and <= 1e+30"),
    ("optim.weight_decay=1e308", "number >= 0 and <= 1000000.0"),
    ("optim.clip=1e308", "number >= 0 and <= 1e+30"),
    ("train.steps=1e30", "integer >= 1 and <= 1e+15 or null"),
    ("train.steps=" + "9" * 400, "integer >= 1 and <= 1e+15 or null"),
    ("train.tokens=1e30", "integer >= 1 and <= 1e+15 or null"),
    ("train.global_batch=1e15", "integer >= 1 and <= 16777216"),
    ("run.seed=1e30", "integer >= 0 and <= 4294967295"),
    ("data.streams=1e15", "integer >= 1 and <= 65536"),
    ("data.workers=1e15", "integer >= 0 and <= 65536"),
    ("data.patience=1e300", "number > 0 and <= 1000000000.0"),
    ("parallel.timeout=1e300", "number > 0 and <= 1000000000.0"),
    ("eval.loops=[1, 1e15]", "list of (integer >= 1 and <= 65536)"),
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
