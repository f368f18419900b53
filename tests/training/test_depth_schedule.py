"""Depth plans: distributions, stratification, curriculum, independence of the layout."""

import itertools
import math
import statistics
from typing import Any

import pytest

from mythos.config.loading import config_from_dict
from mythos.config.sections import Config
from mythos.training.depth_schedule import DepthSchedule, cumulative_probabilities


def config_with(steps: int = 1000, streams: int = 1, rows: int = 8, **depth: Any) -> Config:
    return config_from_dict(
        {
            "depth": depth,
            "train": {"steps": steps, "global_batch": rows},
            "data": {"streams": streams},
        }
    )


@pytest.mark.parametrize("mean", [1, 1.5, 2, 6, 16, 64])
@pytest.mark.parametrize("sampling", ["poisson", "fixed", "uniform", "lognormal"])
def test_mean_is_exact(sampling, mean):
    maximum = math.ceil(2 * mean)
    cumulative = cumulative_probabilities(sampling, mean, maximum)
    mass = [b - a for a, b in itertools.pairwise((0.0, *cumulative))]
    assert len(mass) == maximum
    assert cumulative[-1] == pytest.approx(1)
    assert min(mass) >= -1e-12
    assert sum(k * p for k, p in enumerate(mass, start=1)) == pytest.approx(mean, rel=1e-6)


def test_poisson_is_clipped_poisson():
    """At mean 6 clipping hardly moves the rate, so the mass is Poisson's own."""
    cumulative = cumulative_probabilities("poisson", 6.0, 12)
    mass = [b - a for a, b in itertools.pairwise((0.0, *cumulative))]
    poisson = [math.exp(-6) * 6**k / math.factorial(k) for k in range(40)]
    expected = [poisson[0] + poisson[1], *poisson[2:12], sum(poisson[12:])]
    assert mass == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("sampling", ["poisson", "uniform", "lognormal", "fixed"])
def test_executed_mean_within_two_percent_over_1000_draws(sampling):
    schedule = DepthSchedule(config_with(mean=8, sampling=sampling))
    draws = [depth for step in range(125) for depth in schedule.plan(step).loops]
    assert len(draws) == 1000
    assert statistics.mean(draws) == pytest.approx(8, rel=0.02)
    assert min(draws) >= 1 and max(draws) <= 16
    if sampling == "poisson":
        assert statistics.pvariance(draws) == pytest.approx(8, rel=0.15)


def test_strata_keep_every_step_near_the_mean():
    schedule = DepthSchedule(config_with(mean=8))
    means = [statistics.mean(schedule.plan(step).loops) for step in range(300)]
    independent = math.sqrt(8 / 8)  # standard deviation of the mean of 8 independent Poisson draws
    assert statistics.pstdev(means) < 0.5 * independent
    orders = {schedule.plan(step).loops.index(max(schedule.plan(step).loops)) for step in range(100)}
    assert orders == set(range(8)), "strata must come in random order"


def test_rows_of_a_slot_share_a_depth_and_streams_do_not_matter():
    few = DepthSchedule(config_with(streams=2, rows=8, mean=6)).plan(5).loops
    many = DepthSchedule(config_with(streams=16, rows=64, mean=6)).plan(5).loops
    slots = [few[slot * 2] for slot in range(4)]
    assert few == tuple(depth for depth in slots for _ in range(2))
    assert many == tuple(depth for depth in slots for _ in range(16))


def test_plans_are_a_function_of_seed_and_step():
    one, two = DepthSchedule(config_with(mean=6)), DepthSchedule(config_with(mean=6))
    two.plan(0)
    assert [one.plan(step) for step in (3, 1, 3)] == [two.plan(step) for step in (3, 1, 3)]
    assert len({one.plan(step).loops for step in range(20)}) > 15


