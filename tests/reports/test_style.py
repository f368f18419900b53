"""Every picture of the project keeps to the style, judged by its parts; and the colours by models of colour vision."""

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from mythos.config.loading import load_config
from mythos.evaluation.continuations import DepthSetting
from mythos.evaluation.depth_sweep import DepthSweep, HaltingPoint, LoopMeasures, fit_losses, fit_metrics
from mythos.evaluation.reasoning import AccuracyMap
from mythos.evaluation.results import Result, save
from mythos.generation.depth_view import PALETTE
from mythos.reports import figures
from mythos.reports.comparison import compare
from mythos.reports.evaluation_plots import map_panels, score_key, score_panels
from mythos.reports.evaluation_section import panels_over_steps, panels_over_tokens, stored_evaluations
from mythos.reports.plots import depth_panels
from mythos.reports.recorded import RecordedRun, open_run
from mythos.reports.style import SERIES, Panel, compose, describe, fit_range, loop_axis, name_lines, separate, spread
from mythos.reports.sweep_plots import sweep_figure, sweep_panels
from tests.reports.drawn import faults, titles
from tests.reports.handmade import write_run

ROOT = Path(__file__).parents[2]
DEPTHS = (1, 2, 4, 8, 16, 32)


def record(number: int, of: int, scale: float = 1.0) -> dict[str, float]:
    """A step's record of a run of 65,536 tokens a step, with noise."""
    t, noise = number / of, random.Random(number).gauss(0, 0.03)
    return {
        "step": number,
        "tokens": 65_536 * number,
        "loss": scale * (3 + 8 * math.exp(-40 * t) + 1.2 * math.exp(-5 * t)) + noise,
        "grad_norm": 0.3 + 3 * math.exp(-30 * t) + abs(noise),
        "state_norm": 2 + t,
        "state_delta": 0.01 + 0.05 * math.exp(-2 * t),
        "lr": 3e-4 * (1 - 0.9 * t),
        "loops": 8 * min(1, 0.2 + 2 * t),
        "backprop_loops": 4.0,
        "rho_a": 0.447,
        "moe/load_max_over_mean": 1.3 + noise,
        "moe/dead_experts": 0,
        "peak_memory_bytes": 8e9,
        "tokens_per_second": 2.2e6 * (1 + noise / 9),
        "mfu": 0.38,
        "time": 1.76e9 + 4 * number,
    }


def validation(line: dict[str, float], t: float) -> dict[str, float]:
    """What a validation adds to a record."""
    losses = {loops: line["loss"] + 0.3 * t * math.exp(-0.9 * loops) for loops in DEPTHS}
    added = {f"val/loss@{loops}": loss for loops, loss in losses.items()}
    added |= {"val/loss": losses[8], "val/bits_per_byte": losses[8] * 0.42, "val/state_delta": 0.01}
    added |= {"moe/depth_overlap": 0.9, "val/auto_loss": losses[4], "val/auto_loops": 4.2 - t, "val/auto_saved": 0.5}
    added |= {f"moe/load_max_over_mean@{loop}": 1.1 + 0.3 / loop for loop in range(1, 9)}
    added |= {f"val/science_acc@{loops}": 0.25 + 0.3 * t * (1 - 0.5 / loops) for loops in (1, 4, 8)}
    return added | fit_metrics(losses)


def text_run(folder: Path, count: int = 120, every: int = 24, scale: float = 1.0) -> Path:
    written = [record(number, count, scale) for number in range(1, count + 1)]
    for line in written[every - 1 :: every]:
        line |= validation(line, line["step"] / count)
    return write_run(folder, written, load_config(ROOT / "configs" / "quickstart.yaml", [f"run.dir={folder}"]))


def task_run(folder: Path) -> Path:
    written = [record(number, 60) for number in range(1, 61)]
    for line in written[19::20]:
        added = validation(line, line["step"] / 60)
        line |= {key: value for key, value in added.items() if not key.startswith(("val/science", "val/bits"))}
        line |= {f"val/accuracy@{loops}": 1 - 0.5 / loops for loops in DEPTHS} | {"val/accuracy": line["step"] / 60}
    return write_run(folder, written, load_config(ROOT / "configs" / "reasoning-hops.yaml", [f"run.dir={folder}"]))


