"""FineWeb-Edu from the stand-in hub through the command line: pinned, faulty, unreachable, and continued."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mythos.cli.train import main
from mythos.config.loading import load_config
from mythos.data.stream import Batch
from mythos.trainer import StepResult, Trainer
from tests.data.hub_server import DATASET, FAULTS, Faults, StandInHub, use_hub, write_fineweb_edu
from tests.runs import documents, losses, write_settings

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    write_fineweb_edu(folder, documents(320), files=4, row_group=5)
    return folder


@pytest.fixture(scope="module", autouse=True)
def through_faults(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, StandInHub, subprocess.Popen[str]]]:
    """A run as a process of its own, with a worker, that knows a faulty hub by its environment alone.

    It mostly waits: it does so beside the other tests, and the last one looks at it.
    """
    config = write(tmp_path_factory.mktemp("faults"), data__workers=1)
    with StandInHub(folder, Faults(rate=0.15, stall=1.5, retry_after=0, seed=1)) as hub:
        process = subprocess.Popen(
            [sys.executable, "train.py", str(config)],
            cwd=ROOT,
            env=hub.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        yield config, hub, process
        process.kill()
        process.wait()


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    with StandInHub(folder) as hub:
        use_hub(monkeypatch, hub)
        yield hub


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory, no_plots: None) -> list[float]:
    """The losses of a run on a hub without faults."""
    config = write(tmp_path_factory.mktemp("sound"))
    with StandInHub(folder) as hub, pytest.MonkeyPatch.context() as patch:
        use_hub(patch, hub)
        assert main([str(config)]) == 0
        assert (run_dir(config) / "config.yaml").is_file()
        assert load_config(run_dir(config) / "config.yaml").data.revision == hub.commit
    return losses(run_dir(config))


def write(directory: Path, **changes) -> Path:
    """A run on sample-10BT (80 documents in 16 row groups) with a cache of its own: nothing was read before."""
    settings = {
        "data__kind": "hub",
        "data__dataset": DATASET,
        "data__subset": "sample-10BT",
        "data__path": None,
        "data__patience": 600.0,
        "data__cache_dir": str(directory / "cache"),
        "train__steps": 12,
        "checkpoint__every": 5,
    }
    return write_settings(directory, **settings | changes)


def run_dir(config: Path) -> Path:
    return Path(yaml.safe_load(config.read_text())["run"]["dir"])


def test_a_run_keeps_its_commit(hub: StandInHub, tmp_path: Path, expected: list[float]) -> None:
    config = write(tmp_path)
    assert main([str(config), "train.steps=6"]) == 0
    hub.refs["main"] = "f" * 40  # a newer one
    hub.counts.clear()
    assert main([str(config)]) == 0
    assert hub.counts["info"] == hub.counts["tree"] == 0, "and asks for no list"
    assert load_config(run_dir(config) / "config.yaml").data.revision == hub.commit
    assert losses(run_dir(config)) != expected, "6 steps have another schedule than 12"
    assert len(losses(run_dir(config))) == 12


def test_an_unreachable_shard_stops_the_run_with_everything_saved(
    hub: StandInHub,
    tmp_path: Path,
    expected: list[float],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = Trainer.train_step

    def outage(self: Trainer, batch: Batch) -> StepResult:
        if self.step == 3:
            hub.faults = Faults(unreachable=(".parquet",))
        return original(self, batch)

    config = write(tmp_path, checkpoint__every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", outage)
        assert main([str(config), "data.patience=1.5"]) == 1
    message = capsys.readouterr().err.partition("error: ")[2]
    assert "data: shard hf://datasets/HuggingFaceFW/fineweb-edu@" in message
    assert ".parquet, row group" in message and "unreachable for 1.5 s" in message
    step = int((run_dir(config) / "checkpoints" / "latest").read_text().removeprefix("step-"))
    assert f"Stopped after step {step}, which is saved" in message and 4 <= step < 12
    hub.faults = Faults()
    assert main([str(config)]) == 0
    assert losses(run_dir(config)) == expected


def test_training_through_faults_is_training_without(
    through_faults: tuple[Path, StandInHub, subprocess.Popen[str]], expected: list[float]
) -> None:
    config, hub, process = through_faults
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert all(hub.counts[f"fault {kind}"] for kind in FAULTS), hub.counts
    assert losses(run_dir(config)) == expected
