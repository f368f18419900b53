"""The loop: injection, core blocks, depth-wise adapter, and the growing prefix of active rows."""

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from math import log
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos.model.attention.context import AttentionContext
from mythos.model.block import Block
from mythos.model.config import INJECTIONS, ModelConfig, loop_stages
from mythos.model.decoding import CachedContext
from mythos.model.halting import HaltingRule
from mythos.model.injection import Injection
from mythos.model.lanes import StateLanes, write_lanes
from mythos.model.layers import Initializer, Linear, RMSNorm, autocast_dtype, has_dropout, loop_rows, ones, zeros
from mythos.model.moe import MixtureOfExperts, core_class
from mythos.model.ops.expert_exchange import CheckpointedPass, ExpertExchange
from mythos.model.ops.grouped_experts import ExpertWeights
from mythos.model.ops.recompute import Selective, recomputable
from mythos.model.ops.shared_weight import SharedWeight
from mythos.model.state import LoopState


class LoopAdapter(nn.Module):
    """Low-rank branch of the core, up(scale[t] * down(norm(u))), with one scale vector per trained loop.

    After Relaxed Recursive Transformers (arXiv 2410.20672). The up-projection starts at zero. Loops beyond the trained
    ones use the last scale. It gains little: perplexity 14.85 -> 14.81 in an ablation at 136M parameters (arXiv
    2604.21254).
    """

    float32 = ("scale",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.down = Linear(config.dim, config.lora_rank)
        self.up = Linear(config.lora_rank, config.dim, zeros)
        self.scale = nn.Parameter(torch.empty(config.loops, config.lora_rank))
        self.initializers: dict[str, Initializer] = {"scale": ones}

    def forward(self, x: Tensor, loop: Tensor) -> Tensor:
        """(n, S, D), and the loop index of each row, (n,) or for all (1,) int64 -> (n, S, D)."""
        return self.up(self.down(self.norm(x)) * loop_rows(self.scale, loop))


class LoopEmbedding(nn.Module):
    """Sinusoids of the loop index, scaled by a learned gain that starts at zero; defined at any depth."""

    float32 = ("gain",)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.empty(dim))
        self.initializers: dict[str, Initializer] = {"gain": zeros}

    def forward(self, loop: Tensor) -> Tensor:
        """Loop index of each row (n,) -> (n, 1, D) float32."""
        half = self.gain.shape[0] // 2
        frequency = torch.exp(torch.arange(half, device=loop.device) * (-log(10_000.0) / half))
        angle = loop.unsqueeze(-1) * frequency
        return (self.gain * torch.cat((angle.sin(), angle.cos()), dim=-1)).unsqueeze(1)


class Stage(NamedTuple):
    """One loop: core layers whose passes all run before those of the next stage."""

    layers: range
    """Indices of the core layers."""
    linears: list[Linear]
    """The linear maps that every pass of the stage uses."""


