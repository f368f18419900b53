"""Runs of the trainer: against a CPU's losses, killed and resumed, and saved while training goes on.

As a program, `python -m mythos.gpu_check.training CONFIG.yaml`, it is the run that is killed.
"""

import contextlib
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from mythos import trainer as training
from mythos.benchmarks.steps import Steps
from mythos.benchmarks.timing import timed
from mythos.config.loading import load_config, save_config
from mythos.config.sections import Config
from mythos.gpu_check.catalog import TRAINING_STEPS
from mythos.gpu_check.result import Result, Setting, judged, not_run
from mythos.gpu_check.runs import steps_of, task_run
from mythos.trainer import Trainer
from mythos.training.metrics import read_metrics

FIRST, LAST = 10, 20
"""Steps that are compared one by one, and those whose mean is: rounding errors grow, and routing turns them into
others, but where training arrives at does not depend on them."""
CLOSE = {"float32": (1e-3, 0.03), "bfloat16": (2e-2, 0.06)}
"""Largest relative difference of a loss among the first steps, and of the mean of the last."""
START_SECONDS = 120.0
"""Longest that a run may take until its first step."""


def against_cpu(setting: Setting, *, dtype: str) -> Iterator[Result]:
    """The same run on this device and, in float32, on the CPU."""
    if not setting.cuda and dtype == "float32":
        yield not_run("the CPU is the reference")
        return
    expected = losses(setting, "cpu", "float32")
    measured = losses(setting, setting.device.type, dtype)
    yield close(measured, expected, *CLOSE[dtype])


def resumed(setting: Setting) -> Iterator[Result]:
    """A run that is killed half way and started again, against one that is not."""
    steps = steps_in(setting)
    expected = losses(setting, setting.device.type, "float32")
    config = run_of(setting, "killed", setting.device.type, "float32", every=steps // 4)
    # Resumed here, and begun in a process of its own, which can be killed.
    kill_at(config, setting.scratch / "killed.yaml", steps // 2)
    run(config)
    records = read_metrics(config.run_dir / "metrics.jsonl")
    starts = [record["resumed_from"] for record in records if "resumed_from" in record]
    measured = [record["loss"] for record in records]
    if not starts or len(measured) != steps:
        yield judged(False, f"it did not continue: {len(measured)} steps of {steps} logged, resumed from {starts}")
        return
    start = starts[-1]
    bitwise = "bitwise equal" if measured == expected else "not bitwise equal"
    result = close(measured[start:], expected[start:], *CLOSE["float32"], first=1)
    yield judged(result.verdict == "ok", f"resumed from step {start}; {result.measured}; {bitwise}")


def asynchronous_save(setting: Setting) -> Iterator[Result]:
    """Steps of mythos_small while its checkpoint is written, which is then read back."""
    config = steps_of(setting, "mythos_small", 4)
    with Steps(config) as steps:
        trainer, device = steps.trainer, setting.device
        for _ in range(3):
            steps()
        before = statistics.median(timed(steps, device).wall for _ in range(4))
        saved = {name: tensor.detach().clone() for name, tensor in trainer.state().items()}
        began = time.perf_counter()
        trainer.save(wait=False)
        blocked = time.perf_counter() - began
        during = [timed(steps, device).wall]
        while trainer.checkpoints.saving and len(during) < 200:
            during.append(timed(steps, device).wall)
        trainer.checkpoints.wait()
        whole = time.perf_counter() - began
        size = sum(tensor.nbytes for tensor in saved.values())
        told = (
            f"{size / 2**30:.3g} GiB in {whole:.2f} s, of which training waited {blocked:.2f} s; {len(during)} steps "
            f"meanwhile, {statistics.median(during):.3f} s each, {before:.3f} s before"
        )
        # The time of a CPU that writes and computes says nothing.
        yield judged(not setting.cuda or statistics.median(during) < 1.5 * before, told)

        assert trainer.checkpoints.newest is not None
        trainer.checkpoints.load(trainer.checkpoints.newest, trainer.state())
        differing = [name for name, tensor in trainer.state().items() if not torch.equal(tensor, saved[name])]
        yield judged(not differing, f"{len(saved)} tensors, {len(differing)} differ {', '.join(differing[:3])}".strip())


def steps_in(setting: Setting) -> int:
    """Steps of a run."""
    return TRAINING_STEPS if setting.cuda else 12


def run_of(setting: Setting, name: str, device: str, dtype: str, every: int = 0) -> Config:
    """The configuration of a run in a folder that is empty."""
    folder = setting.scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    return task_run(
        setting,
        folder,
        train__steps=steps_in(setting),
        train__device=device,
        train__dtype=dtype,
        checkpoint__every=every,
    )


@cache
def losses(setting: Setting, device: str, dtype: str) -> list[float]:
    """Losses of all steps of an uninterrupted run."""
    config = run_of(setting, f"{device}-{dtype}", device, dtype)
    run(config)
    return [record["loss"] for record in read_metrics(config.run_dir / "metrics.jsonl")]


def run(config: Config) -> None:
    """Train, or continue, without drawing plots, for which a package may be missing."""
    training.draw_plots = lambda *_: []
    Trainer(config).run()


def kill_at(config: Config, file: Path, step: int) -> None:
    """Train in another process, and kill it once it has logged a step.

    Raises RuntimeError where it ends before.
    """
    save_config(config, file)
    log = file.with_suffix(".log")
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, "-m", "mythos.gpu_check.training", str(file)]
        child = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            limit = time.monotonic() + START_SECONDS
            while len(read_metrics(config.run_dir / "metrics.jsonl")) < step:
                if child.poll() is not None or time.monotonic() > limit:
                    tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
                    raise RuntimeError(f"it was not there to be killed at step {step}: {' | '.join(tail)}")
                time.sleep(0.01)
        finally:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait()


def close(
    measured: list[float], expected: list[float], each: float, mean: float, first: int = FIRST, last: int = LAST
) -> Result:
    """Whether two curves agree: relative differences of the first losses, and of the mean of the last."""
    if len(measured) != len(expected) or not all(loss is not None and math.isfinite(loss) for loss in measured):
        return judged(False, f"{len(measured)} losses for {len(expected)}, or some are not finite: {measured[:3]} ...")
    early = max(abs(a - b) / abs(b) for a, b in zip(measured[:first], expected[:first], strict=True))
    ends = [statistics.fmean(curve[-last:]) for curve in (measured, expected)]
    late = abs(ends[0] - ends[1]) / ends[1]
    told = f"first {min(first, len(measured))} within {early:.1e}, mean of the last {last} within {late:.1e}"
    told += f" ({ends[0]:.4f} and {ends[1]:.4f})"
    return judged(early <= each and late <= mean, told)


if __name__ == "__main__":
    run(load_config(sys.argv[1]))
