"""Labels as transformers gives them: the ids themselves, the target of a position being the label after it."""

import torch.nn.functional as F
from torch import Tensor

from mythos.model import IGNORE_INDEX


def predicted_labels(labels: Tensor, mask: Tensor, *, shifted: bool = False) -> Tensor:
    """Labels (B, S) int64 without those that padding would predict, which become -100.

    mask is (B, S) bool, True at tokens. With `shifted` each label stands at the position that predicts it, else at the
    one after that.
    """
    predicting = mask if shifted else F.pad(mask[:, :-1], (1, 0), value=True)
    return labels.masked_fill(~predicting, IGNORE_INDEX)


def targets_of(labels: Tensor) -> Tensor:
    """(B, S) labels -> the target of each position, (B, S), -100 at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
