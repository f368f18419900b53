"""Mixture of experts: sigmoid affinities, bias-balanced top-k, grouped matrix products."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.model.config import ModelConfig
from mythos.model.layers import Initializer, SwiGLU, autocast_dtype, truncated_normal, zeros


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
        with torch.autocast(x.device.type, enabled=False):
            affinity = torch.sigmoid(F.linear(x.float(), self.weight.float()))
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

    Routed experts are stacked parameters, so that they shard, load and train as one tensor whatever the routing. Tokens
    are sorted by expert on the device and multiplied by `grouped_mm`, without a loop over experts of our own; where
    torch has a grouped kernel (on GPUs bfloat16) it has none either, and nothing waits for the host.
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

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> output (B, S, D), chosen experts (B, S, k) int64."""
        tokens = x.flatten(0, 1)
        gates, experts = self.router(tokens)
        routed = self.run_experts(tokens, gates, experts).view_as(x)
        if self.shared is not None:
            routed = routed + self.shared(x)
        return routed, experts.view(*x.shape[:2], -1)

    @torch.compiler.disable  # torch 2.13 cannot trace grouped_mm in float32 on a CPU
    def run_experts(self, tokens: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """Weighted sum of each token's chosen experts: (N, D), (N, k), (N, k) -> (N, D)."""
        dtype = autocast_dtype(tokens)
        expert_of_slot, order = experts.flatten().sort(stable=True)
        edges = torch.arange(self.gate_up.shape[0], device=tokens.device)
        ends = torch.searchsorted(expert_of_slot, edges, right=True).int()
        token_of_slot = order // experts.shape[-1]

        gathered = tokens.to(dtype)[token_of_slot]
        gate, up = F.grouped_mm(gathered, self.gate_up.to(dtype), offs=ends).chunk(2, dim=-1)
        output = F.grouped_mm(F.silu(gate) * up, self.down.to(dtype), offs=ends)
        weighted = output * gates.flatten()[order].unsqueeze(-1).to(dtype)
        return torch.zeros_like(tokens).index_add(0, token_of_slot, weighted.to(tokens.dtype))


def build_core_ffn(config: ModelConfig) -> nn.Module:
    """The feed-forward of a core block that `config.core_ffn` names."""
    return MixtureOfExperts(config) if config.core_ffn == "moe" else SwiGLU(config.dim, config.ffn_dim)
