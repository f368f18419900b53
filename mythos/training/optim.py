"""The optimizer of a model: parameter groups of AdamW and Muon, with weight decay on matrices only."""

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from mythos.config.sections import OptimConfig
from mythos.model.layers import is_dtensor, is_loop_table
from mythos.training.adamw import FusedAdamW
from mythos.training.muon import Muon

UNDECAYED = (
    *("embedding.", "value_embeddings.", "readout."),
    *("recurrence.lanes.", "recurrence.injection.", "recurrence.embedding.", "recurrence.adapter.scale"),
)
"""Name prefixes of matrices that weight decay would pull away from their meaning: tables, injection and readout (which
start as the identity), gates of lanes, and per-loop scales. Other tables with a row per loop (`is_loop_table`) are not
decayed either."""

HIDDEN = ("prelude.", "recurrence.blocks.", "coda.")
"""Name prefixes of the matrices that Muon updates, except for those of routers."""


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon updates a parameter: a matrix of attention or feed-forward, or a stack of experts' matrices."""
    is_matrix = parameter.ndim > 1 and not is_loop_table(name)
    return is_matrix and name.startswith(HIDDEN) and not name.endswith("router.weight")


def build_optimizer(
    model: nn.Module, config: OptimConfig, dtype: torch.dtype = torch.float32, ranks: int = 1
) -> FusedAdamW:
    """Fused AdamW, or Muon with matmuls in `dtype` whose work on whole matrices is divided over `ranks` processes.

    The state is allocated here, not in the first step, so that every checkpoint has the same tensors.
    """
    named = dict(model.named_parameters())
    muon = config.name == "muon"
    matrices = {p for name, p in named.items() if muon and is_hidden_matrix(name, p)}
    # (weight decay, mesh or None, matrices side by side in a parameter of Muon or 0 for AdamW). One fused kernel takes
    # whole tensors, or shards over one mesh.
    groups: dict[tuple[float, DeviceMesh | None, int], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        decayed = parameter.ndim > 1 and not name.startswith(UNDECAYED) and not is_loop_table(name)
        decay = config.weight_decay if decayed else 0.0
        parts = 0 if parameter not in matrices else 2 if "gate_up" in name else 1
        mesh = parameter.device_mesh if is_dtensor(parameter) else None
        groups.setdefault((decay, mesh, parts), []).append(parameter)
    settings = [
        {"params": members, "weight_decay": decay} | ({"momentum": config.momentum, "parts": parts} if parts else {})
        for (decay, _, parts), members in groups.items()
    ]
    optimizer = (
        Muon(settings, dtype, ranks=ranks, lr=config.lr, betas=config.betas, eps=config.eps)
        if muon
        else FusedAdamW(settings, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)
    )
    for parameter in (p for p in named.values() if p not in matrices):
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def state_bytes(config: OptimConfig, name: str, parameter: Tensor, elements: int) -> int:
    """Bytes that :func:`build_optimizer` allocates for a parameter of which a rank has so many elements.

    Muon keeps one momentum, AdamW two and a step counter. For plans: building an optimizer imports Dynamo, and
    `zeros_like` on the meta device sympy, each half a second.
    """
    if config.name == "muon" and is_hidden_matrix(name, parameter):
        return elements * parameter.itemsize
    return 2 * elements * parameter.itemsize + torch.float32.itemsize
