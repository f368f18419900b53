"""What a checkpoint and the run that continues it must have in common."""

from pathlib import Path

import pytest

from mythos.errors import MythosError
from mythos.preflight import check_same_model
from tests.runs import tiny


def test_fields_that_a_checkpoint_does_not_know_had_their_defaults(tmp_path: Path) -> None:
    saved = tiny(tmp_path).model.model_dump(mode="json")
    del saved["scale_embeddings"]
    check_same_model(tiny(tmp_path), saved, tmp_path)
    with pytest.raises(MythosError, match=r"model\.scale_embeddings: True in the checkpoint, False here"):
        check_same_model(tiny(tmp_path, model__scale_embeddings=False), saved, tmp_path)
