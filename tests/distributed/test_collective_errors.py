"""Failed collectives, provoked between two processes, and signals that arrive during a collective."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from mythos.distributed.collective_errors import collective_failure
from mythos.errors import MythosError
from tests.warm import WarmPopen

ROOT = Path(__file__).resolve().parents[2]

GLOO = """
import json, os, signal, sys, threading, time
from datetime import timedelta
import torch, torch.distributed as dist
from mythos.distributed.stop import StopRequests
from mythos.distributed.collective_errors import collective_failure
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
attempt(lambda: ranks.any(False))
print(json.dumps(failures), flush=True)
os._exit(0)
"""


@pytest.fixture(scope="module")
def gloo(tmp_path_factory) -> Iterator[tuple[list[dict], list]]:
    """What two processes found out about each other: both ranks' results, then rank 0's failed collectives."""
    path = tmp_path_factory.mktemp("gloo") / "store"
    command = [sys.executable, "-c", GLOO]
    ranks = [
        WarmPopen([*command, str(rank), str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) for rank in range(2)
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
