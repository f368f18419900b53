"""Training with experts divided among processes against training in one: same losses, gradients and weights."""

import gc
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mythos.gpu_check.timed_steps import tensor_bytes, tensor_peak
from mythos.model.layers import local_part
from mythos.planning.rank_state import activations, rank_state, working_memory
from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.distributed.test_parallel import CHANGES as PARITY
from tests.distributed.test_parallel import Trained, assert_same, train
from tests.runs import tiny
from tests.trainers import take_step

FSDP, HSDP = {"parallel__mode": "fsdp"}, {"parallel__mode": "hsdp", "parallel__shard": 2}
SELECTIVE, LOOP, ALL = ({"parallel__activation_checkpointing": mode} for mode in ("selective", "loop", "all"))
GATE, MUON = {"model__halting": "gate"}, {"optim__name": "muon"}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "ep 2": (2, FSDP | GATE | {"parallel__expert": 2}),
    "ep 4, recomputed in part": (4, FSDP | GATE | SELECTIVE | {"parallel__expert": 4}),
    "ep 2 x fsdp 2, recomputed": (4, FSDP | GATE | LOOP | {"parallel__expert": 2}),
    "ep 2 x replicate 2, reduced once": (4, HSDP | {"parallel__expert": 2, "parallel__reduce": "step"}),
    "ep 2 x replicate 2, recomputed": (4, HSDP | GATE | LOOP | {"parallel__expert": 2}),
    "ep 2 x fsdp 2, blocks, all recomputed": (
        4,
        FSDP | GATE | ALL | {"parallel__expert": 2, "parallel__wrap": "block"},
    ),
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
        return train(directory, name, {**PARITY, **changes})


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    directory = tmp_path_factory.mktemp("experts")
    return directory, train_here(directory, "single", {})


@pytest.fixture(scope="module")
def gated(single: tuple[Path, Trained]) -> Trained:
    return train_here(single[0], "gated", GATE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_one_process(pool: RankPool, single: tuple[Path, Trained], gated: Trained, layout: str) -> None:
    """Depths that change every step, truncated gradient, documents, idle experts, accumulation, clipping, a gate."""
    directory, expected = single
    ranks, changes = LAYOUTS[layout]
    if changes.keys() >= GATE.keys():
        expected = gated
    everyone = pool.run(train_here, directory, layout, changes, ranks=ranks)
    assert sum(len(set(depths)) > 1 for depths in expected.depths) > 2 and min(expected.norms) > 0.7
    assert all(trained.idle_experts for trained in everyone), "ranks must have no token for some experts"
    for trained in everyone:
        assert_same(trained, expected)


def test_one_rank_gets_all_tokens_and_muon_makes_matrices_whole(pool: RankPool, single: tuple[Path, Trained]) -> None:
    """Experts of one rank compute everything, the other rank nothing; matrices of experts are cut over two more."""
    layout, changes = "ep 2 x fsdp 2, muon", {**GATE, **MUON, "train__micro_batch": 8, "model__core_layers": 1}
    expected = train_here(single[0], "single, muon", changes, 10)
    changes |= FSDP | LOOP | {"parallel__expert": 2}
    for trained in pool.run(train_here, single[0], layout, changes, 10, ranks=4):
        assert [int(load.sum((0, 1))[:8].sum()) for load in trained.loads] == [0] * 4
        assert_same(trained, expected)


def test_passes_that_choose_other_experts(pool: RankPool, single: tuple[Path, Trained]) -> None:
    """A router that knows the loop, with a bias for each loop: both are the same on all ranks."""
    options = {"model__router_loop": "embedding", "model__router_bias_per_loop": True, "model__loop_norm": "adaptive"}
    expected = train_here(single[0], "single, passes", options)
    bias = expected.weights["model.recurrence.blocks.0.ffn.router.bias"]
    assert bias.ndim == 2 and not torch.equal(bias[0], bias[1])
    for layout in ("ep 2 x fsdp 2, recomputed", "ep 2 x replicate 2, reduced once"):
        ranks, changes = LAYOUTS[layout]
        for trained in pool.run(train_here, single[0], f"{layout}, passes", changes | options, ranks=ranks):
            assert_same(trained, expected)


WIDE: dict[str, Any] = {
    "model__dim": 128,
    "model__n_experts": 8,
    "model__expert_dim": 256,
    "model__shared_expert_dim": 128,
    "model__core_layers": 2,
    "model__prelude_layers": 1,
    "model__coda_layers": 1,
    "data__streams": 4,
    "data__sequence_length": 64,
    "train__global_batch": 8,
    "train__micro_batch": 1,
    "depth__sampling": "fixed",
    "depth__curriculum": {"shape": "none"},
}


def memory(directory: Path, name: str, changes: dict[str, Any]) -> tuple[int, int]:
    """Peak bytes of a rank's tensors during the second step, and those of the plan, which rank 0 makes (others: 0)."""
    trainer = Trainer(tiny(directory, run__dir=str(directory / name), **{**WIDE, **changes}))
    config, layout = trainer.config, trainer.layout
    take_step(trainer)
    gc.collect()
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    held = tensor_bytes([local_part(tensor) for tensor in (*trainer.model.parameters(), *states)])
    batch, problem = trainer.read_ahead()
    assert batch is not None, problem
    peak = held + tensor_peak(lambda: trainer.train_step(batch))
    trainer.resources.close()
    if trainer.world.rank:
        return peak, 0
    state = rank_state(config, layout)
    return peak, state.total + working_memory(config, state).total + activations(config, layout).peak


@pytest.mark.parametrize("layout", [*LAYOUTS][:4])
def test_memory_of_a_rank_is_planned(pool: RankPool, tmp_path: Path, layout: str) -> None:
    tiny(tmp_path)
    ranks, changes = LAYOUTS[layout]
    sizes = pool.run(memory, tmp_path, layout, changes, ranks=ranks)
    planned = sizes[0][1]
    print(layout, f"{planned:,} planned", [f"{peak:,} allocated: {planned / peak:.3f}" for peak, _ in sizes])
    # What uneven routing adds to one rank it takes from others.
    mean = sum(peak for peak, _ in sizes) / ranks
    assert 1.0 <= planned / mean <= 1.25 and all(planned / peak >= 0.99 for peak, _ in sizes)
