"""Injections: how the encoded input e enters every pass of the loop."""

from math import expm1, log, sqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.model.config import ModelConfig
from mythos.model.lanes import inject_lanes
from mythos.model.layers import Initializer, Linear, RMSNorm, by_row, identity, without_autocast, zeros
from mythos.model.ops.matmul import float32_linear

START_DECAY = sqrt(1 / 5)
"""Initial entries of A, as in Parcae (arXiv 2604.12946)."""

# Within these bounds A stays in [1e-19, 1 - 6e-6], which float32 distinguishes from 0 and 1.
DT_BOUNDS = (-6.0, 6.0)
LOG_A_BOUNDS = (-6.0, 2.0)

PROJECTION_EPSILON = 1e-6
"""Added to the squared norm by which a projection divides (as in the code of arXiv 2610.06833)."""


class Injection(nn.Module):
    """Base of the classes in the registry `INJECTIONS`; by itself it shares e between the loops and learns nothing."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def maps_outside_loop(self) -> list[nn.Module]:
        """Linear maps that `forward` uses, which run once and not in every loop."""
        return []

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Compute once what all loops share: a parameter tensor and the encoded input, from e (B, S, D)."""
        return e.new_ones(()), e

    def combine(self, state: Tensor, shared: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """The core's input u, (n, S, D) float32.

        state (n, S, D); `shared` and `injected` are the results of `forward`; `loop` (n,) or (1,) int64 is each row's
        loop index.
        """
        raise NotImplementedError


class _Bounded(torch.autograd.Function):
    """x clamped to low..high, with a gradient that can bring a parameter back inside.

    The gradient of `clamp` is zero outside the bounds, so a parameter that one bad step moved there would never move
    again. Here the gradient passes if a descent step leads back inside, and is zero if it leads further out.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        outward = ((x > high) & (gradient < 0)) | ((x < low) & (gradient > 0))
        return gradient.masked_fill(outward, 0.0), None, None


class LTIInjection(Injection):
    """u = A * h + Delta * (e B^T): linear, time-invariant and stable by construction (arXiv 2604.12946).

    Delta = softplus(dt) and A = exp(-Delta * exp(log_a)), per dimension. dt and log_a are clamped where they are used,
    so every entry of A lies strictly between 0 and 1 in float32 whatever an optimizer does to them. A parameter outside
    its bounds can still be trained back inside. All in float32.

    With K state lanes, u_k = A_k * h_k + Delta_k * (e B^T) for each lane k, where dt and log_a are (K, D). The decay of
    lane k starts at START_DECAY ** (1 / (k + 1)), k from 0, so that later lanes remember longer.
    """

    float32 = ("dt", "log_a")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        dim, lanes = config.dim, config.lanes
        self.lanes = lanes
        shape = (dim,) if lanes == 1 else (lanes, dim)
        self.dt = nn.Parameter(torch.empty(shape))
        self.log_a = nn.Parameter(torch.empty(shape))
        self.weight = nn.Parameter(torch.empty(dim, dim))
        decays = [START_DECAY ** (1 / (lane + 1)) for lane in range(lanes)]
        self.initializers: dict[str, Initializer] = {
            "dt": by_row([log(expm1(-log(decay))) for decay in decays]),  # inverse softplus: A starts at `decays`
            "log_a": zeros,
            "weight": identity(),
        }

    def rates(self) -> tuple[Tensor, Tensor]:
        """Diagonal of A and step size Delta, (D,) float32 each; with lanes (K, D)."""
        # Clamp dt once for both uses: its gradient's direction is judged on their sum.
        delta = F.softplus(_Bounded.apply(self.dt, *DT_BOUNDS))
        return torch.exp(-delta * _Bounded.apply(self.log_a, *LOG_A_BOUNDS).exp()), delta

    def decay(self) -> Tensor:
        """Diagonal of A, (D,) float32, with lanes (K, D); its largest entry is rho(A)."""
        return self.rates()[0]

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """A (D,) and Delta * (e B^T) (B, S, D); with lanes A and Delta (2, K, D) and e B^T (B, S, D). All float32."""
        with without_autocast(e):
            decay, delta = self.rates()
            projected = float32_linear(e, self.weight)
            if self.lanes == 1:
                return decay, delta * projected
            return torch.stack((decay, delta)), projected  # one tensor of the input for all lanes, not one for each

    def combine(self, state: Tensor, shared: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """A * h + Delta * (e B^T): (n, S, D), or with lanes (n, S, K, D)."""
        if self.lanes == 1:
            return torch.addcmul(injected, shared, state)
        decay, delta = shared.unbind()
        return inject_lanes(state, decay, delta, injected)


def spread_lanes(name: str, value: Tensor, lanes: int) -> Tensor:
    """The parameter `name`, dt or log_a, of K lanes that start from one lane's: (D,) -> (K, D).

    All lanes take the one lane's Delta, and lane k takes A ** (1 / (k + 1)), so that they differ as new lanes do.
    From a state of zeros the first pass computes what it did with one lane.
    """
    repeated = value.expand(lanes, -1)
    if name == "dt":
        return repeated.clone()
    return repeated - torch.arange(1, lanes + 1, device=value.device).log().unsqueeze(-1)


class OrthogonalInjection(LTIInjection):
    """u = P(A * h) + b with b = Delta * (e B^T), where P removes the component along b (OrthoInj, arXiv 2610.06833).

    P(x) = x - b (x . b) / (||b||^2 + 1e-6), for each position, so what a pass keeps of the state does not repeat what
    is injected again. P is symmetric with eigenvalues between 0 and 1, so ||P A|| <= max(A) < 1 in every pass, and
    `decay` bounds what is left of a state by a product over the passes. Parameters, their initial values and bounds are
    those of `LTIInjection`; so is float32. The formula and the constant are those of the authors' code
    (github.com/ifm-ai/xllm-loop at 3af99f4); their models inject e without a norm (`model.prelude_norm: false`).
    """

    def combine(self, state: Tensor, shared: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """P(A * h) + Delta * (e B^T); `shared` is A."""
        kept = shared * state
        along = (kept * injected).sum(-1, keepdim=True)
        share = along / (injected.square().sum(-1, keepdim=True) + PROJECTION_EPSILON)
        return torch.addcmul(kept, 1 - share, injected)


class LinearInjection(Injection):
    """u = W_h h + W_e e, unconstrained: the adapter of Huginn (arXiv 2502.05171), with the initial values of LTI."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.state = Linear(config.dim, config.dim, identity(START_DECAY))
        self.input = Linear(config.dim, config.dim, identity(-log(START_DECAY)))

    def maps_outside_loop(self) -> list[nn.Module]:
        """W_e."""
        return [self.input]

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """W_e e (B, S, D); no shared parameter."""
        return e.new_ones(()), self.input(e).float()

    def combine(self, state: Tensor, shared: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """W_h h + W_e e."""
        return injected + self.state(state)


class AddInjection(Injection):
    """u = h + e (the simplest looped transformer)."""

    def combine(self, state: Tensor, shared: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """h + e."""
        return injected + state


class InitialInjection(Injection):
    """u = e in the first pass and RMSNorm(h) in all others: the loop starts from the input (arXiv 2510.25741)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm = RMSNorm(config.dim, config.norm_eps, cast=False)

    def combine(self, state: Tensor, shared: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """e where the loop index is 0, RMSNorm(h) elsewhere."""
        return torch.where((loop == 0).view(-1, 1, 1), injected, self.norm(state))
