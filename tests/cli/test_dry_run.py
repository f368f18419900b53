"""`mythos train --dry-run`: the plan of a run on the command line."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from mythos.cli.train import main
from mythos.config.loading import config_from_dict, load_config
from tests.planning.helpers import GIB


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).parents[2] / "configs" / "debug.yaml"
    arguments = ["data.streams=64", "train.global_batch=64", "parallel.mode=hsdp", "--dry-run", "--ranks", "64"]
    assert main([str(path), *arguments, "--machine-ranks", "16", "--device-memory", "24"]) == 0
    text = capsys.readouterr().out
    assert "64, 16 on a machine: hsdp, 4 x 16" in text and "in all, of 24" in text
    assert main([str(path), *arguments]) == 0
    assert "in all, of 80\n" in capsys.readouterr().out
    assert main([str(path), "--dry-run", "--ranks", "3"]) == 1
    assert "not a multiple of the 3 processes" in capsys.readouterr().err


def test_the_plan_is_for_the_device_that_is_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["debug", "--dry-run", "train.device=cpu", f"run.dir={tmp_path}"]) == 0
    text = capsys.readouterr().out
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    assert text.startswith("parameters ") and "global_batch:" not in text
    memory_line = re.search(r"in all, of ([\d.]+) \(this machine\)", text)
    assert memory_line and float(memory_line[1]) == pytest.approx(memory, rel=0.01)


def test_a_plan_for_gpus_needs_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["debug", "--dry-run", "train.device=cuda", f"run.dir={tmp_path}"]) == 0
    assert "in all, of 80 (assumed, for there is no GPU)\n" in capsys.readouterr().out


def test_the_configuration_follows_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["train.device=cpu", f"run.dir={tmp_path}"]
    assert main(["debug", *overrides, "--dry-run", "-v"]) == 0
    text = capsys.readouterr().out
    written = yaml.safe_load(text[text.index("\nrun:\n") :])
    assert config_from_dict(written) == load_config("debug", overrides)
    assert main(["debug", *overrides, "-v"]) == 1
    assert "--verbose: only for --dry-run" in capsys.readouterr().err


PLANS = """
import sys
from mythos.cli.train import main
from mythos.config.loading import load_config
from mythos.distributed.layout import Layout
from mythos.planning import rank_state
rank_state.step_activations = lambda *_: rank_state.Activations(0, 0)  # of these the package has traces
for optimizer in ("adamw", "muon"):
    assert main(["debug", "--dry-run", f"optim.name={optimizer}"]) == 0
    assert main(["debug", "--dry-run", "--device-memory", "1e-6"]) == 0  # says what would fit
    assert rank_state.rank_state(load_config("debug", [f"optim.name={optimizer}"]), Layout("fsdp", 1, 2, "")).units
slow = {"sympy", "torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "transformers", "datasets"}
print(sorted(slow & sys.modules.keys()))
"""


def test_a_plan_imports_neither_dynamo_nor_fsdp() -> None:
    """These imports take as long as that of torch."""
    process = subprocess.run([sys.executable, "-c", PLANS], capture_output=True, text=True, check=True)
    assert process.stdout.splitlines()[-1] == "[]"
