"""The loop: injection, core blocks, depth-wise adapter, and the growing prefix of rows."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from hashlib import blake2b
from math import erf, expm1, log, sqrt
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos.model.attention import AttentionContext, build_attention, value_embedding_layers
from mythos.model.cache import CachedContext, Part
from mythos.model.config import ModelConfig
from mythos.model.halting import HaltingRule
from mythos.model.layers import (
    Linear,
    RMSNorm,
    autocast_dtype,
    constant,
    dense_ffn,
    identity,
    ones,
    without_autocast,
    zeros,
)
from mythos.model.moe import MixtureOfExperts, build_core_ffn
from mythos.model.ops.grouped_experts import ExpertWeights
from mythos.model.ops.matmul import float32_linear
from mythos.model.ops.recompute import Selective, recomputable
from mythos.model.ops.shared_weight import SharedWeight

START_DECAY = sqrt(1 / 5)
"""Entries of A at the start."""

# With these bounds A stays within [1e-19, 1 - 6e-6], which float32 tells from 0 and 1.
DT_BOUNDS = (-6.0, 6.0)
LOG_A_BOUNDS = (-6.0, 2.0)


class Block(nn.Module):
    """Transformer block with norms before its parts, and after them or on the sums; its residual stream is float32."""

    def __init__(self, config: ModelConfig, ffn: nn.Module, part: Part, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = build_attention(config, (part, layer) in value_embedding_layers(config))
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn = ffn
        self.on_sums = config.block_norm == "sandwich"
        self.attention_out_norm = self.ffn_out_norm = None
        if config.block_norm != "pre":
            self.attention_out_norm = RMSNorm(config.dim, config.norm_eps, cast=False)
            self.ffn_out_norm = RMSNorm(config.dim, config.norm_eps, cast=False)

    def forward(
        self, x: Tensor, context: AttentionContext | CachedContext, weights: ExpertWeights | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D), and the chosen experts (B, S, k) if the feed-forward routes."""
        x = self.add(x, self.attention(self.attention_norm(x), context), self.attention_out_norm)
        normed = self.ffn_norm(x)
        output = self.ffn(normed) if weights is None else self.ffn(normed, weights)
        output, experts = output if isinstance(output, tuple) else (output, None)
        return self.add(x, output, self.ffn_out_norm), experts

    def add(self, x: Tensor, output: Tensor, norm: RMSNorm | None) -> Tensor:
        """The residual stream with a part's output, (B, S, D) float32."""
        if norm is None:
            return x + output
        return norm(x + output) if self.on_sums else x + norm(output)


def dense_block(config: ModelConfig, part: Part, layer: int) -> Block:
    """A block of the prelude or the coda."""
    return Block(config, dense_ffn(config.dense_ffn, config.dim, config.ffn_dim), part, layer)


