"""How a measurement runs a model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from mythos.distributed.ranks import World


@dataclass(frozen=True)
class Execution:
    """How a measurement runs a model: in which batches, on which ranks and in which dtype."""

    micro_batch: int
    """Rows of a forward pass."""
    world: World
    """The ranks, over which rows are divided; measurements are collective."""
    autocast: AbstractContextManager[Any]
    progress: bool = False
    """Show a progress bar."""
    check: Callable[[], None] = lambda: None
    """Called before every forward pass, equally often on every rank; an exception from it ends the measurement."""
