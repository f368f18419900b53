"""Requests to stop: durations, signals, the end of the launcher."""

import os
import signal
import time
from collections.abc import Callable

import pytest

from mythos.distributed import stop
from mythos.distributed.stop import SIGNALS, StopRequests, parse_duration
from mythos.errors import MythosError


def until(condition: Callable[[], object], limit: float = 5.0) -> bool:
    deadline = time.monotonic() + limit
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "MYTHOS_STATUS_FILE", "RANK"):
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
        "from mythos.distributed import stop\n"
        "stop.SAME_REQUEST = 0.1\n"
        "with contextlib.suppress(ValueError), stop.StopRequests(None):\n"
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
