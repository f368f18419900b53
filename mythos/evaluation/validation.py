"""Validation loss by depth."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from math import log
from typing import Any

import torch

from mythos.data.validation import ValidationSet
from mythos.distributed.ranks import World
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.training.metrics import losses_by_depth as losses_by_depth


def validation_metrics(
    model: RecurrentDepthTransformer,
    data: ValidationSet,
    *,
    depths: Sequence[int],
    main_depth: int,
    micro_batch: int,
    world: World,
    autocast: AbstractContextManager[Any],
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss in nats per token after each of `depths` loops, every position of every row run alike.

    The rows are divided over the ranks, and every rank gets the whole result: `val/loss@<loops>` for each depth and, at
    `main_depth` (always measured), `val/loss`, `val/bits_per_byte`, `val/state_delta` and, for routed cores,
    `moe/depth_overlap`. `check` is called before every micro-batch, as often on every rank; what it raises ends the
    measurement.
    """
    depths = sorted({*depths, main_depth})
    device = world.device
    # Summed over rows: a loss by depth, then the change of the state and the overlap of the experts at the main depth.
    sums = torch.zeros(len(depths) + 2, dtype=torch.float64, device=device)
    mine = range(world.rank, len(data.ids), world.size)
    routed = False
    for start in range(0, -(-len(data.ids) // world.size), micro_batch):
        check()
        chosen = list(mine[start : start + micro_batch])
        # A rank without rows left runs one that does not count: under FSDP the others need it.
        counted, chosen = len(chosen), chosen or [0]
        rows = data.ids[chosen].to(device)
        documents = None if data.document_ids is None else data.document_ids[chosen].to(device)
        with autocast:
            readouts = model.read_depths(rows[:, :-1], rows[:, 1:], depths, documents)
        main = readouts[depths.index(main_depth)]
        routed = main.depth_overlap is not None
        means = torch.stack([main.state_delta, main.depth_overlap if routed else torch.zeros_like(main.state_delta)])
        losses = torch.stack([readout.losses.double().sum() for readout in readouts])
        sums += torch.cat((losses * bool(counted), means.double() * counted))
    *totals, delta, overlap = world.sum(sums).tolist()
    tokens = data.ids[:, 1:].numel()
    metrics = {f"val/loss@{depth}": loss / tokens for depth, loss in zip(depths, totals, strict=True)}
    total = totals[depths.index(main_depth)]
    metrics["val/loss"] = total / tokens
    metrics["val/bits_per_byte"] = total / log(2) / int(data.bytes.sum())
    metrics["val/state_delta"] = delta / len(data.ids)
    if routed:
        metrics["moe/depth_overlap"] = overlap / len(data.ids)
    return metrics
