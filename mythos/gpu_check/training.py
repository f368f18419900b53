"""Runs of the trainer: compared with a CPU's losses, killed and resumed, and saved while training continues.

`python -m mythos.gpu_check.training CONFIG.yaml` is the run that is killed.
"""

import contextlib
import math
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from mythos.config.loading import load_config, save_config
from mythos.config.sections import Config
from mythos.gpu_check.catalog import TRAINING_STEPS
from mythos.gpu_check.result import Result, Setting, judged, not_run
from mythos.gpu_check.runs import steps_of, task_run
from mythos.gpu_check.timed_steps import Steps, timed
from mythos.trainer import Trainer
from mythos.training.metrics import METRICS_FILE, read_metrics

FIRST, LAST = 10, 20
"""The first steps are compared one by one, of the last steps only the mean loss: rounding errors grow, and change which
experts are chosen, but training ends at about the same loss."""
CLOSE = {"float32": (1e-3, 0.03), "bfloat16": (2e-2, 0.06)}
"""Largest relative difference of a loss of the first steps, and of the mean of the last steps."""
VARIED: dict[str, Any] = {
    "model__lanes": 2,
    "model__router_loop": "bias",
    "model__router_bias_per_loop": True,
    "model__loop_norm": "adaptive",
    "model__residual_scale": 0.25,
}
"""A model whose state has lanes and whose passes differ."""
START_SECONDS = 120.0
"""Limit of the time until the step at which a run is killed."""


def against_cpu(setting: Setting, *, dtype: str, varied: bool = False) -> Iterator[Result]:
    """Compare a run on this device with the same run on the CPU in float32; `varied`: of a model with VARIED."""
    if not setting.cuda and dtype == "float32":
        yield not_run("the CPU is the reference")
        return
    expected = losses(setting, "cpu", "float32", varied)
    measured = losses(setting, setting.device.type, dtype, varied)
    yield close(measured, expected, *CLOSE[dtype])


def resumed(setting: Setting) -> Iterator[Result]:
    """Compare a run that is killed half way and started again with one that is not."""
    steps = steps_in(setting)
    expected = losses(setting, setting.device.type, "float32")
    config = run_of(setting, "killed", setting.device.type, "float32", every=steps // 4)
    # The run starts in another process, which can be killed, and is resumed in this one.
    kill_at(config, setting.scratch / "killed.yaml", steps // 2)
    Trainer(config).run()
    records = read_metrics(config.run_dir / METRICS_FILE)
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
    """Time steps of mythos_small while its checkpoint is written, then read the checkpoint back."""
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
        measured = (
            f"{size / 2**30:.3g} GiB in {whole:.2f} s, of which training waited {blocked:.2f} s; {len(during)} steps "
            f"meanwhile, {statistics.median(during):.3f} s each, {before:.3f} s before"
        )
        # A CPU both computes and writes, so its time is not judged.
        yield judged(not setting.cuda or statistics.median(during) < 1.5 * before, measured)

        assert trainer.checkpoints.newest is not None
        trainer.checkpoints.load(trainer.checkpoints.newest, trainer.state())
        differing = [name for name, tensor in trainer.state().items() if not torch.equal(tensor, saved[name])]
        yield judged(not differing, f"{len(saved)} tensors, {len(differing)} differ {', '.join(differing[:3])}".strip())


def steps_in(setting: Setting) -> int:
    """Steps of a compared run."""
    return TRAINING_STEPS if setting.cuda else 12


def run_of(
    setting: Setting, name: str, device: str, dtype: str, every: int = 0, changes: Mapping[str, Any] | None = None
) -> Config:
    """Configure a run in an empty folder; `changes` as in `task_run`."""
    folder = setting.scratch / name
    shutil.rmtree(folder, ignore_errors=True)
    return task_run(
        setting,
        folder,
        train__steps=steps_in(setting),
        train__device=device,
        train__dtype=dtype,
        checkpoint__every=every,
        **(changes or {}),
    )


@cache
def losses(setting: Setting, device: str, dtype: str, varied: bool = False) -> list[float]:
    """Losses of all steps of an uninterrupted run."""
    changes = VARIED if varied else {}
    config = run_of(setting, f"{device}-{dtype}{'-varied' * varied}", device, dtype, changes=changes)
    Trainer(config).run()
    return [record["loss"] for record in read_metrics(config.run_dir / METRICS_FILE)]


def kill_at(config: Config, file: Path, step: int) -> None:
    """Train in another process, and kill it once it has logged `step` steps.

    Raises RuntimeError if the process ends before, or takes longer than START_SECONDS.
    """
    save_config(config, file)
    log = file.with_suffix(".log")
    with log.open("w", encoding="utf-8") as output:
        command = [sys.executable, "-m", "mythos.gpu_check.training", str(file)]
        child = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            limit = time.monotonic() + START_SECONDS
            while len(read_metrics(config.run_dir / METRICS_FILE)) < step:
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
    """Judge a loss curve: first losses must be within `each` (relative), the mean of the last ones within `mean`."""
    if len(measured) != len(expected) or not all(loss is not None and math.isfinite(loss) for loss in measured):
        return judged(False, f"{len(measured)} losses for {len(expected)}, or some are not finite: {measured[:3]} ...")
    early = max(abs(a - b) / abs(b) for a, b in zip(measured[:first], expected[:first], strict=True))
    ends = [statistics.fmean(curve[-last:]) for curve in (measured, expected)]
    late = abs(ends[0] - ends[1]) / ends[1]
    text = f"first {min(first, len(measured))} within {early:.1e}, mean of the last {last} within {late:.1e}"
    return judged(early <= each and late <= mean, f"{text} ({ends[0]:.4f} and {ends[1]:.4f})")


if __name__ == "__main__":
    Trainer(load_config(sys.argv[1])).run()
