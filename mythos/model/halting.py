"""Halting: rules that decide after each pass which positions stop, and the modules that are trained for them."""

from math import inf, log
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.model.config import HALTING_RULES, ModelConfig
from mythos.model.layers import Initializer, constant, truncated_normal, without_autocast, zeros
from mythos.model.state import LoopState

if TYPE_CHECKING:
    from mythos.model.rdt import RecurrentDepthTransformer

GATE_WIDTH = 64
"""Hidden width of the halting gate."""
GATE_START = 0.05
"""Loss in nats that an untrained gate predicts."""
GATE_POSITIONS = 128
"""Positions of a row that the gate learns from; their logits over the whole vocabulary are kept in memory."""
ACT_EPSILON = 0.01
"""With act a position halts once its probabilities add up to 1 minus this (arXiv 1603.08983)."""


class HaltingRule:
    """Base of the classes in the registry `HALTING_RULES`: decides after each pass which positions stop.

    Its memory of a position moves with the position.
    """

    default_threshold: ClassVar[float]
    highest_threshold: ClassVar[float] = inf
    trained_module: ClassVar[type[nn.Module] | None] = None
    """The type of `RecurrentDepthTransformer.halting` that the rule needs; None if it needs no training."""
    exclusive: ClassVar[bool] = False
    """A model trained for this rule can use no other, because it is trained on this rule's `result`."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    @classmethod
    def build_module(cls, config: ModelConfig) -> nn.Module | None:
        """The module that a model trains for the rule; None if it trains nothing."""
        return None

    @classmethod
    def of(cls, module: Any, threshold: float) -> "HaltingRule":
        """The rule at an exit threshold; `module` is the model's, of type `trained_module`."""
        return cls(threshold)

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return which of n positions stop after pass `loop` (from 1), (n,) bool, and the new memory, (n, ...).

        before and after are the states (n, D) float32; memory is that of the pass before, None in the first pass.
        """
        raise NotImplementedError

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        """The state to read out, (n, D), for positions that stop with state (n, D): by default that state."""
        return state


class Convergence(HaltingRule):
    """Stop when the state changes little: ||h_t - h_{t-1}|| < threshold * ||h_t||. Needs no training."""

    default_threshold = 0.13

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`; no memory."""
        return (after - before).norm(dim=-1) < self.threshold * after.norm(dim=-1), None


