"""The depth sweep: loss by number of loops, a fitted law, and the trade-off of halting rules."""

import csv
import json
import math
import re
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
from mythos.errors import MythosError, short_reason
from mythos.evaluation.execution import Execution
from mythos.files.text import from_plain, read_json
from mythos.model import IGNORE_INDEX
from mythos.model.attention.context import document_starts
from mythos.model.cache import DecodeCache
from mythos.model.config import loop_stages
from mythos.model.halting import HaltingRule, default_threshold, halting_rule, usable_rules
from mythos.model.layers import autocast_dtype
from mythos.model.moe import core_class
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.model.state import LoopState, add_load, chosen_overlap, state_measures
from mythos.progress import progress_bar

HARM = 0.01
"""Nats (1% of perplexity) by which the deepest loss may exceed the lowest before more loops count as harmful."""
SMALLEST_FIT = 4
"""Minimum number of depths for the fit, which has three parameters."""
MULTIPLES = (4.0, 2.0, 1.0, 0.5, 0.25)
"""Thresholds of a sweep as multiples of the rule's default; those that the rule does not allow are skipped."""


@dataclass(frozen=True)
class DepthFit:
    """L(T) = limit + amplitude exp(-rate T), the loss in nats after T loops (arXiv 2604.12946)."""

    limit: float
    """L_inf: the limit of the loss for many loops, nats."""
    amplitude: float
    """Z, nats."""
    rate: float
    """z: each loop multiplies the distance to the limit by exp(-z)."""
    residual: float
    """Root mean squared error of the fit, nats."""
    loops: list[int]
    """The depths that were fitted."""

    def loss(self, loops: float) -> float:
        """The loss after so many loops by the law, nats."""
        return self.limit + self.amplitude * math.exp(-self.rate * loops)

    def __str__(self) -> str:
        law = f"L(T) = {self.limit:.4f} {self.amplitude:+.4f} exp(-{self.rate:.4f} T)"
        return f"{law}, residual {self.residual:.1e} nats"


@dataclass(frozen=True)
class LoopMeasures:
    """Measurements of one pass of the core over all positions; the loss, if read out, is that of stopping after it."""

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
    """Tokens of the busiest expert over the mean, maximum over layers; None for a dense core."""
    expert_overlap: float | None
    """Share of the chosen experts that the previous pass also chose; None for a dense core and the first pass."""


@dataclass(frozen=True)
class HaltingPoint:
    """A halting rule at a threshold: its loss and its savings."""

    rule: str
    threshold: float
    default: bool
    """Whether inference uses it by default."""
    loss: float
    perplexity: float
    bits_per_byte: float | None
    loops: float
    """Mean loops of a position."""
    saved: float
    """Share of the maximum number of loops that was not run."""
    exits: list[int]
    """Number of positions that stopped after 1, 2, ... loops; the last also counts those that did not halt."""


@dataclass(frozen=True)
class DepthSweep:
    """A model measured at every depth and with halting rules, on one set of sequences."""

    mean_loops: int
    """Mean number of loops in training."""
    sequences: int
    sequence_length: int
    loops: list[LoopMeasures]
    """Measurements after 1, 2, ... loops."""
    fit: DepthFit | None
    halting: list[HaltingPoint]

    @property
    def read_out(self) -> list[LoopMeasures]:
        """The entries of `loops` with a loss, shallowest first."""
        return [measures for measures in self.loops if measures.loss is not None]

    def save(self, stem: Path, about: Mapping[str, Any]) -> list[Path]:
        """Write STEM.json, with `about` before the numbers, and STEM.csv, one line per depth and per threshold."""
        content = {**about, **asdict(self)}
        kinds = LoopMeasures, HaltingPoint
        columns = dict.fromkeys(field.name for kind in kinds for field in fields(kind) if field.name != "exits")
        rows = [*map(asdict, self.loops), *map(asdict, self.halting)]
        table, document = stem.with_name(stem.name + ".csv"), stem.with_name(stem.name + ".json")
        document.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return [document, table]

    @classmethod
    def load(cls, document: Path) -> tuple["DepthSweep", dict[str, Any]]:
        """Read a STEM.json: the sweep and `about`. Raises MythosError if `save` did not write it."""
        try:
            values = read_json(document)
            about = {key: values.pop(key) for key in values.keys() - {field.name for field in fields(cls)}}
            values["loops"] = [LoopMeasures(**measures) for measures in values["loops"]]
            values["fit"] = DepthFit(**values["fit"]) if values["fit"] else None
            values["halting"] = [HaltingPoint(**point) for point in values["halting"]]
            return from_plain(cls, asdict(cls(**values))), about
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise MythosError(f"{document} cannot be read as a depth sweep: {short_reason(error)}") from error


