"""scripts/test_with_torch.sh: the packages it installs, the tests it runs, and its last line."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "test_with_torch.sh"
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, shutil, sys
arguments = sys.argv[1:]
if arguments[0] == "-c":
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
if "-r" in arguments:
    arguments.append(pathlib.Path(arguments[arguments.index("-r") + 1]).read_text())
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(arguments) + "\\n")
if arguments[:2] == ["-m", "venv"]:
    os.makedirs(arguments[2] + "/bin")
    shutil.copy(sys.argv[0], arguments[2] + "/bin/python")
if arguments[:2] == ["-m", "pytest"]:
    print("FAILED tests/test_one.py - took 3 in 2s\\n2 failed, 5 passed, 1 skipped in 1.25s")
    sys.exit(1)
"""
"""A fake interpreter that records its arguments."""


def run(directory: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    stand_in, record = directory / "python", directory / "record"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "RECORD": str(record), "TMPDIR": str(directory)}
    command = [str(SCRIPT), *arguments, "--python", str(stand_in)]
    if "--" in arguments:
        command = [str(SCRIPT), "--python", str(stand_in), *arguments]
    done = subprocess.run(command, env=environment, cwd=directory, capture_output=True, text=True, timeout=60)
    calls = record.read_text().splitlines() if record.exists() else []
    return done, [json.loads(line) for line in calls]


def test_torch_is_the_one_asked_for_and_all_else_the_projects(tmp_path: Path) -> None:
    done, (venv, install, editable, tests) = run(
        tmp_path, "2.14", "--with", "transformers==5.10.*", "--", "tests/model", "-k", "a or b"
    )
    assert venv[:2] == ["-m", "venv"]
    assert install[:4] == ["-m", "pip", "install", "torch==2.14.*"] and "transformers==5.10.*" in install
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    assert [line for line in wanted if not line.startswith("torch>")] == install[-1].splitlines()
    assert editable == ["-m", "pip", "install", "--no-deps", "-e", str(ROOT)]
    assert tests == ["-m", "pytest", "tests/model", "-k", "a or b"]
    assert done.returncode == 1
    last = done.stdout.splitlines()[-1]
    assert last.startswith("torch ") and last.endswith(": 2 failed, 5 passed, 1 skipped in 1.25s")
    assert not Path(venv[2]).exists()


def test_an_environment_is_kept_and_used_again(tmp_path: Path) -> None:
    folder = str(tmp_path / "kept")
    _, first = run(tmp_path, "2.11.0", "--environment", folder)
    assert first[1][3] == "torch==2.11.0" and first[-1] == ["-m", "pytest"]
    _, calls = run(tmp_path, "2.11.0", "--environment", folder)
    assert [call[1] for call in calls] == ["venv", "pip", "pip", "pytest", "pip", "pip", "pytest"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "VERSION: got ''"),
        (("2.x",), "VERSION: got '2.x'"),
        (("2.11", "tests/model"), "got tests/model after VERSION"),
        (("2.11", "--with", ""), "--with: no value given"),
    ],
)
def test_refusals(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    done, calls = run(tmp_path, *arguments)
    assert done.returncode == 2 and message in done.stderr and not calls
