"""Makes transformers' `Trainer` count the same targets of a mythos model as the model's loss.

`Trainer` counts the labels of all micro-batches of a step from the labels alone and divides the summed loss by that
number (`num_items_in_batch`). In a mythos model padding predicts nothing, so a label that follows padding has no loss,
but `Trainer` would count it. This module is imported right after `transformers.trainer` (see
`mythos.hf.auto_classes`).
"""

from collections.abc import Callable, MutableMapping
from functools import wraps
from typing import Any

from torch import Tensor
from transformers.trainer import Trainer

from mythos.hf.config import MythosConfig
from mythos.hf.labels import predicted_labels


def _count_predicted_labels(count: Callable[..., Tensor | int | None]) -> Callable[..., Tensor | int | None]:
    """Wrap `Trainer._get_num_items_in_batch`, the one function that sees every batch before its labels are used."""

    @wraps(count)
    def counted(trainer: Trainer, batches: list[Any], *args: Any, **kwargs: Any) -> Tensor | int | None:
        if isinstance(getattr(trainer.model, "config", None), MythosConfig):
            for batch in batches:
                _drop_unpredicted(batch)
        return count(trainer, batches, *args, **kwargs)

    return counted


def _drop_unpredicted(batch: Any) -> None:
    """Set labels of a batch that nothing predicts to -100.

    The batch itself is changed, because label smoothing and a `compute_loss_func` read its labels and bypass our loss.
    """
    if not isinstance(batch, MutableMapping):
        return
    mask, labels = batch.get("attention_mask"), batch.get("labels")
    if isinstance(mask, Tensor) and isinstance(labels, Tensor) and mask.shape == labels.shape:
        batch["labels"] = predicted_labels(labels, mask.bool())
    shifted = batch.get("shift_labels")
    if isinstance(mask, Tensor) and isinstance(shifted, Tensor) and mask.shape == shifted.shape:
        batch["shift_labels"] = predicted_labels(shifted, mask.bool(), shifted=True)


# Trainer has no hook for this, and users create it themselves: replacing the method is the only way in.
Trainer._get_num_items_in_batch = _count_predicted_labels(  # type: ignore[method-assign]
    Trainer._get_num_items_in_batch
)
