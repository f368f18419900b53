"""AdamW as the trainer uses it: one fused kernel that clips and skips without waiting for the device."""

import torch
from torch import Tensor


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW, to be built with `fused=True`. It declares the attributes by which torch's gradient scaler works.

    Set them before a step: gradients are divided by `grad_scale`, and the update is skipped if `found_inf` is 1.
    """

    found_inf: Tensor | None = None
    grad_scale: Tensor | None = None