def newest_sweep(run_dir: Path) -> Path | None:
    """The document of a run's newest depth sweep: the last one at the highest step; None if there is none."""

    def step_and_number(path: Path) -> tuple[int, int]:
        match = re.fullmatch(r"step-([0-9]+)(?:-([0-9]+))?", path.stem)
        return (int(match[1]), int(match[2] or 1)) if match else (-1, 0)

    return max((run_dir / "sweep").glob("step-*.json"), key=step_and_number, default=None)


class Rows(NamedTuple):
    """A batch of sequences on the model's device."""

    ids: Tensor
    """(B, S) int64."""
    targets: Tensor
    """(B, S) int64, -100 where there is none."""
    documents: Tensor | None
    """(B, S) int, see `RecurrentDepthTransformer.forward`; None if each row is one document."""


def sweep_depths(mean_loops: int, times: int = 8) -> list[int]:
    """The depths of a sweep: powers of two up to `times` the training mean, the mean, and the deepest."""
    deepest = times * mean_loops
    return sorted({*(2**n for n in range(deepest.bit_length())), mean_loops, deepest})


def default_rule(model: RecurrentDepthTransformer) -> tuple[str, float] | None:
    """Name and threshold of the rule that inference uses by default; None if it uses none."""
    name = model.config.halting
    return None if name == "none" else (name, default_threshold(name))


def sweep_rules(model: RecurrentDepthTransformer, names: Sequence[str] | None = None) -> list[tuple[str, float]]:
    """The named rules, or all that the model supports, each at thresholds around its default.

    Raises ValueError for a rule that does not exist or that the model does not support.
    """
    if model.config.injection == "none":
        return []
    for name in names or []:
        halting_rule(model, name)
    names = usable_rules(model) if names is None else names
    points = [(name, multiple * default_threshold(name)) for name in names if name != "none" for multiple in MULTIPLES]
    return [(name, threshold) for name, threshold in points if _supports(model, name, threshold)]


