"""Progress of long work and of training: drawn on a terminal, plain lines elsewhere."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mythos import progress
from mythos.config.loading import load_config
from mythos.data.stream import Batch
from mythos.errors import StandardError
from mythos.progress import Console, Lines, aligned, duration, progress_bar, scaled
from tests.runs import documents, write_settings
from tests.terminal import Terminal
from tests.warm import WarmPopen

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


class FakeTerminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_where_a_terminal_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := FakeTerminal())
    assert list(progress_bar(range(3), desc="reading")) == [0, 1, 2]
    assert "\rreading" in terminal.getvalue()


def test_a_line_for_every_record(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(shown=True)
    with console.training(0, 9537):
        for step in range(1, 31):
            clock.now += 1
            console.step_done()
            if step % 10 == 0:
                console.report(record(step))
    assert capsys.readouterr().out.splitlines() == [
        "step 10/9537 | loss 3.214 | lr 6.0e-04 | grad 0.41 | loops 15.9 | 2.17M tok/s | ETA 2h38m",
        "step 20/9537 | loss 3.214 | lr 6.0e-04 | grad 0.41 | loops 15.9 | 2.17M tok/s | ETA 2h38m",
        "step 30/9537 | loss 3.214 | lr 6.0e-04 | grad 0.41 | loops 15.9 | 2.17M tok/s | ETA 2h38m",
    ]


def test_remaining_time_of_a_run_that_continues(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """By the steps of this process: 2 of them took 10 s, and 6 are left. None after the last."""
    console = Console(shown=True)
    with console.training(90, 98):
        for step in range(91, 99):
            clock.now += 5
            console.step_done()
            console.report(record(step))
    endings = [line.split(" | ")[-1] for line in capsys.readouterr().out.splitlines()]
    assert endings[1] == "ETA 30s" and endings[-1] == "2.17M tok/s"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_the_first_rank_writes(
    rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal := FakeTerminal())
    monkeypatch.setenv("TERM", "xterm")
    console = Console(shown=rank == "0")
    with console.training(0, 10):
        console.step_done()
        console.report(record(1))
        console.write("a line")
    assert bool(terminal.getvalue()) == (rank == "0")


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
    [
        (0.4, "0s"),
        (59.6, "1m00s"),
        (185, "3m05s"),
        (7800, "2h10m"),
        (4 * 86400 + 7300, "4d02h"),
        (1e20, "1157407407407407d09h"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_columns_of_words_and_numbers() -> None:
    rows = [["what", "why", "number"], ["a", "so", "1,000"], ["longer", "because", "2"]]
    assert aligned(rows, left=2).splitlines() == [
        "what    why      number",
        "a       so        1,000",
        "longer  because       2",
    ]


SHOWN: dict[str, Any] = {
    "train__steps": 12,
    "eval__every": 4,
    "eval__samples": 1,
    "eval__prompts": ["Ünïcode"],
    "checkpoint__every": 4,
}


def train(directory: Path, output: int | io.IOBase, **environment: str) -> tuple[int, bytes]:
    """The exit status of a run, and what it has written to standard error."""
    process = WarmPopen(
        [sys.executable, str(ROOT / "train.py"), str(write_settings(directory, **SHOWN))],
        stdout=output,
        stderr=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    errors = process.communicate()[1]
    return process.returncode, errors


def test_log_of_a_run(tmp_path: Path) -> None:
    """Into a file: a line for each record, validation, sample and checkpoint; no carriage return, no escape sequence;
    characters that the encoding lacks are escaped.
    """
    path = tmp_path / "log"
    with path.open("wb") as file:
        status, errors = train(tmp_path, file, PYTHONIOENCODING="ascii", FORCE_COLOR="1")
    log = path.read_bytes()
    assert status == 0, errors
    assert not {b"\r", b"\x1b"} & {bytes([byte]) for byte in log + errors}
    lines = log.decode().splitlines()
    assert [line.split(" | ")[0] for line in lines if " | loss " in line] == [f"step {n}/12" for n in range(1, 13)]
    every = ["step 4/12", "step 8/12", "step 12/12"]
    assert [line.split(" | ")[0] for line in lines if " | validation loss " in line] == every
    checkpoints = [line.split(" | checkpoint ") for line in lines if " | checkpoint " in line]
    assert sorted(step for step, _ in checkpoints) == sorted(every)
    assert {Path(path).name for _, path in checkpoints} == {f"step-000000{n}" for n in ("04", "08", "12")}
    escaped = r"\xdcn\xefcode"
    assert [line.split(escaped)[0] for line in lines if " | sample: " in line] == [
        "step 4/12 | sample: ",
        "step 8/12 | sample: ",
    ]
    assert lines[lines.index("Sample") + 2].startswith(f"  {escaped}")


def test_log_of_the_quickstart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], no_plots: None
) -> None:
    """The quickstart's steps, records, validations and checkpoints, with a smaller model and one step for all."""
    from mythos.trainer import StepResult, Trainer

    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents()))
    small = ["model.dim=16", "model.ffn_dim=16", "model.n_experts=2", "model.expert_dim=16", "data.sequence_length=16"]
    small += ["tokenizer.vocab_size=384", "data.kind=files", "data.path=corpus.jsonl", "eval.batches=1"]
    small += ["train.device=cpu"]
    steps: list[StepResult] = []
    take = Trainer.train_step

    def step(trainer: Trainer, batch: Batch) -> StepResult:
        if not steps:
            steps.append(take(trainer, batch))
        return steps[0]

    monkeypatch.setattr(Trainer, "train_step", step)
    monkeypatch.chdir(tmp_path)
    Trainer(load_config("quickstart", small)).run()
    log = tmp_path / "log"
    log.write_bytes("".join(capfd.readouterr()).encode())

    def output(*command: str) -> str:
        return subprocess.run([*command, str(log)], capture_output=True, text=True, check=True).stdout

    assert log.stat().st_size < 15_000
    assert b"\r" not in log.read_bytes() and b"\n\n\n" not in log.read_bytes()
    assert log.read_text().startswith("model ")  # the tokenizer was trained without a word
    assert output("grep", "-c", "^step .* | loss ") == "130\n"
    assert output("grep", "-c", "^step .* | checkpoint ") == "7\n"
    assert output("grep", "-c", "^step .* | validation loss ") == "1\n"
    assert output("grep", "^step 640/").startswith("step 640/1300 | loss ")
    assert output("tail", "-n", "1") == "checkpoint  runs/quickstart/checkpoints/step-00001300\n"
    assert 138 + 7 < len(log.read_text().splitlines()) < 190  # and the size of the run, the table by depth, a sample


