"""Validation loss by depth."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import log
from typing import Any

import torch

from mythos.data.validation import ValidationSet
from mythos.model.rdt import RecurrentDepthTransformer


def validation_metrics(
    model: RecurrentDepthTransformer,
    data: ValidationSet,
    *,
    depths: Sequence[int],
    main_depth: int,
    micro_batch: int,
    device: torch.device,
    autocast: AbstractContextManager[Any],
) -> dict[str, float]:
    """Mean loss in nats per token after each of `depths` loops, every position of every row run alike.

    Returns `val/loss@<loops>` for each depth and, at `main_depth` (always measured), `val/loss`, `val/bits_per_byte`,
    `val/state_delta` and, for routed cores, `moe/depth_overlap`.
    """
    depths = sorted({*depths, main_depth})
    losses = torch.zeros(len(depths), dtype=torch.float64, device=device)
    weights, deltas, overlaps = [], [], []
    for start in range(0, len(data.ids), micro_batch):
        rows = data.ids[start : start + micro_batch].to(device)
        documents = None if data.document_ids is None else data.document_ids[start : start + micro_batch].to(device)
        with autocast:
            readouts = model.read_depths(rows[:, :-1], rows[:, 1:], depths, documents)
        losses += torch.stack([readout.losses.double().sum() for readout in readouts])
        main = readouts[depths.index(main_depth)]
        weights.append(len(rows))
        deltas.append(main.state_delta)
        if main.depth_overlap is not None:
            overlaps.append(main.depth_overlap)
    tokens = data.ids[:, 1:].numel()
    by_depth = dict(zip(depths, (losses / tokens).tolist(), strict=True))
    total = by_depth[main_depth] * tokens
    share = torch.tensor(weights, dtype=torch.float64, device=device) / sum(weights)
    metrics = {f"val/loss@{depth}": loss for depth, loss in by_depth.items()}
    metrics["val/loss"] = by_depth[main_depth]
    metrics["val/bits_per_byte"] = total / log(2) / int(data.bytes.sum())
    metrics["val/state_delta"] = (torch.stack(deltas) * share).sum().item()
    if overlaps:
        metrics["moe/depth_overlap"] = (torch.stack(overlaps) * share).sum().item()
    return metrics


def losses_by_depth(metrics: dict[str, float]) -> dict[int, float]:
    """The `val/loss@<loops>` of a record, by number of loops, shallowest first."""
    prefix = "val/loss@"
    return dict(sorted((int(key.removeprefix(prefix)), v) for key, v in metrics.items() if key.startswith(prefix)))