def _supports(model: RecurrentDepthTransformer, name: str, threshold: float | None = None) -> bool:
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
        rules: halting rules and their thresholds.
        most: maximum number of loops with a rule (default the training mean).
        micro_batch: sequences computed at once.
        autocast: the context to run the model in.
        progress: show a bar.

    Raises:
        ValueError: a depth below 1, or above 1 for a fixed-depth model; a rule or threshold that the model does not
            support.
    """
    most = mean_loops if most is None else most
    model.check_loops(sorted([*depths, most], reverse=True), len(depths) + 1)
    halting_rules = [halting_rule(model, name, threshold) for name, threshold in rules]
    batches = list(batches_of(data, micro_batch, model.head_weight.device))
    size = text_bytes(data)
    total = len(batches) * (max(depths) + most * len(rules))
    bar: Any
    with autocast, progress_bar(total=total, unit="loop", desc="depth sweep", disable=not progress) as bar:
        loops = measure_loops(model, batches, depths, size, bar.update)
        halting = []
        for (name, threshold), rule in zip(rules, halting_rules, strict=True):
            bar.set_postfix_str(f"{name} {threshold:g}")
            sums = adaptive_sums(model, batches, rule, most, bar.update)
            default = (name, threshold) == default_rule(model)
            halting.append(HaltingPoint(name, threshold, default, **halting_measures(sums, size)._asdict()))
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
    """Run every position for the largest of `depths`; measure every pass, and the loss after each of `depths`.

    `size` is the size of the text in bytes. `advance` is called with the number of loops after every batch.
    """
    depths = sorted(set(depths))
    deepest, config, device = depths[-1], model.config, model.head_weight.device
    routed = core_class(config).routes
    # By pass, summed over rows and stages: state norm, state change, expert overlap.
    states = torch.zeros(deepest, 3, dtype=torch.float64, device=device)
    load = torch.zeros(deepest, config.core_layers, 1, config.n_experts, dtype=torch.int64, device=device)
    losses = torch.zeros(len(depths), dtype=torch.float64, device=device)
    rows = tokens = 0
    before: dict[int, list[Tensor]] = {}
    stages = len(loop_stages(config))

    def observe(after: LoopState) -> None:
        norm, delta = state_measures(after)
        overlap = torch.zeros_like(norm)
        if routed and after.loop > 1:
            overlap = chosen_overlap(before[after.layer], after.experts)
        states[after.loop - 1] += torch.stack((norm, delta, overlap)).double() * len(after.state)
        if routed:
            add_load(load[after.loop - 1], after)
        before[after.layer] = after.experts

    for ids, targets, documents in batches:
        readouts = model.read_depths(ids, targets, depths, documents, observe)
        losses += torch.stack([readout.losses.double().sum() for readout in readouts])
        rows += len(ids)
        tokens += int((targets != IGNORE_INDEX).sum())
        advance(deepest)

    predictions = {depth: prediction(loss, tokens, size) for depth, loss in zip(depths, losses.tolist(), strict=True)}
    not_read_out: dict[str, Any] = dict.fromkeys(Prediction._fields)
    by_expert = load.squeeze(2).double()
    balance = (by_expert.amax(-1) / by_expert.mean(-1)).amax(-1).tolist()
    return [
        LoopMeasures(
            loop,
            **(predictions[loop]._asdict() if loop in predictions else not_read_out),
            state_norm=norm,
            state_delta=delta,
            load_max_over_mean=balance[loop - 1] if routed else None,
            expert_overlap=overlap if routed and loop > 1 else None,
        )
        for loop, (norm, delta, overlap) in enumerate((states / rows / stages).tolist(), start=1)
    ]


@torch.no_grad()
def adaptive_sums(
    model: RecurrentDepthTransformer,
    batches: Iterable[Rows],
    rule: HaltingRule | None,
    most: int,
    advance: Callable[[int], Any] = lambda _: None,
) -> Tensor:
    """Run every position until the rule stops it, at most `most` loops.

    Returns (2 + most,) float64: the summed loss in nats, the number of targets, and the number of positions that
    stopped after 1, 2, ..., `most` loops.
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
    """Losses (B, S) float32 in nats and loops (B, S) int64, with every position stopped by the rule.

    Shapes as in :class:`Rows`; `loops` is the maximum for a position. This is the computation of generation: deeper
    loops of other positions attend to the last keys and values of a position that has halted.
    """
    losses = torch.zeros(ids.shape, dtype=torch.float32, device=ids.device)
    used = torch.zeros_like(ids)
    # Each document is a row of the cache.
    for rows_NL, columns_NL, mask_NL in document_groups(torch.zeros_like(ids) if documents is None else documents):
        dtype = autocast_dtype(model.head_weight)
        cache = DecodeCache(model.config, len(mask_NL), loops=loops, dtype=dtype, device=ids.device)
        result = model.extend(ids[rows_NL, columns_NL], cache, mask=mask_NL, loops=loops, halting=rule, logits="all")
        rows, columns = rows_NL[mask_NL], columns_NL[mask_NL]  # packed: the tokens only
        losses[rows, columns] = F.cross_entropy(
            result.logits[mask_NL], targets[rows, columns], ignore_index=IGNORE_INDEX, reduction="none"
        )
        used[rows, columns] = result.loops[mask_NL]
    return losses, used


