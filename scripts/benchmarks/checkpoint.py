"""Cost of a checkpoint: how long training waits for it, and how long saving and loading take."""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from mythos.checkpoints.checkpoint import Checkpoints, training_state
from mythos.cli.common import check_least
from mythos.config.presets import preset_config
from mythos.config.sections import OptimConfig
from mythos.distributed.ranks import Ranks
from mythos.errors import MythosError
from mythos.gpu_check.timed_steps import timed
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.training.optim import build_optimizer
from scripts.benchmarks.timing import most_resident_bytes

SAVES = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the subcommand."""
    parser.add_argument("--preset", default="dense_140m", help="the model (dense_140m)")
    parser.add_argument("--vocabulary", type=int, default=19008, help="its tokens (19008)")
    parser.add_argument("--directory", help="where to write (a temporary directory)")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time saving and loading, and the slowdown of small matmuls during a save; print and return all figures."""
    check_least(options, vocabulary=1)
    if options.directory is not None and not os.access(options.directory, os.W_OK):
        raise MythosError(f"--directory: got {options.directory}; give a folder that exists and can be written")
    torch.set_num_threads(1)
    model = RecurrentDepthTransformer(preset_config(options.preset, vocab_size=options.vocabulary)).initialize(0)
    state = training_state(model, build_optimizer(model, OptimConfig()))
    size = sum(tensor.nbytes for tensor in state.values())
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{options.preset}: {count:,} parameters, with AdamW {size / 1e9:.2f} GB in {len(state)} tensors")
    with tempfile.TemporaryDirectory(prefix="mythos-benchmark-", dir=options.directory) as directory:
        waiting, background = (
            Checkpoints(f"{directory}/{name}", Ranks(), keep=1, keep_every=0, asynchronous=name == "background")
            for name in ("waiting", "background")
        )
        save = [wall_seconds(lambda: waiting.save(1, state, {})) for _ in range(SAVES)]
        stall, whole, pace, longest = [], [], [], []
        for _ in range(SAVES + 1):
            alone = _matmuls(lambda started: time.perf_counter() - started < 1)
            started = time.perf_counter()
            stall.append(wall_seconds(lambda: background.save(1, state, {})))
            beside = _matmuls(lambda _: background.saving)
            background.wait()
            whole.append(time.perf_counter() - started)
            pace.append(beside[0] / alone[0])
            longest.append(beside[1])
        for tensor in state.values():
            tensor.zero_()
        newest = background.newest
        assert newest is not None
        load = [wall_seconds(lambda: background.load(newest, state)) for _ in range(SAVES)]
        find = [wall_seconds(lambda: background.find("auto")) for _ in range(SAVES)]
    first, later = stall[0], statistics.median(stall[1:])
    share = later / statistics.median(save)
    print(f"save and wait: {_seconds(save)}")
    print(
        f"save while training continues: training waits {later:.3f} s, {share:.1%} of that "
        f"(the first save also allocates memory: {first:.3f} s); on disk after {_seconds(whole[1:])}"
    )
    print(
        f"meanwhile: small matmuls on the same cores at {statistics.median(pace[1:]):.0%} of their speed, "
        f"longest pause {1000 * max(longest[1:]):.0f} ms"
    )
    print(f"checksums at the start: {_seconds(find)}; load: {_seconds(load)}")
    print(f"peak memory {most_resident_bytes() / 1e9:.2f} GB")
    return {
        "tensor_bytes": size,
        "save_seconds": _record(save),
        "stall_seconds": _record(stall[1:]),
        "first_stall_seconds": first,
        "on_disk_seconds": _record(whole[1:]),
        "pace_of_products": statistics.median(pace[1:]),
        "longest_pause_seconds": max(longest[1:]),
        "find_seconds": _record(find),
        "load_seconds": _record(load),
        "peak_memory_bytes": most_resident_bytes(),
    }


def wall_seconds(work: Callable[[], object]) -> float:
    """Wall time of the work."""
    return timed(work).wall


def _matmuls(running: Callable[[float], bool]) -> tuple[float, float]:
    """Matmuls of 128 x 128 matrices per second, and the longest time between two, seconds."""
    matrix = torch.randn(128, 128)
    started = last = time.perf_counter()
    count, longest = 0, 0.0
    while running(started):
        matrix @ matrix
        count += 1
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return count / (last - started), longest


def _seconds(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


def _record(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "best": min(values), "worst": max(values)}