def test_run_goes_on_without_its_output(tmp_path: Path) -> None:
    """`python train.py CONFIG | head -1`, and a disk that is full of logs."""
    reader, writer = os.pipe()
    os.close(reader)
    status, errors = train(tmp_path, writer)
    os.close(writer)
    assert status == 0, errors
    assert (tmp_path / "run/checkpoints/step-00000012/committed").exists()


PROGRAM = """
import logging, sys, time
from mythos.errors import log_messages
from mythos.progress import Console

steps, seconds, fails = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:] == ["fails"]
record = {"loss": 3.2141, "lr": 6e-4, "grad_norm": 0.412, "loops": 15.94, "tokens_per_second": 2.17e6, "mfu": 0.38}
console = Console(shown=True)
log_messages()
console.write("before")
with console.training(0, steps):
    for step in range(1, steps + 1):
        time.sleep(seconds)
        console.step_done()
        console.report(record | {"step": step})
        if step == 5:
            console.write("a validation", style="bold cyan")
            logging.warning("a warning")
            print("printed")
            print("printed to standard error", file=sys.stderr, flush=True)
        if step == 7 and fails:
            raise ValueError("a failure")
console.write("after")
"""
"""A run's output without its computation: steps, seconds a step, and `fails` for an error after step 7."""


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM, *arguments]


def displays(terminal: Terminal) -> list[str]:
    """The lines of progress bars on the screen; more than one are remains of earlier drawings."""
    return [line for line in terminal.shown if re.match(r" *step +\d+/\d+ [━╸╺-]", line)]


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_terminal(columns: int) -> None:
    """One display, lines above it, later ones below, nothing left of earlier drawings, and the cursor stays visible."""
    with Terminal(program("20", "0.1"), columns) as terminal:
        assert terminal.end() == 0
    shown = terminal.shown
    [bar] = displays(terminal)
    place = shown.index(bar)
    printed = ["before", "a validation", "WARNING: a warning", "printed", "printed to standard error"]
    assert shown[:place] == printed and shown[place + 2 :] == ["after"]
    if columns >= 80:
        assert re.fullmatch(r" *step 20/20 [━╸]+ 100% *", bar)
        assert shown[place + 1] == "loss 3.214 | lr 6.0e-04 | grad 0.41 | loops 15.9 | 2.17M tok/s | MFU 38%"
    assert b"\x1b[1;36m" in terminal.raw and b"\x1b[?25l" not in terminal.raw


def test_terminal_shows_the_remaining_time() -> None:
    with Terminal(program("100", "0.3")) as terminal:
        bar = displays_once(terminal, lambda bar: "ETA" in bar)
    assert re.search(r"step +\d+/100 .* \d+% ETA [0-9ms]+$", bar)


