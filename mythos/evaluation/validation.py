"""Validation loss by depth, and rows with all targets right."""

from collections.abc import Sequence
from math import log

import torch
from torch import Tensor

from mythos.data.validation import ValidationSet
from mythos.evaluation.execution import Execution
from mythos.model import IGNORE_INDEX
from mythos.model.rdt import RecurrentDepthTransformer


def validation_metrics(
    model: RecurrentDepthTransformer,
    data: ValidationSet,
    execution: Execution,
    *,
    depths: Sequence[int],
    main_depth: int,
) -> dict[str, float]:
    """Mean loss in nats per token after each of `depths` loops, with the same loops at every position.

    Returns `val/loss@<loops>` for each depth and, at `main_depth` (always measured), `val/loss`, `val/bits_per_byte`,
    `val/state_delta` and, for routed cores, `moe/depth_overlap`. Collective: the rows are divided over the ranks, and
    all get the result.
    """
    depths = sorted({*depths, main_depth})
    world, micro_batch, device = execution.world, execution.micro_batch, execution.world.device
    # Sums over rows: the loss by depth, then state_delta and depth_overlap at the main depth.
    sums = torch.zeros(len(depths) + 2, dtype=torch.float64, device=device)
    mine = range(world.rank, len(data.ids), world.size)
    routed = False
    for start in range(0, -(-len(data.ids) // world.size), micro_batch):
        execution.check()
        chosen = list(mine[start : start + micro_batch])
        # A rank without rows left repeats row 0, uncounted: under FSDP the others wait for it.
        counted, chosen = len(chosen), chosen or [0]
        rows = data.ids[chosen].to(device)
        documents = None if data.document_ids is None else data.document_ids[chosen].to(device)
        with execution.autocast:
            readouts = model.read_depths(rows[:, :-1], rows[:, 1:], depths, documents)
        main = readouts[depths.index(main_depth)]
        routed = main.depth_overlap is not None
        overlap = torch.zeros_like(main.state_delta) if main.depth_overlap is None else main.depth_overlap
        means = torch.stack([main.state_delta, overlap])
        losses = torch.stack([readout.losses.double().sum() for readout in readouts])
        sums += torch.cat((losses * bool(counted), means.double() * counted))
    *totals, delta_sum, overlap_sum = world.sum(sums).tolist()
    tokens = data.ids[:, 1:].numel()
    metrics = {f"val/loss@{depth}": loss / tokens for depth, loss in zip(depths, totals, strict=True)}
    total = totals[depths.index(main_depth)]
    metrics["val/loss"] = total / tokens
    metrics["val/bits_per_byte"] = total / log(2) / int(data.bytes.sum())
    metrics["val/state_delta"] = delta_sum / len(data.ids)
    if routed:
        metrics["moe/depth_overlap"] = overlap_sum / len(data.ids)
    return metrics


def right_rows(right: Tensor, targets: Tensor) -> Tensor:
    """Rows with every target predicted: `right` (B, S) bool, by token, and `targets` (B, S) -> (B,) bool."""
    return (right | (targets == IGNORE_INDEX)).all(-1)
