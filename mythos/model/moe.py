"""Feed-forwards of the core: a mixture of experts (sigmoid affinities, bias-balanced top-k), or a dense one."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mythos.model.config import CORES, ROUTERS, ModelConfig
from mythos.model.layers import (
    Initializer,
    SwiGLU,
    autocast_dtype,
    dense_feed_forward,
    local_part,
    loop_rows,
    noise,
    truncated_normal,
    without_autocast,
    zeros,
)
from mythos.model.ops.expert_exchange import CheckpointedPass, ExpertExchange
from mythos.model.ops.grouped_experts import ExpertWeights, start_experts
from mythos.model.ops.matmul import float32_linear
from mythos.model.ops.recompute import recomputable
from mythos.model.ops.shared_experts import SharedExpertGroup, SliceWeights


class Router(nn.Module):
    """Chooses k experts for each token (arXiv 2408.15664, 2412.19437).

    Affinity is sigmoid(x W^T) in float32. The k experts with the largest affinity + bias are chosen. The gate weights
    are the affinities of the chosen experts, without the bias, normalised to sum 1. Only `rebalance` changes the bias,
    which is (E,), or (loops, E) with one row for each trained loop.

    With G groups of E / G experts, only experts of M groups are chosen: those whose k / M largest affinity + bias have
    the largest sum.
    """

    float32: tuple[str, ...] = ("weight",)
    bias: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, self.chosen = config.n_experts, config.experts_per_token
        self.groups, self.chosen_groups = config.expert_groups, config.groups_per_token
        self.weight = nn.Parameter(torch.empty(experts, config.dim))
        self.initializers: dict[str, Initializer] = {"weight": truncated_normal(config.dim)}
        self.register_buffer("bias", torch.zeros((config.loops, experts) if config.router_bias_per_loop else experts))

    def logits(self, x: Tensor, loop: Tensor | None) -> Tensor:
        """x W^T, (N, E) float32."""
        return float32_linear(x, self.weight.float())

    def forward(self, x: Tensor, loop: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(N, D) -> gates (N, k) float32, chosen experts (N, k) int64.

        `loop` int64 is the loop index of all tokens (1,), or of the n rows that these are the tokens of, (n,).
        """
        with without_autocast(x):
            affinity_NE = torch.sigmoid(self.logits(x, loop))
        biased_NE = affinity_NE.detach()
        if self.bias.ndim == 1:
            biased_NE = biased_NE + self.bias
        else:
            assert loop is not None
            biased_NE = (by_row(biased_NE, loop) + loop_rows(self.bias, loop)).flatten(0, 1)
        if self.chosen_groups < self.groups:
            biased_NE = self.without_other_groups(biased_NE)
        experts_NK = biased_NE.topk(self.chosen, dim=-1).indices
        gates_NK = affinity_NE.gather(-1, experts_NK)
        return gates_NK / gates_NK.sum(-1, keepdim=True).clamp_min(1e-9), experts_NK

    def without_other_groups(self, biased: Tensor) -> Tensor:
        """(N, E) with -infinity for the experts of groups that are not chosen."""
        biased_NGe = biased.unflatten(-1, (self.groups, -1))
        score_NG = biased_NGe.topk(self.chosen // self.chosen_groups, dim=-1).values.sum(-1)
        chosen_NM = score_NG.topk(self.chosen_groups, dim=-1).indices
        others_NG = torch.ones_like(score_NG, dtype=torch.bool).scatter(-1, chosen_NM, False)
        return biased_NGe.masked_fill(others_NG.unsqueeze(-1), float("-inf")).flatten(-2)

    @torch.no_grad()
    def rebalance(self, load: Tensor, rate: float | Tensor) -> None:
        """Move the bias by +-rate against the load, tokens per expert of a whole optimizer step in the bias's shape."""
        load = load.float()
        self.bias += rate * torch.sign(load.mean(-1, keepdim=True) - load)


def by_row(tokens: Tensor, loop: Tensor) -> Tensor:
    """Tokens (N, W) of the rows whose loop indices are (n,) -> (n, N / n, W)."""
    return tokens.unflatten(0, (loop.shape[0], -1))


class LoopBiasRouter(Router):
    """Affinity sigmoid(x W^T + loop_bias[t]); loops beyond the trained ones use the last row.

    The same experts gain in a loop for all tokens. Rows start as noise, so that loops differ from the first step.
    """

    float32 = ("weight", "loop_bias")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.loop_bias = nn.Parameter(torch.empty(config.loops, config.n_experts))  # (T, E)
        self.initializers["loop_bias"] = noise(config.router_loop_start)

    def logits(self, x: Tensor, loop: Tensor | None) -> Tensor:
        """x W^T + loop_bias[t], (N, E) float32."""
        assert loop is not None
        return (by_row(super().logits(x, loop), loop) + loop_rows(self.loop_bias, loop)).flatten(0, 1)


class LoopEmbeddingRouter(Router):
    """Affinity sigmoid((x * (1 + loop_embedding[t])) W^T); loops beyond the trained ones use the last row.

    Which experts gain in a loop depends on the token. Rows start as noise, as in `LoopBiasRouter`.
    """

    float32 = ("weight", "loop_embedding")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.loop_embedding = nn.Parameter(torch.empty(config.loops, config.dim))  # (T, D)
        self.initializers["loop_embedding"] = noise(config.router_loop_start)

    def logits(self, x: Tensor, loop: Tensor | None) -> Tensor:
        """(x * (1 + loop_embedding[t])) W^T, (N, E) float32."""
        assert loop is not None
        scaled = recomputable(scaled_rows, by_row(x, loop), loop_rows(self.loop_embedding, loop))
        return super().logits(scaled.flatten(0, 1), loop)


def scaled_rows(x: Tensor, scale: Tensor) -> Tensor:
    """x * (1 + scale), (n, S, D) and (n, 1, D) -> (n, S, D) float32."""
    return x.float() * (1 + scale)


class MixtureOfExperts(nn.Module):
    """Fine-grained routed experts beside always-on shared ones (arXiv 2401.06066).

    Routed experts are stacked parameters, so that they shard, load and train as one tensor whatever the routing.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, hidden, experts = config.dim, config.expert_dim, config.n_experts
        self.router: Router = ROUTERS[config.router_loop](config)
        self.gate_up = nn.Parameter(torch.empty(experts, dim, 2 * hidden))
        self.down = nn.Parameter(torch.empty(experts, hidden, dim))
        self.initializers: dict[str, Initializer] = {"gate_up": truncated_normal(dim), "down": zeros}
        shared = config.n_shared_experts * config.shared_expert_dim
        self.shared = SwiGLU(dim, shared) if shared else None
        self.exchange: ExpertExchange | None = None
        """Sends tokens to the ranks that hold their experts; None if this rank holds all."""
        self.shared_group: SharedExpertGroup | None = None
        """The ranks that divide the shared experts by hidden width; None if this rank holds all of it. Then the
        parameters of `shared` are this rank's slice."""

    @property
    def stacks(self) -> list[nn.Parameter]:
        """The routed experts' parameters, each with one matrix per expert."""
        return [self.gate_up, self.down]

    @property
    def slices(self) -> list[nn.Parameter]:
        """The shared experts' parameters, which can be divided by hidden width; none without shared experts."""
        return [] if self.shared is None else list(self.shared.parameters())

    def weights(self, dtype: torch.dtype) -> ExpertWeights:
        """The weights of the experts that this rank holds, for a step whose matmuls are in `dtype`.

        Shared experts are among them if they are divided.
        """
        weights = ExpertWeights(local_part(self.gate_up), local_part(self.down), dtype)
        if self.shared_group is not None:
            gate_up, down = (local_part(parameter) for parameter in self.slices)
            weights.shared = SliceWeights(gate_up, down, dtype)
        return weights

    def forward(
        self, x: Tensor, weights: ExpertWeights | None = None, loop: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> output (B, S, D), chosen experts (B, S, k) int64.

        `weights` are those that all loops of the step share; None = use the parameters for this call alone. `loop` is
        the loop index of each row (B,), or of all (1,), int64; a router that does not depend on it needs none.
        """
        tokens_ND = x.flatten(0, 1)
        gates_NK, experts_NK = self.router(tokens_ND, loop)
        weights = weights or self.weights(autocast_dtype(x))
        if self.exchange is None:
            finish = start_experts(tokens_ND, gates_NK, experts_NK, weights)
            shared = None if self.shared is None else self.shared(x)
            output = finish().view_as(x)  # last: a recomputation need not compute it
        elif weights.shared is None:
            start = self.exchange.start(experts_NK, len(weights.gate_up)).send(tokens_ND, gates_NK, weights)
            shared, output = self.while_rows_travel(x, start)
        else:
            output, shared = (part.view_as(x) for part in self.exchanged(tokens_ND, gates_NK, experts_NK, weights))
        if shared is not None:
            output = output + shared
        return output, experts_NK.view(*x.shape[:2], -1)

    def while_rows_travel(self, x: Tensor, start: Callable[[], Callable[[], Tensor]]) -> tuple[Tensor | None, Tensor]:
        """Outputs of whole shared experts and of routed ones, as x (B, S, D); `start` is that of `Dispatch.send`."""
        if self.shared is None:
            return None, start()().view_as(x)
        hidden = self.shared.hidden(x)
        if CheckpointedPass.current is None:
            shared = self.shared.down(hidden)
            return shared, start()().view_as(x)
        # A recomputation ends before the last matmuls of both, if their results are not needed.
        finish = start()
        shared = self.shared.down(hidden)
        return shared, finish().view_as(x)

    def exchanged(self, x: Tensor, gates: Tensor, experts: Tensor, weights: ExpertWeights) -> tuple[Tensor, Tensor]:
        """Outputs of routed and of shared experts, both divided, for x (N, D): -> (N, D) float32 each.

        The slice of the shared experts runs while the rows of the routed experts travel, and these while the results of
        the slices do.
        """
        assert self.exchange is not None and self.shared_group is not None and weights.shared is not None
        dispatch = self.exchange.start(experts, len(weights.gate_up))
        call = self.shared_group.call(dispatch.splits.tokens, weights.shared)
        tokens = call.send(x)
        start = dispatch.send(x, gates, weights)
        results = call.compute(tokens)
        output = start()()
        return output, call.total(results, len(x))

    def serve(self, x: Tensor, weights: ExpertWeights | None) -> None:
        """Run this rank's experts for the tokens of other ranks, without own ones; x (..., D) gives type and device."""
        assert self.exchange is not None, "the experts are shared"
        weights = weights or self.weights(autocast_dtype(x))
        gates, none = torch.empty(0, self.router.chosen, device=x.device), x.flatten(0, -2)[:0]
        if weights.shared is None:
            self.exchange.start(gates.long(), len(weights.gate_up)).run(none, gates, weights)
        else:
            self.exchanged(none, gates, gates.long(), weights)


class CoreFeedForward:
    """Base of the classes in the registry `CORES`."""

    routes = False
    """The module returns its output and the chosen experts, (B, S, k) int64 below `n_experts`."""

    @staticmethod
    def build(config: ModelConfig) -> nn.Module:
        """The feed-forward of one core block: (B, S, D) -> (B, S, D)."""
        raise NotImplementedError


class MixtureCore(CoreFeedForward):
    """`core_ffn: moe`."""

    routes = True

    @staticmethod
    def build(config: ModelConfig) -> nn.Module:
        """A mixture of experts."""
        return MixtureOfExperts(config)


class DenseCore(CoreFeedForward):
    """`core_ffn: dense`."""

    @staticmethod
    def build(config: ModelConfig) -> nn.Module:
        """The feed-forward that `model.dense_ffn` names."""
        return dense_feed_forward(config)


def core_class(config: ModelConfig) -> type[CoreFeedForward]:
    """The class that `model.core_ffn` names."""
    return CORES[config.core_ffn]