def depth_sweep(deepest: int, rules: tuple[str, ...]) -> DepthSweep:
    loops = []
    for n in range(1, deepest + 1):
        loss = 3.72 + 0.95 * math.exp(-1.35 * n) if n & (n - 1) == 0 else None
        routed = (1.2 + 0.2 / n, None if n == 1 else 0.97) if rules else (None, None)
        loops.append(LoopMeasures(n, loss, 41.0, 1.5, 3.6 + 0.6 * (1 - math.exp(-n)), max(5e-3, math.exp(-n)), *routed))
    halting = []
    for rule in rules:
        for number, threshold in enumerate((0.52, 0.26, 0.13, 0.065, 0.0325)):
            mean = 2 + 1.1 * number
            exits = [int(1000 * math.exp(-0.5 * ((n - mean) / 1.1) ** 2)) for n in range(1, 9)]
            point = 3.72 + 0.9 * math.exp(-1.35 * mean), 41.0, 1.5, mean, 1 - mean / 8
            halting.append(HaltingPoint(rule, threshold, (rule, number) == ("gate", 2), *point, exits))
    fit = fit_losses({measures.loops: measures.loss for measures in loops if measures.loss is not None})
    return DepthSweep(8, 128, 256, loops, fit, halting)


def scores(step: int, depths: tuple[int, ...], thresholds: tuple[float, ...] = ()) -> list[Result]:
    results = []
    settings = [(DepthSetting(n), float(n)) for n in depths]
    settings += [(DepthSetting(8, "convergence", x), 3.0 + number) for number, x in enumerate(thresholds)]
    for task in ("hellaswag", "arc_easy", "questions/in/a/folder/with-a-long-name/science.jsonl"):
        for setting, mean in settings:
            value = 0.3 + 0.1 * (1 - math.exp(-mean / 3)) + step / 1e5
            results += [Result(task, metric, setting, mean, value, 0.02, 200) for metric in ("acc", "acc_norm")]
    return results


