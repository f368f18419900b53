"""Accuracy on reasoning tasks: in training, and by difficulty and loops."""

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mythos.config.data import TaskConfig
from mythos.data.tasks import TaskSet, task_set
from mythos.errors import MythosError, short_reason
from mythos.evaluation.execution import Execution
from mythos.evaluation.validation import right_rows
from mythos.files.text import from_plain, read_json
from mythos.model import IGNORE_INDEX
from mythos.model.rdt import DepthReadout, RecurrentDepthTransformer

BEYOND = (1.2, 1.6, 2, 3, 4, 6)
"""Difficulties beyond the hardest of training to measure by default, as multiples of it."""
BATCH = 256
"""Sequences computed at once."""


def task_metrics(
    model: RecurrentDepthTransformer,
    data: TaskSet,
    execution: Execution,
    *,
    depths: Sequence[int],
    main_depth: int | None,
) -> dict[str, float]:
    """Mean loss of the answers in nats per token, and the share of sequences with every answer token right.

    Returns `val/loss@<loops>` and `val/accuracy@<loops>` for each of `depths`, and `val/loss` and `val/accuracy` at
    `main_depth` loops; if that is None, with as many loops as each sequence's difficulty. Collective: the rows are
    divided over the ranks, and all get the result. They must be ordered hardest first, and their number at each
    difficulty must be a multiple of the number of ranks.
    """
    world, micro_batch = execution.world, execution.micro_batch
    depths = sorted({*depths, *([] if main_depth is None else [main_depth])})
    # None: as many loops as the difficulty of each sequence.
    passes: list[int | None] = [*depths, *([None] if main_depth is None else [])]
    sums = torch.zeros(len(passes), 2, dtype=torch.float64, device=world.device)
    mine = range(world.rank, len(data.ids), world.size)
    for start in range(0, len(mine), micro_batch):
        chosen = list(mine[start : start + micro_batch])
        ids, targets = data.ids[chosen].to(world.device), data.targets[chosen].to(world.device)
        for number, depth in enumerate(passes):
            execution.check()
            # All ranks run the same loops, as FSDP requires: their rows have the same difficulties.
            loops = data.difficulties[chosen].tolist() if depth is None else depth
            with torch.no_grad(), execution.autocast:
                logits = model(ids, loops=loops).logits
            losses = F.cross_entropy(
                logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
            )
            right = right_rows(logits.argmax(-1) == targets, targets).sum()
            sums[number] += torch.stack([losses.double().sum(), right.double()])
    tokens = int((data.targets != IGNORE_INDEX).sum())
    metrics: dict[str, float] = {}
    for depth, (loss_sum, right_count) in zip(passes, world.sum(sums).tolist(), strict=True):
        values = {"val/loss": loss_sum / tokens, "val/accuracy": right_count / len(data.ids)}
        if depth is not None:
            metrics |= {f"{name}@{depth}": value for name, value in values.items()}
        if depth == main_depth:
            metrics |= values
    return metrics


@dataclass(frozen=True)
class AccuracyMap:
    """Accuracy of a model by difficulty and loops."""

    name: str
    task: str
    step: int
    """Optimizer steps of the model's training."""
    trained: tuple[int, int]
    """Smallest and largest difficulty in training."""
    difficulties: list[int]
    loops: list[int]
    sequences: int
    """Sequences of each difficulty; the same ones at every number of loops and for every model of the task."""
    accuracy: list[list[float]]
    """One row per difficulty, one column per number of loops."""

    def at(self, difficulty: int, loops: int) -> float:
        """The accuracy at one difficulty and number of loops. Raises ValueError if it was not measured."""
        return self.accuracy[self.difficulties.index(difficulty)][self.loops.index(loops)]

    def write(self, path: Path) -> list[Path]:
        """Write the map to `path` with .csv and .json appended to its name; returns both paths."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not with_suffix, which would replace the part of a run's name after a dot.
        table, values = (path.with_name(f"{path.name}.{kind}") for kind in ("csv", "json"))
        with table.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["difficulty", "loops", "accuracy", "sequences"])
            for difficulty, row in zip(self.difficulties, self.accuracy, strict=True):
                writer.writerows(
                    (difficulty, loops, value, self.sequences) for loops, value in zip(self.loops, row, strict=True)
                )
        values.write_text(json.dumps(asdict(self), indent=1) + "\n")
        return [table, values]

    @classmethod
    def load(cls, path: Path) -> "AccuracyMap":
        """Read a .json that `write` wrote. Raises MythosError for another file."""
        try:
            values = from_plain(cls, asdict(cls(**read_json(path))))
            shape = set(map(len, values.accuracy))
            if len(values.accuracy) != len(values.difficulties) or shape != {len(values.loops)}:
                raise ValueError("the rows of accuracy are not difficulties x loops")
            return values
        except (OSError, ValueError, TypeError) as error:
            raise MythosError(f"{path} cannot be read as a map of accuracies: {short_reason(error)}") from error

    def table(self) -> str:
        """The map in percent as text, with * at the difficulties of training."""
        corner = "difficulty \\ loops"
        lines = [f"{corner:>18}" + "".join(f"{loops:>7}" for loops in self.loops)]
        for difficulty, row in zip(self.difficulties, self.accuracy, strict=True):
            trained = "*" if self.trained[0] <= difficulty <= self.trained[1] else " "
            lines.append(f"{difficulty:>17}{trained}" + "".join(f"{value:>7.1%}" for value in row))
        return "\n".join(lines)


def usual_difficulties(task: TaskConfig) -> list[int]:
    """The difficulties of training, and some up to six times the hardest, as far as the task can express them."""
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
    """Measure a model in eval mode on sequences with one query each.

    Args:
        model: on the device it computes on, in the type of its parameters.
        task: the task; the number of queries is set to 1.
        name: the map's name.
        step: optimizer steps of the model's training.
        difficulties: ascending.
        loops: ascending; [1] for a fixed-depth model.
        sequences: number of sequences of each difficulty.
        length: tokens of a sequence, unless the difficulty needs more.

    Raises:
        ValueError: a difficulty that the task's vocabulary cannot express.
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
            right += torch.stack([_count_right(readout, targets) for readout in readouts]).cpu()
        accuracy.append([count / sequences for count in right.tolist()])
    return AccuracyMap(name, task.name, step, task.difficulty, list(difficulties), list(loops), sequences, accuracy)


def _count_right(readout: DepthReadout, targets: Tensor) -> Tensor:
    """Number of rows with every target right, scalar int64."""
    assert readout.right is not None, "judged=True was requested"
    return right_rows(readout.right, targets).sum()
