"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mythos import progress
from mythos.progress import Console, Lines, duration, progress_bar, scaled
from tests.runs import write_settings

ROOT = Path(__file__).parents[1]


class Clock:
    """A clock that tests set."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def record(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 3.2141, "lr": 6e-4, "grad_norm": 0.412, "loops": 15.94} | {
        "tokens_per_second": 2.17e6,
        **changes,
    }


def test_lines_of_long_work_come_every_ten_seconds(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in Lines(range(40), desc="reading", unit="file"):
        clock.now += 1
    assert capsys.readouterr().err.splitlines() == [
        "reading: 10/40 file | 10s | ETA 30s",
        "reading: 20/40 file | 20s | ETA 20s",
        "reading: 30/40 file | 30s | ETA 10s",
        "reading: 40/40 file | 40s | ETA 0s",
        "reading: 40/40 file | 40s | ETA 0s",
    ]


def test_quick_or_silenced_work_writes_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in Lines(range(9)):
        clock.now += 1
    with Lines(total=100, disable=True) as bar:
        clock.now += 50
        bar.update(50)
    assert capsys.readouterr().err == ""


def test_bar_where_a_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert list(progress_bar(range(3), desc="reading")) == [0, 1, 2]
    assert "\rreading" in terminal.getvalue()
    console = Console(shown=True)
    with console.training(0, 10):
        console.step_done()
        console.report(record(1), always=False)
    assert "1/10" in terminal.getvalue() and "loss 3.214" in terminal.getvalue()


def test_steps_between_lines_are_left_out(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(shown=True)
    with console.training(0, 9537):
        for step in range(1, 26):
            clock.now += 1
            console.report(record(step), always=step == 24)
    shown = capsys.readouterr().out.splitlines()
    assert [line.split("/")[0] for line in shown] == ["step 1", "step 11", "step 21", "step 24"]
    assert shown[0] == "step 1/9537 | loss 3.214 | lr 6.0e-04 | grad 0.41 | loops 15.9 | 2.17M tok/s | ETA 2h38m"


def test_skipped_update_and_mfu() -> None:
    assert progress.measurements(record(1, loss=None, grad_norm=None, mfu=0.38)) == [
        "skipped",
        "lr 6.0e-04",
        "grad not finite",
        "loops 15.9",
        "2.17M tok/s",
        "MFU 38%",
    ]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1k"), (12_345, "12.3k"), (2.17e6, "2.17M"), (4e9, "4G")],
)
def test_scaled(number: float, text: str) -> None:
    assert scaled(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7800, "2h10m"), (4 * 86400 + 7300, "4d02h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def train(directory: Path, output: int | io.IOBase, **environment: str) -> subprocess.CompletedProcess[bytes]:
    settings = write_settings(directory, train__steps=30, eval__every=10, eval__samples=1, eval__prompts=["Ünïcode"])
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), str(settings)],
        stdout=output,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )


def test_log_of_a_run(tmp_path: Path) -> None:
    """Into a file: a line for each validation, no carriage return; characters that the encoding lacks are escaped."""
    path = tmp_path / "log"
    with path.open("wb") as file:
        ended = train(tmp_path, file, PYTHONIOENCODING="ascii")
    log = path.read_bytes()
    assert ended.returncode == 0, ended.stderr
    assert b"\r" not in log + ended.stderr
    assert rb"\xdcn\xefcode" in log
    lines = log.decode().splitlines()
    assert [line.split(" | ")[0] for line in lines if "validation loss" in line] == [
        "step 10/30",
        "step 20/30",
        "step 30/30",
    ]
    assert sum(line.startswith("step ") for line in lines) < 12


def test_run_goes_on_without_its_output(tmp_path: Path) -> None:
    """`python train.py CONFIG | head -1`, and a disk that is full of logs."""
    reader, writer = os.pipe()
    os.close(reader)
    ended = train(tmp_path, writer)
    os.close(writer)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "run/checkpoints/step-00000030/committed").exists()
