"""What the command lines share."""

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from mythos.cli import COMMANDS, main
from mythos.cli.common import check_least, exit_status, positive_numbers, quiet_without_reader, whole_numbers
from mythos.errors import MythosError
from mythos.files.local import writing


def failing(error: BaseException) -> None:
    raise error


def test_how_a_command_ends(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(lambda: print("text")) == 0
    assert capsys.readouterr() == ("text\n", "")
    assert exit_status(lambda: failing(MythosError("--loops: got 0"))) == 1
    assert capsys.readouterr() == ("", "error: --loops: got 0\n")
    assert exit_status(lambda: failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "\nstopped\n")
    with pytest.raises(ZeroDivisionError):  # a defect of ours is not hidden
        exit_status(lambda: failing(ZeroDivisionError()))


def test_only_standard_output_may_lose_its_reader(capfd: pytest.CaptureFixture[str]) -> None:
    """A broken pipe to a worker, say, is a defect and not hidden."""
    with pytest.raises(BrokenPipeError):
        quiet_without_reader(lambda: failing(BrokenPipeError()))
    assert quiet_without_reader(lambda: 3) == 3


def test_numbers_keep_the_order_of_the_command_line() -> None:
    assert whole_numbers("--loops", "4,1,1, 2") == [4, 1, 1, 2]
    assert positive_numbers("--thresholds", "0.2,1e-3") == [0.2, 1e-3]


@pytest.mark.parametrize("text", ["0", "-1", "1,0", "2,-3", "a", "", "1,", "1.5", "1e3"])
def test_what_is_no_whole_number_is_refused(text: str) -> None:
    message = f"--loops: got {text!r}; give whole numbers of at least 1, e.g. 8 or 1,2,4"
    with pytest.raises(MythosError) as caught:
        whole_numbers("--loops", text)
    assert str(caught.value) == message
    with pytest.raises(MythosError, match="; give auto, or whole numbers of at least 1"):
        whole_numbers("--loops", text, besides="auto, or ")


@pytest.mark.parametrize("text", ["0", "-0.1", "0.1,0", "nan", "x", "", "0.1,"])
def test_what_is_no_number_above_zero_is_refused(text: str) -> None:
    with pytest.raises(MythosError, match=r"--thresholds: got .*; give numbers above 0"):
        positive_numbers("--thresholds", text)


def test_least_values() -> None:
    options = Namespace(tokens=1, top_k=0, micro_batch=None)
    check_least(options, tokens=1, top_k=0, micro_batch=1)
    with pytest.raises(MythosError, match=r"^--top-k: got 0; give at least 1$"):
        check_least(options, tokens=1, top_k=1)


def test_what_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with (
        pytest.raises(MythosError, match=r"there cannot be written: .*No space left.* with --out"),
        writing(Path("there")),
    ):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("entry", ["mythos.cli.train", "mythos.cli.generate"])
@pytest.mark.parametrize("chosen", [{}, {"OMP_WAIT_POLICY": "ACTIVE"}, {"GOMP_SPINCOUNT": "7"}, {"KMP_BLOCKTIME": "0"}])
def test_waiting_threads_sleep_unless_the_user_chose(entry: str, chosen: dict[str, str], tmp_path: Path) -> None:
    """Commands set it before they import torch, whose OpenMP reads it then."""
    (tmp_path / "config.yaml").write_text((Path(__file__).parents[2] / "configs/debug.yaml").read_text())
    program = f"""
import builtins, os, sys
before, shown = builtins.__import__, {{}}
def look(name, *rest, **more):
    if name == "torch" and not shown:
        shown.update({{k: v for k, v in os.environ.items() if k.startswith(("OMP_WAIT", "GOMP_", "KMP_"))}})
        print(sorted(shown.items()))
        os._exit(0)
    return before(name, *rest, **more)
builtins.__import__ = look
from {entry} import main
sys.exit(main(["{tmp_path}"]))
"""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_WAIT", "GOMP_", "KMP_"))}
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=clean | chosen, check=False
    )
    expected = chosen or {"GOMP_SPINCOUNT": "1000", "OMP_WAIT_POLICY": "PASSIVE"}
    assert ended.stdout.splitlines()[-1:] == [str(sorted(expected.items()))], ended.stderr


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("completion", "gpu-check")])
@pytest.mark.parametrize("argument", ["a\0b", "a\udcffb"])
def test_arguments_that_are_no_text_are_refused(name: str, argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    """By every command, as a path and as an option's value."""
    with pytest.raises(SystemExit) as caught:
        main([name, argument])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert f"argument {argument!a}: allowed: text in UTF-8" in message
    message.encode()


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        (
            "generate",
            ["--tokens", "9" * 30],
            "--tokens: got 999999999999999999999999999999; give at most",
        ),
        ("generate", ["--seed", "9" * 30], "--seed: got"),
        ("generate", ["--prefill-chunk", "9" * 30], "--prefill-chunk: got"),
        ("generate", ["--cache-loops", "9" * 30], "--cache-loops: got"),
        ("generate", ["--loops", "9" * 30], "at most 65536"),
        ("generate", ["--temperature", "nan"], "temperature: got nan"),
        ("generate", ["--temperature", "inf"], "temperature: got inf"),
        ("generate", ["--repetition-penalty", "nan"], "repetition penalty: got nan"),
        ("generate", ["--top-p", "nan"], "top-p: got nan"),
        ("generate", ["--exit-threshold", "nan"], "--exit-threshold: got nan"),
        ("sweep", ["--loops", "1,65537"], "at most 65536"),
        ("sweep", ["--sequences", "9" * 30], "--sequences: got"),
        ("sweep", ["--rules", "convergence", "--thresholds", "inf"], "numbers above 0"),
        ("evaluate", ["--limit", "9" * 30], "--limit: got"),
        ("evaluate", ["--exit-threshold", "0.1,nan"], "numbers above 0"),
        ("train", ["--dry-run", "--device-memory", "nan"], "--device-memory: got nan"),
        ("train", ["--dry-run", "--device-memory", "inf"], "--device-memory: got inf; give at most"),
        ("train", ["--dry-run", "--device-memory", "1e308"], "--device-memory: got 1e+308; give at most"),
        ("train", ["--dry-run", "--ranks", "9" * 30], "--ranks: got"),
        ("train", ["--dry-run", "--ranks", "0"], "--ranks: got 0; give at least 1"),
    ],
)
def test_numbers_that_nothing_can_be_done_with(
    name: str,
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a line that names the option, before a model is opened."""
    monkeypatch.chdir(tmp_path)
    Path("quickstart").mkdir()
    Path("quickstart/config.yaml").touch()
    assert main([name, "quickstart", *arguments]) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and says in message and message.count("\n") == 1
