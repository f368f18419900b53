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
from mythos.model.ops.grouped_experts import ExpertWeights, expert_ends, run_experts, sum_slots
from mythos.model.ops.transfer import Passage, Transfer


class Splits(NamedTuple):
    """Sizes of an exchange between R ranks, each of which holds E / R experts."""

    leaving: list[int]
    """Rows that this rank sends to each rank."""
    coming: list[int]
    """Rows that it receives from each rank."""
    arrived: Tensor
    """(R, E / R) int64 on the device: rows from each rank for each of this rank's experts."""
    tokens: list[int]
    """Tokens of each of the T ranks that divide the shared experts; empty if they are not divided."""


class ExpertExchange:
    """Runs the experts of a block that R ranks share: rank r holds experts r E / R to (r + 1) E / R - 1.

    No token is dropped, whatever the routing. Every rank takes part in every exchange, also with no token at all, so
    all ranks must call it equally often, in the forward and in the backward pass.

    A call makes three all-to-alls: the number of rows for each expert (the host waits for them, because they are the
    sizes of the others), rows with their gates, and results. The backward pass makes two. If the shared experts are
    divided, the first one brings the ranks' numbers of tokens too.

    Args:
        group: the R ranks.
        ranks: R.
        sharers: T, the number of adjacent ones among them that divide the shared experts; 1 = undivided.
    """

    def __init__(self, group: dist.ProcessGroup | None, ranks: int, sharers: int = 1) -> None:
        self.group, self.ranks, self.sharers = group, ranks, sharers

    def start(self, experts: Tensor, held: int) -> "Dispatch":
        """Sort the chosen experts (N, k) int64 and exchange counts, without waiting; `held` is E / R.

        Work that is queued between this call and `Dispatch.send` hides the wait for the counts.
        """
        ids, order = experts.flatten().sort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        recomputed = CheckpointedPass.recomputed_splits()
        if recomputed is not None:
            return Dispatch(self, experts.shape, order, place, lambda: recomputed)
        ends = expert_ends(ids, held * self.ranks).long()
        sent = torch.diff(ends, prepend=ends.new_zeros(1)).view(self.ranks, held)
        return Dispatch(self, experts.shape, order, place, self.exchange_counts(sent, len(experts)))

    def exchange_counts(self, sent: Tensor, tokens: int) -> Callable[[], Splits]:
        """Exchange (R, E / R) int64 counts of rows, and of tokens; returns a function that waits for the result."""
        held = sent.shape[1]
        if self.sharers > 1:
            sent = F.pad(sent, (0, 1), value=tokens)
        arrived = torch.empty_like(sent)
        dist.all_to_all_single(arrived, sent, group=self.group)
        rows = arrived[:, :held]
        # Where tokens do not travel, the last column is not one of them: its values are not used.
        sums = torch.stack((sent[:, :held].sum(1), rows.sum(1), arrived[:, -1]))
        if not sums.is_cuda:
            return lambda: self.splits(sums, rows)
        # A copy to pinned memory is queued and not waited for.
        host = torch.empty(sums.shape, dtype=sums.dtype, pin_memory=True).copy_(sums, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def wait() -> Splits:
            copied.synchronize()
            return self.splits(host, rows)

        return wait

    def splits(self, sums: Tensor, arrived: Tensor) -> Splits:
        """The splits, from (3, R) int64 on the host: rows that leave and that come, and tokens, by rank."""
        leaving, coming, tokens = sums.tolist()
        if self.sharers == 1:
            return Splits(leaving, coming, arrived, [])
        first = dist.get_rank(self.group) // self.sharers * self.sharers
        return Splits(leaving, coming, arrived, tokens[first : first + self.sharers])

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
        self, exchange: ExpertExchange, shape: torch.Size, order: Tensor, place: Tensor, wait: Callable[[], Splits]
    ) -> None:
        self.exchange, self.shape = exchange, shape
        self.order, self.place = order, place
        """(N k,) int64: the slot at each place of the order by expert, and the inverse."""
        self.wait = wait
        self.known: Splits | None = None

    @property
    def splits(self) -> Splits:
        """Sizes of the exchange; the first use waits for them."""
        if self.known is None:
            self.known = self.wait()
            CheckpointedPass.keep(self.known)
        return self.known

    def send(self, x: Tensor, gates: Tensor, weights: ExpertWeights) -> Callable[[], Tensor]:
        """Send x (N, D) with gates (N, k) float32 to the experts; `weights` are those of this rank.

        Returns a function that completes `run_experts` over all ranks: -> (N, D) float32. What is computed before it is
        called runs while the rows travel; and in the backward pass while their gradients do, because autograd goes
        through calls in reverse order.
        """
        splits = self.splits
        held, dtype = len(weights.gate_up), weights.gate_up.dtype
        with without_autocast(x):
            packed = _Leave.apply(x, gates, self, splits, dtype)

        def run() -> Tensor:
            local = torch.arange(held, device=x.device).repeat(self.exchange.ranks)
            experts = local.repeat_interleave(splits.arrived.flatten(), output_size=sum(splits.coming)).unsqueeze(1)
            with without_autocast(x):
                rows, row_gates = _Arrive.apply(packed, self, splits, x.shape[1])
                results = run_experts(rows, row_gates, experts, weights)
                return _FromExperts.apply(results, self, splits, dtype)

        return run

    def run(self, x: Tensor, gates: Tensor, weights: ExpertWeights) -> Tensor:
        """Both steps of `send`."""
        return self.send(x, gates, weights)()

    def by_expert(self, values: Tensor) -> Tensor:
        """Values of tokens (N, m) -> those of their slots, ordered by expert (N k, m)."""
        return values.index_select(0, self.order // self.shape[1])


class _Leave(torch.autograd.Function):
    """Tokens (N, D) and gates (N, k) -> the packed rows that this rank's experts get, which have not arrived yet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gates: Tensor, dispatch: Dispatch, splits: Splits, dtype: torch.dtype) -> Tensor:
        ctx.dispatch, ctx.dtype, ctx.width = dispatch, x.dtype, x.shape[1]
        rows = _packed(dispatch.by_expert(x.to(dtype)), gates.flatten()[dispatch.order].unsqueeze(1))
        dispatch.travelling = dispatch.exchange.send(rows, splits.leaving, splits.coming)
        return dispatch.travelling.received

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dispatch = ctx.dispatch
        slots, gates = _unpacked(dispatch.arrived(), ctx.width)  # which `_Arrive` has sent
        grad_x = sum_slots(slots, dispatch.place, dispatch.shape).to(ctx.dtype)
        return grad_x, gates[dispatch.place].view(dispatch.shape), None, None, None


class _Arrive(torch.autograd.Function):
    """Waits for packed rows: -> the rows (n, D) that this rank's experts compute, and their gates (n, 1)."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, dispatch: Dispatch, splits: Splits, width: int) -> tuple[Tensor, Tensor]:
        ctx.dispatch, ctx.splits = dispatch, splits
        return _unpacked(dispatch.arrived(), width)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor, grad_gates: Tensor) -> tuple[Tensor, None, None, None]:
        dispatch, splits = ctx.dispatch, ctx.splits
        packed = _packed(grad_rows, grad_gates)
        dispatch.travelling = dispatch.exchange.send(packed, splits.coming, splits.leaving)
        return packed, None, None, None  # `_Leave` takes what comes back from the dispatch, not this