def accuracies(name: str, loops: list[int]) -> AccuracyMap:
    rows = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30]
    shares = [[max(0.1, min(1.0, 1.02 - 0.6 * max(0, (row - n) / row))) for n in loops] for row in rows]
    return AccuracyMap(name, "hops", 1200, (1, 5), rows, loops, 2048, shares)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """A text run with evaluations at two steps."""
    directory = text_run(tmp_path_factory.mktemp("style") / "run")
    (directory / "evaluation").mkdir()
    for step in (60, 120):
        about = {"step": step, "dtype": "float32", "limit": None, "fewshot": None}
        save(scores(step, (1, 4, 8), (0.13,)), directory / "evaluation" / f"step-{step:08d}_all", about)
    return open_run(directory)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    return open_run(task_run(tmp_path_factory.mktemp("style") / "hops"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Nine runs of equal vocabulary; the last has a single validation."""
    folder = tmp_path_factory.mktemp("runs")
    names = [f"_run-{number}-with-lr-0.00{number}" for number in range(8)]
    made = [text_run(folder / name, 40, 10, 1 + number / 50) for number, name in enumerate(names)]
    return [str(path) for path in [*made, text_run(folder / "last", 30, 30)]]


def page_panels(run: RecordedRun) -> Iterator[Panel]:
    yield from figures.run_loss_panels(run)
    for kind in (figures.TRAINING, figures.HALTING):
        yield from figures.panels(run, kind)
    yield from figures.run_depth_panels(run)
    yield from figures.expert_panels(run)
    yield from figures.rate_panels(run)


def assert_good(figure: Figure) -> None:
    assert faults(figure) == [], titles(figure)


def test_pictures_of_a_run(run: RecordedRun, task: RecordedRun) -> None:
    for figure in [*separate(page_panels(run)), *separate(page_panels(task))]:
        assert_good(figure)
    assert_good(compose(depth_panels(run.validations, 8)))
    # At one depth, or at one validation, there is no curve.
    one_depth = [{key: value for key, value in line.items() if "@" not in key} for line in run.validations]
    assert depth_panels(one_depth, 8) == []
    single = RecordedRun(run.directory, run.config, [run.validations[-1]])
    assert len(list(page_panels(single))) == 2, "the last validation's losses and loads by loops"


def test_pictures_of_sweeps() -> None:
    for deepest, rules in ((64, ("convergence", "second_difference", "gate")), (64, ()), (3, ("act",)), (1, ())):
        assert_good(sweep_figure(depth_sweep(deepest, rules)))
    for figure in separate(sweep_panels(depth_sweep(16, ("gate",)))):
        assert_good(figure)


def test_pictures_of_comparisons(runs: list[str]) -> None:
    for count in (1, 3, 9):
        comparison = compare(runs[-count:])
        assert_good(comparison.figure())
    for figure in separate(comparison.panels(), comparison.key()):
        assert_good(figure)


def test_pictures_of_evaluations(run: RecordedRun) -> None:
    for results in (scores(0, (1, 2, 4, 8, 16), (0.26, 0.13)), scores(0, (8,)), scores(0, (), (0.13,))):
        panels, key = score_panels(results), score_key(results)
        assert panels
        assert_good(compose(panels, key))
    assert score_panels(scores(0, (8,))[:1]) == [], "one number is no picture"
    stored = stored_evaluations(sorted((run.directory / "evaluation").glob("*.json"), reverse=True))
    over_training = [*panels_over_steps(stored), *panels_over_tokens(run)]
    assert len(over_training) == 7
    for figure in separate(over_training):
        assert_good(figure)


def test_pictures_of_maps() -> None:
    big = [1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30]
    for maps in ([accuracies("hops", big)], [accuracies("a$b", [*big, 40, 60]), accuracies("fixed", [1])]):
        assert_good(compose(map_panels(maps)))
    assert_good(compose(map_panels([accuracies("many", list(range(1, 41)))])))


def drawn(draw: Callable[..., None]) -> Figure:
    return compose([Panel(draw)])


def plain_plot(axes: Axes, xs: Sequence[float] = (0, 1), ys: Sequence[float] = (3, 4), **style: Any) -> None:
    describe(axes, "A title", "steps", "loss")
    axes.plot(xs, ys, **{"color": SERIES[0]} | style)


def test_faults_are_found() -> None:
    assert faults(drawn(plain_plot)) == []

    def found(draw: Callable[..., None]) -> str:
        return "; ".join(faults(drawn(draw)))

    def powers(axes: Axes) -> None:
        plain_plot(axes)
        axes.plot([0, 3e6], [3, 4], color=SERIES[0])
        axes.xaxis.set_major_formatter(ScalarFormatter())

    def crowded(axes: Axes) -> None:
        plain_plot(axes)
        axes.set_xticks([0.5, 0.51], ["first", "second"])

    def outside(axes: Axes) -> None:
        plain_plot(axes)
        axes.set_title("A long title " * 9, loc="left")

    assert "number 1e6" in found(powers)
    assert "'first' overlaps 'second'" in found(crowded)
    assert "leaves the picture" in found(outside)
    assert "colour #ff0000" in found(lambda axes: plain_plot(axes, color="red"))
    assert "single points only" in found(lambda axes: plain_plot(axes, xs=[1], ys=[2]))
    assert "is empty" in found(lambda axes: describe(axes, "A", "b", "c"))
    assert "has no x" in found(lambda axes: axes.plot([0, 1], [0, 1], color=SERIES[0]))
    assert "too small" in found(lambda axes: (plain_plot(axes), axes.set_xlabel("steps", fontsize=6)))


# Numbers, ranges and names


def tick_labels(values: tuple[float, ...]) -> list[str]:
    figure = drawn(lambda axes: (plain_plot(axes, xs=range(len(values)), ys=values), fit_range(axes)))
    assert faults(figure) == []
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    return [label.get_text() for label in axes.get_yticklabels() if low <= label.get_position()[1] <= high]


def test_numbers_on_axes() -> None:
    assert tick_labels((0, 2_500_000)) == ["0", "500k", "1M", "1.5M", "2M", "2.5M"]
    assert tick_labels((0, 1.2e15)) == ["0", "500T", "1P"]
    assert tick_labels((0, 3e-4)) == ["0.0000", "0.0001", "0.0002", "0.0003"]
    assert tick_labels((4.2369, 4.2372)) != tick_labels((4.2, 4.3)), "a small difference stays small"
    assert tick_labels((-2, 2)) == ["-2", "-1", "0", "1", "2"]


def test_a_constant_is_not_magnified() -> None:
    for value in (0.0, 0.447, -3.0, 2.2e6):
        low, high = drawn(lambda axes, v=value: (plain_plot(axes, ys=[v, v]), fit_range(axes))).axes[0].get_ylim()
        assert low < value < high and high - low >= 0.01 * abs(value)
    axes = drawn(lambda axes: (plain_plot(axes, ys=[0, 0]), fit_range(axes, low=0))).axes[0]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] > 0.5, "no -0.04 to 0.04"


@pytest.mark.parametrize("loops", [[1], [1, 2], [1, 3, 6], list(range(1, 33)), [1, 2, 4, 8, 16, 32, 64, 128, 255, 256]])
def test_as_many_loops_are_named_as_there_is_room(loops: list[int]) -> None:
    figure = drawn(lambda axes: (plain_plot(axes, xs=[1, *loops], ys=[1, *loops]), loop_axis(axes, loops)))
    assert faults(figure) == []
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown[0] == str(loops[0]) and shown[-1] == str(loops[-1]) and set(shown) <= set(map(str, loops))


def test_lines_are_named_at_their_ends_or_below() -> None:
    def lines(count: int, length: int = 8, end: float = 1.0) -> Figure:
        def draw(axes: Axes) -> None:
            describe(axes, "A title", "steps", "loss")
            for number in range(count):
                name = f"line {number}".ljust(length, "x")
                axes.plot([0, 1 if number else end], [number, 3], color=SERIES[0], label=name)
            name_lines(axes)

        return drawn(draw)

    for figure in (lines(2), lines(8), lines(9), lines(3, 40), lines(2, end=0.5)):
        assert faults(figure) == []
    for figure, beside in ((lines(8), True), (lines(9), False), (lines(3, 40), False), (lines(2, end=0.5), False)):
        assert (figure.axes[0].get_legend() is None) == beside


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.01, 0.1)), min_size=1, max_size=8))
def test_spread_names_keep_their_order_and_do_not_overlap(names: list[tuple[float, float]]) -> None:
    places, sizes = zip(*names, strict=True)
    moved = spread(places, sizes)
    assert max(moved) <= 1
    for one, other in combinations(range(len(names)), 2):
        assert abs(moved[one] - moved[other]) >= (sizes[one] + sizes[other]) / 2 - 1e-9
        assert places[one] == places[other] or (places[one] < places[other]) == (moved[one] < moved[other])


# Colours

VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""What is seen of a linear RGB colour, by Machado, Oliveira and Fernandes (2009)."""
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
WHITE = XYZ.sum(1)


def linear(colour: str) -> np.ndarray:
    parts = np.array([int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    return np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE L*a*b*, in which a distance of about 2 is the smallest that is seen side by side."""
    ratio = XYZ @ np.clip(rgb, 0, 1) / WHITE
    x, y, z = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""
    dark, light = sorted(float(linear(colour) @ XYZ[1]) for colour in (one, other))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("vision", VISIONS)
def test_colours_differ_for_everyone(vision: str) -> None:
    def distances(colours: list[str]) -> list[float]:
        seen = [lab(np.array(VISIONS[vision]) @ linear(colour)) for colour in colours]
        return [float(np.linalg.norm(one - other)) for one, other in combinations(seen, 2)]

    assert min(distances(list(SERIES))) > 15
    assert min(distances([ground for _, ground in PALETTE])) > 10
    red_and_green = distances(["#d62728", "#2ca02c"])
    assert vision != "deuteranopia" or red_and_green[0] < 40, "the model of vision has an effect"


def test_text_can_be_read_on_its_ground() -> None:
    assert all(contrast("#1b1b1b", ground) > 7 for _, ground in PALETTE)
    for colour in SERIES[:4]:
        assert contrast(colour, "#ffffff") > 3 and contrast(colour, "#16181c") > 3
