"""Training needs neither datasets, matplotlib, W&B, shtab nor a tracker; what does need one says which."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mythos.cli.completion import script
from mythos.data.hub import resolve_hub
from mythos.errors import MythosError
from mythos.training.metrics import read_metrics
from mythos.training.trackers import start_trackers
from tests.runs import tiny

ROOT = Path(__file__).parents[1]
ABSENT = """
from importlib import metadata
from importlib.machinery import PathFinder

MISSING = {"datasets", "matplotlib", "wandb", "shtab", "tensorboard"}
find_spec, from_name = PathFinder.find_spec, metadata.Distribution.from_name


def find_present(name, path=None, target=None):
    return None if name.partition(".")[0] in MISSING else find_spec(name, path, target)


def present(name):
    if name in MISSING:
        raise metadata.PackageNotFoundError(name)
    return from_name(name)


PathFinder.find_spec = staticmethod(find_present)
metadata.Distribution.from_name = present
"""
"""A sitecustomize.py, which every process of a run imports at its start: packages are missing as if not installed."""


def test_a_run_on_embedded_data_saves_and_resumes_without_them(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(ABSENT)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}", "MYTHOS_CACHE": str(tmp_path / "cache")}

    def python(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    packages = ("datasets", "matplotlib", "wandb", "shtab", "tensorboard")
    python("-c", f"from importlib.util import find_spec; assert not any(map(find_spec, {packages}))")
    small = ("checkpoint.every=1", "eval.every=0", "eval.samples=0", "data.workers=0", "train.device=cpu")
    python(str(ROOT / "train.py"), str(ROOT / "configs/debug.yaml"), "train.steps=2", *small)
    python(str(ROOT / "train.py"), str(ROOT / "configs/debug.yaml"), "train.steps=3", *small)
    records = read_metrics(tmp_path / "runs/debug/metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record][-1] == 3
    assert [record["resumed_from"] for record in records if "resumed_from" in record] == [2]


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("datasets", "wandb", "shtab"):
        monkeypatch.setitem(sys.modules, package, None)  # `import` then raises ImportError


def test_wandb_is_asked_for_where_it_is_missing(missing: None, tmp_path: Path) -> None:
    config = tiny(tmp_path, log__wandb={"mode": "offline"})
    with pytest.raises(MythosError, match=r"^log\.wandb\.mode: offline needs the package wandb.*`pip install wandb`"):
        start_trackers(tmp_path, config, 0)


def test_datasets_is_asked_for_where_it_is_missing(missing: None, tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(MythosError, match=r"^data\.kind: hub needs the package datasets.*`pip install datasets`"):
        resolve_hub(str(tmp_path), None, "train", None, tmp_path / "cache", 1.0)


def test_shtab_is_asked_for_where_it_is_missing(missing: None) -> None:
    with pytest.raises(MythosError, match=r"^mythos completion needs the package shtab.*`pip install shtab`"):
        script("bash")
