"""Scaling laws of looped models, fitted to any runs: isoFLOP parabolas, their exponents, and what a loop is worth.

IsoFLOP parabolas after arXiv 2203.15556, for loops instead of parameters after arXiv 2604.12946; the worth of a loop
after arXiv 2604.21106. The law of the loss by loops at inference is `mythos.evaluation.depth_sweep.fit_losses`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """A run of a sweep over loops and tokens."""

    flops: float
    """Training FLOPs; runs of one budget may differ by some percent."""
    loops: float
    """Mean loops of training."""
    tokens: float
    loss: float
    """Nats per token."""


class Optimum(NamedTuple):
    """The best split of a budget."""

    flops: float
    loops: float
    tokens: float
    loss: float
    inside: bool
    """Whether the parabola opens upward with its lowest point between the loops that were run."""


class Exponent(NamedTuple):
    """An exponent with its bootstrap interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:z.2f} ({self.low:z.2f} to {self.high:z.2f})"


def budgets(points: Sequence[Point], tolerance: float = 0.2) -> list[list[Point]]:
    """Group runs by budget: neighbours in FLOPs that differ by at most `tolerance`."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda one: one.flops):
        if groups and point.flops <= groups[-1][-1].flops * (1 + tolerance):
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def isoflop(points: Sequence[Point]) -> Optimum:
    """Fit a parabola of the loss in log loops to the runs of one budget, and take its lowest point.

    Tokens at that point follow from a straight line of log tokens in log loops. If the parabola has no lowest point
    between the loops that were run, the loops with the lowest mean loss stand for it, and `inside` is false.

    Raises ValueError with fewer than three different numbers of loops.
    """
    loops, tokens, losses, flops = (
        np.array([getattr(p, name) for p in points]) for name in ("loops", "tokens", "loss", "flops")
    )
    if len(set(loops.tolist())) < 3:
        raise ValueError(f"a parabola needs three different numbers of loops; got {sorted(set(loops.tolist()))}")
    x = np.log(loops)
    a, b, c = np.polyfit(x, losses, 2)
    place = -b / (2 * a) if a > 0 else np.inf
    budget = float(np.exp(np.log(flops).mean()))
    if not x.min() <= place <= x.max():
        means = {count: losses[loops == count].mean() for count in loops.tolist()}
        best = min(means, key=lambda count: means[count])
        return Optimum(budget, best, float(tokens[loops == best].mean()), float(means[best]), False)
    slope, level = np.polyfit(x, np.log(tokens), 1)
    return Optimum(
        budget, float(np.exp(place)), float(np.exp(level + slope * place)), float(a * place**2 + b * place + c), True
    )


def exponents(points: Sequence[Point], samples: int = 1000, seed: int = 0) -> dict[str, Exponent]:
    """Exponents of the best loops and tokens by FLOPs (`loops`, `tokens`), with 90% bootstrap intervals.

    The runs of each budget are drawn again with replacement; draws with fewer than three different numbers of loops in
    a budget are drawn anew.

    Raises ValueError with fewer than three budgets, or if a budget has fewer than three different numbers of loops.
    """
    groups = budgets(points)
    if len(groups) < 3:
        raise ValueError(f"an exponent needs at least three budgets; got {len(groups)}")
    values = slopes(groups)
    generator = np.random.default_rng(seed)
    drawn = np.array([slopes([resampled(group, generator) for group in groups]) for _ in range(samples)])
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    return {name: Exponent(values[n], float(low[n]), float(high[n])) for n, name in enumerate(("loops", "tokens"))}


def slopes(groups: Sequence[Sequence[Point]]) -> tuple[float, float]:
    """Slopes of the best log loops and log tokens in log FLOPs."""
    best = [isoflop(group) for group in groups]
    x = np.log([one.flops for one in best])
    return tuple(
        float(np.polyfit(x, np.log([getattr(one, name) for one in best]), 1)[0]) for name in ("loops", "tokens")
    )  # type: ignore[return-value]


def resampled(group: Sequence[Point], generator: np.random.Generator) -> list[Point]:
    """As many runs of a budget, drawn with replacement, with at least three different numbers of loops."""
    while True:
        drawn = [group[n] for n in generator.integers(len(group), size=len(group))]
        if len({point.loops for point in drawn}) >= 3:
            return drawn


PHI_RANGE = (-2.0, 2.0)
"""Exponents among which :func:`loop_worth` searches. A fit at an end of them says that the runs do not determine it."""


class LoopRun(NamedTuple):
    """A run for the fit of what a loop is worth."""

    once: float
    """Parameters outside of the loop."""
    core: float
    """Parameters in the loop."""
    loops: float
    tokens: float
    loss: float
    """Nats per token."""


def loop_worth(runs: Sequence[LoopRun]) -> float:
    """Fit phi of L = E + A (N_once + r^phi N_core)^-alpha + B D^-beta: r loops are worth r^phi layers (2604.21106).

    phi 1: a loop is worth a layer of its own; phi 0: nothing. Variable projection: for given phi, alpha and beta the
    law is linear in E, A and B, so only three numbers are searched for, phi in `PHI_RANGE`, on grids that are refined
    five times. A is at least 0. Runs of one number of tokens are fitted without B.

    Raises ValueError with fewer than eight runs, or if all have the same number of loops.
    """
    if len(runs) < 8 or len({run.loops for run in runs}) < 2:
        raise ValueError(f"the fit needs at least 8 runs with different loops; got {len(runs)}")
    once, core, loops, tokens, losses = (np.array(column) for column in zip(*runs, strict=True))
    log_size, one_length = np.log(once.mean() + core.mean()), len(set(tokens.tolist())) == 1

    def errors(grid: np.ndarray) -> np.ndarray:
        """Squared errors of the best line in the two powers, for every (phi, alpha, beta)."""
        phi, alpha, beta = (column[:, None] for column in grid.T)
        size = np.log(once + loops**phi * core) - log_size
        powers = np.stack([np.exp(-alpha * size), (tokens / tokens.mean()) ** -beta], axis=2)
        powers = (powers - powers.mean(1, keepdims=True))[..., : 1 if one_length else 2]
        basis, _ = np.linalg.qr(powers)
        distance = losses - losses.mean()
        # A below 0 would let the loss rise with the size. Its sign by Cramer's rule:
        products, inner = distance @ powers, powers.swapaxes(1, 2) @ powers
        a = products[:, 0] if one_length else products[:, 0] * inner[:, 1, 1] - products[:, 1] * inner[:, 0, 1]
        return np.where(a < 0, np.inf, distance @ distance - ((distance @ basis) ** 2).sum(1))

    bounds = np.array([PHI_RANGE, (0.02, 2.0), (0.02, 2.0)])
    axes = [np.linspace(*PHI_RANGE, 41), *[np.geomspace(0.02, 2.0, 8)] * 2]
    width = np.array([0.1, 0.3, 0.3])
    for _ in range(6):
        grid = np.array(list(itertools.product(*axes)))
        centre = grid[errors(grid).argmin()]
        axes = [np.clip(np.linspace(c - w, c + w, 9), *b) for c, w, b in zip(centre, width, bounds, strict=True)]
        width = width / 3
    return float(centre[0])


def worth_interval(cells: Sequence[Sequence[LoopRun]], samples: int = 100, seed: int = 0) -> Exponent:
    """:func:`loop_worth` of the mean losses of cells, whose runs differ by their seed only, with its 90% interval.

    For each of the bootstrap's samples the runs of every cell are drawn again with replacement. Raises ValueError as
    :func:`loop_worth`.
    """
    generator = np.random.default_rng(seed)
    losses = [np.array([run.loss for run in cell]) for cell in cells]

    def fitted(means: list[float]) -> float:
        return loop_worth([cell[0]._replace(loss=loss) for cell, loss in zip(cells, means, strict=True)])

    value = fitted([float(of_cell.mean()) for of_cell in losses])
    drawn = [fitted([float(generator.choice(one, len(one)).mean()) for one in losses]) for _ in range(samples)]
    low, high = np.quantile(drawn, [0.05, 0.95])
    return Exponent(value, float(low), float(high))
