"""W&B and accelerate's trackers: what they get, and what happens where one fails."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from accelerate import tracking

from mythos.config.loading import load_config
from mythos.errors import MythosError
from mythos.training.metrics import MetricsLog, read_metrics
from mythos.training.trackers import check_trackers
from tests.runs import tiny
from tests.warm import WarmPopen


class Recorder(tracking.GeneralTracker):
    """Built as accelerate's own trackers are: it acts on what accelerate takes for the main process, and logs."""

    name = "recorder"
    requires_logging_directory = True
    failing = False

    def __init__(self, run_name: str, logging_dir: str) -> None:
        super().__init__()
        self.run_name, self.directory, self.calls = run_name, logging_dir, []

    @property
    def tracker(self):
        return self.calls

    @tracking.on_main_process
    def start(self):
        tracking.logger.debug("started")
        self.calls.append("start")

    @tracking.on_main_process
    def store_init_configuration(self, values):
        self.config = values

    @tracking.on_main_process
    def log(self, values, step=None):
        if self.failing:
            raise ConnectionError("https://me:password@service has gone.")
        self.calls.append((step, values))

    @tracking.on_main_process
    def finish(self):
        tracking.logger.debug("finished")
        self.calls.append("finish")


class Particular(Recorder):
    name = "mlflow"


@pytest.fixture
def recorders(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mlflow", Particular)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.MLFLOW])


def test_trackers_get_every_record(tmp_path, recorders):
    config = tiny(tmp_path, log__trackers=["recorder", "mlflow", "recorder"], eval__loops=[1, 3])
    log = MetricsLog(tmp_path, config, 0)
    first, second = log.trackers
    log.write({"step": 4, "loss": 1.5, "grad_norm": None, "val/loss@8": 2.5})
    log.close()
    assert first.calls == ["start", (4, {"loss": 1.5, "val/loss@8": 2.5}), "finish"]
    assert second.calls == ["start", (4, {"loss": 1.5, "val/loss_at_8": 2.5}), "finish"], "MLflow refuses an @"
    assert (first.run_name, first.directory) == ("tiny", str(tmp_path / "recorder"))
    assert first.config["model.dim"] == 32 and first.config["log.wandb.mode"] == "disabled"
    assert first.config["eval.loops"] == "[1, 3]" and first.config["depth.mean"] == "null"


def test_a_failing_tracker_does_not_end_the_run(tmp_path, recorders, caplog):
    log = MetricsLog(tmp_path, tiny(tmp_path, log__trackers=["recorder", "mlflow"]), 0)
    first, second = log.trackers
    log.write({"step": 1, "loss": 1.0})
    first.failing = True
    log.write({"step": 2, "loss": 2.0})
    log.write({"step": 3, "loss": 3.0})
    second.finish = lambda: 1 / 0
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert [call[0] for call in second.calls[1:]] == [1, 2, 3]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "recorder failed (ConnectionError: https://***@service has gone)" in messages[0]
    assert "mlflow failed (ZeroDivisionError" in messages[1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", r"section of its own; set log\.wandb\.mode=online"),
        ("tensorbord", r"got tensorbord; did you mean tensorboard\?"),
        ("all", r"got all; allowed: aim, clearml, comet_ml, dvclive, mlflow, .*tensorboard"),
        ("swanlab", r"swanlab is not installed; run `pip install swanlab`"),
    ],
)
def test_trackers_that_cannot_be(tmp_path, recorders, name, message):
    with pytest.raises(MythosError, match=r"log\.trackers: .*" + message):
        check_trackers(["mlflow", name])
    (tmp_path / "metrics.jsonl").write_text("kept\n")
    with pytest.raises(MythosError):
        MetricsLog(tmp_path, tiny(tmp_path, log__trackers=["mlflow", name]), 0)
    assert (tmp_path / "metrics.jsonl").read_text() == "kept\n"


