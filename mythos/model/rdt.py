"""The recurrent-depth transformer: embedding, prelude, loop, coda, head."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache as cached
from math import sqrt
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mythos.model import IGNORE_INDEX
from mythos.model.attention.context import AttentionContext, attention_context
from mythos.model.attention.value_embeddings import ValueEmbeddings
from mythos.model.block import dense_block
from mythos.model.cache import DecodeCache
from mythos.model.config import ModelConfig, padded_vocab_size
from mythos.model.decoding import CachedContext, Extension, PackedTokens, pack_tokens, scatter_rows
from mythos.model.halting import (
    GATE_POSITIONS,
    ActHalting,
    HaltingGate,
    HaltingRule,
    Pondering,
    build_halting,
    halting_rule,
)
from mythos.model.injection import LTIInjection
from mythos.model.layers import (
    Initializer,
    Linear,
    RMSNorm,
    applied_weight,
    has_dropout,
    identity,
    initialize,
    truncated_normal,
)
from mythos.model.loss import cross_entropies, summed_cross_entropy
from mythos.model.moe import MixtureOfExperts, core_class
from mythos.model.recurrence import Recurrence
from mythos.model.state import LoopState, add_load, chosen_overlap, state_measures
from mythos.torch_internals import mark_static


class TokenEmbedding(nn.Module):
    """Rows of a (V, D) table; `scaled` multiplies them by sqrt(D), so that entries are as large as a block's output."""

    def __init__(self, vocab_size: int, dim: int, scaled: bool = True) -> None:
        super().__init__()
        self.scale = sqrt(dim) if scaled else 1.0
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.initializers: dict[str, Initializer] = {"weight": truncated_normal(dim)}

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, D) float32."""
        # The residual stream is float32 even if FSDP gathers the table in bfloat16.
        return F.embedding(ids, self.weight).float() * self.scale


class RDTOutput(NamedTuple):  # a tuple, because FSDP and DDP look for tensors in what a module returns
    """The result of a forward pass; measurements carry no gradient and stay on the device."""

    logits: Tensor | None
    """(B, S, V) float32; None with targets."""
    loss: Tensor | None
    """Sum of the cross-entropy over all targets, nats, float32 scalar; None without targets."""
    state_norm: Tensor
    """Mean of log ||h_T|| over positions."""
    state_delta: Tensor
    """Mean of ||h_T - h_{T-1}|| / ||h_T|| over positions."""
    expert_load: Tensor | None
    """(core layers, trained loops, E) int64: tokens sent to each expert at each loop index. The last index includes the
    loops beyond the trained ones. None for a core that does not route."""
    halting_loss: Tensor | None
    """The part of the loss that halting adds, float32 scalar: the gate's regression, which gives the trunk no gradient,
    or the weighted ponder cost of act. None for other rules, or without targets."""

    @property
    def objective(self) -> Tensor:
        """The sum over the targets that training minimises. Needs a forward pass with targets."""
        assert self.loss is not None
        return self.loss if self.halting_loss is None else self.loss + self.halting_loss


class DepthReadout(NamedTuple):
    """The model read out after a number of loops, equal for all rows."""

    loops: int
    losses: Tensor
    """(B, S) float32 nats; 0 where the target is ignored."""
    right: Tensor | None
    """(B, S) bool: the likeliest token is the target; False where the target is ignored. None unless `judged`."""
    state_delta: Tensor
    """Mean of ||h_t - h_{t-1}|| / ||h_t|| over positions."""
    depth_overlap: Tensor | None
    """Share of the experts chosen in this pass that the pass before chose too, mean over positions and layers; None for
    the first pass, or a core that does not route."""


class RecurrentDepthTransformer(nn.Module):
    """logits = Head(RMSNorm(Coda(C h_T))) with h_T from the recurrence over e = RMSNorm(Prelude(Embed(ids)))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not isinstance(config.vocab_size, int):
            raise ValueError("model.vocab_size is 'auto': resolve it to the tokenizer's size before building the model")
        self.config = config
        dim, looped = config.dim, config.injection != "none"
        self.vocabulary = vocab = padded_vocab_size(config.vocab_size)
        self.embedding = TokenEmbedding(vocab, dim, config.scale_embeddings)
        self.value_embeddings = ValueEmbeddings(config, vocab) if config.value_embeddings else None
        self.prelude = nn.ModuleList(dense_block(config, "prelude", layer) for layer in range(config.prelude_layers))
        self.prelude_norm = RMSNorm(dim, config.norm_eps, cast=False) if config.prelude_norm and looped else None
        self.recurrence = Recurrence(config)
        self.readout_norm = RMSNorm(dim, config.norm_eps) if config.readout_norm and looped else None
        self.readout = Linear(dim, dim, identity()) if looped else None
        self.coda = nn.ModuleList(dense_block(config, "coda", layer) for layer in range(config.coda_layers))
        self.norm = RMSNorm(dim, config.norm_eps)
        self.head = None if config.tie_embeddings else Linear(dim, vocab)
        self.halting = build_halting(config)
        self.recompute_layers = False
        """Keep of each layer of prelude and coda only its input, and recompute the rest in the backward pass."""

    @property
    def head_weight(self) -> Tensor:
        """(V, D) matrix from hidden states to logits: the embedding's if they are tied."""
        return self.embedding.weight if self.head is None else applied_weight(self.head)

    def initialize(self, seed: int) -> "RecurrentDepthTransformer":
        """Set every parameter to its initial value, a function of (seed, parameter name); return self."""
        initialize(self, seed)
        return self

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        loops: int | Sequence[int] | None = None,
        backprop: int | None = None,
        state: Tensor | None = None,
        document_ids: Tensor | None = None,
        early_rows: Sequence[int] = (),
        early_by: int = 0,
    ) -> RDTOutput:
        """Run every row for its number of loops.

        Args:
            ids: (B, S) int64.
            targets: (B, S) int64, -100 at positions without loss; None = return logits.
            loops: one number for all rows, or one per row, deepest first; default config.loops.
            backprop: the number of last loops that carry gradient; default all.
            state: h_0, (B, S, D) float32; default zeros.
            document_ids: (B, S) int; a document is a run of equal ids. Attention stays within documents, and positions
                count from the start of each.
            early_rows: rows to read out early, without gradient, to train a gate: adjacent and equally deep.
            early_by: how many passes before their last one to read them out.

        Raises ValueError for loops below 1, rows that are not ordered deepest first, or a number of loops that does not
        match the rows.
        """
        rows = self.check_loops(loops, len(ids))
        load = self.empty_load(ids.device)
        gate = self.halting if isinstance(self.halting, HaltingGate) else None
        early: LoopState | None = None

        def observe(after: LoopState) -> None:
            nonlocal early
            if load is not None:
                add_load(load, after)
            if gate is not None and early_rows and after.loop == rows[0] - early_by:
                early = after

        hidden, last, pondering = self.hidden_states(
            ids, rows, backprop or rows[0], state=state, document_ids=document_ids, observe=observe
        )
        norm, delta = state_measures(last)
        if targets is None:
            return RDTOutput(F.linear(hidden, self.head_weight).float(), None, norm, delta, load, None)
        halting_loss = None
        if gate is not None:
            halting_loss = self.gate_loss(gate, early, early_rows, hidden, ids, targets, document_ids)
        elif pondering is not None:
            halting_loss = self.config.ponder_weight * (pondering.ponder_cost() * (targets != IGNORE_INDEX)).sum()
        return RDTOutput(None, summed_cross_entropy(hidden, self.head_weight, targets), norm, delta, load, halting_loss)

    def hidden_states(
        self,
        ids: Tensor,
        rows: Sequence[int],
        backprop: int,
        *,
        state: Tensor | None = None,
        document_ids: Tensor | None = None,
        observe: Callable[[LoopState], None],
    ) -> tuple[Tensor, LoopState, Pondering | None]:
        """Everything before the head: prelude, loop and coda.

        Arguments as in `forward`, with `rows` the loops of each row, deepest first; `observe` is called after every
        pass. Returns the head's input (B, S, D), the last pass, and the halting probabilities of an act model.
        """
        context = self.context(ids, document_ids)
        e = self.encode(ids, context)
        if state is None:
            state = e.new_zeros(e.shape, dtype=torch.float32)
        pondering = Pondering(self.halting) if isinstance(self.halting, ActHalting) else None

        def observe_pass(after: LoopState) -> None:
            if pondering is not None:
                pondering.observe(after)
            observe(after)

        last = self.recurrence(e, state, rows, backprop, context, observe_pass)
        return self.decode(last.state if pondering is None else pondering.result(last.state), context), last, pondering

    def gate_loss(
        self,
        gate: HaltingGate,
        early: LoopState | None,
        rows: Sequence[int],
        hidden: Tensor,
        ids: Tensor,
        targets: Tensor,
        document_ids: Tensor | None,
    ) -> Tensor:
        """Train the gate on the loss that `rows` would have by stopping at `early` instead of the full depth; scalar.

        `hidden` is the decoded state of the full depth, (B, S, D).
        """
        if early is None:  # DDP and FSDP expect a gradient of every parameter in every step
            return torch.stack([parameter.sum() for parameter in gate.parameters()]).sum() * 0.0
        chosen = slice(rows[0], rows[-1] + 1)
        # At most GATE_POSITIONS positions, because distributions over the whole vocabulary take much memory: positions
        # with a target come first (tasks may have few of them), and among equals evenly spaced ones.
        positions = torch.arange(targets.shape[1], device=targets.device)
        spacing = -(-len(positions) // GATE_POSITIONS)
        has_target = (targets[chosen] != IGNORE_INDEX).any(0)
        by_spacing = (positions % spacing != 0).int().argsort(stable=True)
        by_target = by_spacing[(~has_target[by_spacing]).int().argsort(stable=True)]
        sampled = by_target[: -(-len(positions) // spacing)].sort().values
        with torch.no_grad():
            context = self.context(ids[chosen], None if document_ids is None else document_ids[chosen])
            shallow, deep = (
                F.linear(decoded[:, sampled], self.head_weight).float().log_softmax(-1)
                for decoded in (self.decode(early.state[chosen], context), hidden[chosen])
            )
            divergence = (deep.exp() * (deep - shallow)).sum(-1)
            counted = (targets[chosen, sampled] != IGNORE_INDEX).float()
        before, after = (state[chosen, sampled].detach().flatten(0, 1) for state in (early.previous, early.state))
        return gate.loss(before, after, divergence.flatten(), counted.flatten())

    @torch.no_grad()
    def read_depths(
        self,
        ids: Tensor,
        targets: Tensor,
        depths: Sequence[int],
        document_ids: Tensor | None = None,
        observe: Callable[[LoopState], None] | None = None,
        *,
        judged: bool = False,
    ) -> list[DepthReadout]:
        """Losses after each of `depths` loops, from one run of the deepest, of which shallower runs are prefixes.

        With `loop_over: layer` they are not, so each depth is a run. Shapes as in `forward`; the state starts at zero;
        `depths` ascend. `observe` is called after every pass of the deepest run, read out or not. `judged` also
        computes `DepthReadout.right`, at the cost of one more matmul with the head.

        Raises ValueError for a depth below 1, above 1 for a fixed-depth model, or depths that do not ascend.
        """
        depths = list(depths)
        if not depths or sorted(set(depths)) != depths:
            raise ValueError(f"depths {depths}: give at least one, each once, shallowest first")
        self.check_loops(depths[::-1], len(depths))
        context = self.context(ids, document_ids)
        e = self.encode(ids, context)
        state = e.new_zeros(e.shape, dtype=torch.float32)
        readouts: list[DepthReadout] = []
        before: dict[int, list[Tensor]] = {}
        overlaps: list[Tensor] = []
        stages = self.recurrence.stages
        # A run that repeats layer by layer does not pass through the results of shallower ones: each needs its own.
        runs = [depths] if len(stages) == 1 else [[depth] for depth in depths]
        pondering = Pondering(self.halting) if isinstance(self.halting, ActHalting) else None

        def read_out(after: LoopState) -> None:
            if observe is not None and run is runs[-1]:
                observe(after)
            if pondering is not None:
                pondering.observe(after)
            if after.loop in run and after.loop > 1 and after.experts:
                overlaps.append(chosen_overlap(before[after.layer], after.experts))
            before[after.layer] = after.experts
            if after.loop in run and after.layer == stages[-1].layers.start:
                result = after.state if pondering is None else pondering.result(after.state)
                hidden = self.decode(result, context)
                losses = cross_entropies(hidden, self.head_weight, targets)
                right = F.linear(hidden, self.head_weight).argmax(-1) == targets if judged else None
                overlap = torch.stack(overlaps).mean() if overlaps else None
                overlaps.clear()
                readouts.append(DepthReadout(after.loop, losses, right, state_measures(after)[1], overlap))

        for run in runs:
            self.recurrence(e, state, [run[-1]] * len(ids), 0, context, read_out)
        return readouts

    @torch.no_grad()
    def extend(
        self,
        ids: Tensor,
        cache: DecodeCache,
        *,
        mask: Tensor | None = None,
        loops: int | Sequence[int] | None = None,
        halting: HaltingRule | None = None,
        logits: Literal["last", "all"] = "last",
        compiled: bool = False,
    ) -> Extension:
        """Continue the rows of a cache by ids (B, S) int64, each position with its own number of loops.

        Prompts may come in pieces: every split gives the same result, unless the cache stores fewer loops than are run.

        Args:
            ids: (B, S) int64.
            cache: of these rows; extended in place.
            mask: (B, S) bool, True at tokens, False at padding on either side. A row without tokens costs nothing.
            loops: most passes, one number for all rows or one per row; default config.loops.
            halting: rule that may stop a position earlier; a model of act always halts by act.
            logits: return those of each row's last token, or of all.
            compiled: run calls that continue every row by one token, with equal loops and without halting, as one graph
                of torch.compile: for each number of loops one graph for a single row, and two for more rows (of equal
                lengths, or not), for any lengths. Other calls run uncompiled.

        Raises ValueError for loops below 1, a mask of another shape or type, tokens outside of the vocabulary, rows
        that become longer than config.context_length, or a cache of other rows or another model. The cache is unchanged
        then.
        """
        rows, length = ids.shape
        cache.admit(self, self.config, rows)
        if mask is not None and (mask.shape != ids.shape or mask.dtype != torch.bool):
            got = f"{mask.dtype} of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}"
            raise ValueError(f"mask: got {got}; allowed: torch.bool of the shape of ids")
        limits = [self.config.loops if loops is None else loops] * rows if not isinstance(loops, Sequence) else loops
        self.check_loops(sorted(limits, reverse=True), rows)
        if halting is None and isinstance(self.halting, ActHalting):
            halting = halting_rule(self)  # the model is trained to read out act's average of the states only

        tokens = pack_tokens(ids, mask, cache.lengths, limits)
        self.check_tokens(tokens)
        if not len(tokens.ids):
            shape = (rows, self.vocabulary) if logits == "last" else (rows, length, self.vocabulary)
            return Extension(torch.zeros(shape, device=ids.device), torch.zeros_like(ids))
        hidden, loops_run = self.run_tokens(tokens, cache, halting, compiled)
        places, places_count = tokens.places, rows * length
        if logits == "last":
            places, places_count = tokens.rows, rows
            if not tokens.single:
                ends = torch.tensor([count for count in tokens.counts if count], device=ids.device).cumsum(0) - 1
                hidden, places = hidden[ends], places[ends]
        packed_logits = F.linear(hidden, self.head_weight).float()
        cache.lengths = tokens.lengths
        spread_logits = scatter_rows(packed_logits, places, places_count)
        spread_loops = scatter_rows(loops_run, tokens.places, rows * length).view(rows, length)
        return Extension(spread_logits if logits == "last" else spread_logits.view(rows, length, -1), spread_loops)

    def check_tokens(self, tokens: PackedTokens) -> None:
        """Raise ValueError for ids outside of the vocabulary, or rows that become too long."""
        lowest, highest = torch.stack(tokens.ids.aminmax()).tolist() if len(tokens.ids) else (0, 0)
        if lowest < 0 or highest >= self.vocabulary:
            raise ValueError(f"token ids {lowest} to {highest}: the model knows 0 to {self.vocabulary - 1}")
        if max(tokens.lengths) > self.config.context_length:
            raise ValueError(
                f"a row of {max(tokens.lengths)} tokens: the model's context is {self.config.context_length} "
                "(model.context_length)"
            )

    def run_tokens(
        self, tokens: PackedTokens, cache: DecodeCache, halting: HaltingRule | None, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        """Hidden states (N, D) of packed tokens, and the loops that each ran, (N,) int64; arguments as in `extend`."""
        span = max(tokens.lengths)
        # Reserve one position more for compiled calls: if the mask covers the whole cache, Inductor compiles a second
        # graph.
        cache.reserve(span + 1 if compiled else span, max(tokens.limits))
        context = CachedContext.make(cache, tokens.rows, tokens.positions, span, tokens.single, tokens.level)
        equal_limits = len(set(tokens.limits)) == 1
        run, stance = RecurrentDepthTransformer.run_packed, "force_eager"
        every_row_by_one = tokens.single and len(tokens.rows) == len(tokens.counts)
        if compiled and every_row_by_one and equal_limits and span > 1 and halting is None:
            run, stance = _compiled_run_packed(tokens.ids.device.type), "default"
            # Mark these dimensions static. Otherwise Dynamo unifies sizes that happen to be equal (number of rows and
            # head width, say) into one symbol and recompiles when one changes.
            for tensor, dimensions in ((cache.entries, (0, 3)), (context.cos, 3), (context.sin, 3)):
                mark_static(tensor, dimensions)
        # Without this stance blocks that training compiled would be compiled anew for the shapes of every call.
        with torch.compiler.set_stance(stance):
            limits = tokens.limits[0] if equal_limits else tokens.limits
            return run(self, tokens.ids, context, limits, halting)

    def run_packed(
        self, tokens: Tensor, context: CachedContext, loops: int | Sequence[int], halting: HaltingRule | None
    ) -> tuple[Tensor, Tensor]:
        """From token ids (N,) to hidden states (N, D) and the loops run, (N,) int64; one graph when compiled."""
        ids = tokens.unsqueeze(1)
        if self.value_embeddings is not None:
            context = context._replace(values=self.value_embeddings(ids))
        e = self.encode(ids, context)
        state, loops_run = self.recurrence.extend(e, context, loops, halting)
        return self.decode(state, context).squeeze(1), loops_run

    def check_loops(self, loops: int | Sequence[int] | None, rows: int) -> list[int]:
        """`loops` as one host integer per row, deepest first."""
        if loops is None or isinstance(loops, int):
            loops = [self.config.loops if loops is None else loops] * rows
        loops = list(loops)
        if len(loops) != rows:
            raise ValueError(f"{len(loops)} loop counts for {rows} rows: give one number, or one per row")
        if min(loops) < 1:
            raise ValueError(f"loops: got {min(loops)}; every row needs at least 1")
        if sorted(loops, reverse=True) != loops:
            raise ValueError(f"loops {loops}: rows must be ordered deepest first")
        if self.config.injection == "none" and loops[0] != 1:
            raise ValueError(f"loops {loops[0]}: a fixed-depth model (injection: none) runs its core once")
        return loops

    def context(self, ids: Tensor, document_ids: Tensor | None = None) -> AttentionContext:
        """Tables, mask and value embeddings that all layers share, for ids (B, S); document_ids as in `forward`."""
        context = attention_context(self.config, ids.shape[1], ids.device, document_ids)
        return context if self.value_embeddings is None else replace(context, values=self.value_embeddings(ids))

    def encode(self, ids: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        """e = RMSNorm(Prelude(Embed(ids))): (B, S) -> (B, S, D)."""
        x = self.embedding(ids)
        for index, block in enumerate(self.prelude):
            x = self.run_layer(block, x, context.layer("prelude", index))
        return x if self.prelude_norm is None else self.prelude_norm(x)

    def decode(self, state: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        """RMSNorm(Coda(C h)): (B, S, D) -> (B, S, D)."""
        x = state if self.readout_norm is None else self.readout_norm(state)
        x = x if self.readout is None else self.readout(x).float()
        for index, block in enumerate(self.coda):
            x = self.run_layer(block, x, context.layer("coda", index))
        return self.norm(x)

    def run_layer(self, block: nn.Module, x: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        """A layer of prelude or coda, (B, S, D) -> (B, S, D)."""
        if not (self.recompute_layers and torch.is_grad_enabled()):
            x, _ = block(x, context)
            return x
        x, _ = checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=has_dropout(block))
        return x

    def empty_load(self, device: torch.device) -> Tensor | None:
        """Zeros in the shape of `RDTOutput.expert_load`; None for a core that does not route."""
        config = self.config
        if not core_class(config).routes:
            return None
        return torch.zeros(config.core_layers, config.loops, config.n_experts, dtype=torch.int64, device=device)

    def rebalance(self, load: Tensor, applied: Tensor | float = 1.0) -> None:
        """Move the router biases once, by the load of a whole optimizer step (`RDTOutput.expert_load`, summed).

        `applied` is 0 if the optimizer step was skipped, which leaves the biases unchanged.
        """
        for block, counts in zip(self.recurrence.blocks, load, strict=True):
            assert isinstance(block.ffn, MixtureOfExperts)
            counts = counts if self.config.router_bias_per_loop else counts.sum(0)
            block.ffn.router.rebalance(counts, self.config.router_bias_rate * applied)

    @torch.no_grad()
    def spectral_radius(self) -> Tensor | None:
        """rho(A), a float32 scalar on the device; None unless the injection is LTI."""
        injection = self.recurrence.injection
        return injection.decay().max() if isinstance(injection, LTIInjection) else None


@cached
def _compiled_run_packed(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    options: dict[str, str | int | bool | Callable[..., object]] | None = None
    if device == "cpu":
        # One token is about 400 small operations; calling them from Python instead of C++ takes a quarter longer.
        options = {"cpp_wrapper": True}
    return torch.compile(RecurrentDepthTransformer.run_packed, dynamic=True, options=options)
