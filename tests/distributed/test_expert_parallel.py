"""Training with experts divided among processes against training in one: same losses, gradients and weights."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.distributed.test_parallel import CHANGES as PARITY
from tests.distributed.test_parallel import Trained, assert_same, train

CHANGES: dict[str, Any] = {**PARITY, "train__global_batch": 16, "train__micro_batch": 3}

FSDP, HSDP = {"parallel__mode": "fsdp"}, {"parallel__mode": "hsdp", "parallel__shard": 2}
SELECTIVE, LOOP = ({"parallel__activation_checkpointing": mode} for mode in ("selective", "loop"))
GATE, MUON = {"model__halting": "gate"}, {"optim__name": "muon"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep 2": (2, FSDP | GATE | {"parallel__expert": 2}),
    "ep 4, recomputed in part": (4, FSDP | GATE | SELECTIVE | {"parallel__expert": 4}),
    "ep 2 x fsdp 2, recomputed": (4, FSDP | GATE | LOOP | {"parallel__expert": 2}),
    "ep 2 x replicate 2, reduced once": (4, HSDP | {"parallel__expert": 2, "parallel__reduce": "step"}),
    "ep 2 x fsdp 2, blocks, recomputed": (4, FSDP | LOOP | {"parallel__expert": 2, "parallel__wrap": "block"}),
}


def train_here(directory: Path, name: str, changes: dict[str, Any], chosen: int | None = None) -> Trained:
    """Four steps; `chosen`: all tokens go to that expert and the next one, whatever the router says."""

    def biased(config: Any) -> Trainer:
        trainer = Trainer(config)
        if chosen is not None:
            for block in trainer.model.recurrence.blocks:
                block.ffn.router.bias[chosen : chosen + 2] = 9.0
        return trainer

    with patch("tests.distributed.test_parallel.Trainer", biased):
        return train(directory, name, {**CHANGES, **changes})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    directory = tmp_path_factory.mktemp("experts")
    return directory, train_here(directory, "single", {})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(pool: RankPool, single: tuple[Path, Trained], layout: str) -> None:
    """Depths that change every step, truncated gradient, documents, idle experts, accumulation, clipping, a gate."""
    directory, expected = single
    ranks, changes = LAYOUTS[layout]
    everyone = pool.run(train_here, directory, layout, changes, ranks=ranks)
    assert sum(len(set(depths)) > 1 for depths in expected.depths) > 2 and min(expected.norms) > 0.7
    assert all(trained.idle_experts for trained in everyone), "ranks must have no token for some experts"
    for trained in everyone:
        assert_same(trained, expected)
