"""When a position stops looping: rules that decide after every pass, and what is trained for them."""

from math import log
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.model.layers import Initializer, constant, truncated_normal, without_autocast, zeros

if TYPE_CHECKING:
    from mythos.model.rdt import RecurrentDepthTransformer
    from mythos.model.recurrence import LoopState

GATE_WIDTH = 64
"""Hidden width of the gate."""
GATE_START = 0.05
"""Nats that an untrained gate expects to be lost."""
GATE_POSITIONS = 128
"""Positions of a row that the gate learns from: their distributions over the vocabulary exist whole."""
ACT_EPSILON = 0.01
"""A position of act halts once its probabilities add up to 1 minus this."""


class HaltingRule(Protocol):
    """Decides after each pass which positions stop; what it remembers of a position travels with it."""

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Which of n positions stop after pass number `loop` (from 1), (n,) bool, and what to remember, (n, ...).

        before and after are the states (n, D) float32; memory is what the pass before remembered, None in the first.
        """
        ...

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        """What is read out for positions that stop with state (n, D)."""
        ...


class LastState:
    """Base of the rules that read out the state a position stops with."""

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        """The last state, (n, D)."""
        return state


class Convergence(LastState):
    """Stop where the state has nearly stopped to change: ||h_t - h_{t-1}|| < threshold * ||h_t||. Needs no training."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`."""
        return (after - before).norm(dim=-1) < self.threshold * after.norm(dim=-1), None


class SecondDifference(LastState):
    """Stop where the change itself has stopped to change, relative to the state (arXiv 2509.23314).

    ||(h_t - h_{t-1}) - (h_{t-1} - h_{t-2})|| < threshold * ||h_t||, from the second pass on. Needs no training.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`."""
        change = after - before
        if memory is None:
            return torch.zeros(len(after), dtype=torch.bool, device=after.device), change
        return (change - memory).norm(dim=-1) < self.threshold * after.norm(dim=-1), change