def test_a_tracker_that_cannot_be_started(tmp_path, recorders, monkeypatch):
    monkeypatch.setattr(Recorder, "start", lambda _: os.stat("/nowhere/at/all"))
    with pytest.raises(MythosError, match=r"log\.trackers: recorder cannot be started: .*No such file.*remove it"):
        MetricsLog(tmp_path, tiny(tmp_path, log__trackers=["recorder"]), 0)


RANKS = """
import os, sys
from datetime import timedelta
from pathlib import Path
import torch, torch.distributed as dist
from accelerate import tracking
from mythos.training.metrics import MetricsLog
from tests.runs import tiny

class Recorder(tracking.GeneralTracker):
    name, requires_logging_directory, tracker, calls = "recorder", False, None, []

    def __init__(self, run_name):
        super().__init__()

    @tracking.on_main_process
    def log(self, values, step):
        tracking.logger.debug("logged")
        self.calls.append((step, values))

directory, size = Path(sys.argv[1]), int(os.environ["WORLD_SIZE"])
tracking.LOGGER_TYPE_TO_CLASS["recorder"] = Recorder
rank, threads, before = int(os.environ["RANK"]), torch.get_num_threads(), dict(os.environ)
if size > 1:
    dist.init_process_group("gloo", timeout=timedelta(seconds=20))
    collectives = dist.group.WORLD._get_sequence_number_for_group
if rank == 0:
    log = MetricsLog(directory, tiny(directory, log__trackers=["recorder"]), 0)
    issued = [collectives()] if size > 1 else []
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert Recorder.calls == [(1, {"loss": 1.0})], Recorder.calls
    if size > 1:
        assert {*issued, collectives()} == {0}, "no collective is issued"
assert dict(os.environ) == before and torch.get_num_threads() == threads
if size == 1:
    assert not dist.is_initialized()
else:
    total = torch.tensor(rank + 1)
    dist.all_reduce(total)
    assert total == 3 and collectives() == 1, (total, collectives())
    dist.barrier()
    dist.destroy_process_group()
"""