class _Bounded(torch.autograd.Function):
    """x clamped to low..high, with the gradient of a parameter that may lie outside.

    Outside the bounds the gradient of `clamp` is zero, so a parameter that one bad step has taken there would never
    move again. Here it passes where a descent along it leads back inside, and is zero where it would lead further out.
    """

    @staticmethod
    def forward(ctx, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        outward = ((x > high) & (gradient < 0)) | ((x < low) & (gradient > 0))
        return gradient.masked_fill(outward, 0.0), None, None


class LTIInjection(nn.Module):
    """u = A * h + Delta * (e B^T), linear, time-invariant and stable by construction (arXiv 2604.12946).

    Delta = softplus(dt) and A = exp(-Delta * exp(log_a)), per dimension. dt and log_a are bounded where they are used,
    so every entry of A lies strictly between 0 and 1 in float32 whatever an optimizer does to them; a value outside
    counts as the bound and can still be trained back inside. All in float32.
    """

    float32 = ("dt", "log_a")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.dt = nn.Parameter(torch.empty(dim))
        self.log_a = nn.Parameter(torch.empty(dim))
        self.weight = nn.Parameter(torch.empty(dim, dim))
        self.initializers = {"dt": constant(log(expm1(-log(START_DECAY)))), "log_a": zeros, "weight": identity()}

    def rates(self) -> tuple[Tensor, Tensor]:
        """Diagonal of A and step size Delta, (D,) float32 each."""
        # dt is bounded once for both: whether its gradient leads outside is decided on the sum of what they contribute.
        delta = F.softplus(_Bounded.apply(self.dt, *DT_BOUNDS))
        return torch.exp(-delta * _Bounded.apply(self.log_a, *LOG_A_BOUNDS).exp()), delta

    def delta(self) -> Tensor:
        """Step size Delta, (D,) float32."""
        return self.rates()[1]

    def decay(self) -> Tensor:
        """Diagonal of A, (D,) float32; its largest entry is rho(A)."""
        return self.rates()[0]

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """What all loops share: A (D,) and Delta * (e B^T) (B, S, D), float32."""
        with without_autocast(e):
            decay, delta = self.rates()
            return decay, delta * float32_linear(e, self.weight)

    def combine(self, state: Tensor, decay: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """The core's input u, (n, S, D) float32."""
        return torch.addcmul(injected, decay, state)


class LinearInjection(nn.Module):
    """u = W_h h + W_e e, unconstrained: the adapter of Huginn (arXiv 2502.05171), started where LTI starts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.state = Linear(config.dim, config.dim, identity(START_DECAY))
        self.input = Linear(config.dim, config.dim, identity(-log(START_DECAY)))

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """What all loops share: W_e e (B, S, D)."""
        return e.new_ones(()), self.input(e).float()

    def combine(self, state: Tensor, unused: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """The core's input u, (n, S, D) float32."""
        return injected + self.state(state)


class AddInjection(nn.Module):
    """u = h + e (the simplest looped transformer)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """What all loops share: nothing learned, and e itself."""
        return e.new_ones(()), e

    def combine(self, state: Tensor, unused: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """The core's input u, (n, S, D) float32."""
        return injected + state


class InitialInjection(nn.Module):
    """u = e in the first pass and RMSNorm(h) in the others: the input is where the state starts (arXiv 2510.25741)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps, cast=False)

    def forward(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """What all loops share: nothing learned, and e itself."""
        return e.new_ones(()), e

    def combine(self, state: Tensor, unused: Tensor, injected: Tensor, loop: Tensor) -> Tensor:
        """The core's input u, (n, S, D) float32."""
        return torch.where((loop == 0).view(-1, 1, 1), injected, self.norm(state))


class LoopAdapter(nn.Module):
    """Low-rank branch of the core, up(scale[t] * down(norm(u))), with one scale vector per trained loop.

    After Relaxed Recursive Transformers (arXiv 2410.20672). The up-projection starts at zero. Loops beyond the trained
    ones reuse the last scale.
    """

    float32 = ("scale",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.down = Linear(config.dim, config.lora_rank)
        self.up = Linear(config.lora_rank, config.dim, zeros)
        self.scale = nn.Parameter(torch.empty(config.loops, config.lora_rank))
        self.initializers = {"scale": ones}

    def forward(self, x: Tensor, loop: Tensor) -> Tensor:
        """(n, S, D) and each row's loop index, (n,) or for all (1,) int64 -> (n, S, D)."""
        slot = loop.clamp(max=self.scale.shape[0] - 1).unsqueeze(1)
        if torch.is_grad_enabled():
            # Looked up as a sum over all slots, of which one is not masked: the gradient touches every slot in one
            # deterministic operation, and the value is exact, where a product would be in the autocast type.
            slots = torch.arange(self.scale.shape[0], device=loop.device)
            scale = torch.where((slot == slots).unsqueeze(-1), self.scale, 0.0).sum(1, keepdim=True)
        else:
            scale = F.embedding(slot, self.scale)
        return self.up(self.down(self.norm(x)) * scale)


class LoopEmbedding(nn.Module):
    """Sinusoids of the loop index, scaled by a learned gain that starts at zero; defined at any depth."""

    float32 = ("gain",)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(dim))
        self.initializers = {"gain": zeros}

    def forward(self, loop: Tensor) -> Tensor:
        """Loop index of each row (n,) -> (n, 1, D) float32."""
        half = self.gain.shape[0] // 2
        frequency = torch.exp(torch.arange(half, device=loop.device) * (-log(10_000.0) / half))
        angle = loop.unsqueeze(-1) * frequency
        return (self.gain * torch.cat((angle.sin(), angle.cos()), dim=-1)).unsqueeze(1)


INJECTIONS = {"lti": LTIInjection, "linear": LinearInjection, "add": AddInjection, "initial": InitialInjection}


class LoopState(NamedTuple):  # a tuple, because FSDP looks for the tensors in what a module returns
    """The recurrence after one of its passes, all rows that are active then."""

    loop: int
    """Passes done, counted for the deepest row."""
    state: Tensor
    """(n, S, D) float32."""
    previous: Tensor
    """The state this pass started from, (n, S, D)."""
    slots: Tensor
    """Loop index of each row in this pass, (n,) int64."""
    experts: list[Tensor]
    """Chosen experts of each routed core block, (n, S, k) int64."""


class Recurrence(nn.Module):
    """h_{t+1} = u_t + Transformer(u_t; t), u_t = A * h_t + Delta * (e B^T), for every row its own number of loops."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.injection = INJECTIONS[config.injection](config) if config.injection != "none" else None
        self.blocks = nn.ModuleList(
            Block(config, build_core_ffn(config), "core", layer) for layer in range(config.core_layers)
        )
        self.adapter = LoopAdapter(config) if config.lora_rank else None
        self.embedding = LoopEmbedding(config.dim) if config.loop_embedding else None
        self.checkpointing: Literal["none", "selective", "loop"] = "none"
        # Not where FSDP gathers every block for itself: it frees their weights after each loop.
        self.share_weights = True
        self.compiled_step: Callable[..., tuple[Tensor, list[Tensor]]] | None = None
        once = getattr(self.injection, "input", None)
        self.looped = [module for module in self.modules() if isinstance(module, Linear) and module is not once]
        """The linear maps that every loop uses."""

    def compile(self, **options: Any) -> None:
        """Let a pass in training or validation run as one graph of torch.compile: injection, adapter and blocks."""
        self.compiled_step = torch.compile(self.step, fullgraph=True, **options)

    def expert_weights(self, dtype: torch.dtype) -> list[ExpertWeights | None]:
        """What the loops of a step share of each block's routed experts."""
        return [
            block.ffn.weights(dtype) if isinstance(block.ffn, MixtureOfExperts) and self.share_weights else None
            for block in self.blocks
        ]

    def linear_weights(self, dtype: torch.dtype) -> list[SharedWeight]:
        """What they share of the weights of `looped`; empty where these are used as they are."""
        if dtype == torch.float32 or not self.share_weights:
            return []
        return [SharedWeight(linear.weight, dtype) for linear in self.looped]

    def forward(
        self,
        e: Tensor,
        state: Tensor,
        loops: Sequence[int],
        backprop: int,
        context: AttentionContext,
        observe: Callable[[LoopState], None],
    ) -> LoopState:
        """Run row r for loops[r] passes, calling `observe` after every pass; all rows end with the last one.

        e and state are (B, S, D); `loops` (host integers, deepest first) sets how many rows each pass computes: row r
        joins the active prefix when loops[r] passes remain, so exactly sum(loops) row-passes are run. Only the last
        `backprop` passes carry gradient (truncated backpropagation, arXiv 2502.05171). Returns the last pass's state.
        """
        deepest, gradient = loops[0], torch.is_grad_enabled()
        shallow_first = sorted(loops)
        row_loops = torch.tensor(loops, pin_memory=e.is_cuda).to(e.device, non_blocking=True)
        dtype = autocast_dtype(e)
        weights, linear_weights = self.expert_weights(dtype), self.linear_weights(dtype)
        shared, injected = self.injection(e) if self.injection is not None else (e, e)
        current = state[:0]
        # A pass draws random numbers only where an adapter has put a dropout in. Else no generator's state need be
        # saved for a checkpoint's second run; on a GPU that is a copy to the host, for which the host waits.
        random = self.checkpointing == "loop" and any(isinstance(module, nn.Dropout) for module in self.modules())
        for remaining in range(deepest, 0, -1):
            active = len(loops) - bisect_right(shallow_first, remaining - 1)
            if active > len(current):
                current = torch.cat((current, state[len(current) : active]))
                visible = context.first_rows(active)
            slots = row_loops[:active] - remaining
            # A slice of all rows would cost a copy of the whole gradient.
            joined = injected if active == len(loops) else injected[:active]
            inputs = (current, shared, joined, slots, visible, weights)
            with torch.set_grad_enabled(gradient and remaining <= backprop):
                in_pass = [weight.in_pass() for weight in linear_weights]
                if self.checkpointing == "loop" and torch.is_grad_enabled():
                    after, experts = checkpoint(
                        self.run, in_pass, *inputs, use_reentrant=False, preserve_rng_state=random
                    )
                elif self.checkpointing == "selective" and torch.is_grad_enabled() and not self.compiled_step:
                    with Selective(e.device):
                        after, experts = self.run(in_pass, *inputs)
                else:
                    after, experts = self.run(in_pass, *inputs)
            last = LoopState(deepest - remaining + 1, after, current, slots, experts)
            observe(last)
            current = after
        return last

    def extend(
        self,
        e: Tensor,
        context: CachedContext,
        loops: int | Sequence[int],
        halting: HaltingRule | None,
        minimum: int,
    ) -> tuple[Tensor, Tensor]:
        """Run packed positions, each until `halting` stops it or for its number of loops; their entries are kept.

        e is (N, 1, D); `loops` is a host integer, for all or for each of the N. A position that has stopped leaves the
        batch: later passes compute nothing for it, and the others see its last keys and values. Returns h_T (N, 1, D)
        float32, and the passes done by each position, (N,) int64.
        """
        weights = self.expert_weights(autocast_dtype(e))
        shared, injected = self.injection(e) if self.injection is not None else (e, e)
        state = torch.zeros_like(e, dtype=torch.float32)
        if halting is None and isinstance(loops, int):
            slots = torch.arange(loops, device=e.device)
            for loop in range(loops):
                slot = slots[loop : loop + 1]
                state, _ = self.step(state, shared, injected, slot, context.at_loop(loop), weights)
            context.cache.freeze(context.rows, context.positions, loops - 1)
            return state, torch.full_like(context.rows, loops)

        loops = [loops] * len(e) if isinstance(loops, int) else loops
        ends, deepest = set(loops), max(loops)
        slots, limits = torch.arange(deepest, device=e.device), torch.tensor(loops, device=e.device)
        final, taken = torch.empty_like(state), torch.empty_like(limits)
        running, memory = torch.arange(len(e), device=e.device), None
        for done in range(1, deepest + 1):
            after, _ = self.step(state, shared, injected, slots[done - 1 : done], context.at_loop(done - 1), weights)
            stop = limits[running] <= done if done in ends else None
            if halting is not None:
                wish, memory = halting(done, state[:, 0], after[:, 0], memory)
                if done >= minimum:
                    stop = wish if stop is None else stop | wish
            state = after
            if stop is None:
                continue  # nothing can stop here, and nobody has to wait for the device to know
            stopped = stop.nonzero().squeeze(1)
            if len(stopped) == 0:
                continue
            result = state if halting is None else halting.result(state[:, 0], memory).unsqueeze(1)
            final[running[stopped]] = result[stopped]
            taken[running[stopped]] = done
            context.cache.freeze(context.rows[stopped], context.positions[stopped], done - 1)
            if len(stopped) == len(running):
                break
            going = (~stop).nonzero().squeeze(1)
            running, state, injected, context = running[going], state[going], injected[going], context.keep(going)
            memory = None if memory is None else memory[going]
        return final, taken

    def run(self, in_pass: Sequence[Tensor], *inputs: Any) -> tuple[Tensor, list[Tensor]]:
        """`step` with the linear maps' weights of this pass, compiled if the core is."""
        for linear, weight in zip(self.looped, in_pass, strict=bool(in_pass)):
            linear.in_pass = weight
        try:
            if self.compiled_step is None:
                return self.step(*inputs)
            with Selective.graph(self.checkpointing == "selective"):
                return self.compiled_step(*inputs)
        finally:  # nothing else may meet them: not what is called next, and not a checkpoint's second run
            for linear in self.looped:
                linear.in_pass = None

    def step(
        self,
        state: Tensor,
        shared: Tensor,
        injected: Tensor,
        loop: Tensor,
        context: AttentionContext | CachedContext,
        weights: Sequence[ExpertWeights | None],
    ) -> tuple[Tensor, list[Tensor]]:
        """One pass of the core over (n, S, D) rows standing at loop indices `loop` (n,)."""
        u = injected
        if self.injection is not None:
            u = recomputable(self.injection.combine, state, shared, injected, loop)
        x = u if self.embedding is None else u + self.embedding(loop)
        adapted = self.adapter(x, loop) if self.adapter is not None else None
        routed = []
        for index, (block, shared_weights) in enumerate(zip(self.blocks, weights, strict=True)):
            x, experts = block(x, context.layer("core", index), shared_weights)
            if experts is not None:
                routed.append(experts)
        return (x if adapted is None else x + adapted), routed


def initial_state(
    config: ModelConfig, rows: Sequence[int], length: int, *, seed: int, step: int, device: torch.device
) -> Tensor:
    """h_0 of training: (len(rows), length, D) float32, a function of (seed, step, global row) for each row.

    Truncated-normal noise of std sqrt(2 / (5 D)), or zeros with `state_init: zero`. The values of a row do not depend
    on the micro-batch or rank it is in; they do depend on the device type, whose generator draws them.
    """
    state = torch.zeros(len(rows), length, config.dim, device=device)
    if config.state_init == "normal" and config.injection != "none":
        std = sqrt(2 / (5 * config.dim))
        within = erf(3 / sqrt(2))  # the share of a normal distribution within three standard deviations
        generator = torch.Generator(device)
        for row, row_state in zip(rows, state, strict=True):
            digest = blake2b(f"{seed}/{step}/{row}".encode(), digest_size=8).digest()
            generator.manual_seed(int.from_bytes(digest) >> 1)
            # By the inverse distribution: nn.init.trunc_normal_ draws until all values fit, and waits to see whether.
            row_state.uniform_(-within, within, generator=generator).erfinv_().mul_(sqrt(2) * std)
    return state
