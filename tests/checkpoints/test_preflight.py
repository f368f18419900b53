"""What a checkpoint and the run that continues it must have in common."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from psutil import virtual_memory

from mythos.checkpoints.preflight import check_memory, check_same_model, schedule_change
from mythos.config.sections import Config
from mythos.errors import MythosError
from tests.runs import tiny


def test_fields_that_a_checkpoint_does_not_know_had_their_defaults(tmp_path: Path) -> None:
    saved = tiny(tmp_path).model.model_dump(mode="json")
    del saved["scale_embeddings"]
    check_same_model(tiny(tmp_path), saved, tmp_path)
    with pytest.raises(MythosError, match=r"model\.scale_embeddings: True in the checkpoint, False here"):
        check_same_model(tiny(tmp_path, model__scale_embeddings=False), saved, tmp_path)


# --- a schedule of another length

COSINE = {"optim__lr": 1e-3, "optim__schedule": "cosine", "optim__min_lr": 0.1, "optim__warmup": 0.0}
WSD = {"optim__lr": 1e-3, "optim__schedule": "wsd", "optim__decay": 0.2, "optim__min_lr": 0.1}


def changed(tmp_path: Path, step: int, before: dict[str, Any], after: dict[str, Any]) -> str | None:
    """What is said of a run that was saved with some fields and goes on with others."""
    depth = {"depth__curriculum": {"shape": "none"}}
    saved: Config = tiny(tmp_path, **depth | COSINE | before)
    return schedule_change(tiny(tmp_path, **depth | COSINE | after), saved.model_dump(mode="json"), step)


def test_more_steps_move_the_learning_rate(tmp_path: Path) -> None:
    """A cosine that had come to its end, 0.1 of the peak, is half way through one of twice the length, at 0.55."""
    warning = changed(tmp_path, 1000, {"train__steps": 1000}, {"train__steps": 2000})
    half = 1e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * 1000 / 1999)) / 2)
    assert f"{half:.3g}" == "0.00055"
    assert warning is not None
    assert warning.startswith("the schedule took 1,000 steps in the checkpoint and takes 2,000 here")
    assert "at step 1,000 this moves the learning rate from 0.0001 to 0.00055. Set optim.schedule_steps=1000" in warning
    assert "depth" not in warning  # which stays what it is


def test_more_steps_move_depths(tmp_path: Path) -> None:
    ramp = {"shape": "linear", "over": 0.5, "start": 1}
    ramps = {"depth__mean": 9, "depth__backprop": 5, "depth__curriculum": ramp, "depth__backprop_curriculum": ramp}
    warning = changed(tmp_path, 500, ramps | {"train__steps": 1000}, ramps | {"train__steps": 2000})
    assert warning is not None
    assert "the mean depth from 9 to 5, the loops with gradient from 5 to 3" in warning


def test_more_steps_move_the_difficulty_of_a_task(tmp_path: Path) -> None:
    task = {"data__kind": "reasoning", "data__path": None, "data__task": {"difficulty": [1, 4], "ramp": 1.0}}
    task |= {"data__sequence_length": 64, "depth__backprop": None, "depth__follow": "difficulty"}
    warning = changed(tmp_path, 80, task | {"train__steps": 100}, task | {"train__steps": 200})
    assert warning is not None
    assert "the mean depth from 2.5 to 1.5, the highest difficulty from 4 to 2" in warning


@pytest.mark.parametrize(
    ("step", "before", "after"),
    [
        (1000, {"train__steps": 1000}, {"train__steps": 2000, "optim__schedule_steps": 1000}),  # what is advised
        (1000, {"train__steps": 1000}, {"train__steps": 1000}),
        (700, {"train__steps": 1000} | WSD, {"train__steps": 2000} | WSD),  # the plateau of both
        (500, {"train__steps": None, "train__tokens": 1000 * 256}, {"train__steps": 1000}),  # said another way
        (500, {"train__steps": 1000}, {"train__steps": 1000, "optim__lr": 1e-4}),  # changed on purpose
        (500, {"train__steps": 1000}, {"train__steps": 500}),  # nothing is left to train
    ],
)
def test_nothing_is_said_where_nothing_moves(tmp_path, step, before, after):
    assert changed(tmp_path, step, before, after) is None


def test_checkpoints_of_earlier_versions_have_no_length_of_the_schedule(tmp_path: Path) -> None:
    saved = tiny(tmp_path, train__steps=1000).model_dump(mode="json")
    del saved["optim"]["schedule_steps"]
    assert schedule_change(tiny(tmp_path, train__steps=1000), saved, 10) is None
    assert "took 1,000 steps" in str(schedule_change(tiny(tmp_path, train__steps=3000), saved, 10))


def test_a_model_too_large_for_memory_is_refused_before_it_is_built() -> None:
    there = virtual_memory().total
    check_memory(there // 8, 1, torch.device("cpu"))
    check_memory(there, 8, torch.device("cpu"))
    with pytest.raises(MythosError, match=r"8,000,000,000,000 parameters take 59,604.6 GiB .* and the device has"):
        check_memory(8 * 10**12, 1, torch.device("cpu"))
