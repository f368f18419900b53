"""What every loop is worth: loss by depth, its fit, and what rules of halting make of it."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.data.tasks import TaskSet
from mythos.data.validation import ValidationSet
from mythos.distributed.ranks import World
from mythos.errors import MythosError, short_reason
from mythos.files.text import read_json
from mythos.model import IGNORE_INDEX
from mythos.model.attention.context import document_starts
from mythos.model.cache import DecodeCache
from mythos.model.halting import HaltingRule, default_threshold, halting_rule, usable_rules
from mythos.model.layers import autocast_dtype
from mythos.model.moe import core_class
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.model.state import LoopState, add_load, chosen_overlap, state_measures
from mythos.progress import progress_bar

HARM = 0.01
"""Nats (1% of perplexity) that the deepest loss may lie above the least one before more loops count as harmful."""
SMALLEST_FIT = 4
"""Depths that the fit of three parameters needs at least."""
MULTIPLES = (4.0, 2.0, 1.0, 0.5, 0.25)
"""What a rule's default threshold is multiplied by for its points, as far as the rule allows."""


@dataclass(frozen=True)
class DepthFit:
    """L(T) = limit + amplitude exp(-rate T), the loss in nats after T loops (arXiv 2604.12946)."""

    limit: float
    """L_inf: what ever more loops approach, nats."""
    amplitude: float
    """Z, nats."""
    rate: float
    """z: each loop leaves exp(-z) of the distance to the limit."""
    residual: float
    """Root of the mean squared difference to the losses fitted, nats."""
    loops: list[int]
    """The depths fitted."""

    def loss(self, loops: float) -> float:
        """The law's loss after so many loops, nats."""
        return self.limit + self.amplitude * math.exp(-self.rate * loops)

    def __str__(self) -> str:
        law = f"L(T) = {self.limit:.4f} {self.amplitude:+.4f} exp(-{self.rate:.4f} T)"
        return f"{law}, residual {self.residual:.1e} nats"


@dataclass(frozen=True)
class LoopMeasures:
    """What one pass of the core does to all positions and, where it was read out, what they lose if it is the last."""

    loops: int
    loss: float | None
    """Mean over targets, nats."""
    perplexity: float | None
    bits_per_byte: float | None
    state_norm: float
    """Mean of log ||h||."""
    state_delta: float
    """Mean of ||h_t - h_{t-1}|| / ||h_t||."""
    load_max_over_mean: float | None
    """Tokens of the busiest expert over the mean, in the layer where that is largest; None for a dense core."""
    expert_overlap: float | None
    """Share of the chosen experts that the pass before chose too; None for a dense core and the first pass."""


@dataclass(frozen=True)
class HaltingPoint:
    """A rule at a threshold: what it costs and what it saves."""

    rule: str
    threshold: float
    default: bool
    """Whether inference takes it unless told otherwise."""
    loss: float
    perplexity: float
    bits_per_byte: float | None
    loops: float
    """Mean over positions of the loops run."""
    saved: float
    """Share of the most loops that was not run."""
    exits: list[int]
    """Positions that stopped after 1, 2, ... loops; the last number holds those that went on to the end."""