class HaltingGate(nn.Module):
    """Expects, after each pass, what a position would lose by stopping there: a scalar per position and loop.

    Trained beside the model on detached states, so that it cannot harm the trunk. What it learns is the mean of
    KL(p_T || p_t), the divergence of the distribution read out after t loops from the full depth's: the expected
    difference of the two losses, if the token is drawn from the full depth's distribution. The difference for the one
    token that came (Ouro, arXiv 2510.25741, learns from it) has the same mean in a calibrated model and far more noise.
    All in float32.
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
        """Log of the expected nats lost, (n,), from the states (n, D) before and after a pass."""
        with without_autocast(after):
            norm = after.norm(dim=-1, keepdim=True)
            change = ((after - before).norm(dim=-1, keepdim=True) / norm).clamp_min(1e-6).log()
            features = torch.cat((F.rms_norm(after, after.shape[-1:]), change), dim=-1)
            return F.silu(F.linear(features, self.hidden, self.hidden_bias)) @ self.out + self.out_bias

    def loss(self, before: Tensor, after: Tensor, divergence: Tensor, weight: Tensor) -> Tensor:
        """Poisson regression on divergences (n,) in nats, a weighted sum: least where exp(output) is their mean."""
        expected = self(before, after).clamp(max=5.0)
        return ((expected.exp() - divergence * expected) * weight).sum()


class Gate(LastState):
    """Stop where the model's gate expects to lose less than `threshold` nats by it."""

    def __init__(self, gate: HaltingGate, threshold: float) -> None:
        self.gate = gate
        self.threshold = threshold

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`."""
        return self.gate(before, after).exp() < self.threshold, None


class ActHalting(nn.Module):
    """Halting probabilities of adaptive computation time (Graves, arXiv 1603.08983; per position: arXiv 1807.03819).

    For comparison: what is read out is the average of the states, weighted by the probabilities, which makes the loss
    flat in depth. The remainder goes to a position's last loop, so that weights add up to 1 whatever the probabilities.
    """

    float32 = ("weight", "bias")

    def __init__(self, dim: int, loops: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(1))
        self.initializers: dict[str, Initializer] = {"weight": zeros, "bias": constant(-log(max(loops, 2) - 1))}

    def forward(self, state: Tensor) -> Tensor:
        """Probability to halt after a pass, (...) float32, from its state (..., D)."""
        with without_autocast(state):
            return torch.sigmoid(F.rms_norm(state, state.shape[-1:]) @ self.weight + self.bias)


class Act:
    """The rule of act: stop where the probabilities add up to `threshold` or more."""

    def __init__(self, halting: ActHalting, threshold: float) -> None:
        self.halting = halting
        self.threshold = threshold

    def __call__(self, loop: int, before: Tensor, after: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """See `HaltingRule`; remembers (n, 1 + D): the sum of the probabilities and the weighted sum of the states."""
        p = self.halting(after).unsqueeze(-1)
        new = torch.cat((p, p * after), dim=-1)
        memory = new if memory is None else memory + new
        return memory[:, 0] >= self.threshold, memory

    def result(self, state: Tensor, memory: Tensor | None) -> Tensor:
        """The average of the states; the last one takes what the probabilities leave, (n, D)."""
        assert memory is not None
        return memory[:, 1:] + (1 - memory[:, :1]) * state


class Pondering:
    """Act in training: the average state and the ponder cost of rows that join as their time comes.

    Differs from decoding in one thing: positions that have halted go on in the loop, as others see them.
    """

    def __init__(self, halting: ActHalting) -> None:
        self.halting = halting
        self.kept: tuple[Tensor, Tensor, Tensor] | None = None
        """Probabilities so far, 1 where halted, (n, S); weighted sum of states, (n, S, D); what it would cost to end
        here, (n, S)."""

    def observe(self, done: "LoopState") -> None:
        """Add a pass. Passes without gradient give none to the probabilities either, and so keep nothing."""
        state = done.state
        with torch.set_grad_enabled(state.requires_grad):
            total, average, cost = self.kept or (state[:0, :, 0], state[:0], state[:0, :, 0])
            joined = len(state) - len(total)
            total, cost = (F.pad(kept, (0, 0, 0, joined)) for kept in (total, cost))
            average = F.pad(average, (0, 0, 0, 0, 0, joined))
            p, running = self.halting(state), total < 1
            halts = running & (total + p >= 1 - ACT_EPSILON)
            weight = torch.where(halts, 1 - total, p) * running
            # Passes plus remainder (Graves, section 2.2), if this is the last; gradient flows through the remainder.
            cost = torch.where(running, done.slots.unsqueeze(1) + 2 - total, cost)
            total = torch.where(halts, 1.0, total + p * running)
            self.kept = total, average + weight.unsqueeze(-1) * state, cost

    def result(self, state: Tensor) -> Tensor:
        """The average of the states, (n, S, D), if the loop ends here: the last one takes what is left."""
        assert self.kept is not None
        total, average, _ = self.kept
        return average + (1 - total).unsqueeze(-1) * state

    def ponder_cost(self) -> Tensor:
        """Passes plus remainder of each position, (n, S)."""
        assert self.kept is not None
        return self.kept[2]


def build_halting(name: str, dim: int, loops: int) -> HaltingGate | ActHalting | None:
    """What `model.halting` adds to the model's parameters."""
    if name == "gate":
        return HaltingGate(dim)
    return ActHalting(dim, loops) if name == "act" else None


THRESHOLDS = {"convergence": 0.13, "second_difference": 0.15, "gate": 0.005, "act": 1 - ACT_EPSILON}
"""Exit threshold of each rule where none is given: relative change of the state, the same, nats, total probability."""
HALTING_RULES = ("none", *THRESHOLDS)


def halting_rule(
    model: "RecurrentDepthTransformer", name: str | None = None, threshold: float | None = None
) -> HaltingRule | None:
    """The rule called `name` (default: the model's) at an exit threshold (default: the rule's); None for `none`.

    Raises ValueError for a name that is unknown, a rule that the model was not trained for, or a threshold that is not
    above 0 (act: up to 1), or that no rule is there for.
    """
    name = model.config.halting if name is None else name
    if name not in HALTING_RULES:
        raise ValueError(f"halting: got {name!r}; allowed: {', '.join(HALTING_RULES)}")
    if name == "none":
        if threshold is not None:
            rules = ", ".join(THRESHOLDS)
            raise ValueError(f"exit threshold {threshold:g}: halting is none, and a threshold needs a rule ({rules})")
        return None
    threshold = THRESHOLDS[name] if threshold is None else threshold
    highest = 1.0 if name == "act" else float("inf")
    if not 0 < threshold <= highest or threshold == float("inf"):
        bound = "above 0 and at most 1" if name == "act" else "a number above 0"
        raise ValueError(f"exit threshold of {name}: got {threshold:g}; allowed: {bound}")
    if isinstance(model.halting, ActHalting):  # what the others read out is not what it was trained to read out
        if name == "act":
            return Act(model.halting, threshold)
        raise ValueError(f"halting: got {name!r}, and this model was trained with model.halting=act; allowed: act")
    if name == "convergence":
        return Convergence(threshold)
    if name == "second_difference":
        return SecondDifference(threshold)
    if name == "gate" and isinstance(model.halting, HaltingGate):
        return Gate(model.halting, threshold)
    gate = ", gate" if isinstance(model.halting, HaltingGate) else ""
    raise ValueError(
        f"halting: got {name!r}, and this model was trained with model.halting={model.config.halting}; "
        f"allowed: none, convergence, second_difference{gate}"
    )
