"""The record of a run: metrics.jsonl over restarts, W&B, and what is computed from counts and times."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate import tracking

from mythos import trainer
from mythos.config.loading import load_config
from mythos.errors import MythosError, log_messages
from mythos.planning.flops import forward_flops
from mythos.trainer import Trainer
from mythos.training.depth_schedule import DepthPlan
from mythos.training.metrics import (
    MetricsLog,
    check_trackers,
    expert_balance,
    loop_loads,
    over_ranks,
    peak_flops,
    peak_memory,
    read_metrics,
    without_credentials,
)
from tests.runs import tiny

SOUND = [{"step": step, "loss": step / 10, "val/loss": None} for step in (1, 2, 3)]
LINES = [json.dumps(record).encode() for record in SOUND]
DAMAGES = {
    "bad line": (b"\n".join([LINES[0], b"{oops", *LINES[1:]]), "line 2 has not JSON"),
    "cut line in the middle": (b"\n".join([LINES[0][:9], *LINES]), "line 1 has not JSON"),
    "not UTF-8": (b"\n".join([*LINES, b'{"step": 4, "\xff": 1}', b""]), "line 4 has not JSON"),
    "list": (b"\n".join([b"[1]", *LINES]), "line 1 has no number for step"),
    "number": (b"\n".join([b"7", *LINES]), "line 1 has no number for step"),
    "empty object": (b"\n".join([*LINES, b"{}", b""]), "line 4 has no number for step"),
    "step is text": (b"\n".join([b'{"step": "1"}', *LINES]), "line 1 has no number for step"),
    "step is a fraction": (b"\n".join([b'{"step": 1.5}', *LINES]), "line 1 has no number for step"),
    "value is text": (b"\n".join([b'{"step": 1, "loss": "low"}', *LINES]), "line 1 has no number for loss"),
    "zeros at the end": (b"\n".join([*LINES, bytes(4096)]), "line 4 has zeros"),
    "zeros before a record": (b"\n".join([*LINES[:2], bytes(99) + LINES[2], b""]), "line 3 has zeros"),
    "zeros alone between": (b"\n".join([LINES[0], bytes(99), *LINES[1:]]), "line 2 has zeros"),
    "deep nesting": (b"\n".join([b"[" * 200_000, *LINES]), "line 1 has not JSON"),
    "endless number": (b"\n".join([b'{"step": ' + b"9" * 5000 + b"}", *LINES]), "line 1 has not JSON"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_records_are_set_aside_and_the_sound_ones_kept(tmp_path, caplog, name):
    content, problem = DAMAGES[name]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    assert read_metrics(path) == SOUND and problem in caplog.text
    caplog.clear()
    MetricsLog(tmp_path, tiny(tmp_path), 2).close()
    assert f"{path}.damaged-1" in caplog.text and problem in caplog.text
    assert read_metrics(path) == SOUND[:2]
    assert Path(f"{path}.damaged-1").read_bytes() == content
    # Another damage does not take the place of the first.
    path.write_bytes(content)
    MetricsLog(tmp_path, tiny(tmp_path), 2).close()
    assert Path(f"{path}.damaged-2").read_bytes() == content


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + b"\n".join(LINES), b"\r\n".join(LINES) + b'\r\n{"st'])
def test_marks_and_a_line_cut_short_are_no_damage(tmp_path, caplog, content):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    MetricsLog(tmp_path, tiny(tmp_path), 3).close()
    assert read_metrics(path) == SOUND and not caplog.records and not list(tmp_path.glob("*.damaged*"))


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_set_aside_and_never_waited_for(tmp_path, caplog, make):
    path = tmp_path / "metrics.jsonl"
    make(path)
    with pytest.raises(OSError, match=r"it is no regular file|Is a directory"):
        read_metrics(path)
    log = MetricsLog(tmp_path, tiny(tmp_path), 2)
    log.write({"step": 3})
    log.close()
    assert [record["step"] for record in read_metrics(path)] == [3]
    assert Path(f"{path}.damaged-1").exists() and "it cannot be read" in caplog.text


def test_continuing_drops_later_and_broken_lines(tmp_path):
    config = tiny(tmp_path)
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(tmp_path, config, 0)
    for step in (2, 4, 6):
        log.write({"step": step, "loss": step / 10})
        assert json.loads(path.read_text().splitlines()[-1])["step"] == step, "written at once, not at the end"
    log.close()
    with path.open("a") as file:
        file.write('{"step": 8, "loss"')
    assert [record["step"] for record in read_metrics(path)] == [2, 4, 6]
    log = MetricsLog(tmp_path, config, 4)
    log.write({"step": 6, "loss": 0.5})
    log.close()
    assert read_metrics(path) == [
        {"step": 2, "loss": 0.2},
        {"step": 4, "loss": 0.4},
        {"step": 6, "loss": 0.5, "resumed_from": 4},
    ]
    MetricsLog(tmp_path, config, 0).close()
    assert path.read_text() == "", "a run that starts anew has no records of another"
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_expert_balance_by_hand():
    # (2 layers, 2 loop indices, 4 experts); layer sums [8, 0, 4, 4] and [2, 2, 12, 0], mean 4.
    load = torch.tensor([[[5, 0, 4, 1], [3, 0, 0, 3]], [[1, 1, 6, 0], [1, 1, 6, 0]]])
    assert expert_balance(load) == {"moe/load_max_over_mean": 3.0, "moe/dead_experts": 2}
    even = torch.full((1, 3, 8), 7)
    assert expert_balance(even) == {"moe/load_max_over_mean": 1.0, "moe/dead_experts": 0}


def test_loads_by_loop_by_hand():
    # (2 layers, 3 loop indices, 4 experts); means 2.5, 1.5 and none in the first layer, 2, 2 and none in the second.
    load = torch.tensor([[[5, 0, 4, 1], [3, 0, 0, 3], [0] * 4], [[1, 1, 6, 0], [1, 1, 5, 1], [0] * 4]])
    assert loop_loads(load) == {"moe/load_max_over_mean@1": 3.0, "moe/load_max_over_mean@2": 2.5}
    assert loop_loads(None) == {}


def test_peak_memory_is_the_process(tmp_path):
    cpu = torch.device("cpu")
    before = peak_memory(cpu)
    held = torch.ones(64 << 20)  # 256 MiB
    grown = peak_memory(cpu)
    del held
    assert 1e8 < before <= grown < 1e12
    assert peak_memory(cpu) == grown
    with open("/proc/self/status") as status:
        line = next((line for line in status if line.startswith("VmHWM")), None)
    if line is not None:
        assert grown == pytest.approx(int(line.split()[1]) * 1024, rel=0.05)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "cuda", torch.bfloat16, 989e12),
        ("NVIDIA A100-SXM4-40GB", "cuda", torch.bfloat16, 312e12),
        ("NVIDIA H100 80GB HBM3", "cuda", torch.float32, None),
        ("Some GPU", "cuda", torch.bfloat16, None),
        ("NVIDIA H100 80GB HBM3", "cpu", torch.bfloat16, None),
    ],
)
def test_peak_flops(monkeypatch, name, device, dtype, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert peak_flops(torch.device(device), dtype) == expected


def test_throughput(tmp_path, monkeypatch):
    """Utilisation counts every pass forward, twice that backward where gradient flows, and no recomputation."""
    config, world = tiny(tmp_path, model__vocab_size=384), SimpleNamespace(size=2)
    made = SimpleNamespace(config=config, device=None, world=world, parallel=SimpleNamespace(dtype=None))
    monkeypatch.setattr(trainer, "peak_flops", lambda *_: 1e9)
    plan = DepthPlan((4, 2, 1, 1), 2)
    metrics = Trainer.throughput(made, plan, 0.5)
    flops = forward_flops(made.config.model, 32)
    passes = (4 + 2 + 1 + 1) / 4 + 2 * (2 + 2 + 1 + 1) / 4
    needed = (3 * flops.once + passes * flops.loop) * 8 * 32
    assert metrics["tokens_per_second"] == 8 * 32 / 0.5
    assert metrics["mfu"] == pytest.approx(needed / 0.5 / 2e9, rel=1e-12), "of two GPUs"
    monkeypatch.setattr(trainer, "peak_flops", lambda *_: None)
    assert "mfu" not in Trainer.throughput(made, plan, 0.5)


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ([4.0], {}),
        ([4.0, 10.0, 5.0], {"straggler/seconds": 5.0, "straggler/rank": 1, "straggler/over_median": 2.0}),
        ([9.0, 2.0, 4.0, 3.0], {"straggler/seconds": 5.5, "straggler/rank": 0, "straggler/over_median": 9 / 3.5}),
        ([2.0, 2.0], {"straggler/seconds": 0.0, "straggler/rank": 0, "straggler/over_median": 1.0}),
        ([0.0, 0.0], {"straggler/seconds": 0.0, "straggler/rank": 0}),
    ],
)
def test_over_ranks_by_hand(own, expected):
    memory = [700, 900, 300, 800][: len(own)]
    reports = [
        {"peak_memory_bytes": held, "own_seconds": seconds, "wait_seconds": 1.0}
        for held, seconds in zip(memory, own, strict=True)
    ]
    assert over_ranks(reports) == {"peak_memory_bytes": max(memory), **expected}


def test_other_ranks_write_nothing(tmp_path):
    config = tiny(tmp_path, log__wandb={"mode": "online"}, log__trackers=["none of these"])
    run_dir = tmp_path / "run"
    log = MetricsLog(run_dir, config, 0, main=False)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert not run_dir.exists()


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
                subprocess.Popen(
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
    """What a run of W&B is told."""

    def __init__(self) -> None:
        self.defined: dict[str, dict[str, str]] = {}
        self.logged: list[tuple[int, dict]] = []

    def define_metric(self, name: str, **given: str) -> None:
        self.defined[name] = given

    def log(self, values: dict, step: int) -> None:
        self.logged.append((step, values))


def test_wandb_panels(tmp_path, monkeypatch, caplog):
    """Everything over tokens, the best validation loss, and the depth curve with each validation; also of a sweep."""
    import wandb

    run = Run()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setenv("WANDB_RUN_ID", "given-by-agent")
    log = MetricsLog(tmp_path, tiny(tmp_path, log__wandb={"mode": "online"}), 0)
    assert (tmp_path / "wandb_id").read_text() == "given-by-agent"
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


@pytest.mark.parametrize("given", [{"optim.lr": 1e-05, "depth.backprop": 2.0, "depth.sampling": "fixed"}, "anything"])
def test_sweep_command(tmp_path, monkeypatch, given):
    """W&B's own agent makes the command, sh carries it out, and the configuration is the one that was drawn."""
    from wandb import wandb_agent

    sweep = yaml.safe_load(SWEEP.read_text())
    expected: dict = {"optim": {"lr": 1e-05}, "depth": {"backprop": 2, "sampling": "fixed"}}
    if given == "anything":  # the forms that values of a sweep may have
        given = {"optim": {"lr": 0.02, "schedule": "wsd"}, "eval.loops": [1, 3], "train.compile": True}
        given |= {"depth.mean": None, "eval.prompts": ["a b", "it's"], "run.seed": 3}
        expected = {"optim": {"lr": 0.02, "schedule": "wsd"}, "eval": {"loops": [1, 3], "prompts": ["a b", "it's"]}}
        expected |= {"depth": {"mean": None}, "train": {"compile": True}, "run": {"seed": 3}}
    else:
        assert given.keys() == sweep["parameters"].keys()
    started = []
    monkeypatch.setattr(wandb_agent, "AgentProcess", lambda **made: started.append(made) or SimpleNamespace())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    agent = wandb_agent.Agent(None, None, sweep_id="s")
    agent._sweep_command = sweep["command"]
    for run_id in ("first", "second"):
        arguments = {name: {"value": value} for name, value in given.items()}
        agent._command_run({"run_id": run_id, "program": sweep["program"], "args": arguments})

    (tmp_path / "python").write_text('#!/bin/sh\nfor word; do printf "%s\\0" "$word"; done\n')
    (tmp_path / "python").chmod(0o755)
    for made, name in zip(started, ("sweep-first", "sweep-second"), strict=True):
        variables = made["env"] | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        said = subprocess.run(made["command"], env=variables, capture_output=True, text=True, check=True).stdout
        program, path, *overrides = said.split("\0")[:-1]
        assert program == "train.py" and (SWEEP.parents[1] / program).exists()
        config = load_config(SWEEP.parents[1] / path, overrides)
        assert config.run.name == name and config.run_dir.name == name and config.log.wandb.mode == "online"
        for section, values in expected.items():
            for field, value in values.items():
                assert getattr(getattr(config, section), field) == value