class SecondDifference(HaltingRule):
    """Stop when the change itself changes little, relative to the state (arXiv 2509.23314).

    ||(h_t - h_{t-1}) - (h_{t-1} - h_{t-2})|| < threshold * ||h_t||, from the second pass on. Needs no training.
    """

    default_threshold = 0.15

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`; remembers the change, (n, D)."""
        change = after - before
        if memory is None:
            return torch.zeros(len(after), dtype=torch.bool, device=after.device), change
        return (change - memory).norm(dim=-1) < self.threshold * after.norm(dim=-1), change


class HaltingGate(nn.Module):
    """Predicts after each pass the loss in nats of stopping a position there: a scalar per position and loop.

    Trained beside the model on detached states, so that it cannot harm the trunk. It learns the mean of KL(p_T || p_t),
    the divergence of the distribution read out after t loops from that of the full depth. This is the expected
    difference of the two losses if the token is drawn from the full depth's distribution. The difference for the one
    token in the data (which Ouro, arXiv 2510.25741, learns from) has the same mean in a calibrated model and far more
    noise. All in float32.
    """

    float32 = ("hidden", "hidden_bias", "out", "out_bias")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.empty(GATE_WIDTH, dim + 1))
        self.hidden_bias = nn.Parameter(torch.empty(GATE_WIDTH))
        self.out = nn.Parameter(torch.empty(GATE_WIDTH))
        self.out_bias = nn.Parameter(torch.empty(1))
        self.initializers: dict[str, Initializer] = {
            "hidden": truncated_normal(dim + 1),
            "hidden_bias": zeros,
            "out": zeros,
            "out_bias": constant(log(GATE_START)),
        }

    def forward(self, before: Tensor, after: Tensor) -> Tensor:
        """Log of the expected loss in nats, (n,), from the states (n, D) before and after a pass."""
        with without_autocast(after):
            norm = after.norm(dim=-1, keepdim=True)
            log_change = ((after - before).norm(dim=-1, keepdim=True) / norm).clamp_min(1e-6).log()
            features = torch.cat((F.rms_norm(after, after.shape[-1:]), log_change), dim=-1)
            return F.silu(F.linear(features, self.hidden, self.hidden_bias)) @ self.out + self.out_bias

    def loss(self, before: Tensor, after: Tensor, divergence: Tensor, weight: Tensor) -> Tensor:
        """Poisson regression on divergences (n,) in nats, a weighted sum; minimal where exp(output) is their mean."""
        predicted_log = self(before, after).clamp(max=5.0)  # bounds exp in the first steps
        return ((predicted_log.exp() - divergence * predicted_log) * weight).sum()


class Gate(HaltingRule):
    """Stop when the model's gate predicts a loss below `threshold` nats."""

    default_threshold = 0.005
    trained_module = HaltingGate

    def __init__(self, gate: HaltingGate, threshold: float) -> None:
        super().__init__(threshold)
        self.gate = gate

    @classmethod
    def build_module(cls, config: ModelConfig) -> HaltingGate:
        """An untrained gate."""
        return HaltingGate(config.dim)

    @classmethod
    def of(cls, module: HaltingGate, threshold: float) -> "Gate":
        """The rule of a model's gate."""
        return cls(module, threshold)

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`; no memory."""
        return self.gate(before, after).exp() < self.threshold, None


class ActHalting(nn.Module):
    """Halting probabilities of adaptive computation time (Graves, arXiv 1603.08983; per position: arXiv 1807.03819).

    For comparison: the readout is the average of the states, weighted by the probabilities, which makes the loss flat
    in depth. A position's last loop gets the remainder, so that the weights add up to 1 for any probabilities.
    """

    float32 = ("weight", "bias")

    def __init__(self, dim: int, loops: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(1))
        # sigmoid(bias) = 1 / loops: an untrained model halts after about `loops` passes.
        self.initializers: dict[str, Initializer] = {"weight": zeros, "bias": constant(-log(max(loops, 2) - 1))}

    def forward(self, state: Tensor) -> Tensor:
        """Probability to halt after a pass, (...) float32, from its state (..., D)."""
        with without_autocast(state):
            return torch.sigmoid(F.rms_norm(state, state.shape[-1:]) @ self.weight + self.bias)


class Act(HaltingRule):
    """Adaptive computation time: stop when the halting probabilities add up to `threshold` or more."""

    default_threshold = 1 - ACT_EPSILON
    highest_threshold = 1.0
    trained_module = ActHalting
    exclusive = True

    def __init__(self, halting: ActHalting, threshold: float) -> None:
        super().__init__(threshold)
        self.halting = halting

    @classmethod
    def build_module(cls, config: ModelConfig) -> ActHalting:
        """Untrained halting probabilities."""
        return ActHalting(config.dim, config.loops)

    @classmethod
    def of(cls, module: ActHalting, threshold: float) -> "Act":
        """The rule of a model's probabilities."""
        return cls(module, threshold)

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`; remembers (n, 1 + D): the sum of the probabilities and the weighted sum of the states."""
        p = self.halting(after).unsqueeze(-1)
        new = torch.cat((p, p * after), dim=-1)
        memory = new if memory is None else memory + new
        return memory[:, 0] >= self.threshold, memory

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        """The average of the states, (n, D); the last state gets the remaining weight."""
        assert memory is not None  # a position stops after at least one pass
        return memory[:, 1:] + (1 - memory[:, :1]) * state


class Pondering:
    """Act in training: the average state and the ponder cost of rows that join the loop at different passes.

    Unlike in decoding, positions that have halted stay in the loop, because others see them.
    """

    def __init__(self, halting: ActHalting) -> None:
        self.halting = halting
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        """Sum of probabilities, 1 if halted, (n, S); weighted sum of states, (n, S, D); cost of ending now, (n, S)."""

    def observe(self, after: LoopState) -> None:
        """Add a pass. The probabilities of passes without gradient get none either, so they save no activations."""
        state = after.state
        with torch.set_grad_enabled(state.requires_grad):
            total, average, cost = self._sums or (state[:0, :, 0], state[:0], state[:0, :, 0])
            joined = len(state) - len(total)
            total, cost = (F.pad(sums, (0, 0, 0, joined)) for sums in (total, cost))
            average = F.pad(average, (0, 0, 0, 0, 0, joined))
            p, running = self.halting(state), total < 1
            halts = running & (total + p >= 1 - ACT_EPSILON)
            weight = torch.where(halts, 1 - total, p) * running
            # Passes plus remainder (Graves, section 2.2) if this pass is the last; the remainder carries the gradient.
            cost = torch.where(running, after.slots.unsqueeze(1) + 2 - total, cost)
            total = torch.where(halts, 1.0, total + p * running)
            self._sums = total, average + weight.unsqueeze(-1) * state, cost

    def result(self, state: Tensor) -> Tensor:
        """The average of the states, (n, S, D), if the loop ends with `state`, which gets the remaining weight."""
        assert self._sums is not None  # `observe` was called after every pass
        total, average, _ = self._sums
        return average + (1 - total).unsqueeze(-1) * state

    def ponder_cost(self) -> Tensor:
        """Passes plus remainder of each position, (n, S)."""
        assert self._sums is not None
        return self._sums[2]


def rule_class(name: str) -> type[HaltingRule] | None:
    """The class of a halting rule, None for `none`."""
    return HALTING_RULES[name]


def trained_module(name: str) -> type[nn.Module] | None:
    """The type of module that a halting rule needs in the model; None if it needs no training."""
    rule = rule_class(name)
    return None if rule is None else rule.trained_module


def is_exclusive(name: str) -> bool:
    """Whether a model trained for a halting rule can use no other, because the rule computes what is read out."""
    rule = rule_class(name)
    return rule is not None and rule.exclusive


def build_halting(config: ModelConfig) -> nn.Module | None:
    """The module that `model.halting` adds to a model; None if the rule trains nothing."""
    rule = rule_class(config.halting)
    return None if rule is None else rule.build_module(config)


def default_threshold(name: str) -> float:
    """Exit threshold of a rule unless the caller gives one; its unit is the rule's.

    Raises KeyError for unknown names, and ValueError for `none`.
    """
    rule = rule_class(name)
    if rule is None:
        raise ValueError(f"halting is {name}, which has no exit threshold")
    return rule.default_threshold


def halting_rule(
    model: "RecurrentDepthTransformer", name: str | None = None, threshold: float | None = None
) -> HaltingRule | None:
    """The rule `name` (default: the model's) at an exit threshold (default: the rule's); None for `none`.

    Raises ValueError for an unknown name, a rule that the model was not trained for, or a threshold that is not above 0
    (act: at most 1) or given for `none`.
    """
    own, name = model.config.halting, model.config.halting if name is None else name
    if name not in HALTING_RULES.names:
        raise ValueError(f"halting: got {name!r}; allowed: {', '.join(HALTING_RULES.names)}")
    rule = rule_class(name)
    if rule is None:
        if threshold is not None:
            rules = ", ".join(other for other in HALTING_RULES.names if rule_class(other) is not None)
            raise ValueError(f"exit threshold {threshold:g}: halting is none, and a threshold needs a rule ({rules})")
        return None
    threshold = rule.default_threshold if threshold is None else threshold
    if not 0 < threshold <= rule.highest_threshold or threshold == inf:
        bound = "a number above 0"
        if rule.highest_threshold < inf:
            bound = f"above 0 and at most {rule.highest_threshold:g}"
        raise ValueError(f"exit threshold of {name}: got {threshold:g}; allowed: {bound}")
    if name not in (usable := usable_rules(model)):
        allowed = ", ".join(usable)
        raise ValueError(
            f"halting: got {name!r}, and this model was trained with model.halting={own}; allowed: {allowed}"
        )
    return rule.of(model.halting, threshold)


def usable_rules(model: "RecurrentDepthTransformer") -> list[str]:
    """Names of the rules that a model can use: those without training, and the one that it was trained for."""
    own = model.config.halting
    if is_exclusive(own):
        return [own]
    return [name for name in HALTING_RULES.names if trained_module(name) is None or name == own]
