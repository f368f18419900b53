"""Measurements of a run: metrics.jsonl first, then Weights & Biases; throughput, utilisation and memory."""

import json
import resource
import secrets
import sys
from pathlib import Path
from typing import Any

import torch

from mythos.config import Config
from mythos.errors import MythosError

PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12}
"""Dense bfloat16 matrix products per second by part of the device's name, from the vendor's data sheets."""


class MetricsLog:
    """Appends JSON objects to `metrics.jsonl`, and to W&B unless it is disabled.

    Continuing at `start_step` drops the lines of later steps that a killed run left: they will be written again.
    """

    def __init__(self, run_dir: Path, config: Config, start_step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        kept = [record for record in read_metrics(self.path) if record["step"] <= start_step] if start_step else []
        aside = self.path.with_name(self.path.name + ".tmp")
        aside.write_text("".join(json.dumps(record) + "\n" for record in kept))
        aside.replace(self.path)
        self.file = self.path.open("a")
        self.wandb_run = start_wandb(run_dir, config)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it must have `step`."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.wandb_run is not None:
            self.wandb_run.log({key: value for key, value in record.items() if key != "step"}, step=record["step"])

    def close(self) -> None:
        """Finish the file and the W&B run."""
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    records: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def start_wandb(run_dir: Path, config: Config) -> Any | None:
    """A W&B run that keeps its id over resumes, or None if log.wandb.mode is disabled.

    Raises MythosError where W&B cannot be reached or does not know the user.
    """
    settings = config.log.wandb
    if settings.mode == "disabled":
        return None
    import wandb  # takes a second to import, and a run may never need it

    id_file = run_dir / "wandb_id"
    if not id_file.exists():
        id_file.write_text(secrets.token_hex(8))
    try:
        return wandb.init(
            mode=settings.mode,
            project=settings.project,
            entity=settings.entity,
            tags=settings.tags,
            name=config.run.name,
            id=id_file.read_text(),
            resume="allow",
            dir=str(run_dir),
            config=config.model_dump(),
        )
    except wandb.errors.Error as error:
        raise MythosError(
            f"log.wandb.mode is {settings.mode}, but W&B cannot be started: {error} Run `wandb login`, or set "
            "log.wandb.mode to offline or disabled."
        ) from error


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Peak rate of matrix products of a known GPU in bfloat16, in FLOP/s; None where it is not known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for part, rate in PEAK_BF16_FLOPS.items() if part in name), None)


def expert_balance(load: torch.Tensor) -> dict[str, float]:
    """`moe/load_max_over_mean` and `moe/dead_experts` from counts (core layers, loop indices, experts).

    The first is the largest share any expert has in any layer, over the mean share; an expert is dead if no loop of the
    step sent it a token.
    """
    by_expert = load.sum(1).double()
    return {
        "moe/load_max_over_mean": (by_expert.amax(-1) / by_expert.mean(-1)).max().item(),
        "moe/dead_experts": int((by_expert == 0).sum().item()),
    }