def test_wandb_run_is_continued_only_with_the_run(tmp_path, monkeypatch):
    import wandb

    made = []
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    monkeypatch.setattr(wandb, "init", lambda **given: made.append(given) or Run())
    config = tiny(tmp_path, log__wandb={"mode": "online", "project": "loops", "entity": "team"})
    for start in (0, 3, 5, 0):
        MetricsLog(tmp_path, config, start)
    ids = [given["id"] for given in made]
    assert ids[0] == ids[1] == ids[2] != ids[3], "a run that starts anew must not be mixed with another"
    for given in made:
        assert (given["mode"], given["project"], given["entity"]) == ("online", "loops", "team")
        assert (given["resume"], given["dir"], given["name"]) == ("allow", str(tmp_path), "tiny")
        assert 0 < given["settings"]["finish_timeout"] < config.parallel.timeout, "other ranks wait for rank 0"
        assert wandb.Settings(**given["settings"])


def test_wandb_that_cannot_be_started(tmp_path, monkeypatch):
    import wandb

    def no_account(**_) -> None:
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", no_account)
    with pytest.raises(MythosError, match=r"log\.wandb\.mode is online.*No API key.*offline or disabled"):
        MetricsLog(tmp_path, tiny(tmp_path, log__wandb={"mode": "online"}), 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://key:secret@bucket/dir", "s3://***@bucket/dir"),
        ("https://token@host/a?b=c&d=e", "https://***@host/a?***"),
        ("data.path=[https://u:p@a/x.txt, https://b/y.txt]", "data.path=[https://***@a/x.txt, https://b/y.txt]"),
        ("https://host/part-?.parquet", "https://host/part-?.parquet"),
        ("/data/user@site/x?y=1", "/data/user@site/x?y=1"),
    ],
)
def test_without_credentials(text, expected):
    assert without_credentials({"a": [text], "b": 1, "c": None}) == {"a": [expected], "b": 1, "c": None}


def test_log_messages_hide_credentials(capsys, monkeypatch):
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    log_messages()
    logging.getLogger("somebody.else").warning("asked %s", "https://user:secret@host/x?token=secret")
    assert capsys.readouterr().err == "WARNING: asked https://***@host/x?***\n"