@pytest.mark.parametrize(
    ("shape", "quarter", "half"),
    [("linear", 0.25, 0.5), ("1-sqrt", 1 - math.sqrt(0.75), 1 - math.sqrt(0.5)),
     ("cosine", (1 - math.cos(math.pi / 4)) / 2, 0.5), ("steps", 0.25, 0.5)],
)  # fmt: skip
def test_curriculum_shapes(shape, quarter, half):
    curriculum = {"shape": shape, "over": 0.4, "start": 2}
    schedule = DepthSchedule(config_with(mean=10, backprop=6, curriculum=curriculum, backprop_curriculum=curriculum))
    assert schedule.mean(0) == pytest.approx(2)
    assert schedule.mean(100) == pytest.approx(2 + 8 * quarter)
    assert schedule.mean(200) == pytest.approx(2 + 8 * half)
    assert schedule.mean(400) == schedule.mean(999) == 10
    assert schedule.plan(0).backprop == 2
    assert schedule.plan(200).backprop == round(2 + 4 * half)
    assert schedule.plan(400).backprop == 6


def test_curricula_are_laid_over_the_schedule_and_then_stay():
    curriculum = {"shape": "linear", "over": 0.4, "start": 2}
    depth = {"mean": 10, "backprop": 6, "curriculum": curriculum, "backprop_curriculum": curriculum}
    short = config_with(steps=1000, **depth)
    long = config_with(steps=5000, **depth)
    laid = long.model_copy(update={"optim": long.optim.model_copy(update={"schedule_steps": 1000})})
    for step in (0, 100, 399, 400, 999):
        assert DepthSchedule(laid).plan(step) == DepthSchedule(short).plan(step)
    assert DepthSchedule(laid).mean(4999) == 10 and DepthSchedule(laid).plan(4999).backprop == 6
    assert DepthSchedule(long).mean(400) == pytest.approx(2 + 8 * 0.2)


def test_mean_of_loops_that_follow_a_task():
    task = {"kind": "reasoning", "streams": 1, "sequence_length": 64}
    task["task"] = {"difficulty": [1, 4], "ramp": 0.5}
    config = config_from_dict(
        {"data": task, "depth": {"follow": "difficulty"}, "train": {"steps": 1000, "global_batch": 8}}
    )
    schedule = DepthSchedule(config)
    for step, mean in ((0, 1), (130, 1.5), (499, 2.5), (999, 2.5)):
        assert schedule.mean(step) == mean
        drawn = [depth for near in range(step, step + (99 if step < 130 else 1)) for depth in schedule.plan(near).loops]
        assert statistics.mean(drawn) == pytest.approx(mean, abs=0.1)


def test_curriculum_is_executed():
    schedule = DepthSchedule(config_with(mean=10, curriculum={"shape": "linear", "over": 1.0, "start": 1}))
    early = statistics.mean(d for step in range(0, 100) for d in schedule.plan(step).loops)
    late = statistics.mean(d for step in range(900, 1000) for d in schedule.plan(step).loops)
    assert early == pytest.approx(1.45, abs=0.1)
    assert late == pytest.approx(9.55, abs=0.25)


def test_mean_backprop():
    plan = DepthSchedule(config_with(mean=6, backprop=4)).plan(0)
    assert plan.mean_backprop == statistics.mean(min(depth, 4) for depth in plan.loops)


@pytest.mark.parametrize("slots", [1, 3, 4, 6, 8, 16])
def test_rows_that_teach_a_gate(slots):
    """At most an eighth of all rows, of one depth, after 1..T-1 loops, few more often than many; a slot in turn."""
    schedule = DepthSchedule(config_with(mean=8, streams=2, rows=2 * slots, steps=4000))
    plans = [schedule.plan(step) for step in range(4000)]
    read = [plan for plan in plans if plan.early is not None]
    share = len(read) / len(plans) / slots
    assert 0.9 / slots / math.ceil(8 / slots) < share <= 1 / 8
    depths = []
    for plan in read:
        (loops,) = {plan.loops[row] for row in plan.early.rows}
        depths.append(loops - plan.early.by)
        assert 1 <= depths[-1] < loops and len(plan.early.rows) == 2
    assert {row // 2 for plan in read for row in plan.early.rows} == set(range(slots))
    # The depth is at most the root of T in half of the draws.
    shallow = [depth for depth, plan in zip(depths, read, strict=True) if plan.loops[plan.early.rows[0]] == 9]
    assert statistics.mean(depth < 3 for depth in shallow) == pytest.approx(0.5, abs=0.15)
    assert schedule.plan(17) == DepthSchedule(config_with(mean=8, streams=2, rows=2 * slots, steps=4000)).plan(17)
