"""Accuracy on reasoning tasks: in training, and by difficulty and loops."""

import csv
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.config.data import TaskConfig
from mythos.data.tasks import TaskSet, task_set
from mythos.distributed.ranks import World
from mythos.model import IGNORE_INDEX
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.reports.plots import finish

BEYOND = (1.2, 1.6, 2, 3, 4, 6)
"""Difficulties that are asked for beyond the hardest of training, as multiples of it."""
BATCH = 256
"""Sequences that are computed at once."""


def task_metrics(
    model: RecurrentDepthTransformer,
    data: TaskSet,
    *,
    depths: Sequence[int],
    main_depth: int | None,
    micro_batch: int,
    world: World,
    autocast: AbstractContextManager[Any],
    check: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Mean loss of the answers in nats a token, and the share of sequences whose answer is right in all its tokens.

    As `val/loss@<loops>` and `val/accuracy@<loops>` after each of `depths` loops, and as `val/loss` and `val/accuracy`
    at `main_depth` loops, or, where it is None, at as many as each sequence's difficulty. The rows, hardest first and
    of each difficulty a multiple of the processes, are divided over the ranks, and every rank gets the whole result.
    `check` is called before every pass, as often on every rank; what it raises ends the measurement.
    """
    depths = sorted({*depths, *([] if main_depth is None else [main_depth])})
    wanted: list[int | None] = [*depths, *([None] if main_depth is None else [])]
    sums = torch.zeros(len(wanted), 2, dtype=torch.float64, device=world.device)
    mine = range(world.rank, len(data.ids), world.size)
    for start in range(0, len(mine), micro_batch):
        chosen = list(mine[start : start + micro_batch])
        ids, targets = data.ids[chosen].to(world.device), data.targets[chosen].to(world.device)
        for number, depth in enumerate(wanted):
            check()
            # Ranks run alike, as FSDP needs it: theirs are rows of the same difficulties.
            loops = data.difficulties[chosen].tolist() if depth is None else depth
            with torch.no_grad(), autocast:
                logits = model(ids, loops=loops).logits
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
            )
            right = rows_right(logits.argmax(-1) == targets, targets)
            sums[number] += torch.stack([losses.double().sum(), right.double()])
    tokens = int((data.targets != IGNORE_INDEX).sum())
    metrics: dict[str, float] = {}
    for depth, (loss, right) in zip(wanted, world.sum(sums).tolist(), strict=True):
        found = {"val/loss": loss / tokens, "val/accuracy": right / len(data.ids)}
        if depth is not None:
            metrics |= {f"{name}@{depth}": value for name, value in found.items()}
        if depth == main_depth:
            metrics |= found
    return metrics


def rows_right(right: Tensor, targets: Tensor) -> Tensor:
    """Rows (B, S) whose answer is right in all of its tokens; `right` (B, S) bool tells of each token. Scalar int64."""
    return (right | (targets == IGNORE_INDEX)).all(-1).sum()


@dataclass(frozen=True)
class AccuracyMap:
    """How often a model is right, by difficulty and loops."""

    name: str
    task: str
    step: int
    """Optimizer steps the model was trained for."""
    trained: tuple[int, int]
    """Fewest and most steps in training."""
    difficulties: list[int]
    loops: list[int]
    sequences: int
    """Of each difficulty; the same ones at every number of loops and for every model of the task."""
    accuracy: list[list[float]]
    """For each difficulty, at each number of loops."""

    def at(self, difficulty: int, loops: int) -> float:
        """One entry. Raises ValueError if it was not measured."""
        return self.accuracy[self.difficulties.index(difficulty)][self.loops.index(loops)]

    def write(self, path: Path) -> list[Path]:
        """Write the map to `path` with .png, .csv and .json added; returns what was written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not with_suffix: what follows a dot in a run's name belongs to the name.
        picture, table, values = (path.with_name(f"{path.name}.{kind}") for kind in ("png", "csv", "json"))
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["difficulty", "loops", "accuracy", "sequences"])
            for difficulty, row in zip(self.difficulties, self.accuracy, strict=True):
                writer.writerows(
                    (difficulty, loops, value, self.sequences) for loops, value in zip(self.loops, row, strict=True)
                )
        values.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return [draw_maps([self], picture), table, values]

    def table(self) -> str:
        """The map in percent, as text; the difficulties of training are marked."""
        corner = "difficulty \\ loops"
        lines = [f"{corner:>18}" + "".join(f"{loops:>7}" for loops in self.loops)]
        for difficulty, row in zip(self.difficulties, self.accuracy, strict=True):
            trained = "*" if self.trained[0] <= difficulty <= self.trained[1] else " "
            lines.append(f"{difficulty:>17}{trained}" + "".join(f"{value:>7.1%}" for value in row))
        return "\n".join(lines)


