"""AdamW as the trainer uses it: one fused kernel that clips and skips without waiting for the device."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class FusedAdamW(torch.optim.AdamW):
    """torch's fused AdamW, with the attributes declared by which torch's gradient scaler controls it.

    Set them before a step: gradients are divided by `grad_scale`, and the update is skipped if `found_inf` is 1.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
