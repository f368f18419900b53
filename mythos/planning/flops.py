"""Parameters and FLOPs of a model, computed from its configuration."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from mythos.errors import MythosError
from mythos.model.attention.base import attention_class
from mythos.model.config import ModelConfig
from mythos.model.layers import is_loop_table
from mythos.model.moe import MixtureOfExperts
from mythos.model.rdt import RecurrentDepthTransformer


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    total: int
    active: int
    """Parameters that one token uses in one loop: all except the routed experts it is not sent to."""


def build_on_meta(config: ModelConfig) -> RecurrentDepthTransformer:
    """Build the model on the meta device, which allocates nothing; `vocab_size: auto` is built as 128."""
    if config.vocab_size == "auto":
        config = config.model_copy(update={"vocab_size": 1})
    with torch.device("meta"):
        return RecurrentDepthTransformer(config)


def count_parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of a model; `vocab_size: auto` counts as 128."""
    model = build_on_meta(config)
    total = sum(p.numel() for p in model.parameters())
    routed = sum(m.gate_up.numel() + m.down.numel() for m in model.modules() if isinstance(m, MixtureOfExperts))
    idle = routed * (config.n_experts - config.experts_per_token) // config.n_experts
    return Parameters(total, total - idle)


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs per token of the matmuls in a forward pass, two per multiply-add."""

    once: float
    """Work outside the loop: prelude, injection of the encoded input, coda and head."""
    loop: float
    """One pass of the core."""

    def forward(self, loops: float) -> float:
        """FLOPs per token of a forward pass of `loops` loops."""
        return self.once + loops * self.loop

    def training(self, loops: Sequence[float], backprop: float) -> float:
        """Mean FLOPs per token of a training step.

        `loops` are the loops of each row. A row carries gradient through its last min(loops, `backprop`) loops.
        """
        with_gradient = [min(row, backprop) for row in loops]
        return self.training_at(sum(loops) / len(loops), sum(with_gradient) / len(loops))

    def training_at(self, mean_loops: float, mean_backprop: float) -> float:
        """FLOPs per token of training at these mean loops and mean loops with gradient.

        Every pass runs forward; a backward pass costs twice as much and runs only where gradient flows.
        """
        return 3 * self.once + self.loop * (mean_loops + 2 * mean_backprop)


def forward_flops(config: ModelConfig, length: int) -> ForwardFlops:
    """FLOPs per token in sequences of `length` tokens; of attention, the causal half is counted.

    Without those of a halting rule. `vocab_size: auto` counts as no head.
    """
    once, loop = matmul_weights(config)
    pairs = attention_class(config).pair_products(config) * (length + 1) / 2  # keys that a query sees on average
    layers = config.prelude_layers + config.coda_layers
    return ForwardFlops(2.0 * (once + layers * pairs), 2.0 * (loop + config.core_layers * pairs))


@cache
def matmul_weights(config: ModelConfig) -> tuple[int, int]:
    """Number of weights that a token is multiplied by once, and in one pass of the loop; of experts, its own.

    These are the two-dimensional parameters called `weight`, without tables, and the experts' stacks.
    """
    model = build_on_meta(config)
    recurrence, injection = model.recurrence, model.recurrence.injection
    outside = [] if injection is None else [injection, *injection.maps_outside_loop()]
    before_loop = sum(map(_matmul_weights, outside))

    def weights(parts: Iterable[nn.Module | None]) -> int:
        modules = {module for part in parts if part is not None for module in part.modules()}
        return sum(_matmul_weights(module) for module in modules)

    stages = len(recurrence.stages)  # each has passes of its own
    once = weights([*model.prelude, model.readout, *model.coda]) + stages * before_loop
    in_pass = weights([injection, recurrence.lanes, recurrence.adapter]) - before_loop
    head = 0 if config.vocab_size == "auto" else model.head_weight.numel()
    return once + head, weights(recurrence.blocks) + stages * in_pass


ELEMENTWISE = {"scale", "log_a", "dt"}
"""Parameters of the loop's parts that are multiplied element by element, although some have two dimensions."""


def _matmul_weights(module: nn.Module) -> int:
    """Those of a module itself, without its parts. Raises MythosError for a parameter that cannot be counted."""
    if isinstance(module, MixtureOfExperts):
        experts, chosen = len(module.gate_up), module.router.chosen
        return (module.gate_up.numel() + module.down.numel()) // experts * chosen
    if (stated := getattr(module, "matmul_weights", None)) is not None:
        return stated
    matrices = {name: parameter for name, parameter in module.named_parameters(recurse=False) if parameter.ndim > 1}
    tables = ELEMENTWISE | set(filter(is_loop_table, matrices))
    if unknown := matrices.keys() - tables - {"weight"}:
        raise MythosError(
            f"{type(module).__name__}: the FLOPs of {', '.join(sorted(unknown))} cannot be counted. Call a matrix that "
            "every token is multiplied by `weight`, in a module of its own (mythos.model.layers.Linear), and a table "
            "with a row per loop `loop_...`; or give the module an attribute `matmul_weights`, the number of weights "
            "that a token is multiplied by"
        )
    return matrices["weight"].numel() if "weight" in matrices else 0
