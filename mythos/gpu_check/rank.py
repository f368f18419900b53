"""One of several training processes: `python -m mythos.gpu_check.rank FOLDER count|profile`, started by `ranks`.

It reads config.yaml in the folder and writes RANK.json.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from mythos.config.loading import load_config
from mythos.config.sections import Config
from mythos.gpu_check import traces
from mythos.gpu_check.runs import next_step
from mythos.torch_internals import TorchDispatchMode
from mythos.trainer import StepResult, Trainer
from mythos.training.depth_schedule import DepthSchedule

STEPS = 3


@dataclass
class RankResult:
    """Measurements of one process."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gathers: dict[str, int] = field(default_factory=dict)
    """All-gathers of a step, by its loops."""
    sending: float = 0.0
    """Microseconds of NCCL's kernels in a step; 0 without a profile."""
    hidden: float = 0.0
    """The part of `sending` during which other kernels ran."""


class GatherCounter(TorchDispatchMode):
    """Counts all-gathers of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d" and "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def take_steps(config: Config, profiled: bool = False) -> RankResult:
    """Train for STEPS steps; then profile one more step, or count the all-gathers of one with half the loops."""
    trainer = Trainer(config)
    result = RankResult()

    def counted_step(loops: float) -> StepResult:
        with GatherCounter() as counter:
            step = next_step(trainer)
        result.gathers[f"{loops:g}"] = counter.count
        return step

    try:
        for _ in range(STEPS):
            step = counted_step(config.depth_mean)
            result.losses.append(step.loss.item())
            result.norms.append(step.grad_norm.item())
        if profiled:
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                next_step(trainer)
                torch.cuda.synchronize()
            result.sending, result.hidden = traces.overlap(traces.kernels(trace.events()))
        else:
            trainer.schedule = DepthSchedule(config.with_fields("depth", mean=config.depth_mean / 2))
            counted_step(config.depth_mean / 2)
    finally:
        trainer.resources.close()
    trainer.world.leave()
    return result


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    folder = Path(sys.argv[1])
    measurements = take_steps(load_config(folder / "config.yaml"), sys.argv[2] == "profile")
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(asdict(measurements)))