def test_trackers_leave_process_groups_alone(tmp_path):
    """Under torchrun's variables, of two processes and of one, where accelerate would make a process group itself."""
    root = Path(__file__).parents[2]
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    started = []
    try:
        for rank, size in ((0, 2), (1, 2), (0, 1)):
            directory = tmp_path / f"{rank}-of-{size}"
            directory.mkdir()
            variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[size - 1], "PYTHONPATH": root}
            started.append(
                WarmPopen(
                    [sys.executable, "-c", RANKS, str(directory)],
                    env=os.environ | {name: str(value) for name, value in variables.items()},
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            _, errors = process.communicate(timeout=60)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.wait()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny(tmp_path, log__trackers=["tensorboard"])
    for start, loss in ((0, 1.0), (2, 0.5)):
        log = MetricsLog(tmp_path, config, start)
        for step in range(start + 1, start + 4):
            log.write({"step": step, "loss": loss, "val/loss@8": 3.0})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "tiny"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss", "val/loss@8"]
    values = [(event.step, event.value) for event in events.Scalars("loss")]
    assert values == [(1, 1.0), (2, 1.0), (3, 0.5), (4, 0.5), (5, 0.5)], "the killed run's step 3 is hidden"


def test_disabled_wandb_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # any import now fails
    MetricsLog(tmp_path, tiny(tmp_path), 0).close()
    with pytest.raises(
        MythosError, match=r"log\.wandb\.mode: offline needs the package wandb.*import of wandb.*`pip install wandb`"
    ):
        MetricsLog(tmp_path, tiny(tmp_path, log__wandb={"mode": "offline"}), 0)


def written(path: Path) -> bytes:
    """What W&B leaves in a file: its process goes on writing for a moment after the run is finished."""
    until = time.monotonic() + 10
    while path.stat().st_size < 100 and time.monotonic() < until:
        time.sleep(0.05)
    return path.read_bytes()


def test_offline_wandb(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    for variable in ("WANDB_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_API_KEY", "k3y" * 14)
    monkeypatch.setenv("SOME_TOKEN", "hidden-in-environment")
    arguments = ["train.py", "data.path=https://me:hidden-in-arguments@host/a.txt", "run.name=tiny"]
    monkeypatch.setattr(sys, "argv", arguments)
    path = "https://host/a.txt?X-Signature=hidden-in-config"
    config = tiny(tmp_path, log__wandb={"mode": "offline", "tags": ["tagged"]}, data__path=path)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    names = []
    for start in (0, 2):
        log = MetricsLog(run_dir, config, start)
        assert [tracker.name for tracker in log.trackers] == ["wandb"]
        names.append(log.trackers[0].run.id)
        log.write({"step": start + 1, "loss": 1.0, "grad_norm": None, "val/loss@8": 2.0, "val/loss@1": 3.0})
        assert log.trackers, "the chart was drawn"
        log.close()
    assert names[0] == names[1] == (run_dir / "wandb_id").read_text()
    assert sys.argv is arguments
    folders = list((run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2, "W&B keeps every process's records apart until `wandb sync` joins them"
    contents = [written(next(folder.glob("*.wandb"))) for folder in folders]
    for stored in contents:
        for known in (names[0], "val/loss@8", "tagged", "tiny", "https://***@host/a.txt", "https://host/a.txt?***"):
            assert known.encode() in stored
        assert b"wandb/line/v0" in stored, "the depth curve is a chart of lines"
    for folder in folders:
        [table] = (folder / "files" / "media").rglob("depth_table*.json")
        stored = json.loads(table.read_text())
        assert stored["columns"] == ["loops", "loss"] and stored["data"] == [[1, 3.0], [8, 2.0]]
    for file in tmp_path.rglob("*"):
        if file.is_file():
            stored = file.read_bytes()
            assert b"hidden-in" not in stored and b"k3yk3y" not in stored, file
    assert [record["step"] for record in read_metrics(run_dir / "metrics.jsonl")] == [1, 3]


class Run:
    """Records the calls to a run of W&B."""

    def __init__(self) -> None:
        self.defined: dict[str, dict[str, str]] = {}
        self.logged: list[tuple[int, dict]] = []

    def define_metric(self, name: str, **options: str) -> None:
        self.defined[name] = options

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))


def test_wandb_panels(tmp_path, monkeypatch, caplog):
    """Everything over tokens, the best validation loss, and the depth curve with each validation; also of a sweep."""
    import wandb

    run = Run()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setenv("WANDB_RUN_ID", "from-agent")
    log = MetricsLog(tmp_path, tiny(tmp_path, log__wandb={"mode": "online"}), 0)
    assert (tmp_path / "wandb_id").read_text() == "from-agent"
    assert run.defined == {
        "tokens": {},
        "*": {"step_metric": "tokens"},
        "val/loss": {"step_metric": "tokens", "summary": "min"},
    }
    log.write({"step": 1, "tokens": 10, "loss": 1.0})
    log.write({"step": 2, "tokens": 20, "loss": 0.5, "val/loss": 2.0, "val/loss@8": 2.0, "val/loss@1": 3.0})
    (_, plain), (step, validated) = run.logged
    assert plain == {"tokens": 10, "loss": 1.0} and step == 2
    chart = validated.pop("val/depth")
    assert validated == {"tokens": 20, "loss": 0.5, "val/loss": 2.0, "val/loss@8": 2.0, "val/loss@1": 3.0}
    assert chart.table.columns == ["loops", "loss"] and chart.table.data == [[1, 3.0], [8, 2.0]]
    assert chart.spec.fields["x"] == "loops" and chart.spec.fields["y"] == "loss"

    monkeypatch.setattr(wandb.plot, "line", lambda *_, **__: 1 / 0)
    log.write({"step": 3, "tokens": 30, "loss": 0.5, "val/loss@8": 2.0})
    log.write({"step": 4, "tokens": 40, "loss": 0.5})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert "wandb failed (ZeroDivisionError" in caplog.text


SWEEP = Path(__file__).parents[2] / "scripts" / "wandb-sweep.yaml"


@pytest.mark.parametrize("drawn", [{"optim.lr": 1e-05, "depth.backprop": 2.0, "depth.sampling": "fixed"}, "anything"])
def test_sweep_command(tmp_path, monkeypatch, drawn):
    """W&B's own agent makes the command, sh carries it out, and the configuration is the one that was drawn."""
    from wandb import wandb_agent

    sweep = yaml.safe_load(SWEEP.read_text())
    expected: dict = {"optim": {"lr": 1e-05}, "depth": {"backprop": 2, "sampling": "fixed"}}
    if drawn == "anything":  # the forms that values of a sweep may have
        drawn = {"optim": {"lr": 0.02, "schedule": "wsd"}, "eval.loops": [1, 3], "train.compile": True}
        drawn |= {"depth.mean": None, "eval.prompts": ["a b", "it's"], "run.seed": 3}
        expected = {"optim": {"lr": 0.02, "schedule": "wsd"}, "eval": {"loops": [1, 3], "prompts": ["a b", "it's"]}}
        expected |= {"depth": {"mean": None}, "train": {"compile": True}, "run": {"seed": 3}}
    else:
        assert drawn.keys() == sweep["parameters"].keys()
    started = []
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda **options: started.append(options) or SimpleNamespace())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    agent = wandb_agent.Agent(None, None, sweep_id="s")
    agent._sweep_command = sweep["command"]
    for run_id in ("first", "second"):
        arguments = {name: {"value": value} for name, value in drawn.items()}
        agent._command_run({"run_id": run_id, "program": sweep["program"], "args": arguments})

    (tmp_path / "python").write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    (tmp_path / "python").chmod(0o755)
    for options, name in zip(started, ("sweep-first", "sweep-second"), strict=True):
        variables = options["env"] | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        said = subprocess.run(options["command"], env=variables, capture_output=True, text=True, check=True).stdout
        program, path, *overrides = said.split("\0")[:-1]
        assert program == "train.py" and (SWEEP.parents[1] / program).exists()
        config = load_config(SWEEP.parents[1] / path, overrides)
        assert config.run.name == name and config.run_dir.name == name and config.log.wandb.mode == "online"
        for section, values in expected.items():
            for field, value in values.items():
                assert getattr(getattr(config, section), field) == value


def test_wandb_run_is_continued_only_with_the_run(tmp_path, monkeypatch):
    import wandb

    inits = []
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setattr(wandb, "init", lambda **options: inits.append(options) or Run())
    config = tiny(tmp_path, log__wandb={"mode": "online", "project": "loops", "entity": "team"})
    for start in (0, 3, 5, 0):
        MetricsLog(tmp_path, config, start)
    ids = [options["id"] for options in inits]
    assert ids[0] == ids[1] == ids[2] != ids[3], "a run that starts anew must not be mixed with another"
    for options in inits:
        assert (options["mode"], options["project"], options["entity"]) == ("online", "loops", "team")
        assert (options["resume"], options["dir"], options["name"]) == ("allow", str(tmp_path), "tiny")
        assert 0 < options["settings"]["finish_timeout"] < config.parallel.timeout, "other ranks wait for rank 0"
        assert wandb.Settings(**options["settings"])


def test_wandb_that_cannot_be_started(tmp_path, monkeypatch):
    import wandb

    def no_account(**_) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", no_account)
    with pytest.raises(MythosError, match=r"log\.wandb\.mode is online.*No API key.*offline or disabled"):
        MetricsLog(tmp_path, tiny(tmp_path, log__wandb={"mode": "online"}), 0)
