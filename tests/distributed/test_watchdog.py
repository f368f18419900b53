"""A process without progress is reported."""

import logging
import re
import threading
import time

from mythos.distributed.watchdog import Watchdog


def sleep_here(seconds: float) -> None:
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
        sleep_here(0.9)
        text = (tmp_path / "stacks" / "rank-00003.txt").read_text()
        assert text.count("has made no progress") == 1  # once a stall
        assert "sleep_here" in text and "test_watchdog_writes_stacks" in text
        watchdog.beat("saving")
        sleep_here(0.6)
    text = (tmp_path / "stacks" / "rank-00003.txt").read_text()
    first, second = [line for line in text.splitlines() if "has made no progress" in line]
    assert re.match(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d rank 3 has made no progress since \d\d:\d\d:\d\d \(0 s\) in: ", first
    )
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