def document_groups(documents: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Group the documents of rows (B, S) int, which are runs of equal ids, by similar length.

    Yields for N documents of at most L tokens three tensors (N, L): row and column of each token, int64, and a mask
    that is True at tokens. A group has at most B x S entries, padding included.
    """
    device, most_entries, length = documents.device, documents.numel(), documents.shape[1]
    rows, starts = (document_starts(documents) == torch.arange(length, device=device)).nonzero().unbind(1)
    ends = torch.where(rows[1:] == rows[:-1], starts[1:], length)
    lengths = torch.cat((ends, ends.new_tensor([length]))) - starts
    remaining = lengths.argsort(descending=True)
    while len(remaining):
        longest = int(lengths[remaining[0]])
        group, remaining = remaining[: most_entries // longest], remaining[most_entries // longest :]
        offsets = torch.arange(longest, device=device)
        columns = (starts[group, None] + offsets).clamp(max=length - 1)
        yield rows[group, None].expand_as(columns), columns, offsets < lengths[group, None]


def adaptive_metrics(
    model: RecurrentDepthTransformer,
    data: ValidationSet | TaskSet,
    execution: Execution,
    *,
    most: int,
) -> dict[str, float]:
    """The default halting rule on validation data, for metrics.jsonl; empty without a rule or with a single loop.

    Returns `val/auto_loss` in nats, `val/auto_loops`, the mean loops of a position, and `val/auto_saved`, the share of
    `most` loops that was not run. Collective: the rows are divided over the ranks, and all get the result; each needs
    the whole model.
    """
    rule = halting_rule(model)
    if rule is None or most == 1:
        return {}
    world, micro_batch = execution.world, execution.micro_batch
    batches = batches_of(data, micro_batch, world.device, range(world.rank, len(data.ids), world.size))

    def checked() -> Iterator[Rows]:
        # Rank 0 has the most rows. A rank without rows left continues to call `check`, which is collective.
        for _ in range(0, -(-len(data.ids) // world.size), micro_batch):
            execution.check()
            yield from islice(batches, 1)

    with execution.autocast:
        sums = world.sum(adaptive_sums(model, checked(), rule, most))
    measures = halting_measures(sums, text_bytes(data))
    return {"val/auto_loss": measures.loss, "val/auto_loops": measures.loops, "val/auto_saved": measures.saved}


def fit_metrics(losses: Mapping[int, float]) -> dict[str, float]:
    """`fit_losses` for metrics.jsonl: `val/fit_limit`, `val/fit_amplitude`, `val/fit_rate`, `val/fit_residual`."""
    fit = fit_losses(losses)
    if fit is None:
        return {}
    return {f"val/fit_{name}": value for name, value in asdict(fit).items() if name != "loops"}


def batches_of(
    data: ValidationSet | TaskSet, size: int, device: torch.device, rows: Sequence[int] | None = None
) -> Iterator[Rows]:
    """Batches of `size` of these rows (default: all), in order."""
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
    """Bytes of all targets; 0 if they are not text."""
    return 0 if isinstance(data, TaskSet) else int(data.bytes.sum())


class HaltingMeasures(NamedTuple):
    """The fields of a `HaltingPoint` that are measured."""

    loss: float
    perplexity: float
    bits_per_byte: float | None
    loops: float
    saved: float
    exits: list[int]


def halting_measures(sums: Tensor, size: int) -> HaltingMeasures:
    """Means from the result of `adaptive_sums`, for a text of `size` bytes."""
    loss, tokens, *exits = sums.tolist()
    loops = sum(loop * count for loop, count in enumerate(exits, start=1)) / sum(exits)
    saved = 1 - loops / len(exits)
    return HaltingMeasures(*prediction(loss, tokens, size), loops, saved, [int(count) for count in exits])


class Prediction(NamedTuple):
    """How well targets are predicted."""

    loss: float
    """Mean over targets, nats."""
    perplexity: float
    bits_per_byte: float | None
    """None if the targets are not text."""


def prediction(loss: float, tokens: float, size: int) -> Prediction:
    """From the summed loss in nats over so many tokens, for a text of `size` bytes (0: no text)."""
    mean = loss / tokens
    perplexity = math.exp(mean) if mean < 700 else math.inf  # exp overflows a float64 above 709
    return Prediction(mean, perplexity, loss / math.log(2) / size if size else None)


def fit_losses(losses: Mapping[int, float]) -> DepthFit | None:
    """Least-squares fit of L(T) = limit + amplitude exp(-rate T) to the losses in nats by number of loops.

    The law is monotonic. If the deepest loss exceeds the lowest by more than `HARM`, the depths after the lowest are
    left out. None if fewer than four losses remain.

    Method: variable projection. For a fixed rate the law is a straight line in exp(-rate T), so only the rate has to be
    searched for.
    """
    curve = sorted(losses.items())
    lowest = min(range(len(curve)), key=lambda i: (not math.isfinite(curve[i][1]), curve[i][1]))
    if not curve[-1][1] - curve[lowest][1] <= HARM:  # written so that NaN counts as harm
        curve = curve[: lowest + 1]
    if len(curve) < SMALLEST_FIT or not all(math.isfinite(loss) for _, loss in curve):
        return None
    loops, observed = (np.array(values, dtype=np.float64) for values in zip(*curve, strict=True))
    # Below `low` the law is a straight line in T, above `high` a step after the first loop: the rate has no effect.
    low, high = 0.01 / (loops[-1] - loops[0]), 12.0 / (loops[1] - loops[0])
    rates = np.geomspace(low, high, 400)
    for _ in range(8):
        basis = np.exp(-rates[:, None] * (loops - loops[0]))
        centred, distance = basis - basis.mean(1, keepdims=True), observed - observed.mean()
        slopes = (centred @ distance) / (centred**2).sum(1)
        errors = ((distance - slopes[:, None] * centred) ** 2).mean(1)
        best = int(errors.argmin())
        rate, slope = float(rates[best]), float(slopes[best])
        level, error = float(basis[best].mean()), float(errors[best])
        rates = np.geomspace(rates[max(best - 1, 0)], rates[min(best + 1, len(rates) - 1)], 400)
    return DepthFit(
        limit=float(observed.mean()) - slope * level,
        amplitude=slope * math.exp(rate * loops[0]),
        rate=rate,
        residual=math.sqrt(error),
        loops=[int(depth) for depth, _ in curve],
    )


def finite(value: Any) -> Any:
    """The same plain data with None in place of infinities and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
