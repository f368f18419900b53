"""The recurrent-depth transformer: embed, prelude, loop, coda, head."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache as cached
from math import sqrt
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mythos.model import IGNORE_INDEX
from mythos.model.attention import AttentionContext, ValueEmbeddings, attention_context
from mythos.model.cache import CachedContext, DecodeCache
from mythos.model.config import ModelConfig, padded_vocab_size
from mythos.model.halting import (
    GATE_POSITIONS,
    THRESHOLDS,
    Act,
    ActHalting,
    HaltingGate,
    HaltingRule,
    Pondering,
    build_halting,
)
from mythos.model.layers import Initializer, Linear, RMSNorm, applied_weight, identity, initialize, truncated_normal
from mythos.model.loss import cross_entropies, summed_cross_entropy
from mythos.model.moe import MixtureOfExperts
from mythos.model.recurrence import LoopState, LTIInjection, Recurrence, dense_block
from mythos.torch_internals import mark_static


class TokenEmbedding(nn.Module):
    """Rows of a (V, D) table, scaled by sqrt(D) so that their entries have the size of a block's output."""

    def __init__(self, vocab_size: int, dim: int, scaled: bool = True) -> None:
        super().__init__()
        self.scale = sqrt(dim) if scaled else 1.0
        self.weight = nn.Parameter(torch.empty(vocab_size, dim))
        self.initializers: dict[str, Initializer] = {"weight": truncated_normal(dim)}

    def forward(self, ids: Tensor) -> Tensor:
        """(B, S) int64 -> (B, S, D) float32."""
        # The residual stream is float32 also where FSDP gathers the table in bfloat16.
        return F.embedding(ids, self.weight).float() * self.scale


class RDTOutput(NamedTuple):  # a tuple, because FSDP and DDP look for the tensors in what a module returns
    """What a forward pass returns; measurements carry no gradient and stay on the device."""

    logits: Tensor | None
    """(B, S, V) float32 when no targets were given."""
    loss: Tensor | None
    """Sum of the cross-entropy over all targets, nats, float32 scalar."""
    state_norm: Tensor
    """Mean of log ||h_T|| over positions."""
    state_delta: Tensor
    """Mean of ||h_T - h_{T-1}|| / ||h_T|| over positions."""
    expert_load: Tensor | None
    """(core layers, trained loops, experts) int64: tokens sent to each expert at each loop index; the last index also
    counts the loops beyond the trained ones. None for a dense core."""
    halting_loss: Tensor | None
    """What halting adds to the loss, float32 scalar: the regression of the gate, which gives the trunk no gradient, or
    the weighted ponder cost of act. None for other rules, or without targets."""

    @property
    def objective(self) -> Tensor:
        """What training minimises, summed over the targets."""
        assert self.loss is not None
        return self.loss if self.halting_loss is None else self.loss + self.halting_loss


class DepthReadout(NamedTuple):
    """The model read out after a number of loops, all rows alike."""

    loops: int
    losses: Tensor
    """(B, S) float32 nats; 0 where the target is ignored."""
    right: Tensor | None
    """(B, S) bool: the likeliest token is the target; False where that is ignored. None unless asked for."""
    state_delta: Tensor
    """Mean of ||h_t - h_{t-1}|| / ||h_t|| over positions."""
    depth_overlap: Tensor | None
    """Share of the experts chosen in this pass that the pass before chose too, mean over positions and layers.

    None for a dense core or the first pass."""


