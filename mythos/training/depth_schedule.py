"""The number of loops of every sequence in a step: a pure function of (seed, step, slot), outside the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import cos, exp, floor, lgamma, log, pi, sqrt
from random import Random
from statistics import NormalDist
from typing import NamedTuple

from mythos.config.sections import Config, CurriculumConfig
from mythos.data.difficulty import hardest, slot_difficulties

LOGNORMAL_SIGMA = 0.5
"""Spread of the log-normal Poisson (Huginn, arXiv 2502.05171)."""
EARLY_SHARE = 8
"""At most one row in so many is read out early to train a halting gate."""
LOGNORMAL_POINTS = 32
"""Quantiles that approximate the log-normal when probabilities are computed."""


@dataclass(frozen=True)
class DepthPlan:
    """The depths of one optimizer step, the same at every world size and micro-batch."""

    loops: tuple[int, ...]
    """Passes through the core for every row of the global batch."""
    backprop: int
    """A row of T loops carries gradient through its last min(T, backprop) passes."""
    early: "EarlyReadout | None" = None
    """Rows that train a halting gate in this step."""

    @property
    def mean_backprop(self) -> float:
        """Mean over rows of the passes that carry gradient."""
        return sum(min(row, self.backprop) for row in self.loops) / len(self.loops)


class EarlyReadout(NamedTuple):
    """Rows of equal depth that are read out before their last loop as well."""

    rows: range
    """Rows of the global batch: those of one slot."""
    by: int
    """Passes between the early readout and the last pass."""


class DepthSchedule:
    """Draws the plan of any step from the configuration alone.

    Row g of the global batch is slot g // S of stream g % S (S = data.streams). All rows of a slot have the same depth,
    and a rank has whole streams, so all ranks do the same work. The slots of a step are drawn by stratified sampling
    in random order, which keeps the step's mean close to the target.
    """

    def __init__(self, config: Config) -> None:
        self.seed = config.run.seed
        self.steps = config.schedule_steps
        self.streams = config.data.streams
        self.slots = config.train.global_batch // config.data.streams
        self.depth = config.depth
        self.mean_target = config.depth_mean
        self.backprop_target = config.depth_backprop
        self.maximum = config.depth_maximum
        self.task = config.data.task if config.depth.follow == "difficulty" else None  # its difficulty is the depth

    def mean(self, step: int) -> float:
        """Target of the mean number of loops in this step."""
        if self.task is not None:
            return (self.task.difficulty[0] + hardest(self.task, step, self.steps)) / 2
        return ramp(self.depth.curriculum, step, self.steps, self.mean_target)

    def backprop(self, step: int) -> int:
        """Number of last passes that carry gradient in this step."""
        return round(ramp(self.depth.backprop_curriculum, step, self.steps, self.backprop_target))

    def plan(self, step: int) -> DepthPlan:
        """Depths of every row of the step's global batch."""
        loops = self.slot_loops(step)
        rows = tuple(depth for depth in loops for _ in range(self.streams))
        return DepthPlan(rows, self.backprop(step), self.early_readout(step, loops))

    def early_readout(self, step: int, loops: Sequence[int]) -> EarlyReadout | None:
        """The rows of one slot, in turn; None if that slot runs one loop, and in most steps with fewer than 8 slots.

        At most an eighth of all rows is thus read out twice: the same rows on any number of ranks, as many on each. The
        depth is log-uniform over 1..T-1, because stopping makes most difference after few loops.
        """
        period = -(-EARLY_SHARE // self.slots)  # steps between early readouts
        slot = step // period % self.slots
        early_depth = int(loops[slot] ** Random(f"early/{self.seed}/{step}").random())
        by = loops[slot] - early_depth
        if step % period or by == 0:
            return None
        return EarlyReadout(range(slot * self.streams, (slot + 1) * self.streams), by)

    def slot_loops(self, step: int) -> list[int]:
        """Loops of each slot: drawn, or the difficulty of the slot's task."""
        if self.task is not None:
            return slot_difficulties(self.task, self.slots, self.seed, step, self.steps)
        cumulative = cumulative_probabilities(self.depth.sampling, self.mean(step), self.maximum)
        random = Random(f"{self.seed}/{step}")
        order = sorted(range(self.slots), key=lambda _: random.random())
        quantiles = [(stratum + random.random()) / self.slots for stratum in order]  # one in each of `slots` strata
        return [1 + sum(q >= edge for edge in cumulative[:-1]) for q in quantiles]


def ramp(curriculum: CurriculumConfig, step: int, steps: int, target: float) -> float:
    """Value at `step` of a ramp from curriculum.start to target over the first curriculum.over of all steps."""
    length = curriculum.over * steps
    if curriculum.shape == "none" or step >= length:
        return target
    x = step / length
    shape = {
        "linear": x,
        "1-sqrt": 1 - sqrt(1 - x),
        "cosine": (1 - cos(pi * x)) / 2,
        "steps": floor(4 * x) / 4,
    }[curriculum.shape]
    return curriculum.start + shape * (target - curriculum.start)


@lru_cache(maxsize=256)
def cumulative_probabilities(sampling: str, mean: float, maximum: int) -> tuple[float, ...]:
    """P(loops <= 1), P(loops <= 2), ..., P(loops <= maximum) = 1 of a distribution whose mean is exactly `mean`.

    Clipping a Poisson to 1..maximum moves its mean (from 2 to 2.06 for mean 2, maximum 4), so its rate is solved for.
    """
    if sampling == "fixed":
        # The two whole numbers around the mean.
        lower, share = floor(mean), mean - floor(mean)
        mass = [(1 - share) * (k == lower) + share * (k == lower + 1) for k in range(1, maximum + 1)]
    elif sampling == "uniform":
        # A mixture of uniform on 1..n and on 1..n+1, for the fractional means of a curriculum; 2 mean - 1 is n + share.
        n = floor(2 * mean - 1)
        share = 2 * mean - 1 - n
        mass = [(1 - share) * (k <= n) / n + share * (k <= n + 1) / (n + 1) for k in range(1, maximum + 1)]
    else:
        multipliers = [1.0]
        if sampling == "lognormal":
            normal = NormalDist(-(LOGNORMAL_SIGMA**2) / 2, LOGNORMAL_SIGMA)
            multipliers = [exp(normal.inv_cdf((i + 0.5) / LOGNORMAL_POINTS)) for i in range(LOGNORMAL_POINTS)]
        # Bisection; 48 halvings leave an error of about 1e-11.
        low, high = 0.0, 64.0 * maximum
        for _ in range(48):
            rate = (low + high) / 2
            mass = clipped_poisson(rate, multipliers, maximum)
            too_low = sum(k * p for k, p in enumerate(mass, start=1)) < mean
            low, high = (rate, high) if too_low else (low, rate)
    return tuple(accumulate(mass))


def clipped_poisson(rate: float, multipliers: list[float], maximum: int) -> list[float]:
    """Probabilities of 1..maximum for max(1, Poisson(rate * m)) capped at maximum, averaged over the multipliers m."""
    mass = [0.0] * maximum
    for scaled in (rate * multiplier for multiplier in multipliers):
        below = exp(-scaled)
        for k in range(1, maximum):
            p = exp(k * log(scaled) - scaled - lgamma(k + 1)) if scaled > 0 else 0.0
            mass[k - 1] += p
            below += p
        mass[0] += exp(-scaled) if maximum > 1 else 0.0
        mass[-1] += max(0.0, 1 - below) if maximum > 1 else 1.0
    return [p / len(multipliers) for p in mass]
