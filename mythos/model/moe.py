"""Mixture of experts: sigmoid affinities, bias-balanced top-k, grouped matrix products."""

import torch
from torch import Tensor, nn

from mythos.model.config import ModelConfig
from mythos.model.layers import (
    Initializer,
    SwiGLU,
    autocast_dtype,
    dense_ffn,
    truncated_normal,
    without_autocast,
    zeros,
)
from mythos.model.ops.grouped_experts import ExpertWeights, run_experts
from mythos.model.ops.matmul import float32_linear


class Router(nn.Module):
    """Chooses experts per token (arXiv 2408.15664, 2412.19437).

    Affinity is sigmoid(x W^T) in float32. The k experts of largest affinity + bias are chosen; the gate weights are the
    chosen affinities, without the bias, normalised to sum 1. The bias is a buffer, moved by `rebalance` alone.
    """

    float32 = ("weight",)

    def __init__(self, dim: int, experts: int, chosen: int) -> None:
        super().__init__()
        self.chosen = chosen
        self.weight = nn.Parameter(torch.empty(experts, dim))
        self.initializers: dict[str, Initializer] = {"weight": truncated_normal(dim)}
        self.register_buffer("bias", torch.zeros(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, D) -> gates (N, k) float32, chosen experts (N, k) int64."""
        with without_autocast(x):
            affinity = torch.sigmoid(float32_linear(x, self.weight.float()))
        experts = (affinity.detach() + self.bias).topk(self.chosen, dim=-1).indices
        gates = affinity.gather(-1, experts)
        return gates / gates.sum(-1, keepdim=True).clamp_min(1e-9), experts

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

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """The routed experts' weights for a step whose products are in `dtype`."""
        return ExpertWeights(self.gate_up, self.down, dtype)

    def forward(self, x: Tensor, weights: ExpertWeights | None = None) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> output (B, S, D), chosen experts (B, S, k) int64; `weights` are the step's, if it has some."""
        tokens = x.flatten(0, 1)
        gates, experts = self.router(tokens)
        routed = run_experts(tokens, gates, experts, weights or self.weights(autocast_dtype(x))).view_as(x)
        if self.shared is not None:
            routed = routed + self.shared(x)
        return routed, experts.view(*x.shape[:2], -1)


def build_core_ffn(config: ModelConfig) -> nn.Module:
    """The feed-forward of a core block that `config.core_ffn` names."""
    if config.core_ffn == "moe":
        return MixtureOfExperts(config)
    return dense_ffn(config.dense_ffn, config.dim, config.ffn_dim)
