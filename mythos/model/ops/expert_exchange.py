"""Expert parallelism: ranks hold some experts each, and send every token to the ranks that hold its experts."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos.model.layers import without_autocast
from mythos.model.ops.grouped_experts import ExpertWeights, expert_ends, start_experts, sum_slots
from mythos.model.ops.transfer import Passage, Transfer


class Splits(NamedTuple):
    """Sizes of an exchange between R ranks, each of which holds E / R experts."""

    leaving: list[int]
    """Rows that this rank sends to each rank."""
    coming: list[int]
    """Rows that it receives from each rank."""
    slots: int
    """Choices of its experts in all rows that it receives."""
    most: int
    """Choices in one of these rows, at most."""
    tokens: list[int]
    """Tokens of each of the T ranks that divide the shared experts; empty if they are not divided."""


class ExpertExchange:
    """Runs the experts of a block that R ranks share: rank r holds experts r E / R to (r + 1) E / R - 1.

    A token travels once to each rank that holds any of its experts, as a row with its gates and experts, and one row
    comes back: the sum over these experts, in the type of the matmuls. No token is dropped, whatever the routing. Every
    rank takes part in every exchange, also with no token at all, so all ranks must call it equally often, in the
    forward and in the backward pass.

    A call makes three all-to-alls: the number of rows for each rank, rows, and results. The backward pass makes two.
    The first one brings the ranks' numbers of tokens too, which divided shared experts need. The host waits for these
    numbers, because they are the sizes of the others. It waits at once: the rows, which take far longer, then travel
    while the shared experts run.

    Args:
        group: the R ranks.
        ranks: R.
        sharers: T, the number of adjacent ones among them that divide the shared experts; 1 = undivided.
    """

    def __init__(self, group: dist.ProcessGroup | None, ranks: int, sharers: int = 1) -> None:
        self.group, self.ranks, self.sharers = group, ranks, sharers

    def start(self, experts: Tensor, held: int) -> "Dispatch":
        """Find the rows that leave for the chosen experts (N, k) int64, and exchange their numbers; `held` is E / R."""
        experts, choices = experts.sort(dim=1)  # neighbours then lie on one rank
        targets = experts // held
        first = torch.ones_like(targets, dtype=torch.bool)
        first[:, 1:] = targets[:, 1:] != targets[:, :-1]
        # A row is the first choice of a token on a rank: by rank, then by token. Further choices come last.
        ranks, order = torch.where(first, targets, self.ranks).flatten().sort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        recomputed = CheckpointedPass.recomputed_splits()
        if recomputed is not None:
            return Dispatch(self, experts, choices, ranks, place, order, recomputed)
        rows = torch.diff(expert_ends(ranks, self.ranks).long(), prepend=ranks.new_zeros(1))
        slots = torch.zeros_like(rows).scatter_add_(0, targets.flatten(), torch.ones_like(order))
        together = (targets.unsqueeze(1) == targets.unsqueeze(2)).sum(-1).flatten()
        most = F.pad(together, (0, 1), value=1).max()  # of no token: 1
        sent = torch.stack((rows, slots, most.expand_as(rows), torch.full_like(rows, len(experts))))
        splits = self.exchange_counts(sent)
        CheckpointedPass.keep(splits)
        return Dispatch(self, experts, choices, ranks, place, order, splits)

    def exchange_counts(self, sent: Tensor) -> Splits:
        """Exchange numbers (4, R) int64 for each rank: its rows, their slots, most slots of a row, this rank's tokens.

        Waits for the result.
        """
        arrived = torch.empty_like(sent.T, memory_format=torch.contiguous_format)
        dist.all_to_all_single(arrived, sent.T.contiguous(), group=self.group)
        leaving, coming, slots, most, tokens = torch.cat((sent[:1], arrived.T)).tolist()
        if self.sharers == 1:
            return Splits(leaving, coming, sum(slots), max(most), [])
        first = dist.get_rank(self.group) // self.sharers * self.sharers
        return Splits(leaving, coming, sum(slots), max(most), tokens[first : first + self.sharers])

    def send(self, rows: Tensor, leaving: list[int], coming: list[int]) -> Transfer:
        """Start to send rows (sum(leaving), m), by target rank; (sum(coming), m) arrive, by source. No autograd.

        Work that is queued before `Transfer.wait` runs while they travel.
        """
        rows, received = rows.contiguous(), rows.new_empty(sum(coming), *rows.shape[1:])
        work = dist.all_to_all_single(received, rows, coming, leaving, group=self.group, async_op=True)
        return Transfer(received, rows, work)

    def any_rank(self, running: bool, device: torch.device) -> bool:
        """Whether `running` is true on any process of the run; waits for the device."""
        votes = torch.tensor(int(running), device=device)
        dist.all_reduce(votes, dist.ReduceOp.MAX)
        return bool(votes)


class Dispatch(Passage):
    """One call of a block's experts for N tokens with k experts each, between `ExpertExchange.start` and the result."""

    def __init__(
        self,
        exchange: ExpertExchange,
        experts: Tensor,
        choices: Tensor,
        ranks: Tensor,
        place: Tensor,
        order: Tensor,
        splits: Splits,
    ) -> None:
        self.exchange, self.shape = exchange, experts.shape
        self.experts, self.choices = experts, choices
        """(N, k) int64: each token's experts, ascending, and where they stood before."""
        self.ranks, self.order, self.place = ranks, order, place
        """(N k,) int64: the target of each row, and its choice (index into N k), the first on that rank. Behind the
        rows: R, and the other choices. And the inverse of that order."""
        self.splits = splits

    def send(self, x: Tensor, gates: Tensor, weights: ExpertWeights) -> Callable[[], Callable[[], Tensor]]:
        """Send x (N, D) with gates (N, k) float32 to the experts; `weights` are those of this rank.

        Returns `start_experts` over all ranks: a function that starts them, and returns another one for the rest: ->
        (N, D) float32. What is computed before the first is called runs while the rows travel; and in the backward pass
        while their gradients do, because autograd goes through calls in reverse order. The second saves nothing.
        """
        held, dtype = len(weights.gate_up), weights.gate_up.dtype
        with without_autocast(x):
            packed = _Leave.apply(x, gates.gather(1, self.choices), self, held, dtype)

        def start() -> Callable[[], Tensor]:
            with without_autocast(x):
                rows, row_gates, experts = _Arrive.apply(packed, self, x.shape[1])
                finish = start_experts(rows, row_gates, experts.long(), weights, self.splits.slots)
            return lambda: self.returned(finish(), dtype)

        return start

    def returned(self, results: Tensor, dtype: torch.dtype) -> Tensor:
        """Send results (n, D) back in this type -> the sum of each token's results (N, D) float32."""
        with without_autocast(results):
            return _FromExperts.apply(results, self, dtype)

    def run(self, x: Tensor, gates: Tensor, weights: ExpertWeights) -> Tensor:
        """All steps of `send`."""
        return self.send(x, gates, weights)()()

    def by_row(self, values: Tensor) -> Tensor:
        """Values of tokens (N, m) -> those of the rows that leave (n, m)."""
        return values.index_select(0, self.order[: sum(self.splits.leaving)] // self.shape[1])

    def by_token(self, rows: Tensor) -> Tensor:
        """What belongs to the rows that leave (n, m) -> its sum for each token (N, m) float32."""
        return sum_slots(rows, self.place, self.shape)

    def choices_of_rows(self, gates: Tensor, held: int) -> tuple[Tensor, Tensor]:
        """Gates (N, k) -> those of the rows that leave, and their experts' numbers at the target, (n, k) each.

        What a row chooses stands in its first columns; the numbers in the others are `held`.
        """
        count, k = sum(self.splits.leaving), self.shape[1]
        columns = self.first_column(count) + torch.arange(k, device=gates.device)
        beyond, columns = columns >= k, columns.clamp(max=k - 1)
        local = self.by_row(self.experts).gather(1, columns) - held * self.ranks[:count].unsqueeze(1)
        local = local.masked_fill(beyond | (local >= held), held)
        return self.by_row(gates).gather(1, columns), local.int()

    def gates_of_tokens(self, gates: Tensor) -> Tensor:
        """Inverse for gradients of gates: (n, k), 0 where a row chooses nothing -> (N, k)."""
        columns = torch.arange(gates.shape[1], device=gates.device) - self.first_column(len(gates))
        return self.by_token(gates.gather(1, columns.clamp(min=0)).masked_fill(columns < 0, 0))

    def first_column(self, count: int) -> Tensor:
        """(n, 1) int64: the first of a token's choices that its row is for."""
        return (self.order[:count] % self.shape[1]).unsqueeze(1)

    def leave(self, rows: Tensor) -> Transfer:
        """Start to send rows (n, m) to the experts."""
        return self.exchange.send(rows, self.splits.leaving, self.splits.coming)

    def give_back(self, rows: Tensor) -> Transfer:
        """Start to send what belongs to rows that came (n, m) back to where they came from."""
        return self.exchange.send(rows, self.splits.coming, self.splits.leaving)


class _Leave(torch.autograd.Function):
    """Tokens (N, D) and gates (N, k) -> the packed rows that this rank's experts get, which have not arrived yet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, dispatch: Dispatch, held: int, dtype: torch.dtype) -> Tensor:
        ctx.dispatch, ctx.dtype, ctx.width = dispatch, x.dtype, x.shape[1]
        rows = _packed(dispatch.by_row(x.to(dtype)), *dispatch.choices_of_rows(gates, held))
        return dispatch.sent(dispatch.leave(rows))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dispatch = ctx.dispatch
        rows, gates = _unpacked(dispatch.arrived(), ctx.width, torch.float32)  # which `_Arrive` has sent
        return dispatch.by_token(rows).to(ctx.dtype), dispatch.gates_of_tokens(gates), None, None, None


class _Arrive(torch.autograd.Function):
    """Waits for packed rows: -> the rows (n, D) for this rank's experts, their gates and experts (n, m).

    m is the most choices that a row has here.
    """

    @staticmethod
    def forward(ctx: Any, packed: Tensor, dispatch: Dispatch, width: int) -> tuple[Tensor, Tensor, Tensor]:
        ctx.dispatch, ctx.shape = dispatch, packed.shape
        rows, gates, experts = _unpacked(dispatch.arrived(), width, torch.float32, torch.int32)
        ctx.further = gates.shape[1] - dispatch.splits.most
        gates, experts = gates[:, : dispatch.splits.most], experts[:, : dispatch.splits.most]
        ctx.mark_non_differentiable(experts)
        return rows, gates.contiguous(), experts.contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_gates: Tensor, _: None) -> tuple[Tensor, None, None]:
        packed = _packed(grad_rows, F.pad(grad_gates, (0, ctx.further)))
        ctx.dispatch.travelling = ctx.dispatch.give_back(packed)
        # `_Leave` takes what comes back from the dispatch, not this, which has no memory of its own.
        return grad_rows.new_zeros(()).expand(ctx.shape), None, None


class _FromExperts(torch.autograd.Function):
    """Results of this rank's experts (n, D) float32 -> sum of each of its tokens' results (N, D) float32."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, dispatch: Dispatch, dtype: torch.dtype) -> Tensor:
        ctx.dispatch, ctx.dtype = dispatch, dtype
        return dispatch.by_token(dispatch.give_back(results.to(dtype)).wait())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        dispatch = ctx.dispatch
        return dispatch.leave(dispatch.by_row(grad_y.to(ctx.dtype))).wait().float(), None, None


def _packed(rows: Tensor, *others: Tensor) -> Tensor:
    """Rows (n, D) with values of 4 bytes (n, k) in further columns of the same type, so that one message has all."""
    return torch.cat((rows, *(values.view(rows.dtype) for values in others)), dim=1)


def _unpacked(packed: Tensor, width: int, *types: torch.dtype) -> list[Tensor]:
    """Inverse of `_packed`: rows (n, width), and the others, which have equally many columns and these types."""
    others = packed[:, width:].chunk(len(types), dim=1)
    values = [part.contiguous().view(dtype) for part, dtype in zip(others, types, strict=True)]
    return [packed[:, :width].contiguous(), *values]


class CheckpointedPass:
    """Context of a checkpointed pass, or of its recomputation, which takes the sizes from the pass: no waiting."""

    current: "CheckpointedPass | None" = None

    def __init__(self, splits: list[Splits], recomputes: bool) -> None:
        self.splits, self.recomputes = splits, recomputes
        self.used = 0
        self.outer: CheckpointedPass | None = None

    @classmethod
    def contexts(cls) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a pass and of its recomputation: `context_fn` of torch.utils.checkpoint."""
        splits: list[Splits] = []
        return cls(splits, False), cls(splits, True)

    @classmethod
    def recomputing(cls) -> bool:
        """Whether a pass is being recomputed."""
        return cls.current is not None and cls.current.recomputes

    @classmethod
    def recomputed_splits(cls) -> Splits | None:
        """The next splits of the pass that is being recomputed; None outside of a recomputation."""
        current = cls.current
        if current is None or not current.recomputes:
            return None
        current.used += 1
        return current.splits[current.used - 1]

    @classmethod
    def keep(cls, splits: Splits) -> None:
        """Keep splits for the recomputation, if there will be one."""
        if cls.current is not None and not cls.current.recomputes:
            cls.current.splits.append(splits)

    def __enter__(self) -> None:
        self.used, self.outer, CheckpointedPass.current = 0, CheckpointedPass.current, self

    def __exit__(self, *exception: object) -> None:
        CheckpointedPass.current = self.outer
