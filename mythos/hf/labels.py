"""Labels in transformers' convention: the input ids themselves; position i is trained on the label at i + 1."""

import torch.nn.functional as F
from torch import Tensor

from mythos.model import IGNORE_INDEX


def predicted_labels(labels: Tensor, mask: Tensor, *, shifted: bool = False) -> Tensor:
    """Labels (B, S) int64 with -100 in place of those that a padding position would predict.

    mask is (B, S) bool, True at tokens. With `shifted` each label is already at the position that predicts it;
    otherwise it is one position later.
    """
    predicting = mask if shifted else F.pad(mask[:, :-1], (1, 0), value=True)
    return labels.masked_fill(~predicting, IGNORE_INDEX)


def targets_of(labels: Tensor) -> Tensor:
    """(B, S) labels -> the target of each position, (B, S), -100 at the last."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
