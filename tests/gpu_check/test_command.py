"""`mythos gpu-check` on a CPU, at tiny sizes; and the page that lists its checks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mythos.gpu_check.catalog import STAGES, table
from tests.warm import CHILDREN, WarmPopen

ROOT = Path(__file__).parents[2]
GPU_ONLY = {
    "GPUs",
    "CUDA, cuDNN, NCCL, driver",
    "Triton and a C compiler",
    "waits in a step, mythos_nano, eager",
    "losses against the CPU's, float32",
    "share of gaps between kernels, mythos_1b, eager",
    "communication behind computation, fsdp",
}
TINY = "at tiny size on a CPU, one of a kind is run"


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("gpu-check") / "out"
    command = [sys.executable, "-m", "mythos", "gpu-check", "--out", str(folder), "--minutes", "30"]
    # Hide the GPU of a machine that has one.
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", CHILDREN: "1"}
    pipe = subprocess.PIPE
    process = WarmPopen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environment)
    shown, errors = process.communicate()
    log = folder / "gpu-check-files" / "log.txt"
    assert process.returncode == 0, f"{shown}\n{errors}\n{log.read_text()[-3000:] if log.exists() else ''}"
    return folder, shown


def test_every_check_is_reported(out):
    folder, shown = out
    lines = json.loads((folder / "report.json").read_text())["lines"]
    checks = [(stage.name, *check) for stage in STAGES for task in stage.tasks for check in task.checks]
    assert [(line["stage"], line["name"], line["expected"]) for line in lines] == checks
    assert {line["device"] for line in lines} == {"cpu"}
    page = (folder / "report.md").read_text()
    assert all(f"| {name} |" in page for _, name, _ in checks)
    assert len([line for line in shown.splitlines() if line.startswith(("ok ", "off ", "failed ", "not run "))]) == len(
        checks
    )


def test_all_that_a_cpu_can_show_is_as_expected(out):
    folder, shown = out
    lines = json.loads((folder / "report.json").read_text())["lines"]
    assert {line["name"] for line in lines if line["verdict"] not in ("ok", "not run")} == set()
    skipped = {line["name"] for line in lines if line["verdict"] == "not run" and line["measured"] != TINY}
    assert skipped == GPU_ONLY
    assert ", 0 off, 0 failed, " in shown


def test_each_kind_of_check_runs_on_a_cpu():
    """Tasks that a CPU skips run there with other arguments."""
    kinds = {task.run for stage in STAGES for task in stage.tasks}
    assert kinds == {task.run for stage in STAGES for task in stage.tasks if task.on_cpu}


def test_profiles_and_figures_are_there(out):
    folder, _ = out
    assert "mythos_1b, eager, cpu" in (folder / "profile.txt").read_text()
    lines = {line["name"]: line["measured"] for line in json.loads((folder / "report.json").read_text())["lines"]}
    assert "tokens/s" in lines["tokens/s and MFU, mythos_small, micro-batch 8, eager"]
    assert "resumed from step" in lines["killed and resumed, float32"]
    assert "bitwise equal" in lines["killed and resumed, float32"]


def test_page_lists_the_checks():
    page = (ROOT / "docs" / "status.md").read_text()
    start, end = "<!-- mythos gpu-check --list -->\n", "\n<!-- end -->"
    assert page[page.index(start) + len(start) : page.index(end)].strip() == table()