class _FromExperts(torch.autograd.Function):
    """Results of this rank's experts (n, D) float32 -> sum of each of its tokens' results (N, D) float32."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, dispatch: Dispatch, splits: Splits, dtype: torch.dtype) -> Tensor:
        ctx.dispatch, ctx.splits, ctx.dtype = dispatch, splits, dtype
        # Each row is the product of one expert, computed in `dtype`: the cast loses nothing.
        slots = dispatch.exchange.send(results.to(dtype), splits.coming, splits.leaving).wait()
        return sum_slots(slots, dispatch.place, dispatch.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None, None]:
        dispatch, splits = ctx.dispatch, ctx.splits
        rows = dispatch.by_expert(grad_y.to(ctx.dtype))
        return dispatch.exchange.send(rows, splits.leaving, splits.coming).wait().float(), None, None, None


def _packed(rows: Tensor, gates: Tensor) -> Tensor:
    """Rows (n, D) with their float32 gates (n, 1) in further columns of the same type, so that one message has both."""
    return torch.cat((rows, gates.view(rows.dtype)), dim=1)


def _unpacked(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Inverse of `_packed`: rows (n, width) and gates (n, 1) float32."""
    return packed[:, :width].contiguous(), packed[:, width:].contiguous().view(torch.float32)


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
