"""What a checkpoint and the run that continues it must have in common."""

from pathlib import Path

import pytest
import torch
from psutil import virtual_memory

from mythos.checkpoints.preflight import check_memory, check_same_model
from mythos.errors import MythosError
from tests.runs import tiny


def test_fields_that_a_checkpoint_does_not_know_had_their_defaults(tmp_path: Path) -> None:
    saved = tiny(tmp_path).model.model_dump(mode="json")
    del saved["scale_embeddings"]
    check_same_model(tiny(tmp_path), saved, tmp_path)
    with pytest.raises(MythosError, match=r"model\.scale_embeddings: True in the checkpoint, False here"):
        check_same_model(tiny(tmp_path, model__scale_embeddings=False), saved, tmp_path)


def test_a_model_too_large_for_memory_is_refused_before_it_is_built() -> None:
    there = virtual_memory().total
    check_memory(there // 8, 1, torch.device("cpu"))
    check_memory(there, 8, torch.device("cpu"))
    with pytest.raises(MythosError, match=r"8,000,000,000,000 parameters take 59,604.6 GiB .* and the device has"):
        check_memory(8 * 10**12, 1, torch.device("cpu"))