def usual_difficulties(task: TaskConfig) -> list[int]:
    """Those of training, and some up to six times the hardest of them, as far as the task's text can tell them."""
    low, high = task.difficulty
    beyond = {round(high * factor) for factor in BEYOND}
    return sorted({*range(low, high + 1), *(difficulty for difficulty in beyond if difficulty <= task.hardest)})


def accuracy_map(
    model: RecurrentDepthTransformer,
    task: TaskConfig,
    *,
    name: str,
    step: int,
    difficulties: Sequence[int],
    loops: Sequence[int],
    sequences: int,
    length: int,
) -> AccuracyMap:
    """Ask a model in eval mode for answers to one query each.

    Args:
        model: on the device it computes on; it computes as its parameters are, in float32.
        task: what is asked for.
        name: what the map is called.
        step: steps the model was trained for.
        difficulties: increasing.
        loops: increasing; [1] for a fixed-depth model.
        sequences: of each difficulty.
        length: tokens of a sequence, where the difficulty does not take more.

    Raises:
        ValueError: a difficulty that the task's vocabulary cannot tell.
    """
    task = task.model_copy(update={"queries": 1, "ask": "end" if task.ask == "steps" else task.ask})
    device = model.embedding.weight.device
    accuracy = []
    for difficulty in difficulties:
        data = task_set(task, [difficulty], sequences, max(length, task.length(difficulty)), f"report/{difficulty}")
        right = torch.zeros(len(loops), dtype=torch.int64)
        for ids, targets in zip(data.ids.split(BATCH), data.targets.split(BATCH), strict=True):
            ids, targets = ids.to(device), targets.to(device)
            readouts = model.read_depths(ids, targets, loops, judged=True)
            right += torch.stack([rows_right(readout.right, targets) for readout in readouts]).cpu()
        accuracy.append([count / sequences for count in right.tolist()])
    return AccuracyMap(name, task.name, step, task.difficulty, list(difficulties), list(loops), sequences, accuracy)


def draw_maps(maps: Sequence[AccuracyMap], path: Path) -> Path:
    """Draw maps side by side as a PNG; a line parts the difficulties of training from harder ones."""
    from matplotlib.figure import Figure  # takes a second, and only reports draw

    widths = [1.2 + 0.45 * len(one.loops) for one in maps]
    tallest = max(len(one.difficulties) for one in maps)
    figure = Figure(figsize=(sum(widths) + 1.5, 1.5 + 0.4 * tallest), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False, width_ratios=widths)[0]
    for axes, one in zip(panels, maps, strict=True):
        image = axes.imshow(one.accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        axes.set(title=one.name, xlabel="loops", ylabel="difficulty")
        axes.set_xticks(range(len(one.loops)), list(map(str, one.loops)))
        axes.set_yticks(range(len(one.difficulties)), list(map(str, one.difficulties)))
        axes.axhline(sum(d <= one.trained[1] for d in one.difficulties) - 0.5, color="red", linewidth=1)
        for y, row in enumerate(one.accuracy):
            for x, value in enumerate(row):
                color = "black" if value > 0.6 else "white"
                axes.text(x, y, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=list(panels), label="accuracy")
    return finish(figure, path)
