"""The command `mythos`: its help, its errors, completion, and the files that package it."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import mythos
from mythos.cli import COMMANDS, GROUPS, command, main
from mythos.config.loading import load_config, packaged_configs
from tests.reports.handmade import records, write_run

ROOT = Path(__file__).parents[2]


def run(*words: str, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, **options)


def test_help_lists_every_command_in_its_group(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert main(["--help"]) == 0
    assert capsys.readouterr().out == text
    groups: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.endswith(":"):
            groups[line[:-1]] = names = []
        elif line.startswith("  "):
            names.append(line.split()[0])
    assert groups == {group: list(names) for group, names in GROUPS.items()}
    assert list(COMMANDS) == [name for names in GROUPS.values() for name in names]


def test_every_module_of_a_command_is_listed():
    modules = {path.stem for path in (ROOT / "mythos" / "cli").glob("*.py")} - {"__init__", "common"}
    assert {command(name).__name__.rpartition(".")[2] for name in COMMANDS} == modules


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    try:
        status = main([name, "--help"])
    except SystemExit as ended:
        status = ended.code
    assert status == 0
    assert capsys.readouterr().out.startswith(f"usage: mythos {name} ")
    assert command(name).parser().description.splitlines()[0].endswith(".")


def test_train_py_command_and_module_answer_alike():
    answers = [
        run(*words, "no/such.yaml", cwd=ROOT)
        for words in (["-m", "mythos", "train"], ["train.py"], ["-m", "mythos.__main__", "train"])
    ]
    assert len({(answer.returncode, answer.stdout, answer.stderr) for answer in answers}) == 1
    assert answers[0].returncode == 1 and answers[0].stderr.startswith("error: no/such.yaml")


def test_help_and_errors_come_without_torch():
    program = "import sys; from mythos.cli import main; code = main(sys.argv[1:]); print('torch' in sys.modules, code)"
    assert run("-c", program).stdout.endswith("False 0\n")
    misspelt = run("-c", program, "train", "quickstart", "train.stepss=1")
    assert misspelt.stdout == "False 1\n" and "did you mean" in misspelt.stderr


def test_options_stand_anywhere_and_what_follows_two_dashes_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (["sweep", "--", "-run"], ["sweep", "--loops", "2", "--", "-run"]):
        assert main(words) == 1
        assert capsys.readouterr().err.startswith("error: -run: no such file or folder")
    assert main(["compare", "one", "--out", "here", "two"]) == 1
    assert capsys.readouterr().err.startswith("error: one: no such file or folder")


WRONG_PATHS = """
import contextlib, io, json, sys
from mythos.cli import main

for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = main(words)
    print(json.dumps([status, "torch" in sys.modules, out.getvalue(), err.getvalue()]))
