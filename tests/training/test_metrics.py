"""metrics.jsonl over restarts: damaged lines, lines of later steps."""

import json
import os
from pathlib import Path

import pytest

from mythos.training.metrics import MetricsLog, read_metrics
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
    "beyond a float": (
        b"\n".join([b'{"step": 1, "loss": 1' + b"0" * 400 + b"}", *LINES]),
        "line 1 has no number for loss",
    ),
    "step beyond a float": (b"\n".join([b'{"step": 1' + b"0" * 400 + b"}", *LINES]), "line 1 has no number for step"),
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
    with pytest.raises(OSError, match=r"it is not a regular file|Is a directory"):
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


def test_other_ranks_write_nothing(tmp_path):
    config = tiny(tmp_path, log__wandb={"mode": "online"}, log__trackers=["none of these"])
    run_dir = tmp_path / "run"
    log = MetricsLog(run_dir, config, 0, main=False)
    log.write({"step": 1, "loss": 1.0})
    log.close()
    assert not run_dir.exists()
