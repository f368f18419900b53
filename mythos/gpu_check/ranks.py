"""Several processes (one per GPU; on a CPU two, over gloo) against one."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mythos.config.loading import save_config
from mythos.config.sections import Config
from mythos.gpu_check.rank import STEPS, RankResult, take_steps
from mythos.gpu_check.result import Result, Setting, judged, not_run
from mythos.gpu_check.runs import task_run
from mythos.torch_internals import has_mesh_placements

CLOSE = 1e-4
"""Largest relative difference of a loss or a norm: float32, summed in another order."""
DIVIDED = {"expert": 1, "shared": 2}
"""Modes in which two processes divide the experts, with the number of them that divide the shared ones."""
SECONDS = 150.0
"""Time limit of the processes."""


def size_of(setting: Setting) -> int:
    """Number of processes: 4 or 2 GPUs, 1 if there is one GPU; 2 on a CPU."""
    gpus = torch.cuda.device_count() if setting.cuda else 2
    return 4 if gpus >= 4 else 2 if gpus >= 2 else 1


def parity(setting: Setting, *, mode: str) -> Iterator[Result]:
    """Compare losses and gradient norms of the first steps."""
    size = size_of(setting)
    if size == 1:
        yield not_run("one GPU")
        return
    if mode in DIVIDED and not has_mesh_placements():
        yield not_run(f"parallel.expert needs torch 2.13 or later; this is {torch.__version__}")
        return
    measured = launched(setting, mode)[0]
    expected = single(setting)
    pairs = [*zip(measured.losses, expected.losses, strict=True), *zip(measured.norms, expected.norms, strict=True)]
    error = max(abs(a - b) / abs(b) for a, b in pairs)
    yield judged(error <= CLOSE, f"within {error:.1e} on {size} {'GPUs' if setting.cuda else 'processes (gloo)'}")


def gathers(setting: Setting) -> Iterator[Result]:
    """Count the all-gathers of a step at two depths."""
    if size_of(setting) == 1:
        yield not_run("one GPU")
        return
    counts = launched(setting, "fsdp")[0].gathers
    yield judged(counts["2"] == counts["4"] > 0, f"{counts['2']} at 2 loops, {counts['4']} at 4")


def overlap(setting: Setting) -> Iterator[Result]:
    """Measure the share of the time of NCCL's kernels during which other kernels run."""
    if size_of(setting) == 1:
        yield not_run("one GPU")
        return
    if not setting.cuda:
        yield not_run("only GPUs communicate while they compute")
        return
    ranks = launched(setting, "fsdp", "mythos_small")
    shares = [rank.hidden / rank.sending for rank in ranks if rank.sending]
    if not shares:
        raise RuntimeError("the profiler recorded no kernel of NCCL")
    sending = max(rank.sending for rank in ranks) / 1e3
    yield judged(True, f"{min(shares):.0%} of {sending:.1f} ms a step, mythos_small on {len(ranks)} GPUs")


def config_of(setting: Setting, name: str, mode: str, preset: str = "") -> Config:
    """Configure a run in an empty folder; every number of processes gets the same batches."""
    folder = setting.scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    changes: dict[str, Any] = {
        "train__steps": STEPS + 1,
        "train__micro_batch": 2,
        "train__global_batch": 8,
        "depth__mean": 4,
        "depth__sampling": "fixed",
        "parallel__mode": "fsdp" if mode in DIVIDED else mode,
        "parallel__start_timeout": SECONDS,
        "parallel__timeout": SECONDS,
        # With a tiny eps the first update of a weight is lr times its gradient's sign, which rounding decides near 0.
        "optim__eps": 1e-5,
    }
    if mode == "hsdp":
        changes["parallel__replicate"] = 2
    if mode in DIVIDED:
        changes |= {"parallel__expert": 2, "parallel__shared": DIVIDED[mode]}
    if preset:
        changes |= {"model__preset": preset, "train__dtype": "bfloat16", "data__sequence_length": 1024}
        changes |= {"model__context_length": 1024, "train__global_batch": 16, "train__micro_batch": 4}
    return task_run(setting, folder, **changes)


@cache
def single(setting: Setting) -> RankResult:
    """Measurements of a run in one process, which is this one."""
    return take_steps(config_of(setting, "alone", "single"))


@cache
def launched(setting: Setting, mode: str, preset: str = "") -> list[RankResult]:
    """Measurements of each of several processes.

    Raises RuntimeError if one fails or exceeds SECONDS, with the last lines of the output of the first that failed.
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
    if any(code != 0 for code in codes):
        raise RuntimeError(_failure(folder, codes))
    return [RankResult(**json.loads((folder / f"{rank}.json").read_text())) for rank in range(size)]


def _failure(folder: Path, codes: list[int | None]) -> str:
    # Prefer a process that failed over those that were still waiting for it.
    rank = next((rank for rank, code in enumerate(codes) if code), codes.index(None) if None in codes else 0)
    lines = (folder / f"{rank}.log").read_text(errors="replace").strip().splitlines()
    why = f"ended with {codes[rank]}" if codes[rank] is not None else f"did not end within {SECONDS:g} s"
    last = lines[-1] if lines else "it printed nothing"
    return "\n".join([f"rank {rank} of {len(codes)} {why}: {last}", *lines[-30:]])


def free_port() -> int:
    """A TCP port that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
