"""Shared experts divided by hidden width: T ranks hold a slice each, and compute it for the tokens of all T.

A SwiGLU is a sum over its hidden units. So each rank gathers the tokens of all, computes its slice for them, and
returns the results to the ranks that the tokens came from, which add them up.

A recomputation needs the gathered tokens, and rarely the results: those are computed only when they are asked for.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos.model.layers import gated, gated_backward, without_autocast
from mythos.model.ops import device_choice
from mythos.model.ops.expert_exchange import CheckpointedPass
from mythos.model.ops.grouped_experts import ParameterLink, without_values
from mythos.model.ops.matmul import multiply
from mythos.model.ops.shared_weight import BackwardPass
from mythos.model.ops.transfer import Passage, Transfer

BLOCK_ELEMENTS = 2**28
"""Most hidden activations that exist at a time: 512 MiB in bfloat16, and a few times that in the backward pass. Tokens
are computed in blocks of so many, whose results are added to the weight gradients: a tenth of the time of the backward
pass on an H200, by its bandwidth, for the 3,840 tokens of a block of mythos_1t."""
LEAST_TOKENS = 256
"""Fewest tokens that are computed together, for the sake of the matmuls."""


class SliceWeights:
    """A rank's slice of the shared experts' weights for all loops of a step: cast once, with one gradient.

    Attributes:
        gate_up: (2 H, D), without gradient, in the type of the matmuls: the gates of the slice's H hidden units, then
            their up-projections.
        down: (D, H), likewise.
        gradient: collects the gradients of the loops.
        link: as in `ExpertWeights`.
    """

    def __init__(self, gate_up: Tensor, down: Tensor, dtype: torch.dtype) -> None:
        self.gate_up, self.down = gate_up.detach().to(dtype), down.detach().to(dtype)
        self.gradient = SliceGradient()
        trained = torch.is_grad_enabled() and (gate_up.requires_grad or down.requires_grad)
        self.link = ParameterLink.apply(gate_up, down, self.gradient) if trained else None

    def run(self, x: Tensor) -> Tensor:
        """The slice for tokens (n, D) -> (n, D), both in the type of the matmuls. No autograd."""
        results = torch.empty_like(x)
        for rows in self.blocks(len(x)):
            activation = device_choice.fused(gated, x.device)(multiply(x[rows], self.gate_up.T))
            multiply(activation, self.down.T, out=results[rows])
        return results

    def blocks(self, tokens: int) -> Iterator[slice]:
        """Those of `tokens` rows that are computed together."""
        most = max(LEAST_TOKENS, BLOCK_ELEMENTS // self.down.shape[1] // LEAST_TOKENS * LEAST_TOKENS)
        return (slice(start, start + most) for start in range(0, tokens, most))


class SliceGradient:
    """The gradient of a slice's weights, summed over loops in float32, block by block."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._pass = BackwardPass()

    def join(self, weights: SliceWeights) -> tuple[Tensor, Tensor]:
        """The sums of `gate_up` and `down`, to add to. Raises RuntimeError as `BackwardPass.join`."""
        self._pass.join()
        if not self._sums:
            self._sums = [torch.zeros_like(each, dtype=torch.float32) for each in (weights.gate_up, weights.down)]
        gate_up, down = self._sums
        return gate_up, down

    def take(self) -> list[Tensor]:
        """Return the sums and reset them. Raises as `join`."""
        self._pass.join()
        self._pass.finish()
        sums, self._sums = self._sums, []
        return sums


class SharedExpertGroup:
    """The T ranks that divide the shared experts of a block."""

    def __init__(self, group: dist.ProcessGroup | None, ranks: int) -> None:
        self.group, self.ranks = group, ranks

    def call(self, tokens: list[int], weights: SliceWeights) -> "SharedCall":
        """A call for so many `tokens` of each of the ranks, all of which must make equally many calls."""
        return SharedCall(self, max(1, *tokens), weights)

    def gather(self, rows: Tensor, most: int) -> Transfer:
        """Start to gather rows (n, D), padded with zeros to (most, D) -> (T most, D), by rank. No autograd."""
        padded = rows.contiguous()
        if len(rows) < most:
            padded = torch.cat((rows, rows.new_zeros(most - len(rows), *rows.shape[1:])))
        received = rows.new_empty(self.ranks * most, *rows.shape[1:])
        work = dist.all_gather_single(received, padded, group=self.group, async_op=True)
        return Transfer(received, padded, work)

    def give_back(self, rows: Tensor) -> Transfer:
        """Start to send rows (T most, D), by target rank; as many arrive, by source. No autograd."""
        received = torch.empty_like(rows)
        work = dist.all_to_all_single(received, rows, group=self.group, async_op=True)
        return Transfer(received, rows, work)


