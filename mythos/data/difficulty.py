"""Difficulty of reasoning tasks by training step."""

from random import Random

from mythos.config.data import TaskConfig


def hardest(task: TaskConfig, step: int, steps: int) -> int:
    """The highest difficulty drawn at a step; the ramp is a share of `steps`."""
    low, high = task.difficulty
    if step < task.ramp * steps:
        return low + int(step / (task.ramp * steps) * (high - low + 1))
    return high


def slot_difficulties(task: TaskConfig, slots: int, seed: int, step: int, steps: int) -> list[int]:
    """Difficulty of every slot of a step, the same for all streams: a function of the arguments alone.

    The ramp is a share of `steps`. The slots of a step are drawn by stratified sampling in random order, like depths.
    """
    low, high = task.difficulty[0], hardest(task, step, steps)
    random = Random(f"difficulty/{seed}/{step}")
    order = sorted(range(slots), key=lambda _: random.random())
    return [low + int((stratum + random.random()) / slots * (high - low + 1)) for stratum in order]
