"""A run consumes the same rows however it is killed, and the comparison that checks this notices differences."""

import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from mythos.config.loading import config_from_dict, save_config
from mythos.data.loader import Loader
from scripts import kill_test
from scripts.kill_test import (
    Failed,
    Reference,
    Shape,
    check,
    consume,
    generated_config,
    kill_run,
    newest,
    record_path,
)
from tests.warm import WarmPopen

from .conftest import make_documents
from .hub_server import DATASET, Faults, StandInHub, use_hub, write_fineweb_edu

ALONE = Shape(world_size=1, workers=0, prefetch=1)
ROW = 2 + 64 + 1
"""Length of a record's row: step, global row, and the ids of a sequence."""


def test_kills_change_nothing(tmp_path: Path) -> None:
    config = generated_config(tmp_path / "corpus", mixture=True)
    kills = kill_run("mixture", config, tmp_path / "run", 6, random.Random(0), workers=(0, 1))
    assert len(kills) == 6
    assert len({kill.shape[:2] for kill in kills}) > 2
    assert len({kill.phase for kill in kills}) > 1
    assert any(kill.noticed is not None for kill in kills), "a data worker was killed"


def test_a_kill_and_a_faulty_hub_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_fineweb_edu(tmp_path / "repository", make_documents(400))
    faults = Faults(rate=0.1, kinds=("503", "reset", "truncated", "short"))
    data = {"kind": "hub", "dataset": DATASET, "subset": "sample-10BT", "cache_dir": str(tmp_path / "cache")}
    values = {
        "data": {**data, "streams": 4, "sequence_length": 32, "patience": 60},
        "tokenizer": {"vocab_size": 384},
        "train": {"steps": 1, "global_batch": 8},
    }
    ids = Reference.ids
    with StandInHub(tmp_path / "repository", faults) as hub:
        use_hub(monkeypatch, hub)
        for name, value in hub.environment.items():
            monkeypatch.setenv(name, value)

        def without_faults(self: Reference, steps: int) -> np.ndarray:
            with patch.object(hub, "faults", Faults()):
                return ids(self, steps)

        monkeypatch.setattr(Reference, "ids", without_faults)
        kill_run("hub", config_from_dict(values), tmp_path / "run", 1, random.Random(1), workers=(1,))
    assert sum(count for name, count in hub.counts.items() if name.startswith("fault")) > 3


@pytest.fixture(autouse=True)
def warm_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks start warm; their data workers as ever."""
    monkeypatch.setattr(kill_test, "subprocess", SimpleNamespace(Popen=WarmPopen, PIPE=subprocess.PIPE))


@pytest.fixture
def consumed(tmp_path: Path) -> tuple[Path, Reference]:
    """Eight steps of an uninterrupted consumer, and the reference."""
    config = generated_config(tmp_path / "corpus", mixture=False)
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(config, folder / "config.yaml")
    reference = Reference(config, folder)
    consume(folder, tmp_path, 0, ALONE, last=8)
    assert check(folder, reference) == [0, 0] and newest(folder)["step"] == 8
    return folder, reference


def test_continuing_from_prefetched_data_is_detected(
    consumed: tuple[Path, Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classic fault: a state of what has been prefetched, not of what has been consumed."""
    folder, reference = consumed
    load = Loader.load_state_dict

    def too_far(self: Loader, state: dict[str, Any]) -> None:
        load(self, state)
        self.next_batch()

    monkeypatch.setattr(Loader, "load_state_dict", too_far)
    consume(folder, folder.parent, 0, ALONE, last=12)
    with pytest.raises(Failed, match=r"^step 8, row 0: consumed"):
        check(folder, reference)


def spoil_rows(spoil: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def spoil_file(folder: Path) -> None:
        path = record_path(folder, 0)
        rows = np.fromfile(path, dtype=np.int32).reshape(-1, ROW)
        path.write_bytes(spoil(rows).tobytes())

    return spoil_file


def another_token(rows: np.ndarray) -> np.ndarray:
    rows[5 * 16 + 3, 40] += 1
    return rows


def spoil_state(folder: Path) -> None:
    state = newest(folder)
    (position,) = state["data"]["positions"]["4"].values()
    position[3] += 1
    (folder / "checkpoint.json").write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_rows(another_token), r"^step 5, row 3: consumed \["),
        (spoil_rows(lambda rows: np.delete(rows, 50, 0)), r"has 34036 bytes, fewer than the checkpoint's 34304"),
        (spoil_rows(lambda rows: np.insert(rows, 51, rows[50], 0)), r"^step 3, row 2: consumed 2 times"),
        (spoil_state, r"^step 8: the data state differs"),
    ],
    ids=["a token", "a row missing", "a row twice", "the state"],
)
def test_the_comparison_finds(spoil: Callable[[Path], None], message: str, consumed: tuple[Path, Reference]) -> None:
    folder, reference = consumed
    spoil(folder)
    with pytest.raises(Failed, match=message):
        check(folder, reference)