@dataclass(frozen=True)
class DepthSweep:
    """A model measured at every depth and under rules of halting, on one set of sequences."""

    mean_loops: int
    """The training mean."""
    sequences: int
    sequence_length: int
    loops: list[LoopMeasures]
    """After 1, 2, ... loops."""
    fit: DepthFit | None
    halting: list[HaltingPoint]

    @property
    def read_out(self) -> list[LoopMeasures]:
        """The depths whose loss was measured, shallowest first."""
        return [measures for measures in self.loops if measures.loss is not None]

    def save(self, stem: Path, about: Mapping[str, Any]) -> list[Path]:
        """Write STEM.json, with `about` before the numbers, and STEM.csv, a line a depth and a line a threshold."""
        content = {**about, **asdict(self)}
        described = LoopMeasures, HaltingPoint
        columns = dict.fromkeys(field.name for kind in described for field in fields(kind) if field.name != "exits")
        rows = [asdict(point) for point in (*self.loops, *self.halting)]
        table, document = stem.with_name(stem.name + ".csv"), stem.with_name(stem.name + ".json")
        document.write_text(json.dumps(_finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return [document, table]

    @classmethod
    def load(cls, document: Path) -> tuple["DepthSweep", dict[str, Any]]:
        """The sweep of a STEM.json, and what the file says about it. Raises MythosError if it is not one of `save`."""
        try:
            values = read_json(document)
            about = {key: values.pop(key) for key in values.keys() - {field.name for field in fields(cls)}}
            values["loops"] = [LoopMeasures(**measures) for measures in values["loops"]]
            values["fit"] = DepthFit(**values["fit"]) if values["fit"] else None
            values["halting"] = [HaltingPoint(**point) for point in values["halting"]]
            return cls(**values), about
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MythosError(f"{document} cannot be read as a depth sweep: {short_reason(error)}") from error


class Rows(NamedTuple):
    """Sequences on the model's device."""

    ids: Tensor
    """(B, S) int64."""
    targets: Tensor
    """(B, S) int64, -100 where there is none."""
    documents: Tensor | None
    """(B, S) int, see `RecurrentDepthTransformer.forward`."""


def sweep_depths(mean_loops: int, times: int = 8) -> list[int]:
    """The depths of a sweep: powers of two up to so many times the training mean, the mean, and the end."""
    deepest = times * mean_loops
    return sorted({*(2**n for n in range(deepest.bit_length())), mean_loops, deepest})


def default_rule(model: RecurrentDepthTransformer) -> tuple[str, float] | None:
    """Name and threshold of the rule that inference takes unless told otherwise."""
    name = model.config.halting
    return None if name == "none" else (name, default_threshold(name))


def sweep_rules(model: RecurrentDepthTransformer, names: Sequence[str] | None = None) -> list[tuple[str, float]]:
    """The named rules, or all that the model can follow, each at thresholds around its default.

    Raises ValueError for the name of a rule that there is not, or that the model cannot follow.
    """
    if model.config.injection == "none":
        return []
    for name in names or []:
        halting_rule(model, name)
    names = usable_rules(model) if names is None else names
    points = [(name, multiple * default_threshold(name)) for name in names if name != "none" for multiple in MULTIPLES]
    return [(name, threshold) for name, threshold in points if _follows(model, name, threshold)]


def _follows(model: RecurrentDepthTransformer, name: str, threshold: float | None = None) -> bool:
    try:
        return halting_rule(model, name, threshold) is not None
    except ValueError:
        return False


def depth_sweep(
    model: RecurrentDepthTransformer,
    data: ValidationSet | TaskSet,
    *,
    depths: Sequence[int],
    mean_loops: int,
    rules: Sequence[tuple[str, float]] = (),
    most: int | None = None,
    micro_batch: int = 8,
    autocast: AbstractContextManager[Any],
    progress: bool = True,
) -> DepthSweep:
    """Measure a model in evaluation mode.

    Args:
        model: the model, whole on one device.
        data: the sequences.
        depths: loops after which the loss is measured.
        mean_loops: the training mean.
        rules: rules of halting and their thresholds.
        most: loops after which a rule's positions stop in any case (default the training mean).
        micro_batch: sequences computed at once.
        autocast: what the model runs in.
        progress: show a bar.

    Raises:
        ValueError: a depth below 1, or above 1 for a fixed-depth model; a rule or threshold that the model has not.
    """
    most = mean_loops if most is None else most
    model.check_loops(sorted([*depths, most], reverse=True), len(depths) + 1)
    chosen = [halting_rule(model, name, threshold) for name, threshold in rules]
    batches = list(batches_of(data, micro_batch, model.head_weight.device))
    size = text_bytes(data)
    total = len(batches) * (max(depths) + most * len(rules))
    with autocast, progress_bar(total=total, unit="loop", desc="depth sweep", disable=not progress) as bar:
        loops = measure_loops(model, batches, depths, size, bar.update)
        halting = []
        for (name, threshold), rule in zip(rules, chosen, strict=True):
            bar.set_postfix_str(f"{name} {threshold:g}")
            sums = adaptive_sums(model, batches, rule, most, bar.update)
            default = (name, threshold) == default_rule(model)
            halting.append(HaltingPoint(name, threshold, default, *halting_measures(sums, size)))
    rows, length = len(data.ids), batches[0].ids.shape[1]
    fit = fit_losses({measures.loops: measures.loss for measures in loops if measures.loss is not None})
    return DepthSweep(mean_loops, rows, length, loops, fit, halting)


@torch.no_grad()
def measure_loops(
    model: RecurrentDepthTransformer,
    batches: Iterable[Rows],
    depths: Sequence[int],
    size: int,
    advance: Callable[[int], Any] = lambda _: None,
) -> list[LoopMeasures]:
    """Run every position for the most loops: state and experts of every pass, and the losses after `depths`.

    `size` is the text's in bytes. `advance` is called with the loops done after every batch.
    """
    depths = sorted(set(depths))
    deepest, config, device = depths[-1], model.config, model.head_weight.device
    routed = core_class(config).routes
    # By pass, summed over rows: norm and change of the state, and overlap of the experts.
    states = torch.zeros(deepest, 3, dtype=torch.float64, device=device)
    load = torch.zeros(deepest, config.core_layers, 1, config.n_experts, dtype=torch.int64, device=device)
    losses = torch.zeros(len(depths), dtype=torch.float64, device=device)
    rows = tokens = 0
    before: list[Tensor] = []

    def observe(after: LoopState) -> None:
        nonlocal before
        norm, delta = state_measures(after)
        overlap = chosen_overlap(before, after.experts) if routed and after.loop > 1 else torch.zeros_like(norm)
        states[after.loop - 1] += torch.stack((norm, delta, overlap)).double() * len(after.state)
        if routed:
            add_load(load[after.loop - 1], after)
        before = after.experts

    for ids, targets, documents in batches:
        readouts = model.read_depths(ids, targets, depths, documents, observe)
        losses += torch.stack([readout.losses.double().sum() for readout in readouts])
        rows += len(ids)
        tokens += int((targets != IGNORE_INDEX).sum())
        advance(deepest)

    read_out = dict(zip(depths, losses.tolist(), strict=True))
    by_expert = load.squeeze(2).double()
    balance = (by_expert.amax(-1) / by_expert.mean(-1)).amax(-1).tolist()
    return [
        LoopMeasures(
            loop,
            *(prediction(read_out[loop], tokens, size) if loop in read_out else (None, None, None)),
            state_norm=norm,
            state_delta=delta,
            load_max_over_mean=balance[loop - 1] if routed else None,
            expert_overlap=overlap if routed and loop > 1 else None,
        )
        for loop, (norm, delta, overlap) in enumerate((states / rows).tolist(), start=1)
    ]


@torch.no_grad()
def adaptive_sums(
    model: RecurrentDepthTransformer,
    batches: Iterable[Rows],
    rule: HaltingRule | None,
    most: int,
    advance: Callable[[int], Any] = lambda _: None,
) -> Tensor:
    """Run every position until the rule stops it, at the latest after `most` loops.

    Returns (2 + most,) float64: the summed loss in nats, the number of targets, and the positions that stopped after
    1, 2, ..., `most` loops.
    """
    sums = torch.zeros(2 + most, dtype=torch.float64, device=model.head_weight.device)
    for ids, targets, documents in batches:
        losses, used = adaptive_losses(model, ids, targets, documents, rule, most)
        sums[0] += losses.double().sum()
        sums[1] += (targets != IGNORE_INDEX).sum()
        sums[2:] += torch.bincount(used.flatten(), minlength=most + 1)[1:]
        advance(most)
    return sums


@torch.no_grad()
def adaptive_losses(
    model: RecurrentDepthTransformer,
    ids: Tensor,
    targets: Tensor,
    documents: Tensor | None,
    rule: HaltingRule | None,
    loops: int,
) -> tuple[Tensor, Tensor]:
    """Losses (B, S) float32 in nats and loops run (B, S) int64, each position stopping where the rule says.

    Shapes as in :class:`Rows`; `loops` is the most that a position runs. It is the computation of generation: a
    position that has halted serves its last keys and values to those that go on.
    """
    losses = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    used = torch.zeros_like(ids)
    # To the cache, a document is a row.
    for rows, columns, mask in document_groups(torch.zeros_like(ids) if documents is None else documents):
        dtype = autocast_dtype(model.head_weight)
        cache = DecodeCache(model.config, len(mask), loops=loops, dtype=dtype, device=ids.device)
        result = model.extend(ids[rows, columns], cache, mask=mask, loops=loops, halting=rule, logits="all")
        rows, columns = rows[mask], columns[mask]
        losses[rows, columns] = F.cross_entropy(
            result.logits[mask], targets[rows, columns], ignore_index=IGNORE_INDEX, reduction="none"
        )
        used[rows, columns] = result.loops[mask]
    return losses, used


def document_groups(documents: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gather the documents of rows (B, S) int, runs of equal ids, into groups of like length.

    Yields, for n documents of at most L tokens, row and column of each token, int64, and where there is one: three
    tensors (n, L). No group has more than B x S places.
    """
    device, places, length = documents.device, documents.numel(), documents.shape[1]
    rows, starts = (document_starts(documents) == torch.arange(length, device=device)).nonzero().unbind(1)
    ends = torch.where(rows[1:] == rows[:-1], starts[1:], length)
    lengths = torch.cat((ends, ends.new_tensor([length]))) - starts
    left = lengths.argsort(descending=True)
    while len(left):
        longest = int(lengths[left[0]])
        group, left = left[: places // longest], left[places // longest :]
        order = torch.arange(longest, device=device)
        columns = (starts[group, None] + order).clamp(max=length - 1)
        yield rows[group, None].expand_as(columns), columns, order < lengths[group, None]


def adaptive_metrics(
    model: RecurrentDepthTransformer,
    data: ValidationSet | TaskSet,
    *,
    most: int,
    micro_batch: int,
    world: World,
    autocast: AbstractContextManager[Any],
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The default rule of halting on validation data, for metrics.jsonl; empty where there is none, or a single loop.

    `val/auto_loss` in nats, `val/auto_loops`, the mean loops run by a position, and `val/auto_saved`, the share of
    `most` loops that was not run. The rows are divided over the ranks, which all get the result; each needs the whole
    model. `check` is called before every micro-batch, as often on every rank; what it raises ends the measurement.
    """
    rule = halting_rule(model)
    if rule is None or most == 1:
        return {}
    batches = batches_of(data, micro_batch, world.device, range(world.rank, len(data.ids), world.size))

    def checked() -> Iterator[Rows]:
        # The first rank has the most rows. One whose rows are done goes on checking, for the others wait for it there.
        for _ in range(0, -(-len(data.ids) // world.size), micro_batch):
            check()
            yield from islice(batches, 1)

    with autocast:
        sums = world.sum(adaptive_sums(model, checked(), rule, most))
    loss, _, _, loops, saved, _ = halting_measures(sums, text_bytes(data))
    return {"val/auto_loss": loss, "val/auto_loops": loops, "val/auto_saved": saved}


def fit_metrics(losses: Mapping[int, float]) -> dict[str, float]:
    """`fit_losses` for metrics.jsonl: `val/fit_limit`, `val/fit_amplitude`, `val/fit_rate`, `val/fit_residual`."""
    fit = fit_losses(losses)
    if fit is None:
        return {}
    return {f"val/fit_{name}": getattr(fit, name) for name in ("limit", "amplitude", "rate", "residual")}


def batches_of(
    data: ValidationSet | TaskSet, size: int, device: torch.device, rows: Sequence[int] | None = None
) -> Iterator[Rows]:
    """The given rows (default all) in their order, `size` at a time."""
    rows = range(len(data.ids)) if rows is None else rows
    for start in range(0, len(rows), size):
        chosen = list(rows[start : start + size])
        ids = data.ids[chosen].to(device)
        if isinstance(data, TaskSet):
            yield Rows(ids, data.targets[chosen].to(device), None)
        else:
            documents = None if data.document_ids is None else data.document_ids[chosen].to(device)
            yield Rows(ids[:, :-1], ids[:, 1:], documents)


def text_bytes(data: ValidationSet | TaskSet) -> int:
    """Bytes of all targets; 0 where they are no text."""
    return 0 if isinstance(data, TaskSet) else int(data.bytes.sum())


def halting_measures(sums: Tensor, size: int) -> tuple[float, float, float | None, float, float, list[int]]:
    """What `adaptive_sums` amount to, as the last fields of `HaltingPoint`, for a text of `size` bytes."""
    loss, tokens, *exits = sums.tolist()
    loops = sum(loop * count for loop, count in enumerate(exits, start=1)) / sum(exits)
    return *prediction(loss, tokens, size), loops, 1 - loops / len(exits), [int(count) for count in exits]


def prediction(loss: float, tokens: float, size: int) -> tuple[float, float, float | None]:
    """Loss of a target in nats, perplexity, and bits per byte, from the summed loss; None for targets without bytes."""
    mean = loss / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return mean, perplexity, loss / math.log(2) / size if size else None


def fit_losses(losses: Mapping[int, float]) -> DepthFit | None:
    """Least squares of L(T) = limit + amplitude exp(-rate T) on the losses in nats by number of loops.

    The law never turns. Where the deepest loss lies more than `HARM` above the least, what follows the least is
    therefore left out. None where fewer than four losses remain.

    By variable projection: given the rate, the law is a straight line in exp(-rate T), so that one number is left to
    search for.
    """
    curve = sorted(losses.items())
    lowest = min(range(len(curve)), key=lambda i: (not math.isfinite(curve[i][1]), curve[i][1]))
    if not curve[-1][1] - curve[lowest][1] <= HARM:  # written so that NaN counts as harm
        curve = curve[: lowest + 1]
    if len(curve) < SMALLEST_FIT or not all(math.isfinite(loss) for _, loss in curve):
        return None
    loops, observed = (np.array(values, dtype=np.float64) for values in zip(*curve, strict=True))
    # Beyond these rates the law is a straight line in T, or a step after the first loop, and data cannot tell which.
    low, high = 0.01 / (loops[-1] - loops[0]), 12.0 / (loops[1] - loops[0])
    rates = np.geomspace(low, high, 400)
    for _ in range(8):
        basis = np.exp(-rates[:, None] * (loops - loops[0]))
        centred, distance = basis - basis.mean(1, keepdims=True), observed - observed.mean()
        slopes = (centred @ distance) / (centred**2).sum(1)
        errors = ((distance - slopes[:, None] * centred) ** 2).mean(1)
        best = int(errors.argmin())
        found = float(rates[best]), float(slopes[best]), float(basis[best].mean()), float(errors[best])
        rates = np.geomspace(rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)], 400)
    rate, slope, level, error = found
    return DepthFit(
        limit=float(observed.mean()) - slope * level,
        amplitude=slope * math.exp(rate * loops[0]),
        rate=rate,
        residual=math.sqrt(error),
        loops=[int(depth) for depth, _ in curve],
    )


def _finite(value: Any) -> Any:
    """The same plain data with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
