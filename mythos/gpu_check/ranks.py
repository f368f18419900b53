"""Several processes, one a GPU (on a CPU two, over gloo), against one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from mythos.config.loading import save_config
from mythos.config.sections import Config
from mythos.gpu_check.rank import STEPS, Taken, take_steps
from mythos.gpu_check.result import Result, Setting, judged, not_run
from mythos.gpu_check.runs import task_run

CLOSE = 1e-4
"""Largest relative difference of a loss or a norm: float32, summed in another order."""
SECONDS = 150.0
"""Longest that the processes may take."""


def size_of(setting: Setting) -> int:
    """Number of processes: 4 or 2 GPUs, and 2 on a CPU; 1 where there is one GPU."""
    gpus = torch.cuda.device_count() if setting.cuda else 2
    return 4 if gpus >= 4 else 2 if gpus >= 2 else 1


def parity(setting: Setting, *, mode: str) -> Iterator[Result]:
    """Losses and gradient norms of the first steps."""
    size = size_of(setting)
    if size == 1:
        yield not_run("one GPU")
        return
    measured = launched(setting, mode)[0]
    expected = alone(setting)
    pairs = [*zip(measured.losses, expected.losses, strict=True), *zip(measured.norms, expected.norms, strict=True)]
    error = max(abs(a - b) / abs(b) for a, b in pairs)
    yield judged(error <= CLOSE, f"within {error:.1e} on {size} {'GPUs' if setting.cuda else 'processes (gloo)'}")


def gathers(setting: Setting) -> Iterator[Result]:
    """All-gathers of a step at two depths."""
    if size_of(setting) == 1:
        yield not_run("one GPU")
        return
    counts = launched(setting, "fsdp")[0].gathers
    yield judged(counts["2"] == counts["4"] > 0, f"{counts['2']} at 2 loops, {counts['4']} at 4")


def overlap(setting: Setting) -> Iterator[Result]:
    """Share of the time of NCCL's kernels during which others ran too."""
    if size_of(setting) == 1:
        yield not_run("one GPU")
        return
    if not setting.cuda:
        yield not_run("only GPUs communicate while they compute")
        return
    everyone = launched(setting, "fsdp", "mythos_small")
    shares = [taken.hidden / taken.sending for taken in everyone if taken.sending]
    if not shares:
        raise RuntimeError("the profiler saw no kernel of NCCL")
    sending = max(taken.sending for taken in everyone) / 1e3
    yield judged(True, f"{min(shares):.0%} of {sending:.1f} ms a step, mythos_small on {len(everyone)} GPUs")


def config_of(setting: Setting, name: str, mode: str, preset: str = "") -> Config:
    """A run in a folder that is empty, of the same batches for every number of processes."""
    folder = setting.scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    changes: dict[str, Any] = {
        "train__steps": STEPS + 1,
        "train__micro_batch": 2,
        "train__global_batch": 8,
        "depth__mean": 4,
        "depth__sampling": "fixed",
        "parallel__mode": mode,
        "parallel__start_timeout": SECONDS,
        "parallel__timeout": SECONDS,
        # An element's first update is lr x its gradient's sign otherwise, and rounding decides signs near zero.
        "optim__eps": 1e-5,
    }
    if mode == "hsdp":
        changes["parallel__replicate"] = 2
    if preset:
        changes |= {"model__preset": preset, "train__dtype": "bfloat16", "data__sequence_length": 1024}
        changes |= {"model__context_length": 1024, "train__global_batch": 16, "train__micro_batch": 4}
    return task_run(setting, folder, **changes)


@cache
def alone(setting: Setting) -> Taken:
    """What one process, this one, comes to."""
    return take_steps(config_of(setting, "alone", "single"))


@cache
def launched(setting: Setting, mode: str, preset: str = "") -> list[Taken]:
    """What each of several processes comes to.

    Raises RuntimeError, with the last lines of the one that failed first, where they do not all end well.
    """
    name, size = f"{mode}{preset}", size_of(setting)
    config = config_of(setting, name, mode, preset)
    folder = setting.scratch / f"{name}-ranks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save_config(config, folder / "config.yaml")
    common = {
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    command = [sys.executable, "-m", "mythos.gpu_check.rank", str(folder), "profile" if preset else "count"]
    children: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(size):
            variables = {**common, "RANK": rank, "LOCAL_RANK": rank}
            environment = os.environ | {key: str(value) for key, value in variables.items()}
            with (folder / f"{rank}.log").open("w") as log:
                children.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment))
        limit = time.monotonic() + SECONDS
        while any(child.poll() is None for child in children):
            if any(child.poll() for child in children) or time.monotonic() > limit:
                break
            time.sleep(0.1)
        codes = [child.poll() for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    if any(codes) or None in codes:
        # One that failed says why; those that waited for it do not.
        rank = next((rank for rank, code in enumerate(codes) if code), codes.index(None) if None in codes else 0)
        lines = (folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
        why = f"ended with {codes[rank]}" if codes[rank] is not None else f"did not end within {SECONDS:g} s"
        raise RuntimeError(
            f"rank {rank} of {size} {why}: {lines[-1] if lines else 'it printed nothing'}\n" + "\n".join(lines[-30:])
        )
    return [Taken(**json.loads((folder / f"{rank}.json").read_text())) for rank in range(size)]


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
