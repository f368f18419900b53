"""A relative checkpoint.dir is the directory that it was when the run was started, from wherever the run continues."""

import shutil
from pathlib import Path

import pytest
import yaml

from mythos.checkpoints.stored_model import open_model
from mythos.cli import main, train
from mythos.config.loading import load_config
from mythos.errors import MythosError
from mythos.reports.recorded import open_run
from mythos.training.metrics import read_metrics
from tests.runs import write_settings

pytestmark = pytest.mark.usefixtures("no_plots")


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of one step in work/runs/x that saved to work/saved; the current folder is another one."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    path = write_settings(work, train__steps=1, run__dir="runs/x", checkpoint__dir="saved", data__workers=0)
    assert train.main([str(path)]) == 0
    assert (work / "saved" / "step-00000001").is_dir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    return work


def store(run: Path, **run_fields: str) -> None:
    """Let config.yaml name the directory of checkpoints as earlier versions stored it: as it was given."""
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["checkpoint"]["dir"] = "saved"
    values["run"] |= run_fields
    (run / "config.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize("earlier", [False, True])
def test_a_run_goes_on_from_another_folder(started: Path, earlier: bool) -> None:
    run = started / "runs" / "x"
    if earlier:
        store(run)
    assert open_model(run).step == 1
    assert [event.step for event in open_run(run).saves()] == [1]
    assert train.main([str(Path("..", "work", "runs", "x")), "train.steps=2"]) == 0
    assert [record["resumed_from"] for record in read_metrics(run / "metrics.jsonl") if "resumed_from" in record] == [1]
    assert {path.name for path in (started / "saved").glob("step-*")} == {"step-00000001", "step-00000002"}
    assert load_config(run / "config.yaml").checkpoint.dir == str(started / "saved")
    assert not list(Path.cwd().iterdir())


def test_a_directory_that_cannot_be_known_is_asked_for(started: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The run was moved alone, so that nothing says where it was started."""
    run = Path(shutil.move(started / "runs" / "x", Path.cwd() / "moved"))
    store(run)
    assert train.main([str(run), "train.steps=2"]) == 1
    message = capsys.readouterr().err
    assert (
        f"checkpoint.dir: {run / 'config.yaml'} has saved, which is relative to the folder that the run was" in message
    )
    assert f"there is none here, in {Path.cwd()}. Give checkpoint.dir=PATH" in message
    assert {path.name for path in Path.cwd().iterdir()} == {"moved"}
    with pytest.raises(MythosError, match=r"the run has no complete checkpoint yet in saved, its checkpoint\.dir"):
        open_model(run)
    assert open_run(run).last("loss") is not None
    assert main(["runs", "--dir", "."]) == 0 and "stopped" in capsys.readouterr().out
    assert train.main([str(run), "train.steps=2", f"checkpoint.dir={started / 'saved'}"]) == 0
    records = read_metrics(run / "metrics.jsonl")
    assert [record["resumed_from"] for record in records if "resumed_from" in record] == [1]


def test_a_directory_beside_us_is_taken(started: Path) -> None:
    """The run and its checkpoints were moved together; the run was given as an absolute path."""
    run = Path(shutil.move(started / "runs" / "x", Path.cwd() / "moved"))
    shutil.move(started / "saved", Path.cwd() / "saved")
    store(run, dir=str(started / "runs" / "x"))
    assert load_config(run).checkpoint.dir == str(Path.cwd() / "saved")


def test_urls_and_absolute_paths_stay(tmp_path: Path) -> None:
    for place in ("s3://bucket/x", "memory://x", str(tmp_path)):
        path = write_settings(tmp_path, checkpoint__dir=place)
        assert load_config(path).checkpoint.dir == place
    assert load_config(write_settings(tmp_path, checkpoint__dir=None)).checkpoint.dir is None
