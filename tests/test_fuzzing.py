"""Reading any file gives a result or a MythosError, whatever is in it; `scripts/fuzz.py` tries more inputs."""

import itertools
import logging
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mythos.errors import MythosError
from scripts import fuzz
from tests.fuzzing import KINDS, Edit, Outcome, Target, build_targets, draw, edited, try_input

NUMBERS = itertools.count()
EDITS = st.lists(
    st.builds(Edit, st.sampled_from(KINDS), st.floats(0, 1, exclude_max=True), st.integers(0, 2**16 - 1)),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> Iterator[list[Target]]:
    targets = build_targets(tmp_path_factory.mktemp("targets"))
    logging.disable(logging.WARNING)  # readers warn about what they skip
    yield targets
    logging.disable(logging.NOTSET)


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(choice=st.integers(0, 2**16), edits=EDITS)
def test_damaged_files_are_read_or_refused(
    choice: int, edits: list[Edit], targets: list[Target], tmp_path: Path
) -> None:
    target = targets[choice % len(targets)]
    file = target.files[choice // len(targets) % len(target.files)]
    outcome = try_input(target, file, edits, tmp_path / f"copy{next(NUMBERS)}")
    assert outcome.kind != "fault", f"{target.name}: {file}: {edits}\n{outcome.message}"


# The judge of outcomes


def judged(tmp_path: Path, read: Callable[[Path], object]) -> Outcome:
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "a").write_bytes(b"text")
    return try_input(Target("a", tmp_path / "sound", ("a",), read), "a", [Edit("flip", 0, 0)], tmp_path / "copy")


class Panic(BaseException):
    """Like the exception of a panic in a Rust extension."""


def busy(_: Path) -> None:
    began = time.process_time()
    while time.process_time() < began + 0.3:
        pass


def test_outcomes_are_distinguished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(error: BaseException) -> Callable[[Path], object]:
        def read(copy: Path) -> None:
            assert (copy / "a").read_bytes() == b"uext"
            raise error

        return read

    expected = [
        (lambda copy: None, "result", ""),
        (raising(MythosError("no")), "refusal", "no"),
        (raising(MythosError("")), "fault", "MythosError"),
        (raising(KeyError("x")), "fault", "KeyError: 'x'"),
        (raising(RecursionError()), "fault", "RecursionError"),
        (raising(Panic("panicked")), "fault", "panicked"),
        (lambda copy: bytearray(300 * 2**20), "fault", " MB"),
    ]
    for number, (read, kind, part) in enumerate(expected):
        folder = tmp_path / str(number)
        folder.mkdir()
        outcome = judged(folder, read)
        assert (outcome.kind, part in outcome.message) == (kind, True), outcome.message
    monkeypatch.setattr("tests.fuzzing.MOST_SECONDS", 0.2)
    (tmp_path / "slow").mkdir()
    assert re.match(r"took 0\.[3-9] s", judged(tmp_path / "slow", busy).message)
    with pytest.raises(KeyboardInterrupt):
        (tmp_path / "stop").mkdir()
        judged(tmp_path / "stop", raising(KeyboardInterrupt()))


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (Edit("flip", 0.5, 0), b'{"a": Z1, 2]}'),
        (Edit("insert", 0, 0), b'\0{"a": [1, 2]}'),
        (Edit("delete", 0.5, 1), b'{"a": , 2]}'),
        (Edit("double", 0.5, 1), b'{"a": [1[1, 2]}'),
        (Edit("cut", 0.5, 0), b'{"a": '),
        (Edit("word", 0.5, 6), b'{"a": null, 2]}'),
        (Edit("value", 0.5, 0), b'{"a": [null, 2]}'),
        (Edit("value", 0.9, 1), b'{"a": [1, true]}'),
        (Edit("key", 0, 2), b'{"x": [1, 2]}'),
    ],
)
def test_edits(edit: Edit, expected: bytes) -> None:
    assert edited(b'{"a": [1, 2]}', [edit]) == expected


def test_values_of_a_safetensors_header_are_replaced() -> None:
    header = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    content = len(header).to_bytes(8, "little") + header + b"\0\0\0\0"
    changed = edited(content, [Edit("value", 0, 3)])
    assert changed == (9).to_bytes(8, "little") + b'{"w": -1}' + b"\0\0\0\0"


def test_an_input_is_a_function_of_seed_and_number(targets: list[Target]) -> None:
    drawn = [[draw(targets, f"{seed}/{number}") for number in range(400)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {target.name for target, _, _ in drawn[0]} == {target.name for target in targets}
    kinds = Counter(edit.kind for _, _, edits in drawn[0] for edit in edits)
    assert set(kinds) == set(KINDS)


def test_the_script_counts_and_reports(
    targets: list[Target], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def read(copy: Path) -> None:
        content = (copy / "run.yaml").read_bytes()
        if b"\0" in content:
            raise ValueError("NUL")
        if len(content) % 2:
            raise MythosError("odd")

    target = next(target for target in targets if target.name == "configuration")
    monkeypatch.setattr("tests.fuzzing.build_targets", lambda _: [Target("odd", target.folder, ("run.yaml",), read)])
    assert fuzz.main(["--inputs", "120", "--seed", "3"]) == 1
    printed = capsys.readouterr().out
    row = next(line for line in printed.split("\n") if line.startswith("| odd"))
    inputs, results, refusals, faults = (int(cell) for cell in row.split("|")[2:6])
    assert inputs == 120 == results + refusals + faults and results and refusals and faults
    assert printed.count("FAULT ") == faults
    first = int(printed.partition("FAULT ")[2].partition(":")[0])
    assert fuzz.main(["--inputs", "1", "--first", str(first), "--seed", "3"]) == 1
    assert "ValueError: NUL" in capsys.readouterr().out
    monkeypatch.setattr(
        "tests.fuzzing.build_targets", lambda _: [Target("good", target.folder, ("run.yaml",), lambda _: 1)]
    )
    assert fuzz.main(["--inputs", "3"]) == 0