def displays_once(terminal: Terminal, holds: Callable[[str], bool]) -> str:
    """The only bar on the screen, once it is as wished."""
    terminal.until(lambda text: any(map(holds, displays(terminal))))
    [bar] = displays(terminal)
    return bar


def test_terminal_that_becomes_narrower() -> None:
    with Terminal(program("60", "0.1"), 120) as terminal:
        displays_once(terminal, lambda bar: "2" in bar.split("/")[0])
        terminal.resize(80, 24)
        assert terminal.end() == 0
    assert len(displays(terminal)) == 1 and terminal.text.count("MFU 38%") == 1


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_terminal_without_colours(variable: str, value: str) -> None:
    with Terminal(program("20", "0.1"), **{variable: value}) as terminal:
        assert terminal.end() == 0
    assert not re.search(rb"\x1b\[[\d;]*(3[0-7]|9[0-7]|38;5;\d+)m", terminal.raw)
    if variable == "TERM":
        assert b"\x1b" not in terminal.raw and terminal.text.count("| loss ") == 20
    else:
        assert len(displays(terminal)) == 1


def test_error_on_a_terminal() -> None:
    """The display stays as it was, and the traceback follows it."""
    with Terminal(program("20", "0.1", "fails")) as terminal:
        assert terminal.end() == 1
    [bar] = displays(terminal)
    place = terminal.shown.index(bar)
    assert "7/20" in bar and terminal.shown[place + 2].startswith("Traceback")
    assert terminal.shown[-1] == "ValueError: a failure"


def test_lines_where_only_the_errors_go_to_a_terminal(tmp_path: Path) -> None:
    """`python train.py CONFIG | tee log`."""
    (tmp_path / "program.py").write_text(PROGRAM)
    command = f"{sys.executable} {tmp_path / 'program.py'} 20 0.01 | cat > {tmp_path / 'log'}"
    with Terminal(["bash", "-c", command], PYTHONPATH=str(ROOT)) as terminal:
        assert terminal.end() == 0
    assert (tmp_path / "log").read_text().count("| loss ") == 20
    assert b"\x1b" not in terminal.raw and terminal.shown == ["WARNING: a warning", "printed to standard error"]


def test_terminal_that_is_gone() -> None:
    """A closed window ends the program unless it ignores the hang-up; then it goes on, as with a full disk."""
    quiet = ["bash", "-c", 'trap "" HUP; exec "$@"', "bash", *program("20", "0.05")]
    with Terminal(quiet) as terminal:
        terminal.until(lambda text: "step" in text)
        os.close(terminal.master)
        terminal.master = os.open(os.devnull, os.O_RDONLY)
        assert terminal.process.wait(300) == 0


def test_run_on_a_terminal(tmp_path: Path) -> None:
    """A whole run: validations, samples and checkpoints above the display, the summary below it."""
    command = [sys.executable, str(ROOT / "train.py"), str(write_settings(tmp_path, **SHOWN))]
    with Terminal(command, 100, warm=True) as terminal:
        assert terminal.end() == 0, terminal.text
    [bar] = displays(terminal)
    above, _, below = terminal.text.partition(bar)
    assert "12/12" in bar and "100%" in bar
    assert above.count("| validation loss") == 3 and above.count("| sample: Ünïcode") == 2
    assert above.count("| checkpoint ") == 3 and "| loss " not in above
    assert re.match(r"\nloss \d\.\d+ \| lr .* tok/s\n", below) and "Validation after" in below


def test_ctrl_c_of_a_run_on_a_terminal(tmp_path: Path) -> None:
    settings = write_settings(tmp_path, train__steps=100_000, eval__every=0)
    with Terminal([sys.executable, str(ROOT / "train.py"), str(settings)], warm=True) as terminal:
        displays_once(terminal, lambda bar: "ETA" in bar)
        terminal.send("\x03")
        assert terminal.end() == 0, terminal.text
    [bar] = displays(terminal)
    above, _, below = terminal.text.partition(bar)
    assert "SIGINT: stopping after this step; again to exit at once" in above
    assert "The same command continues." in below


def test_warnings_go_above_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    """A logger's handler writes to what standard error is at the time."""
    monkeypatch.setattr(sys, "stderr", now := io.StringIO())
    handler = StandardError()
    monkeypatch.setattr(sys, "stderr", later := io.StringIO())
    handler.handle(logging.LogRecord("name", logging.WARNING, "path", 1, "text", (), None))
    assert (now.getvalue(), later.getvalue()) == ("", "text\n")
