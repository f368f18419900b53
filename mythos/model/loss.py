"""Cross-entropy of the head, in pieces: the logits of all tokens never exist at once."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos.model import IGNORE_INDEX
from mythos.model.layers import autocast_dtype, without_autocast
from mythos.model.ops import device_choice
from mythos.model.ops.matmul import multiply

LOGIT_BYTES = {"cpu": 8 * 2**20, "cuda": 2 * 2**30}
"""Most memory of a piece's float32 logits: on a CPU what a core's caches hold; on a GPU enough rows for its products to
run at full speed and for the weight's gradient, which every piece adds to, to be passed through seldom."""


def pieces(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """The rows in pieces of equal length (but the last), as many as LOGIT_BYTES allows, at least 64."""
    size = max(64, LOGIT_BYTES.get(device_choice.device_type(device), LOGIT_BYTES["cuda"]) // (4 * vocabulary))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _SummedCrossEntropy(torch.autograd.Function):
    """Gradients are formed together with the loss, while a piece's logits are there, and scaled in the backward pass.

    F.linear_cross_entropy does the same, but rounds the sum of bfloat16 inputs to bfloat16 (0.4%).
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        rows, matrix = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        of_hidden = torch.empty_like(rows)
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for piece in pieces(len(rows), len(weight), hidden.device):
            counted = (targets[piece] != IGNORE_INDEX).unsqueeze(1)
            target = targets[piece].unsqueeze(1).where(counted, 0)
            logits = multiply(rows[piece], matrix.T).float()
            logits -= logits.amax(-1, keepdim=True)
            of_target = logits.gather(1, target)
            total = logits.exp_().sum(-1, keepdim=True)
            loss += (total.log() - of_target).where(counted, 0).sum()
            error = logits.mul_(counted / total).scatter_add_(1, target, -counted.float()).to(dtype)
            multiply(error, matrix, out=of_hidden[piece])
            if of_weight is not None:
                of_weight += multiply(error.T, rows[piece]).float()
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        of_hidden, of_weight = ctx.saved_tensors
        for_hidden, for_weight = ctx.dtypes
        # In place: the pieces are gone, so nobody can ask a second time.
        of_weight = None if of_weight is None else of_weight.mul_(gradient).to(for_weight)
        return of_hidden.to(for_hidden).mul_(gradient), of_weight, None, None


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over the targets of the cross-entropy of softmax(hidden weight^T), nats, float32 scalar.

    hidden (..., D), weight (V, D), targets (...) int64, -100 where there is none. The products are in the autocast
    type, all else in float32. Its backward pass can be run once.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return cross_entropies(hidden, weight, targets).sum()
    dtype = autocast_dtype(hidden)
    with without_autocast(hidden):
        return _SummedCrossEntropy.apply(hidden, weight, targets, dtype)


@torch.no_grad()
def cross_entropies(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, float32 of the targets' shape, 0 where that is -100; no gradient.

    Shapes as in `summed_cross_entropy`.
    """
    rows, flat = hidden.flatten(0, -2), targets.flatten()
    losses = [
        F.cross_entropy(F.linear(rows[piece], weight).float(), flat[piece], ignore_index=IGNORE_INDEX, reduction="none")
        for piece in pieces(len(rows), len(weight), hidden.device)
    ]
    return torch.cat(losses).view_as(targets)
