"""Cross-entropy of the head in chunks: the logits of all tokens never exist at once."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mythos.model import IGNORE_INDEX
from mythos.model.layers import autocast_dtype, without_autocast
from mythos.model.ops import device_choice
from mythos.model.ops.matmul import multiply

LOGIT_BYTES = {"cpu": 8 * 2**20, "cuda": 2 * 2**30}
"""Most memory of a chunk's float32 logits. CPU: what fits into a core's caches. GPU: enough rows for matmuls at full
speed, and few chunks, because each one reads and writes the whole gradient of the weight."""


def chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Slices of the rows, equally long but for the last: as many rows as LOGIT_BYTES allows, and at least 64."""
    size = max(64, LOGIT_BYTES.get(device_choice.device_type(device), LOGIT_BYTES["cuda"]) // (4 * vocabulary))
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients with the loss, while a chunk's logits exist; the backward pass only scales them.

    F.linear_cross_entropy does the same, but rounds the sum of bfloat16 inputs to bfloat16 (0.4%).
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
        rows_ND, weight_VD = hidden.to(dtype), weight.to(dtype)
        loss = torch.zeros((), device=hidden.device)
        grad_hidden = torch.empty_like(rows_ND)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for chunk in chunks(len(rows_ND), len(weight), hidden.device):
            counted_N1 = (targets[chunk] != IGNORE_INDEX).unsqueeze(1)
            target_N1 = targets[chunk].unsqueeze(1).where(counted_N1, 0)
            logits_NV = multiply(rows_ND[chunk], weight_VD.T).float()
            logits_NV -= logits_NV.amax(-1, keepdim=True)
            target_logit_N1 = logits_NV.gather(1, target_N1)
            exp_NV = logits_NV.exp_()
            total_N1 = exp_NV.sum(-1, keepdim=True)
            loss += (total_N1.log() - target_logit_N1).where(counted_N1, 0).sum()
            # softmax - one-hot, zero where the target is ignored.
            grad_NV = exp_NV.mul_(counted_N1 / total_N1).scatter_add_(1, target_N1, -counted_N1.float()).to(dtype)
            multiply(grad_NV, weight_VD, out=grad_hidden[chunk])
            if grad_weight is not None:
                grad_weight += multiply(grad_NV.T, rows_ND[chunk]).float()
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        # In place, to save memory. A second backward pass raises, because autograd sees that a saved tensor changed.
        grad_weight = None if grad_weight is None else grad_weight.mul_(gradient).to(weight_dtype)
        return grad_hidden.to(hidden_dtype).mul_(gradient), grad_weight, None, None


def summed_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Sum over the targets of the cross-entropy of softmax(hidden weight^T): nats, float32 scalar.

    hidden (..., D), weight (V, D), targets (...) int64, -100 where a position has none. Matmuls run in the autocast
    type, everything else in float32. The backward pass can be run once.
    """
    hidden, targets = hidden.flatten(0, -2), targets.flatten()
    if not (torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)):
        return cross_entropies(hidden, weight, targets).sum()
    dtype = autocast_dtype(hidden)
    with without_autocast(hidden):
        return _SummedCrossEntropy.apply(hidden, weight, targets, dtype)


@torch.no_grad()
def cross_entropies(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each target in nats, float32 of the targets' shape, 0 where the target is -100; no gradient.

    Shapes as in `summed_cross_entropy`.
    """
    rows, flat = hidden.flatten(0, -2), targets.flatten()
    losses = [
        F.cross_entropy(F.linear(rows[chunk], weight).float(), flat[chunk], ignore_index=IGNORE_INDEX, reduction="none")
        for chunk in chunks(len(rows), len(weight), hidden.device)
    ]
    return torch.cat(losses).view_as(targets)
