"""When a position stops looping: rules that decide after every pass, position by position."""

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mythos.model.rdt import RecurrentDepthTransformer


class HaltingRule(Protocol):
    """Decides after each pass which positions stop; what it remembers of a position travels with it."""

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Which of n positions stop after pass number `loop` (from 1), (n,) bool, and what to remember, (n, ...).

        before and after are the states (n, D) float32; memory is what the pass before remembered, None in the first.
        """
        ...

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        """What is read out for positions that stop with state (n, 1, D)."""
        ...


class Convergence:
    """Stop where the state has nearly stopped to change: ||h_t - h_{t-1}|| < threshold * ||h_t||. Needs no training."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`."""
        return (after - before).norm(dim=-1) < self.threshold * after.norm(dim=-1), None

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        """The last state."""
        return state


class SecondDifference:
    """Stop where the change itself has stopped to change, relative to the state (arXiv 2509.23314).

    ||(h_t - h_{t-1}) - (h_{t-1} - h_{t-2})|| < threshold * ||h_t||, from the second pass on.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`."""
        change = after - before
        if memory is None:
            return torch.zeros(len(after), dtype=torch.bool, device=after.device), change
        return (change - memory).norm(dim=-1) < self.threshold * after.norm(dim=-1), change

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        """The last state."""
        return state


THRESHOLDS = {"convergence": 0.1, "second_difference": 0.1}
"""Exit threshold of each rule where none is given."""
HALTING_RULES = ("none", *THRESHOLDS)


def halting_rule(
    model: "RecurrentDepthTransformer", name: str | None = None, threshold: float | None = None
) -> HaltingRule | None:
    """The rule called `name` (default model.config.halting) at an exit threshold (default the rule's); None for none.

    Raises ValueError for a name that is unknown, or a threshold that is not above 0.
    """
    name = model.config.halting if name is None else name
    if name not in HALTING_RULES:
        raise ValueError(f"halting: got {name!r}; allowed: {', '.join(HALTING_RULES)}")
    if threshold is not None and not threshold > 0:
        raise ValueError(f"exit threshold: got {threshold}; allowed: above 0")
    if name == "none":
        return None
    threshold = THRESHOLDS[name] if threshold is None else threshold
    return {"convergence": Convergence, "second_difference": SecondDifference}[name](threshold)
