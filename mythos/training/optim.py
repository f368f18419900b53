"""Parameter groups of AdamW and Muon, with decay on matrices only, and the learning rate of every step."""

from math import cos, pi

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mythos.config.sections import OptimConfig
from mythos.training.muon import Muon

UNDECAYED = (
    *("embedding.", "value_embeddings.", "readout."),
    *("recurrence.injection.", "recurrence.embedding.", "recurrence.adapter.scale"),
)
"""Matrices (by name prefix) that weight decay would pull away from what they mean: tables, the identity-centred
injection and readout, and per-loop scales."""


HIDDEN = ("prelude.", "recurrence.blocks.", "coda.")
"""Where (by name prefix) the matrices are that Muon is for, all but those of routers."""


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether a parameter is one that Muon is for: of attention or feed-forward, or a stack of experts'."""
    return parameter.ndim > 1 and name.startswith(HIDDEN) and not name.endswith("router.weight")


def build_optimizer(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32, ranks: int = 1
) -> torch.optim.AdamW | Muon:
    """Fused AdamW, or Muon with products in `dtype`, whose work on whole matrices `ranks` processes share.

    The state exists from the start: a checkpoint has all tensors.
    """
    named = dict(model.named_parameters())
    matrices = {p for name, p in named.items() if config.name == "muon" and is_hidden_matrix(name, p)}
    groups: dict[tuple[float, bool, int], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        decay = config.weight_decay if parameter.ndim > 1 and not name.startswith(UNDECAYED) else 0.0
        parts = 0 if parameter not in matrices else 2 if "gate_up" in name else 1
        # One fused operation takes shards or whole tensors, not both.
        groups.setdefault((decay, isinstance(parameter, DTensor), parts), []).append(parameter)
    settings = [
        {"params": members, "weight_decay": decay} | ({"momentum": config.momentum, "parts": parts} if parts else {})
        for (decay, _, parts), members in groups.items()
    ]
    options = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    optimizer = (
        Muon(settings, dtype, ranks=ranks, **options)
        if config.name == "muon"
        else torch.optim.AdamW(settings, **options)
    )
    for parameter in (p for p in named.values() if p not in matrices):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Learning rate of 0-based `step`: linear warmup from 0, then cosine or warmup-stable-decay over `steps` in all.

    Later steps keep the last value.
    """
    warmup = config.warmup * steps
    if step < warmup:
        return config.lr * (step + 1) / (warmup + 1)
    if config.schedule == "cosine":
        progress = (step - warmup) / max(1.0, steps - 1 - warmup)
        share = (1 + cos(pi * min(1.0, progress))) / 2
    else:
        share = min(1.0, max(0, steps - 1 - step) / max(1.0, config.decay * steps))
    return config.lr * (config.min_lr + (1 - config.min_lr) * share)
