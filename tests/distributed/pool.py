"""Gloo processes that are started once and run one test function after another, as torchrun's workers would."""

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import secrets
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from mythos import trainer
from mythos.errors import MythosError
from tests.trainers import no_drawing
from tests.warm import WarmPopen

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import multiprocessing, sys
from multiprocessing.connection import Client
from tests.distributed.pool import serve

multiprocessing.current_process().authkey = bytes.fromhex(sys.argv[2])  # with which tensors travel
with Client(sys.argv[1], "AF_UNIX") as connection:
    serve(connection)
"""


class RankPool:
    """Runs functions on several ranks. The functions and what they return must be picklable."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.workers: list[tuple[WarmPopen, Connection]] = []
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        """What all of them write to standard error."""

    def run(
        self, function: Callable[..., Any], *arguments: Any, ranks: int, timeout: float = 120, lost: int = 0
    ) -> list[Any]:
        """Call `function(*arguments)` on so many ranks; returns what each returned.

        Raises MythosError if all ranks did (the ranks' distinct messages), and RuntimeError with a traceback for any
        other exception, when time is out, or when all but the `lost` ranks, which never answer, have answered; the
        processes are then ended and replaced at the next call.
        """
        self.start()
        port = free_port()
        for rank, (_, connection) in enumerate(self.workers[:ranks]):
            environment = {
                "RANK": rank,
                "WORLD_SIZE": ranks,
                "LOCAL_RANK": rank,
                "LOCAL_WORLD_SIZE": ranks,
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
            }
            connection.send(({key: str(value) for key, value in environment.items()}, function, arguments))
        deadline = time.monotonic() + timeout
        answers: dict[int, tuple[str, Any]] = {}
        while len(answers) < ranks - lost:
            for rank, (process, connection) in enumerate(self.workers[:ranks]):
                if rank not in answers and connection.poll(0.02):
                    try:
                        answers[rank] = connection.recv()
                    except EOFError:
                        answers[rank] = ("failed", f"ended with {process.wait()}. {self.said()}")
                    if answers[rank][0] == "failed":
                        deadline = min(deadline, time.monotonic() + 5)  # the others may wait for it for ever
            if time.monotonic() > deadline:
                break
        failures = [f"rank {rank}: {what}" for rank, (kind, what) in answers.items() if kind == "failed"]
        if failures or len(answers) < ranks:
            self.close()
            raise RuntimeError("\n".join(failures) or f"only ranks {sorted(answers)} answered within {timeout} s")
        problems = [what for kind, what in answers.values() if kind == "problem"]
        if problems:
            assert len(problems) == ranks, f"only some ranks raised: {answers}"
            raise MythosError("\n".join(dict.fromkeys(problems)))
        return [answers[rank][1] for rank in range(ranks)]

    def start(self) -> None:
        """Start the processes, unless they run."""
        if self.workers:
            return
        self.errors.seek(0)
        self.errors.truncate()
        with Listener(None, "AF_UNIX") as listener:
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}  # to find the functions' modules
            arguments = [str(listener.address), multiprocessing.current_process().authkey.hex()]
            for _ in range(self.size):
                command = [sys.executable, "-c", PROGRAM, *arguments]
                process = WarmPopen(command, cwd=ROOT, env=environment, stderr=self.errors)
                self.workers.append((process, listener.accept()))

    def said(self) -> str:
        """The end of standard error: why a process was aborted, and where it was."""
        self.errors.seek(0)
        return self.errors.read()[-8000:]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self.workers:
            connection.close()
            process.kill()
            process.wait()
        self.workers = []


def free_port() -> int:
    """A TCP port that nobody listens on, and that Linux gives to nobody who asks for any: Gloo's listeners do."""
    while True:
        port = 20_000 + secrets.randbelow(12_768)  # trainers seed the module random
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _keep_sharding_results() -> None:
    """Let a run use what DTensor has worked out in earlier runs of the same layout: a quarter of its time.

    DTensor caches how an operator is sharded together with the mesh of its result, which finds its groups by name. So
    meshes are equal here only if their groups have the same names: a cached result is then used only by a run whose own
    groups have these names.
    """
    key = DeviceMesh._hash_key
    DeviceMesh._hash_key = lambda mesh: (*key(mesh), *getattr(mesh, "_dim_group_names", ()))
    DeviceMesh.__eq__ = lambda mesh, other: isinstance(other, DeviceMesh) and mesh._hash_key() == other._hash_key()


def serve(connection: Connection) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    trainer.draw_plots = no_drawing
    keep = hasattr(DeviceMesh, "_hash_key")  # since torch 2.13
    if keep:
        _keep_sharding_results()
    while True:
        try:
            environment, function, arguments = connection.recv()
        except EOFError:
            return
        os.environ.update(environment)
        try:
            answer = ("result", function(*arguments))
        except MythosError as error:
            answer = ("problem", str(error))
        except BaseException:
            answer = ("failed", traceback.format_exc())
        connection.send(answer)
        if dist.is_initialized():
            dist.destroy_process_group()
            if not keep:
                _clear_sharding_prop_cache()
        # FSDP's modules are in cycles of references. Their groups must not end, threads and connections with them, in
        # the middle of a later run. What is left now is not looked at again.
        answer = function = arguments = None
        gc.collect()
        gc.freeze()
