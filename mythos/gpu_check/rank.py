"""One of several processes that train: `python -m mythos.gpu_check.rank FOLDER count|profile`, started by `ranks`.

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
from mythos.trainer import Trainer
from mythos.training.depth_schedule import DepthSchedule

STEPS = 3


@dataclass
class Taken:
    """What the steps of a process came to."""

    losses: list[float]
    norms: list[float]
    gathers: dict[str, int] = field(default_factory=dict)
    """All-gathers of a step, by its loops."""
    sending: float = 0.0
    """Microseconds of NCCL's kernels in a step; 0 where there was no profile."""
    hidden: float = 0.0
    """Microseconds of them during which other kernels ran."""


class Gathers(TorchDispatchMode):
    """Counts all-gathers of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.namespace == "c10d" and "allgather" in func.name()
        return func(*args, **(kwargs or {}))


def take_steps(config: Config, profiled: bool = False) -> Taken:
    """Train for a few steps as a run does; then profile one, or take one of half as many loops."""
    trainer = Trainer(config)
    taken = Taken([], [])
    try:
        for _ in range(STEPS):
            with Gathers() as counter:
                result = next_step(trainer)
            taken.gathers[f"{config.depth_mean:g}"] = counter.count
            taken.losses.append(result.loss.item())
            taken.norms.append(result.grad_norm.item())
        if profiled:
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CUDA]) as trace:
                next_step(trainer)
                torch.cuda.synchronize()
            taken.sending, taken.hidden = traces.overlap(traces.kernels(trace.events()))
        else:
            depth = config.depth.model_copy(update={"mean": config.depth_mean / 2})
            trainer.schedule = DepthSchedule(config.model_copy(update={"depth": depth}))
            with Gathers() as counter:
                next_step(trainer)
            taken.gathers[f"{config.depth_mean / 2:g}"] = counter.count
    finally:
        trainer.resources.close()
    trainer.world.leave()
    return taken


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    folder = Path(sys.argv[1])
    found = take_steps(load_config(folder / "config.yaml"), sys.argv[2] == "profile")
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(asdict(found)))
