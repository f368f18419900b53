"""AdamW with decay on matrices only, and the learning rate of every step."""

from math import cos, pi

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mythos.config import OptimConfig

UNDECAYED = ("embedding.", "readout.", "recurrence.injection.", "recurrence.embedding.", "recurrence.adapter.scale")
"""Matrices (by name prefix) that weight decay would pull away from what they mean: tables, the identity-centred
injection and readout, and per-loop scales."""


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW; its state exists from the start, so that a checkpoint always has the same tensors."""
    named = dict(model.named_parameters())
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        decay = config.weight_decay if parameter.ndim > 1 and not name.startswith(UNDECAYED) else 0.0
        # One fused operation takes shards or whole tensors, not both.
        groups.setdefault((decay, isinstance(parameter, DTensor)), []).append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": members, "weight_decay": decay} for (decay, _), members in groups.items()],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )
    for parameter in named.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of 0-based `step` of `steps`: linear warmup from 0, then cosine or warmup-stable-decay."""
    warmup = config.warmup * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1.0, steps - 1 - warmup)
        share = (1 + cos(pi * min(1.0, progress))) / 2
    else:
        share = min(1.0, (steps - 1 - step) / max(1.0, config.decay * steps))
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)
