"""Signals, stalls, locks and failed collectives, each provoked for real."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from mythos.distributed import stop
from mythos.distributed.restarts import collective_failure, exit_for_good, refuse_restart
from mythos.distributed.run_lock import RunLock
from mythos.distributed.stop import SIGNALS, StopRequests, parse_duration
from mythos.distributed.watchdog import Watchdog
from mythos.errors import MythosError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start programs in Python, given as text, that end with the test whatever happens."""
    running: list[subprocess.Popen] = []

    def program(source: str, *arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-u", "-c", source, *map(str, arguments)]
        pipe = subprocess.PIPE
        running.append(subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
        return running[-1]

    try:
        yield program
    finally:
        for process in running:
            process.kill()
            process.communicate()


def until(condition: Callable[[], object], limit: float = 5.0) -> bool:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "MYTHOS_ENDED", "RANK"):
        monkeypatch.delenv(name, raising=False)


# --- durations


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("3h30m", 12600), ("1d", 86400), ("1d2h3m4s", 93784), ("0h5m", 300), ("07s", 7)]
)
def test_duration(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0s", "0d0h", "90", "1.5h", "30m3h", "3 h", "-5s", "5s\n", "1w", "s"])
def test_no_duration(text):
    with pytest.raises(MythosError, match=r"3h30m, 1d") as error:
        parse_duration(text)
    assert repr(text) in str(error.value)


# --- requests to stop


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_a_request(number, capfd, monkeypatch):
    before = [signal.getsignal(one) for one in SIGNALS]
    with StopRequests(None) as stop:
        assert stop.reason is None
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at the same moment: what a launcher passes on
        assert until(lambda: stop.reason)
        assert stop.reason == number.name
        time.sleep(0.05)
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    said = capfd.readouterr().err.strip()
    assert said == f"{number.name}: stopping after this step; again to exit at once"


def test_second_signal_exits_at_once(start):
    process = start(
        "import time\n"
        "from mythos.distributed.stop import StopRequests\n"
        "with StopRequests(None) as stop:\n"
        "    print('ready')\n"
        "    while stop.reason is None: time.sleep(0.01)\n"
        "    print(stop.reason)\n"
        "    time.sleep(60)\n"
        "print('never')"
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "SIGUSR1\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)  # so soon it is the same request
    time.sleep(stop.SAME_REQUEST)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=2)
    assert process.returncode == 128 + signal.SIGTERM
    assert rest == ""


@pytest.mark.parametrize(
    ("launched", "ending", "signals", "status"),
    [
        (True, "pass", 1, 0),
        (True, "pass", 2, 0),  # all is saved
        (True, "raise ValueError", 1, -signal.SIGTERM),
        (False, "pass", 1, -signal.SIGTERM),
    ],
)
def test_signal_after_the_end(start, monkeypatch, launched, ending, signals, status):
    """launch.sh passes a signal on to one process after another, and the last may be done by then."""
    monkeypatch.delenv("MYTHOS_LAUNCHER", raising=False)
    if launched:
        monkeypatch.setenv("MYTHOS_LAUNCHER", str(os.getpid()))
    process = start(
        "import contextlib, os, signal, time\n"
        "from mythos import faults\n"
        "faults.SAME_REQUEST = 0.1\n"
        "with contextlib.suppress(ValueError), faults.StopRequests(None):\n"
        f"    {ending}\n"
        f"for _ in range({signals}):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.5)\n"
    )
    process.communicate(timeout=30)
    assert process.returncode == status


def test_time_is_up(monkeypatch):
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stop = StopRequests(12600.0)
    now += 12599
    assert stop.reason is None
    now += 1
    assert stop.reason == "train.max_time (3h30m)"
    assert StopRequests(None).reason is None


def test_launcher_is_gone(monkeypatch):
    alone = StopRequests(None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(os, "getppid", lambda: 4711)  # a detached test run may have lost its own parent
    launched = StopRequests(None)
    assert launched.reason is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert launched.reason == "the launcher is gone"
    assert alone.reason is None  # started from a shell, which may be closed


# --- collectives that fail

GLOO = """
import json, os, signal, sys, threading, time
from datetime import timedelta
import torch, torch.distributed as dist
from mythos.distributed.stop import StopRequests
from mythos.distributed.restarts import collective_failure
from mythos.distributed.ranks import Ranks

rank, path = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(path, 2), rank=rank, world_size=2, timeout=timedelta(seconds=30))
group = lambda seconds: dist.new_group([0, 1], backend="gloo", timeout=timedelta(seconds=seconds))
ranks, impatient, other, pids = Ranks(group(30)), group(1), group(30), [0, 0]
result = {}

# A signal is seen while the main thread is in a collective.
with StopRequests(None) as stop:
    ranks.barrier()
    if rank == 0:
        threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGUSR1)).start()
        early = threading.Timer(0.5, lambda: result.update(early=stop.reason))
        early.start()
    else:
        time.sleep(1)
    ranks.barrier()

# A peer that does not answer, then one that is gone.
peer = ranks.gather(os.getpid())[1 - rank]
print(json.dumps(result), flush=True)
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(60)
failures = []
def attempt(collective):
    began = time.monotonic()
    try:
        collective()
    except Exception as error:
        failures.append([collective_failure(error), type(error).__name__, str(error), time.monotonic() - began])
attempt(lambda: dist.all_reduce(torch.ones(1), group=impatient))
attempt(lambda: dist.barrier(impatient))
os.kill(peer, signal.SIGKILL)
attempt(lambda: Ranks(other).gather(0))
attempt(lambda: ranks.max(0))
print(json.dumps(failures), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def gloo(tmp_path_factory) -> Iterator[tuple[list[dict], list]]:
    """What two processes found out about each other: both ranks' results, then rank 0's failed collectives."""
    path = tmp_path_factory.mktemp("gloo") / "store"
    command = [sys.executable, "-c", GLOO]
    ranks = [
        subprocess.Popen([*command, str(rank), str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    watch = threading.Timer(60, lambda: [rank.kill() for rank in ranks])
    watch.start()
    try:
        lines = [rank.stdout.readline() for rank in ranks]
        yield [json.loads(line) for line in lines], json.loads(ranks[0].stdout.readline())
    finally:
        watch.cancel()
        for rank in ranks:
            rank.kill()
            rank.communicate()


def test_signal_is_seen_inside_a_collective(gloo):
    assert gloo[0][0]["early"] == "SIGUSR1"


def test_failed_collectives_are_recognised(gloo):
    silent, closed, gone, exchange = gloo[1]
    assert "Timed out" in silent[2] and 0.9 < silent[3] < 3
    assert re.search("closure|Timed out", closed[2])  # gloo closes the pair a moment after the first timeout
    assert re.search("closed by peer|reset by peer", gone[2])
    assert all(failure[:2] == [True, "RuntimeError"] for failure in (silent, closed, gone, exchange)), gloo[1]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (dist.DistBackendError("NCCL communicator was aborted on rank 1."), True),
        (dist.DistNetworkError("The client socket has timed out after 60000ms"), True),
        (RuntimeError("[Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7)"), True),
        (
            RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:77, remote process exited or network error"),
            True,
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # of a data source
        (MythosError("Connection closed by peer"), False),
    ],
)
def test_what_counts_as_a_failed_collective(error, expected):
    assert collective_failure(error) is expected


# --- stalls


def stands_still_here(seconds: float) -> None:
    time.sleep(seconds)


def test_watchdog_writes_stacks(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    with Watchdog(tmp_path / "stacks", rank=3, seconds=0.3) as watchdog:
        for step in range(10):
            watchdog.beat(f"step {step}: forward")
            time.sleep(0.06)
        assert not (tmp_path / "stacks").exists()  # busy for longer than the limit, but never silent for so long
        watchdog.beat("step 12: backward")
        assert watchdog.doing == "step 12: backward"
        stands_still_here(0.9)
        text = (tmp_path / "stacks" / "rank-00003.txt").read_text()
        assert text.count("stands still") == 1  # once a stall
        assert "stands_still_here" in text and "test_watchdog_writes_stacks" in text
        watchdog.beat("saving")
        stands_still_here(0.6)
    text = (tmp_path / "stacks" / "rank-00003.txt").read_text()
    first, second = [line for line in text.splitlines() if "stands still" in line]
    assert re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d rank 3 stands still since \d\d:\d\d:\d\d \(0 s\) in: ", first)
    assert first.endswith("in: step 12: backward") and second.endswith("in: saving")
    assert [re.search(r"in: (.*); its stacks: ", record.getMessage())[1] for record in caplog.records] == [
        "step 12: backward",
        "saving",
    ]
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_watchdog_outlives_an_unwritable_directory(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with Watchdog(tmp_path / "file", rank=0, seconds=0.1) as watchdog:
        time.sleep(0.3)
        watchdog.beat("again")
        time.sleep(0.3)
    assert len([record for record in caplog.records if "cannot be written" in record.getMessage()]) == 2


# --- the lock

HOLDER = """
import fcntl, json, sys, time
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
file.write(json.dumps({"host": "node7", "pid": 4711, "since": "2026-01-02 03:04:05"}))
file.flush()
print("locked")
time.sleep(60)
"""


def test_second_job_is_refused(tmp_path, start):
    holder = start(HOLDER, tmp_path / ".lock")
    assert holder.stdout.readline() == "locked\n"
    before = (tmp_path / ".lock").read_text()
    with pytest.raises(MythosError) as error, RunLock(tmp_path, patience=0.2):
        pass
    for part in (str(tmp_path), "process 4711 on node7", "2026-01-02 03:04:05", "run.name or run.dir"):
        assert part in str(error.value)
    assert (tmp_path / ".lock").read_text() == before

    # Killed, it no longer holds the lock, though the file still names it: the next job waits for that moment.
    threading.Timer(0.3, holder.kill).start()
    with RunLock(tmp_path, patience=5):
        held = json.loads((tmp_path / ".lock").read_text())
        assert (held["host"], held["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(MythosError, match=f"process {os.getpid()} on"), RunLock(tmp_path, patience=0):
            pass
    with RunLock(tmp_path, patience=0):
        pass


def test_lock_needs_a_directory(tmp_path):
    with pytest.raises(MythosError, match=r"\.lock: cannot be written \(No such file"), RunLock(tmp_path / "none"):
        pass


# --- errors that a restart would meet again


def test_error_without_launcher(capfd):
    assert exit_for_good("no such corpus") == 1
    assert capfd.readouterr().err == "error: no such corpus\n"
    assert not refuse_restart()


def test_error_rules_out_restarts(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert not refuse_restart()
    for rank in range(3):  # all processes of the machine fail; one tells
        monkeypatch.setenv("RANK", str(rank))
        assert exit_for_good("no such corpus") == 1
    assert capfd.readouterr().err == "error: no such corpus\n"
    assert refuse_restart()
    monkeypatch.setattr(os, "getppid", os.getpid)  # another launcher
    assert not refuse_restart()


def test_error_under_launch_script(capfd, monkeypatch, tmp_path):
    ended = tmp_path / "ended"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("MYTHOS_ENDED", str(ended))
    assert not refuse_restart()
    ended.touch()  # it was asked to stop
    assert refuse_restart()
    assert exit_for_good("no such corpus") == exit_for_good("a consequence of it") == 1
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    assert exit_for_good("a consequence of it") == 0  # launch.sh, which ends with 1, needs no report of torchrun
    assert ended.read_text() == "error: no such corpus\n"  # told by launch.sh
    assert capfd.readouterr().err == ""