class Extension(NamedTuple):
    """What decoding returns for the positions it was given."""

    logits: Tensor
    """float32, (B, V) at the last position given of each row (zeros where none was), or (B, S, V), zeros at padding."""
    loops: Tensor
    """(B, S) int64 loops that each position ran; 0 at padding."""


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
        self.halting = build_halting(config.halting, dim, config.loops)

    @property
    def head_weight(self) -> Tensor:
        """(V, D) matrix from hidden states to logits: the embedding's where they are tied."""
        return self.embedding.weight if self.head is None else applied_weight(self.head)

    def initialize(self, seed: int) -> "RecurrentDepthTransformer":
        """Give every parameter its starting value, a function of (seed, parameter name); returns self."""
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

        ids (B, S) int64; targets (B, S) int64, -100 where there is none; `loops` one number for all rows or one per
        row, deepest first (default config.loops); `backprop` how many last loops carry gradient (default all); `state`
        h_0 (B, S, D) float32 (default zeros); document_ids (B, S) int, a document being a run of equal ids, keeps
        attention within documents and counts positions from the start of each.

        To train a gate, rows `early_rows`, which lie side by side and are equally deep, are also read out `early_by`
        passes before their last, without gradient.

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
        """The gate's regression on what `rows` would lose by stopping at `early`, against their full depth; scalar.

        `hidden` is what the full depth was decoded to, (B, S, D).
        """
        if early is None:  # DDP and FSDP expect a gradient of every parameter in every step
            return torch.stack([parameter.sum() for parameter in gate.parameters()]).sum() * 0.0
        chosen = slice(rows[0], rows[-1] + 1)
        # Some positions only, for whole distributions over the vocabulary take much memory: evenly spaced, but first
        # those with a target, which a task may have few of.
        place = torch.arange(targets.shape[1], device=targets.device)
        every = -(-len(place) // GATE_POSITIONS)
        asked = (targets[chosen] != IGNORE_INDEX).any(0)
        wanted = 2 * asked + (place % every == 0)
        spaced = wanted.topk(-(-len(place) // every)).indices.sort().values
        with torch.no_grad():
            context = self.context(ids[chosen], None if document_ids is None else document_ids[chosen])
            shallow, deep = (
                F.linear(decoded[:, spaced], self.head_weight).float().log_softmax(-1)
                for decoded in (self.decode(early.state[chosen], context), hidden[chosen])
            )
            divergence = (deep.exp() * (deep - shallow)).sum(-1)
            counted = (targets[chosen, spaced] != IGNORE_INDEX).float()
        before, after = (state[chosen, spaced].detach().flatten(0, 1) for state in (early.previous, early.state))
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
        """Losses after each of `depths` loops, from one run of the deepest: a shallower run is a prefix of it.

        Shapes as in `forward`; the state starts at zero; `depths` ascend. `observe` is called after every pass, read
        out or not. `judged` also asks for `DepthReadout.right`, which takes the head's product once more.

        Raises ValueError for a depth below 1, above 1 for a fixed-depth model, or depths that do not ascend.
        """
        depths = list(depths)
        if not depths or sorted(set(depths)) != depths:
            raise ValueError(f"depths {depths}: give at least one, each once, shallowest first")
        deepest = self.check_loops(depths[::-1], len(depths))[0]
        context = self.context(ids, document_ids)
        e = self.encode(ids, context)
        state = e.new_zeros(e.shape, dtype=torch.float32)
        readouts: list[DepthReadout] = []
        before: list[Tensor] = []
        pondering = Pondering(self.halting) if isinstance(self.halting, ActHalting) else None

        def read_out(after: LoopState) -> None:
            nonlocal before
            if observe is not None:
                observe(after)
            if pondering is not None:
                pondering.observe(after)
            if after.loop in depths:
                result = after.state if pondering is None else pondering.result(after.state)
                hidden = self.decode(result, context)
                losses = cross_entropies(hidden, self.head_weight, targets)
                right = F.linear(hidden, self.head_weight).argmax(-1) == targets if judged else None
                overlap = chosen_overlap(before, after.experts) if before else None
                readouts.append(DepthReadout(after.loop, losses, right, state_measures(after)[1], overlap))
            before = after.experts

        self.recurrence(e, state, [deepest] * len(ids), 0, context, read_out)
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
        minimum: int = 1,
        logits: Literal["last", "all"] = "last",
        compiled: bool = False,
    ) -> Extension:
        """Continue the rows of a cache by ids (B, S) int64, each position with its own number of loops.

        `mask` (B, S) bool is True at tokens and False at padding, on either side; a row without tokens costs nothing.
        `loops` is the most passes, of all rows or one per row (default config.loops); `halting` may stop a position
        after `minimum` passes or more (a model of act always halts by act). Prompts may come in pieces: any split gives
        the same result, unless the cache keeps fewer loops than are run.

        `compiled` runs calls that continue every row by one token, with as many loops for all and without halting, as
        one graph of torch.compile: for each number of loops one for a single row, and two for any number of rows (of
        equal lengths, or not), whatever the lengths. Other calls run as they would without it.

        Raises ValueError for loops below 1, a mask of another shape or type, tokens outside of the vocabulary, rows
        that become longer than config.context_length, or a cache of other rows or another model; the cache then holds
        what it held before.
        """
        rows, length = ids.shape
        cache.admit(self, rows)
        if mask is not None and (mask.shape != ids.shape or mask.dtype != torch.bool):
            given = f"{mask.dtype} of shape {tuple(mask.shape)} for ids of shape {tuple(ids.shape)}"
            raise ValueError(f"mask: got {given}; allowed: torch.bool of the shape of ids")
        limits = [self.config.loops if loops is None else loops] * rows if not isinstance(loops, Sequence) else loops
        self.check_loops(sorted(limits, reverse=True), rows)
        if halting is None and isinstance(self.halting, ActHalting):
            halting = Act(self.halting, THRESHOLDS["act"])  # the average of the states is all that it was trained for
        if minimum < 1:
            raise ValueError(f"minimum: got {minimum}; allowed: at least 1")

        # Packed: all tokens of row 0, then of row 1, ...
        device = ids.device
        if mask is None:
            counts, packed = [length] * rows, torch.arange(rows * length, device=device)
        else:
            counts, packed = mask.sum(1).tolist(), mask.flatten().nonzero().squeeze(1)
        tokens = ids.flatten()[packed]
        lowest, highest = torch.stack(tokens.aminmax()).tolist() if len(tokens) else (0, 0)
        if lowest < 0 or highest >= self.vocabulary:
            raise ValueError(f"token ids {lowest} to {highest}: the model knows 0 to {self.vocabulary - 1}")
        lengths = [held + count for held, count in zip(cache.lengths, counts, strict=True)]
        if max(lengths) > self.config.context_length:
            raise ValueError(
                f"a row of {max(lengths)} tokens: the model's context is {self.config.context_length} "
                "(model.context_length)"
            )
        width = self.vocabulary
        if not sum(counts):
            shape = (rows, width) if logits == "last" else (rows, length, width)
            return Extension(torch.zeros(shape, device=device), torch.zeros_like(ids))
        each_row = [r for r, count in enumerate(counts) for _ in range(count)]
        each_place = [p for old, new in zip(cache.lengths, lengths, strict=True) for p in range(old, new)]
        each_limit = [limits[r] for r in each_row]
        row, position = torch.tensor(each_row, device=device), torch.tensor(each_place, device=device)
        span, single = max(lengths), max(counts) == 1
        # One place more for compiled calls: a graph in which all places are seen would be another one.
        cache.reserve(span + 1 if compiled else span, max(each_limit))
        context = CachedContext.make(cache, row, position, span, single, single and min(each_place) == span - 1)

        alike = len(set(each_limit)) == 1
        run, stance = RecurrentDepthTransformer.run_packed, "force_eager"
        if compiled and single and alike and len(row) == rows and span > 1 and halting is None:
            run, stance = _compiled_run_packed(device.type), "default"
            # Else torch takes sizes that are equal by chance, as of rows and of a head, for one that changes.
            for tensor, sizes in ((cache.held, (0, 3)), (context.cos, 3), (context.sin, 3)):
                mark_static(tensor, sizes)
        # Calls have other shapes each, and blocks that training compiled would be compiled for all of them.
        with torch.compiler.set_stance(stance):
            hidden, done = run(self, tokens, context, each_limit[0] if alike else each_limit, halting, minimum)
        if logits == "last" and not single:
            ends = torch.tensor([count for count in counts if count], device=device).cumsum(0) - 1
            hidden, row = hidden[ends], row[ends]
        found = F.linear(hidden, self.head_weight).float()
        cache.lengths = lengths
        taken = in_places(done, packed, rows * length).view(rows, length)
        if logits == "last":
            return Extension(in_places(found, row, rows), taken)
        return Extension(in_places(found, packed, rows * length).view(rows, length, width), taken)

    def run_packed(
        self,
        tokens: Tensor,
        context: CachedContext,
        loops: int | Sequence[int],
        halting: HaltingRule | None,
        minimum: int,
    ) -> tuple[Tensor, Tensor]:
        """The part of `extend` between token ids (N,) and the head: hidden states (N, D), and loops run (N,) int64."""
        ids = tokens.unsqueeze(1)
        if self.value_embeddings is not None:
            context = context._replace(values=self.value_embeddings(ids))
        e = self.encode(ids, context)
        state, done = self.recurrence.extend(e, context, loops, halting, minimum)
        return self.decode(state, context).squeeze(1), done

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
        """What the layers of a pass over ids (B, S) share; document_ids as in `forward`."""
        context = attention_context(self.config, ids.shape[1], ids.device, document_ids)
        return context if self.value_embeddings is None else replace(context, values=self.value_embeddings(ids))

    def encode(self, ids: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        """e = RMSNorm(Prelude(Embed(ids))): (B, S) -> (B, S, D)."""
        x = self.embedding(ids)
        for index, block in enumerate(self.prelude):
            x, _ = block(x, context.layer("prelude", index))
        return x if self.prelude_norm is None else self.prelude_norm(x)

    def decode(self, state: Tensor, context: AttentionContext | CachedContext) -> Tensor:
        """RMSNorm(Coda(C h)): (B, S, D) -> (B, S, D)."""
        x = state if self.readout_norm is None else self.readout_norm(state)
        x = x if self.readout is None else self.readout(x).float()
        for index, block in enumerate(self.coda):
            x, _ = block(x, context.layer("coda", index))
        return self.norm(x)

    def empty_load(self, device: torch.device) -> Tensor | None:
        """Zero counts in the layout of `RDTOutput.expert_load`."""
        config = self.config
        if config.core_ffn != "moe":
            return None
        return torch.zeros(config.core_layers, config.loops, config.n_experts, dtype=torch.int64, device=device)

    def rebalance(self, load: Tensor, applied: Tensor | float = 1.0) -> None:
        """Move the router biases once, given the counts of a whole optimizer step (`RDTOutput.expert_load`, summed).

        `applied` is 0 where the step's update was skipped, which leaves the biases as they are.
        """
        for block, counts in zip(self.recurrence.blocks, load, strict=True):
            assert isinstance(block.ffn, MixtureOfExperts)
            block.ffn.router.rebalance(counts.sum(0), self.config.router_bias_rate * applied)

    @torch.no_grad()
    def spectral_radius(self) -> Tensor | None:
        """rho(A), a float32 scalar on the device; None where the injection is not LTI."""
        injection = self.recurrence.injection
        return injection.decay().max() if isinstance(injection, LTIInjection) else None


@cached
def _compiled_run_packed(device: str) -> Callable[..., tuple[Tensor, Tensor]]:
    # One token is some 400 small operations: called from Python they take a CPU a quarter longer than from C++.
    options = {"cpp_wrapper": True} if device == "cpu" else None
    return torch.compile(RecurrentDepthTransformer.run_packed, dynamic=True, options=options)


def in_places(values: Tensor, places: Tensor, count: int) -> Tensor:
    """Values (n, ...) at ascending places (n,) of `count`, and zeros elsewhere: (count, ...)."""
    if len(values) == count:
        return values
    return values.new_zeros(count, *values.shape[1:]).index_copy(0, places, values)


@torch.no_grad()
def add_load(load: Tensor, done: LoopState) -> None:
    """Count the tokens that a pass sent to each expert, at the loop index of their row."""
    _, slots, experts = load.shape
    for counts, chosen in zip(load, done.experts, strict=True):
        cell = done.slots.clamp(max=slots - 1)[:, None, None] * experts + chosen
        counts.view(-1).scatter_add_(0, cell.flatten(), counts.new_ones(()).expand(cell.numel()))


@torch.no_grad()
def state_measures(last: LoopState) -> tuple[Tensor, Tensor]:
    """Mean over positions of log ||h|| and of the relative change of the last pass, two scalars."""
    norm = last.state.norm(dim=-1)
    change = (last.state - last.previous).norm(dim=-1)
    return norm.log().mean(), (change / norm).mean()


def chosen_overlap(before: list[Tensor], after: list[Tensor]) -> Tensor:
    """Share of the experts chosen after that were chosen before, mean over layers, positions and k; scalar."""
    shares = [
        (new.unsqueeze(-1) == old.unsqueeze(-2)).any(-1).float().mean() for old, new in zip(before, after, strict=True)
    ]
    return torch.stack(shares).mean()