"""


def test_a_wrong_path_is_reported_without_torch(tmp_path):
    """Importing torch takes seconds."""
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.yaml").touch()
    cases = [
        (name, path, meant)
        for name in ("sweep", "generate", "evaluate", "reasoning", "report", "compare", "export")
        for path, meant in (("runs/nope", None), ("runs/mime", "runs/mine"), ("mine", "runs/mine"))
    ]
    commands = [[name, path, *(["exported"] if name == "export" else [])] for name, path, _ in cases]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    answers = run("-c", WRONG_PATHS, json.dumps(commands), cwd=tmp_path, env=environment).stdout.splitlines()
    for (name, path, meant), answer in zip(cases, map(json.loads, answers), strict=True):
        status, torch_loaded, printed, errors = answer
        assert (status, torch_loaded, printed) == (1, False, ""), name
        assert errors.startswith(f"error: {path}: no such file or folder. Give a run directory"), name
        assert (f"Did you mean {meant}?" in errors) == (meant is not None), name


LONG = ["-c", "from mythos.cli.common import *; sys.exit(quiet_without_reader(lambda: print('x' * 10**6)))"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        *(["-m", "mythos", name, "--help"] for name in COMMANDS),
        *(["-m", "mythos", *words] for words in ([], ["--version"], ["train", "--help", "depth"], ["presets"])),
        *(["-m", "mythos", *words] for words in (["configs", "quickstart"], ["completion", "bash"])),
        ["train.py", "--help"],
        LONG,
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_the_reader_of_the_output_may_stop(words):
    """`mythos train --help | head -1` ends without a traceback, whether `print` meets the error or Python's exit."""
    reader, writer = os.pipe()
    os.close(reader)
    # Every second command without a buffer, so that `print` meets the error and not the exit.
    environment = os.environ | {"PYTHONUNBUFFERED": "1" if sum(map(len, words)) % 2 else ""}
    ended = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("configs >&-", 0),
        ("configs <&- >&- 2>&-", 0),
        ("runs rm done --dir runs <&-", 1),
        ("configs quickstart >/dev/full", 1),
    ],
)
def test_standard_streams_may_be_closed_or_full(tmp_path: Path, words: str, status: int) -> None:
    write_run(tmp_path / "runs" / "done", records(1), train__steps=3)
    shell = ["bash", "-c", f"{sys.executable} -m mythos {words}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == status and len(ended.stderr.splitlines()) == status, ended.stderr
    assert ended.stderr.startswith("error: " * status)


def test_continuing_has_no_command_of_its_own(capsys):
    assert main(["resume", "runs/mine"]) == 2
    assert capsys.readouterr().err.endswith("no such command; `mythos train runs/NAME` continues a run\n")


def test_unknown_command(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: mythos trian: no such command; did you mean train?\n"


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"mythos {mythos.__version__}\n"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "mythos.__version__"}


def test_configurations_come_with_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert set(packaged_configs()) == {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert load_config("quickstart") == load_config(ROOT / "configs" / "quickstart.yaml")
    assert main(["configs", "debug"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs" / "debug.yaml").read_text()
    assert main(["configs"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(packaged_configs())
    assert main(["configs", "quickstrat"]) == 1
    assert "did you mean quickstart" in capsys.readouterr().err
    assert main(["train", "quickstrat"]) == 1
    assert "quickstrat: neither a file nor a configuration that comes with mythos" in capsys.readouterr().err


def test_a_file_comes_before_a_packaged_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("quickstart").write_text("train: {steps: 7}\n")
    assert load_config("quickstart").train_steps == 7


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in (*COMMANDS, "quickstart", "dry-run", "exit-threshold"))
    if shutil.which(shell):
        file = tmp_path / "completion"
        file.write_text(script)
        subprocess.run([shell, "-n", file], check=True)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "completion"),
    [(["tr"], "train"), (["train", "quick"], "quickstart"), (["generate", "--exit"], "--exit-threshold")],
)
def test_completion_of_bash(words, completion, capsys):
    main(["completion", "bash"])
    program = f"""{capsys.readouterr().out}
COMP_WORDS=(mythos {" ".join(words)}); COMP_CWORD={len(words)}
_shtab_mythos; echo "${{COMPREPLY[@]}}\""""
    assert completion in subprocess.run(["bash", "-c", program], capture_output=True, text=True).stdout.split()


def test_citation_follows_its_format():
    # https://github.com/citation-file-format/citation-file-format/blob/1.2.0/schema-guide.md
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"authors", "cff-version", "message", "title"} <= cited.keys()
    assert cited["cff-version"] == "1.2.0" and cited["type"] == "software"
    assert all("name" in author or {"family-names", "given-names"} <= author.keys() for author in cited["authors"])
    assert cited["version"] == mythos.__version__ and cited["license"] == "MIT"


def test_dockerfile():
    """The rules of hadolint that matter here, where neither it nor an engine may be at hand."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]
    instructions = {word: [rest for first, rest in lines if first == word] for word, _ in lines}
    (base,) = instructions["FROM"]
    assert ":" in base and not base.endswith(":latest")
    assert instructions["USER"][-1] not in ("root", "0")
    places = [word for word, _ in lines]
    assert places.index("USER") > max(place for place, word in enumerate(places) if word == "RUN")
    assert "ADD" not in instructions and "sudo" not in text
    (apt,) = [line for line in instructions["RUN"] if "apt-get install" in line]
    assert "--no-install-recommends" in apt and "--yes" in apt and "rm -rf /var/lib/apt/lists/*" in apt
    assert all("--no-cache-dir" in line for line in instructions["RUN"] if "pip install" in line)
    assert all(path.startswith("[") for path in (*instructions["ENTRYPOINT"], *instructions["CMD"]))
    for copied in instructions["COPY"]:
        *sources, _ = copied.split()
        assert all((ROOT / source).exists() for source in sources)
        assert all(f"!{source.split('/')[0]}" in (ROOT / ".dockerignore").read_text().split() for source in sources)
