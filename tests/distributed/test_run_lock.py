"""Two jobs in one directory."""

import json
import os
import socket
import threading

import pytest

from mythos.distributed.run_lock import RunLock
from mythos.errors import MythosError

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