class Recurrence(nn.Module):
    """h_{t+1} = u_t + Transformer(u_t; t) with u_t from the injection; every row runs its own number of loops.

    With `loop_over: core` this is one loop, and the transformer is the whole core. With `loop_over: layer` it is one
    loop (stage) for each core layer, after the one of the layer before. All stages run the same numbers of passes from
    the same h_0, and share the injection, adapter and loop embedding. The first stage injects the encoded input e, and
    each later one the last state of the stage before, through an RMSNorm of its own if e has one. So a layer keeps its
    input in view in all its passes, as the whole core does e. With `injection: initial` and `prelude_norm: false` the
    first pass of a layer is on the plain output of the layer before, as in a transformer that repeats each layer.

    With lanes the state is (n, S, K, D), and the injection acts on every lane. A pass reads u_t from the lanes and
    writes its change to them, see `StateLanes`. What is read out is the pass's own sum, u_t + Transformer(u_t; t).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        injection: type[Injection] | None = INJECTIONS[config.injection]
        self.injection = injection(config) if injection is not None else None
        self.lanes = StateLanes(config) if config.lanes > 1 else None
        build_ffn = core_class(config).build
        self.blocks = nn.ModuleList(
            Block(config, build_ffn(config), "core", layer) for layer in range(config.core_layers)
        )
        self.adapter = LoopAdapter(config) if config.lora_rank else None
        self.embedding = LoopEmbedding(config.dim) if config.loop_embedding else None
        self.checkpointing: Literal["none", "selective", "loop"] = "none"
        self.share_weights = True
        """Cast weights once for all loops. False if FSDP gathers each block by itself, and frees it after each loop."""
        self.compiled_step: Callable[..., tuple[Tensor, Tensor, list[Tensor]]] | None = None
        outside = self.injection.maps_outside_loop() if self.injection is not None else []
        self.looped = [module for module in self.modules() if isinstance(module, Linear) and module not in outside]
        """The linear maps that every loop uses."""
        self.stages = [Stage(layers, self.linears_of(layers)) for layers in loop_stages(config)]
        normed = len(self.stages) - 1 if config.prelude_norm else 0
        self.stage_norms = nn.ModuleList(RMSNorm(config.dim, config.norm_eps, cast=False) for _ in range(normed))
        """Of the inputs of all stages but the first."""

    def linears_of(self, layers: range) -> list[Linear]:
        """Those of `looped` that a stage of these core layers uses."""
        others = [block for block in self.blocks if block.layer not in layers]
        unused = {linear for block in others for linear in block.modules()}
        return [linear for linear in self.looped if linear not in unused]

    def exclude(self, linears: Collection[Linear]) -> None:
        """Take linear maps out of `looped`, because their weights are used in another way (divided shared experts)."""
        self.looped = [linear for linear in self.looped if linear not in linears]
        self.stages = [stage._replace(linears=self.linears_of(stage.layers)) for stage in self.stages]

    def stage_input(self, number: int, state: Tensor) -> Tensor:
        """Encoded input of stage `number` (1 and up), of the shape of the last state of the stage before."""
        return self.stage_norms[number - 1](state) if self.stage_norms else state

    @property
    def exchange(self) -> ExpertExchange | None:
        """The exchange of tokens with the ranks that share the experts; None if this rank holds all."""
        return next((block.ffn.exchange for block in self.blocks if isinstance(block.ffn, MixtureOfExperts)), None)

    def compile(self, **options: Any) -> None:
        """Run each pass of training and validation (injection, adapter, blocks) as one graph of torch.compile."""
        self.compiled_step = torch.compile(self.step, fullgraph=True, **options)

    def stage_blocks(self, stage: Stage) -> list[Block]:
        """The core blocks of a stage."""
        return [block for block in self.blocks if isinstance(block, Block) and block.layer in stage.layers]

    def expert_weights(self, dtype: torch.dtype, blocks: Sequence[Block]) -> list[ExpertWeights | None]:
        """Each block's routed experts, cast once for all loops of a step; None for a block without, or unshared."""
        return [
            block.ffn.weights(dtype) if isinstance(block.ffn, MixtureOfExperts) and self.share_weights else None
            for block in blocks
        ]

    def linear_weights(self, dtype: torch.dtype, linears: Sequence[Linear]) -> list[SharedWeight]:
        """The linears' weights, cast once for all loops of a step; empty if they are used uncast or unshared."""
        if dtype == torch.float32 or not self.share_weights:
            return []
        return [SharedWeight(linear.weight, dtype) for linear in linears]

    def forward(
        self,
        e: Tensor,
        state: Tensor,
        loops: Sequence[int],
        backprop: int,
        context: AttentionContext,
        observe: Callable[[LoopState], None],
    ) -> LoopState:
        """Run row r for loops[r] passes; call `observe` after every pass; return the last pass.

        e and state are (B, S, D). `loops` (host integers, deepest first) sets the number of rows of every pass: all
        rows end with the last pass, and row r joins the active prefix when loops[r] passes remain. So exactly
        sum(loops) row-passes are computed. Only the last `backprop` passes carry gradient (truncated backpropagation,
        arXiv 2502.05171). All this holds for each stage; between stages gradient flows in full.
        """
        last = self.run_stage(self.stages[0], e, state, loops, backprop, context, observe)
        for number, stage in enumerate(self.stages[1:], start=1):
            e = self.stage_input(number, last.state)
            last = self.run_stage(stage, e, state, loops, backprop, context, observe)
        return last

    def run_stage(
        self,
        stage: Stage,
        e: Tensor,
        state: Tensor,
        loops: Sequence[int],
        backprop: int,
        context: AttentionContext,
        observe: Callable[[LoopState], None],
    ) -> LoopState:
        """All passes of one stage; arguments and result as in `forward`."""
        deepest, gradient = loops[0], torch.is_grad_enabled()
        shallow_first = sorted(loops)
        row_loops = torch.tensor(loops, pin_memory=e.is_cuda).to(e.device, non_blocking=True)
        dtype = autocast_dtype(e)
        blocks = self.stage_blocks(stage)
        weights, linear_weights = self.expert_weights(dtype, blocks), self.linear_weights(dtype, stage.linears)
        shared, injected = self.injection(e) if self.injection is not None else (e, e)
        # With lanes the state that passes on and the state that is read out differ.
        shown, current = state[:0], self.lanes_from(state[:0])
        random = self.checkpointing == "loop" and has_dropout(self)
        for remaining in range(deepest, 0, -1):
            active = len(loops) - bisect_right(shallow_first, remaining - 1)
            if active > len(current):
                joining = state[len(current) : active]
                current = torch.cat((current, self.lanes_from(joining)))
                shown = current if self.lanes is None else torch.cat((shown, joining))
                visible = context.first_rows(active)
            slots = row_loops[:active] - remaining
            # Slicing all rows would copy the whole gradient in the backward pass.
            joined = injected if active == len(loops) else injected[:active]
            inputs = (current, shared, joined, slots, visible, blocks, weights)
            with torch.set_grad_enabled(gradient and remaining <= backprop):
                in_pass = [weight.in_pass() for weight in linear_weights]
                pass_weights = list(zip(stage.linears, in_pass, strict=bool(in_pass)))
                if self.checkpointing == "loop" and torch.is_grad_enabled():
                    after, output, experts = checkpoint(
                        self.run,
                        pass_weights,
                        *inputs,
                        use_reentrant=False,
                        preserve_rng_state=random,
                        context_fn=CheckpointedPass.contexts,
                    )
                elif self.checkpointing == "selective" and torch.is_grad_enabled() and not self.compiled_step:
                    with Selective(e.device):
                        after, output, experts = self.run(pass_weights, *inputs)
                else:
                    after, output, experts = self.run(pass_weights, *inputs)
            last = LoopState(deepest - remaining + 1, output, shown, slots, experts, stage.layers.start)
            observe(last)
            current, shown = after, output
        return last

    def lanes_from(self, state: Tensor) -> Tensor:
        """The state of the first pass from h_0 (n, S, D): itself, or as many copies as there are lanes."""
        return state if self.lanes is None else state.unsqueeze(-2).repeat_interleave(self.lanes.count, dim=-2)

    def extend(
        self, e: Tensor, context: CachedContext, loops: int | Sequence[int], halting: HaltingRule | None
    ) -> tuple[Tensor, Tensor]:
        """Run packed positions until `halting` stops them or for their number of loops, and write them to the cache.

        e is (N, 1, D); `loops` is one host integer for all positions, or one for each. A position that has stopped
        leaves the batch: later passes compute nothing for it, and other positions see its last keys and values. With
        several stages `halting` stops a position in each of them anew, and its passes are the mean over the stages,
        rounded up. Ranks that share experts must call this together, with the same largest number of loops; a rank
        whose positions have all stopped goes on to compute for the others. Returns h_T (N, 1, D) float32, and the
        passes of each position, (N,) int64.
        """
        state, passes = self.extend_stage(self.stages[0], e, context, loops, halting)
        for number, stage in enumerate(self.stages[1:], start=1):
            e = self.stage_input(number, state)
            state, more = self.extend_stage(stage, e, context, loops, halting)
            passes = passes + more
        stages = len(self.stages)
        return state, passes if stages == 1 else (passes + stages - 1) // stages

    def extend_stage(
        self, stage: Stage, e: Tensor, context: CachedContext, loops: int | Sequence[int], halting: HaltingRule | None
    ) -> tuple[Tensor, Tensor]:
        """Run one stage; arguments and results as in `extend`."""
        blocks = self.stage_blocks(stage)
        weights = self.expert_weights(autocast_dtype(e), blocks)
        shared, injected = self.injection(e) if self.injection is not None else (e, e)
        output = torch.zeros_like(e, dtype=torch.float32)
        state = self.lanes_from(output)
        if halting is None and isinstance(loops, int):
            slots = torch.arange(loops, device=e.device)
            for loop in range(loops):
                slot = slots[loop : loop + 1]
                state, output, _ = self.step(state, shared, injected, slot, context.at_loop(loop), blocks, weights)
            context.cache.freeze(context.rows, context.positions, loops - 1, stage.layers)
            return output, torch.full_like(context.rows, loops)

        loops = [loops] * len(e) if isinstance(loops, int) else loops
        depths, deepest = set(loops), max(loops)
        slots, limits = torch.arange(deepest, device=e.device), torch.tensor(loops, device=e.device)
        final_state, loops_run = torch.empty_like(output), torch.empty_like(limits)
        # Indices of the running positions among the N, and the rule's memory of them.
        running, memory = torch.arange(len(e), device=e.device), None
        exchange = self.exchange
        for done in range(1, deepest + 1):
            if exchange is not None:
                if not exchange.any_rank(len(running) > 0, e.device):
                    break
                if len(running) == 0:
                    self.serve_experts(e, blocks, weights)
                    continue
            before, slot, at_loop = output, slots[done - 1 : done], context.at_loop(done - 1)
            state, output, _ = self.step(state, shared, injected, slot, at_loop, blocks, weights)
            stop = limits[running] <= done if done in depths else None
            if halting is not None:
                rule_stops, memory = halting(done, before[:, 0], output[:, 0], memory)
                stop = rule_stops if stop is None else stop | rule_stops
            if stop is None:
                continue  # no position can stop here: do not wait for the device
            stopped = stop.nonzero().squeeze(1)
            if len(stopped) == 0:
                continue
            result = output if halting is None else halting.result(output[:, 0], memory).unsqueeze(1)
            final_state[running[stopped]] = result[stopped]
            loops_run[running[stopped]] = done
            context.cache.freeze(context.rows[stopped], context.positions[stopped], done - 1, stage.layers)
            if len(stopped) == len(running):
                running = running[:0]
                if exchange is None:
                    break
                continue
            going = (~stop).nonzero().squeeze(1)
            running, context = running[going], context.keep(going)
            state, output, injected = state[going], output[going], injected[going]
            memory = None if memory is None else memory[going]
        return final_state, loops_run

    def serve_experts(self, x: Tensor, blocks: Sequence[nn.Module], weights: Sequence[ExpertWeights | None]) -> None:
        """Take part in the exchanges of one pass without positions of this rank; x as in `Block.serve_experts`."""
        for block, block_weights in zip(blocks, weights, strict=True):
            assert isinstance(block, Block), "the core has no other modules"
            block.serve_experts(x, block_weights)

    def run(self, pass_weights: Sequence[tuple[Linear, Tensor]], *inputs: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
        """`step` with this pass's weights of the linear maps, compiled if the core is."""
        for linear, weight in pass_weights:
            linear.in_pass = weight
        try:
            if self.compiled_step is None:
                return self.step(*inputs)
            with Selective.graph(self.checkpointing == "selective"):
                return self.compiled_step(*inputs)
        finally:  # later calls, and a checkpoint's recomputation, must not use this pass's weights
            for linear in self.looped:
                linear.in_pass = None

    def step(
        self,
        state: Tensor,
        shared: Tensor,
        injected: Tensor,
        loop: Tensor,
        context: AttentionContext | CachedContext,
        blocks: Sequence[Block],
        weights: Sequence[ExpertWeights | None],
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """One pass of a stage: the next state, what is read out, (n, S, D), and each routed block's chosen experts.

        state is (n, S, D), which is also what is read out, or with lanes (n, S, K, D). `loop` is the loop index of each
        row, (n,) or (1,) int64; `shared` and `injected` come from the injection; `weights` are those of the stage's
        `blocks`.
        """
        u = injected
        if self.injection is not None:
            u = recomputable(self.injection.combine, state, shared, injected, loop)
        lanes = u
        if self.lanes is not None:
            u, write = self.lanes(lanes)
        x = u if self.embedding is None else u + self.embedding(loop)
        adapted = self.adapter(x, loop) if self.adapter is not None else None
        routed = []
        for block, block_weights in zip(blocks, weights, strict=True):
            x, experts = block(x, context.layer("core", block.layer), block_weights, loop)
            if experts is not None:
                routed.append(experts)
        output = x if adapted is None else torch.add(x, adapted, alpha=self.config.residual_scale)
        return output if self.lanes is None else write_lanes(lanes, write, output - u), output, routed
