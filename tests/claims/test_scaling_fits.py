"""Fits of scaling laws on synthetic runs whose exponents are known."""

from itertools import product
from math import log

import numpy as np
import pytest

from mythos.claims.scaling_fits import (
    PHI_RANGE,
    LoopRun,
    Point,
    budgets,
    exponents,
    isoflop,
    loop_worth,
    worth_interval,
)


def sweep(exponent: float, noise: float = 0.0, counts: tuple[int, ...] = (1, 2, 4, 8, 16)) -> list[Point]:
    """Runs of four budgets whose best loops are 2 C^exponent (C in units of the first), tokens C / loops^0.5."""
    generator = np.random.default_rng(1)
    points = []
    for budget, loops in product((1.0, 4.0, 16.0, 64.0), counts):
        best = 2 * budget**exponent
        loss = 4 - 0.2 * log(budget) + 0.05 * log(loops / best) ** 2 + noise * generator.normal()
        points.append(Point(1e15 * budget * (1 + 0.01 * generator.uniform()), loops, budget * 1e6 / loops**0.5, loss))
    return points


def test_budgets_are_grouped_by_flops() -> None:
    assert [len(group) for group in budgets(sweep(0.4))] == [5, 5, 5, 5]


def test_the_lowest_point_of_a_parabola_is_found() -> None:
    best = isoflop(sweep(0.4)[5:10])
    assert best.inside
    assert best.loops == pytest.approx(2 * 4**0.4, rel=1e-6)
    assert best.tokens == pytest.approx(4e6 / (2 * 4**0.4) ** 0.5, rel=1e-6)
    assert best.loss == pytest.approx(4 - 0.2 * log(4), rel=1e-6)


def test_a_budget_without_a_lowest_point_says_so() -> None:
    falling = [Point(1e15, loops, 1e6, 4 - 0.1 * loops) for loops in (1, 2, 4)]
    best = isoflop(falling)
    assert not best.inside and best.loops == 4


@pytest.mark.parametrize("exponent", [0.2, 0.4])
def test_exponents_are_recovered_within_their_intervals(exponent: float) -> None:
    exact = exponents(sweep(exponent), samples=20)
    assert exact["loops"].value == pytest.approx(exponent, abs=0.01)
    assert exact["tokens"].value == pytest.approx(1 - exponent / 2, abs=0.01)
    noisy = exponents(sweep(exponent, noise=0.005), samples=300)
    assert noisy["loops"].low < exponent < noisy["loops"].high
    assert noisy["loops"].high - noisy["loops"].low > 0.01
    assert exponents(sweep(exponent, noise=0.005), samples=300) == noisy  # the same at every call


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="three budgets; got 2"):
        exponents(sweep(0.4)[:10])
    with pytest.raises(ValueError, match="three different numbers of loops"):
        isoflop(sweep(0.4)[:2])
    with pytest.raises(ValueError, match="at least 8 runs"):
        loop_worth([LoopRun(1e5, 1e5, 1, 1e6, 4.0)] * 3)


@pytest.mark.parametrize("phi", [0.0, 0.45, 0.65, 1.0])
def test_the_worth_of_a_loop_is_recovered(phi: float) -> None:
    runs = []
    for core, loops, tokens in product((5e4, 2e5), (1, 2, 4, 8), (1e6, 4e6, 1.6e7)):
        size = 1e5 + loops**phi * core
        runs.append(LoopRun(1e5, core, loops, tokens, 1.8 + 30 * size**-0.3 + 60 * tokens**-0.35))
    assert loop_worth(runs) == pytest.approx(phi, abs=0.03)
    # Runs of one length determine it too.
    assert loop_worth([run for run in runs if run.tokens == 4e6]) == pytest.approx(phi, abs=0.03)


def test_a_worth_that_the_runs_do_not_determine_is_an_end_of_the_range() -> None:
    """Losses that rise with any loop, however many: only r^-infinity would say so."""
    runs = [LoopRun(1e5, 1e5, loops, 1e6, 4.0 + 0.1 * (loops > 1)) for loops in (1, 1, 2, 2, 4, 4, 8, 8)]
    assert loop_worth(runs) == pytest.approx(PHI_RANGE[0], abs=0.05)


def test_the_interval_of_a_loops_worth_contains_it_and_widens_with_noise() -> None:
    def cells(noise: float) -> list[list[LoopRun]]:
        generator = np.random.default_rng(2)
        found = []
        for core, loops, tokens in product((5e4, 2e5), (1, 2, 4, 8), (1e6, 4e6)):
            size = 1e5 + loops**0.45 * core
            loss = 1.8 + 30 * size**-0.3 + 60 * tokens**-0.35
            found.append([LoopRun(1e5, core, loops, tokens, loss + noise * generator.normal()) for _ in range(3)])
        return found

    little, much = (worth_interval(cells(noise), samples=40) for noise in (0.001, 0.01))
    assert little.low < 0.45 < little.high
    assert much.high - much.low > 3 * (little.high - little.low)
    assert worth_interval(cells(0.01), samples=40) == much  # the same at every call
