"""Feed-forwards of the core: a mixture of experts (sigmoid affinities, bias-balanced top-k), or a dense one."""

import torch
from torch import Tensor, nn

from mythos.model.config import CORES, FEED_FORWARDS, ModelConfig
from mythos.model.layers import (
    Initializer,
    SwiGLU,
    autocast_dtype,
    dense_feed_forward,
    local_part,
    truncated_normal,
    without_autocast,
    zeros,
)
from mythos.model.ops.expert_exchange import ExpertExchange
from mythos.model.ops.grouped_experts import ExpertWeights, run_experts
from mythos.model.ops.matmul import float32_linear


class Router(nn.Module):
    """Chooses k experts for each token (arXiv 2408.15664, 2412.19437).

    Affinity is sigmoid(x W^T) in float32. The k experts with the largest affinity + bias are chosen. The gate weights
    are the affinities of the chosen experts, without the bias, normalised to sum 1. Only `rebalance` changes the bias.
    """

    float32 = ("weight",)
    bias: Tensor

    def __init__(self, dim: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.initializers: dict[str, Initializer] = {"weight": truncated_normal(dim)}
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> gates (N, k) float32, chosen experts (N, k) int64."""
        with without_autocast(x):
            affinity_NE = torch.sigmoid(float32_linear(x, self.weight.float()))
        experts_NK = (affinity_NE.detach() + self.bias).topk(self.chosen, dim=-1).indices
        gates_NK = affinity_NE.gather(-1, experts_NK)
        return gates_NK / gates_NK.sum(-1, keepdim=True).clamp_min(1e-9), experts_NK

    @torch.no_grad()
    def rebalance(self, load: Tensor, rate: float | Tensor) -> None:
        """Move the bias by +-rate against the load, (E,) tokens per expert of a whole optimizer step."""
        load = load.float()
        self.bias += rate * torch.sign(load.mean() - load)


class MixtureOfExperts(nn.Module):
    """Fine-grained routed experts beside always-on shared ones (arXiv 2401.06066).

    Routed experts are stacked parameters, so that they shard, load and train as one tensor whatever the routing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, hidden, experts = config.dim, config.expert_dim, config.n_experts
        self.router = Router(dim, experts, config.experts_per_token)
        self.gate_up = nn.Parameter(torch.empty(experts, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.initializers: dict[str, Initializer] = {"gate_up": truncated_normal(dim), "down": zeros}
        shared = config.n_shared_experts * config.shared_expert_dim
        self.shared = SwiGLU(dim, shared) if shared else None
        self.exchange: ExpertExchange | None = None
        """Sends tokens to the ranks that hold their experts; None if this rank holds all."""

    @property
    def stacks(self) -> list[nn.Parameter]:
        """The routed experts' parameters, each with one matrix per expert."""
        return [self.gate_up, self.down]

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """The weights of the routed experts that this rank holds, for a step whose matmuls are in `dtype`."""
        return ExpertWeights(local_part(self.gate_up), local_part(self.down), dtype)

    def forward(self, x: Tensor, weights: ExpertWeights | None = None) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> output (B, S, D), chosen experts (B, S, k) int64.

        `weights` are those that all loops of the step share; None = use the parameters for this call alone.
        """
        tokens_ND = x.flatten(0, 1)
        gates_NK, experts_NK = self.router(tokens_ND)
        weights = weights or self.weights(autocast_dtype(x))
        if self.exchange is None:
            output = run_experts(tokens_ND, gates_NK, experts_NK, weights).view_as(x)
            shared = None if self.shared is None else self.shared(x)
        else:
            dispatch = self.exchange.start(experts_NK, len(weights.gate_up))
            shared = None if self.shared is None else self.shared(x)  # runs while the counts travel
            output = dispatch.run(tokens_ND, gates_NK, weights).view_as(x)
        if shared is not None:
            output = output + shared
        return output, experts_NK.unflatten(0, x.shape[:2])  # also of no tokens


class CoreFeedForward:
    """Base of the classes in the registry `CORES`."""

    routes = False
    """The module returns its output and the chosen experts, (B, S, k) int64 below `n_experts`."""

    @staticmethod
    def build(config: ModelConfig) -> nn.Module:
        """The feed-forward of one core block: (B, S, D) -> (B, S, D)."""
        raise NotImplementedError

    @staticmethod
    def token_products(config: ModelConfig) -> int:
        """Multiply-adds for one token."""
        raise NotImplementedError


class MixtureCore(CoreFeedForward):
    """`core_ffn: moe`."""

    routes = True

    @staticmethod
    def build(config: ModelConfig) -> nn.Module:
        """A mixture of experts."""
        return MixtureOfExperts(config)

    @staticmethod
    def token_products(config: ModelConfig) -> int:
        """Multiply-adds of the router, and of the routed and shared experts of one token."""
        hidden = config.experts_per_token * config.expert_dim + config.n_shared_experts * config.shared_expert_dim
        return config.dim * config.n_experts + 3 * config.dim * hidden


class DenseCore(CoreFeedForward):
    """`core_ffn: dense`."""

    @staticmethod
    def build(config: ModelConfig) -> nn.Module:
        """The feed-forward that `model.dense_ffn` names."""
        return dense_feed_forward(config)

    @staticmethod
    def token_products(config: ModelConfig) -> int:
        """Multiply-adds of the dense feed-forward for one token."""
        return FEED_FORWARDS[config.dense_ffn].token_products(config.dim, config.ffn_dim)


def core_class(config: ModelConfig) -> type[CoreFeedForward]:
    """The class that `model.core_ffn` names."""
    return CORES[config.core_ffn]