class SharedCall(Passage):
    """One call of a block's shared experts, for the tokens of T ranks, padded to the `most` of any of them.

    Call `send`, `compute` and `total` once each, in that order. Tokens travel between the first two, results between
    the last two. What is computed meanwhile hides that, in the backward pass too, because autograd goes through calls
    in reverse order.
    """

    def __init__(self, group: SharedExpertGroup, most: int, weights: SliceWeights) -> None:
        self.group, self.most, self.weights = group, most, weights
        self.deferred = CheckpointedPass.recomputing()
        """`total` computes the slice. A recomputation ends before it if no gradient needs the results: those of the
        last block of a pass, unless a norm follows or lanes are written."""
        self.tokens: Tensor | None = None
        """Gathered tokens (T most, D) for `total`, detached as in `sent`."""

    def send(self, x: Tensor) -> Tensor:
        """Send this rank's tokens (N, D) to the others: -> the argument of `compute`."""
        with without_autocast(x):
            return _Leave.apply(x, self)

    def compute(self, packed: Tensor) -> Tensor:
        """Compute this rank's slice for the tokens of all ranks, and send the results: -> the argument of `total`."""
        with without_autocast(packed):
            return _Return.apply(_RunSlice.apply(_Arrive.apply(packed, self), self.weights.link, self), self)

    def total(self, packed: Tensor, count: int) -> Tensor:
        """Wait for the results of this rank's N = `count` tokens and add up those of all slices: (N, D) float32."""
        with without_autocast(packed):
            if self.tokens is not None:
                results, self.tokens = self.weights.run(self.tokens), None
                self.travelling = self.group.give_back(results)
            return _Total.apply(packed, self, count)

    def summed(self, count: int) -> Tensor:
        """Wait for this rank's `count` rows from all ranks, and add them up: (count, D) float32."""
        return self.arrived().unflatten(0, (self.group.ranks, self.most))[:, :count].sum(0, dtype=torch.float32)


class _Leave(torch.autograd.Function):
    """Tokens (N, D) -> those of all ranks (T most, D), which have not arrived yet."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: SharedCall) -> Tensor:
        ctx.call, ctx.count, ctx.dtype = call, len(x), x.dtype
        return call.sent(call.group.gather(x.detach().to(call.weights.gate_up.dtype), call.most))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.call.summed(ctx.count).to(ctx.dtype), None  # of what `_Arrive` has sent


class _Arrive(torch.autograd.Function):
    """Waits for the tokens of all ranks."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, call: SharedCall) -> Tensor:
        ctx.call = call
        return call.arrived().view_as(packed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.call.travelling = ctx.call.group.give_back(gradient)
        return gradient, None  # `_Leave` takes what comes back from the call, not this


class _Return(torch.autograd.Function):
    """Results of this rank's slice (T most, D) -> those of all slices for its tokens, which have not arrived yet."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, call: SharedCall) -> Tensor:
        ctx.call = call
        return (
            without_values(results.shape, results.dtype, results.device)
            if call.deferred
            else call.sent(call.group.give_back(results.detach()))
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.call.arrived(), None  # what `_Total` has sent


class _Total(torch.autograd.Function):
    """Waits for the results of this rank's tokens, and adds those of all slices: -> (N, D) float32."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, call: SharedCall, count: int) -> Tensor:
        ctx.call = call
        return call.summed(count)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        call = ctx.call
        call.travelling = call.group.gather(gradient.to(call.weights.gate_up.dtype), call.most)
        return call.travelling.received, None, None  # `_Return` waits for it


class _RunSlice(torch.autograd.Function):
    """A slice of the hidden units for tokens (n, D) -> (n, D), both in the type of the matmuls.

    Saves the tokens alone: the backward pass computes the hidden activations again, block by block. Of the shared
    experts of mythos_500b 8,192 tokens have 68 GiB of them, however many ranks divide these experts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, link: Tensor | None, call: SharedCall) -> Tensor:
        ctx.weights = call.weights
        ctx.save_for_backward(x)
        if not call.deferred:
            return call.weights.run(x)
        call.tokens = x.detach()
        return without_values(x.shape, x.dtype, x.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None, None]:
        weights: SliceWeights = ctx.weights
        (x,) = ctx.saved_tensors
        sums = None if weights.link is None else weights.gradient.join(weights)
        grad_x = grad_y  # overwritten block by block: `_Return`, which has made it, does not keep it
        with without_autocast(x):
            for rows in weights.blocks(len(x)):
                grad_gate_up, activation = device_choice.fused(gated_backward, x.device)(
                    multiply(grad_y[rows], weights.down), multiply(x[rows], weights.gate_up.T)
                )
                if sums is not None:
                    gate_up_sum, down_sum = sums
                    gate_up_sum += multiply(grad_gate_up.T, x[rows])
                    down_sum += multiply(grad_y[rows].T, activation)
                multiply(grad_gate_up, weights.gate_up, out=grad_x[rows])
        return grad_x, None, None
