"""Whatever goes wrong in one check, all others run, and every check is reported."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mythos.cli import main
from mythos.gpu_check import catalog, report, runner
from mythos.gpu_check.report import Report
from mythos.gpu_check.runner import Runner
from tests.warm import WarmPopen

FAULTY = "tests.gpu_check.faulty"
QUICK = {"catalog": FAULTY, "grace": 6.0, "patience": 1.0}


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]], list[str]]:
    folder, shown = tmp_path_factory.mktemp("faulty"), []
    checks = Runner(Report(folder, shown.append), 5, **QUICK)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "subprocess", SimpleNamespace(Popen=WarmPopen, TimeoutExpired=subprocess.TimeoutExpired))
        checks.run()
    assert checks.report.unexpected
    lines = json.loads((folder / "report.json").read_text())["lines"]
    return folder, {line["name"]: line for line in lines}, shown


def test_every_check_has_a_line_in_order(faulty):
    _, lines, shown = faulty
    assert list(lines) == list("abcdefghijklmnopqrs")
    assert [line.split(":")[0].split()[-1] for line in shown] == list(lines)
    assert all(line["expected"] == f"{name} is fine" and line["device"] == "cpu" for name, line in lines.items())


def test_verdicts(faulty):
    _, lines, _ = faulty
    verdicts = {name: line["verdict"] for name, line in lines.items()}
    assert "".join(name for name, verdict in verdicts.items() if verdict == "ok") == "abdjmors"
    assert verdicts["c"] == "off"
    assert {verdicts[name] for name in "efghiklnpq"} == {"failed"}


@pytest.mark.parametrize(
    ("names", "measured", "detail"),
    [
        ("ef", "ValueError: no such thing\nsecond line", "in raises\n"),
        ("g", "out of memory: tried to allocate 2 GiB", "in runs_out\n"),
        ("h", "ModuleNotFoundError: No module named 'tests.gpu_check.nothing'", "import_module"),
        ("i", "RuntimeError: the check gave 0 results of 1", ""),
        ("kl", "the process died by SIGSEGV", "the last words"),
        ("n", "it hangs: ended after 6 s, where about 1 were expected", ""),
        ("p", "the process died by SIGKILL, most likely for lack of host memory", "the last words"),
        ("q", "the process ended with status 3", ""),
    ],
)
def test_failures_say_why(faulty, names, measured, detail):
    _, lines, _ = faulty
    for name in names:
        assert lines[name]["measured"] == measured
        assert detail in lines[name]["detail"]


def test_only_what_fails_costs_a_process(faulty):
    _, lines, _ = faulty
    assert lines["a"]["measured"] == lines["b"]["measured"]
    assert len({lines[name]["measured"] for name in "amrs"}) == 4


def test_page(faulty):
    folder = faulty[0]
    page = (folder / "report.md").read_text()
    assert "8 ok, 1 off, 10 failed, 0 not run" in page
    assert "| one | c | c is fine | 12, in a \\| cell (cpu) | off |" in page
    assert "| one | e | e is fine | ValueError: no such thing (cpu) | failed |" in page
    assert page.count("## ") == 10 and "Traceback" in page
    assert not list(folder.glob("*.tmp"))


def test_report_is_whole_after_each_line(tmp_path):
    seen = []
    table = Report(tmp_path, lambda _: seen.append(len(json.loads((tmp_path / "report.json").read_text())["lines"])))
    for _ in range(3):
        table.add(report.Line("stage", "name", "1", "1", "ok"))
    assert seen == [0, 1, 2] and len(json.loads((tmp_path / "report.json").read_text())["lines"]) == 3


@pytest.mark.parametrize(("minutes", "device"), [(1e-9, ""), (4 / 60, "cpu")])
def test_what_there_is_no_time_for_is_not_run(tmp_path, minutes, device):
    """With no time at all no process starts (no device); with little time the process itself skips the task."""
    checks = Runner(Report(tmp_path, lambda _: None), minutes, "tests.gpu_check.slow")
    checks.run()
    assert [(line.verdict, line.device) for line in checks.report.lines] == [("not run", device)] * 2
    assert all(line.measured == "out of time, give more --minutes" for line in checks.report.lines)
    assert not checks.report.unexpected


def test_a_process_that_cannot_begin_fails_every_check(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "environment", lambda: {"PATH": "/usr/bin", "PYTHONPATH": str(tmp_path)})
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 is missing')\n")
    (tmp_path / "mythos").symlink_to(Path(runner.__file__).parents[1])
    (tmp_path / "tests").symlink_to(Path(__file__).parents[1])
    checks = Runner(Report(tmp_path / "out", lambda _: None), 5, **QUICK)
    checks.run()
    assert [line.name for line in checks.report.lines] == list("abcdefghijklmnopqrs")
    assert {(line.verdict, line.measured) for line in checks.report.lines} == {
        ("failed", "the process ended with status 1")
    }
    assert "libcudart.so.13 is missing" in checks.report.lines[0].detail and not checks.report.lines[-1].detail


@pytest.mark.parametrize(
    ("verdicts", "status"), [(["ok", "not run"], 0), (["ok", "off", "not run"], 1), (["ok", "failed"], 1), ([], 0)]
)
def test_exit_status(tmp_path, monkeypatch, capsys, verdicts, status):
    """The status is 1 if a check is off or failed, so that a script need not read the report."""

    def run(self: Runner) -> None:
        for verdict in verdicts:
            self.report.add(report.Line("stage", "name", "1", "2", verdict))

    monkeypatch.setattr(Runner, "run", run)
    assert main(["gpu-check", "--out", str(tmp_path / "out")]) == status
    shown = capsys.readouterr().out
    assert f"{verdicts.count('off')} off, {verdicts.count('failed')} failed" in shown
    assert f"{tmp_path / 'out' / 'report.md'}" in shown


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_must_be_above_0(tmp_path, minutes, capsys):
    assert main(["gpu-check", "--out", str(tmp_path / "out"), f"--minutes={minutes}"]) == 1
    assert capsys.readouterr().err == f"error: --minutes: got {minutes}; give a number above 0, e.g. 8\n"
    assert not (tmp_path / "out").exists()


def test_out_must_be_a_folder(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    assert main(["gpu-check", "--out", str(file)]) == 1
    assert capsys.readouterr().err == f"error: --out: {file} cannot be written: File exists. Give another folder.\n"


def test_list_needs_no_torch():
    program = "import sys; from mythos.cli import main; main(['gpu-check', '--list']); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout == f"{catalog.table()}\nFalse\n"


BARE = """
from importlib.machinery import PathFinder

MISSING = {"datasets", "pyarrow", "wandb", "shtab", "matplotlib", "tensorboard", "pandas"}
find_spec = PathFinder.find_spec
PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.partition(".")[0] in MISSING else find_spec(name, path, target)
)
"""
"""A sitecustomize.py that hides packages which gpu-check does not need."""


def test_few_packages_are_enough(tmp_path):
    """A run with validation and checkpoint works without these packages."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    program = f"""
import importlib, pathlib, pkgutil, time, torch
import mythos.gpu_check
from mythos.gpu_check.result import Setting
for module in pkgutil.iter_modules(mythos.gpu_check.__path__):
    importlib.import_module("mythos.gpu_check." + module.name)
from mythos.gpu_check import training
setting = Setting(torch.device("cpu"), pathlib.Path({str(tmp_path)!r}), time.time() + 600)
print(len(training.losses(setting, "cpu", "float32")))
"""
    environment = runner.environment() | {"CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = f"{tmp_path}:{environment['PYTHONPATH']}"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert ran.stdout.splitlines()[-1] == "12"
