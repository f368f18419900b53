"""`mythos runs`: the list against the files, and what is deleted and what is not."""

import io
import subprocess
from pathlib import Path

import pytest

from mythos.cli import main
from mythos.distributed.run_lock import LOCK_FILE, RunLock, is_locked
from mythos.reports.listing import shown_size, size_on_disk
from tests.reports.handmade import records, write_run


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished, a stopped, an unsaved, a training and an unreadable run, one in a subfolder, and other things."""
    monkeypatch.chdir(tmp_path)
    root = Path("runs")
    for name, steps in (("done", 3), ("halfway", 2), ("unsaved", 3), ("group/now", 1), ("broken", 1)):
        directory = write_run(root / name, records(steps), train__steps=3)
        (directory / "checkpoints").mkdir()
    for name in ("done", "halfway"):
        checkpoint = root / name / "checkpoints" / ("step-00000003" if name == "done" else "step-00000002")
        checkpoint.mkdir()
        (checkpoint / "committed").write_text("{}")
        (checkpoint / "shard-00000-model.safetensors").write_bytes(b"x" * 200_000)
    (root / "broken" / "config.yaml").write_text("train: {steps: many}\n")
    (root / "notes").mkdir()
    (root / "configs").mkdir()
    (root / "configs" / "config.yaml").write_text("train: {steps: 3}\n")
    return root


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    assert main(["runs"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1:] for line in lines[1:]}


def test_the_list(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunLock(runs / "group" / "now"):
        rows = listed(capsys)
    assert {name: row[:2] for name, row in rows.items()} == {
        "broken": ["unreadable", "1"],
        "done": ["finished", "3/3"],
        "halfway": ["stopped", "2/3"],
        "unsaved": ["stopped", "3/3"],
        "group/now": ["training", "1/3"],
    }
    assert rows["halfway"][2:4] == [f"{records(2)[-1]['loss']:.4f}", "512"]
    counted = int(subprocess.check_output(["du", "-s", "-B1", str(runs / "done")]).split()[0])
    assert size_on_disk(runs / "done") == counted > 200_000
    assert rows["done"][4:6] == shown_size(counted).split()
    assert listed(capsys)["group/now"][0] == "stopped"


def test_damaged_records_do_not_end_the_list(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, time in (("a", "1e300"), ("b", "NaN")):
        directory = write_run(tmp_path / name, records(1), train__steps=3)
        with (directory / "metrics.jsonl").open("a") as file:
            file.write(f'nonsense\n{{"step": 2, "loss": NaN, "time": {time}}}\n')
    assert main(["runs", "--dir", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert [line.split()[:4] for line in captured.out.splitlines()[1:]] == [[n, "stopped", "2/3", "nan"] for n in "ab"]
    assert captured.err.count("metrics.jsonl: line 2 has not JSON") == 2
    assert main(["runs", "rm", "--yes", "x", "--dir", str(tmp_path)]) == 1
    assert main(["runs", "rm", "x", "--dir", "none"]) == 1


def test_a_name_sends_no_commands_to_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a\x1b[2Jb", records(1), train__steps=3)
    assert main(["runs", "--dir", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and out.splitlines()[1].startswith("a\N{REPLACEMENT CHARACTER}[2Jb ")


def test_sizes_in_words() -> None:
    sizes = (0, 1023, 1024, 1536 * 1024, 5 * 2**30, 3 * 2**50)
    assert [shown_size(size) for size in sizes] == ["0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5.0 GiB", "3,072.0 TiB"]


def test_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", "--dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"no runs below {tmp_path}\n"
    assert main(["runs", "rm", "a", "--dir", str(tmp_path)]) == 1
    assert "there is none at all; give the folder of the runs with --dir" in capsys.readouterr().err
    assert main(["runs", "--dir", str(tmp_path / "none")]) == 1
    assert "is not a folder; give the folder of your runs with --dir" in capsys.readouterr().err


def test_a_lock_is_seen_without_writing(tmp_path: Path) -> None:
    assert not is_locked(tmp_path) and not list(tmp_path.iterdir())
    with RunLock(tmp_path):
        content = (tmp_path / LOCK_FILE).read_bytes()
        assert is_locked(tmp_path) and (tmp_path / LOCK_FILE).read_bytes() == content
    assert not is_locked(tmp_path)


@pytest.mark.parametrize(
    ("answer", "gone"), [("y\n", True), ("yes\n", True), ("n\n", False), ("\n", False), ("", False)]
)
def test_the_question(
    runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, answer: str, gone: bool
) -> None:
    monkeypatch.setattr("sys.stdin", Terminal(answer))
    assert main(["runs", "rm", "halfway", "runs/group/now", "runs/halfway/"]) == 0
    printed = capsys.readouterr().out
    assert "Delete these runs (" in printed and ("nothing is deleted" in printed) is not gone
    for name in ("halfway", "group/now"):
        assert (runs / name).exists() is not gone
    left = {"done", "unsaved", "broken", "notes", "configs", "group"} | ({"halfway"} if not gone else set())
    assert {path.name for path in runs.iterdir()} == left


def test_yes_needs_no_terminal(runs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["runs", "rm", "done"]) == 1
    assert "there is no terminal to ask at; give --yes" in capsys.readouterr().err and (runs / "done").exists()
    outside = Path("precious")
    outside.mkdir()
    (outside / "file").touch()
    (runs / "done" / "link").symlink_to(outside.absolute(), target_is_directory=True)
    assert main(["runs", "rm", "--yes", "done"]) == 0
    assert not (runs / "done").exists() and (outside / "file").exists()


def test_what_is_not_deleted(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("elsewhere"), records(1))
    (runs / "link").symlink_to(Path("elsewhere").absolute(), target_is_directory=True)
    (runs / "behind").symlink_to(Path.cwd(), target_is_directory=True)
    write_run(runs / "halfway" / "inner", records(1))
    refused = {
        "nothing": "there is no such run below runs",
        "dnoe": "did you mean done?",
        "notes": "is no run directory",
        "configs": "is no run directory",
        "elsewhere": "it is not below runs",
        "..": "it is not below runs",
        ".": "it is not below runs",
        "runs": "it is not below runs",
        "/": "it is not below runs",
        "link": "it is or is behind a link",
        "behind/elsewhere": "it is or is behind a link",
        "halfway": "it contains another run",
        "unsaved": "the run trains; end it first",
    }
    before = sorted(Path().rglob("*"))
    with RunLock(runs / "unsaved"):
        before = sorted(Path().rglob("*"))
        for name, message in refused.items():
            assert main(["runs", "rm", "--yes", "done", name]) == 1, name
            assert message in capsys.readouterr().err, name
    assert sorted(Path().rglob("*")) == before, "all names are checked before the first run is deleted"
    assert main(["runs", "rm", "--yes"]) == 1 and main(["runs", "list", "done"]) == 1


def test_checkpoints_elsewhere_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "scratch" / "step-00000001"
    place.mkdir(parents=True)
    write_run(tmp_path / "runs" / "a", records(1), checkpoint__dir=str(place.parent))
    assert main(["runs", "rm", "--yes", "a", "--dir", str(tmp_path / "runs")]) == 0
    assert f"its checkpoints in {place.parent} stay" in capsys.readouterr().out and place.exists()
    write_run(tmp_path / "runs" / "b", records(1), checkpoint__dir="s3://key:secret@bucket/b")
    assert main(["runs", "rm", "--yes", "b", "--dir", str(tmp_path / "runs")]) == 0
    assert "its checkpoints in s3://***@bucket/b stay" in capsys.readouterr().out
