"""Checkpoints of divided experts: continued under any layout, opened, exported, and started from."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from mythos.checkpoints.stored_model import open_model, tensors_of
from mythos.cli import main
from mythos.hf.export import export_model
from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.distributed.test_parallel import whole
from tests.distributed.test_resharding import CHANGES as RESHARDING
from tests.distributed.test_resharding import take_steps
from tests.runs import tiny

CHANGES: dict[str, Any] = {**RESHARDING, "model__n_experts": 4, "optim__name": "muon", "train__steps": 12}
CHANGES |= {"eval__batches": 1, "eval__loops": [1], "train__micro_batch": 8}
EXPERTS = {"parallel__mode": "fsdp", "parallel__expert": 2}

HOPS: dict[str, tuple[int, dict[str, Any]]] = {
    "single": (1, {}),
    "ep 2 x fsdp 2": (4, EXPERTS),
    "ep 4": (4, EXPERTS | {"parallel__expert": 4}),
    "ep 2 x fsdp 2, shared 2": (4, EXPERTS | {"parallel__shared": 2}),
    "ddp on 2": (2, {"parallel__mode": "ddp"}),
    "ep 2 x replicate 2": (4, EXPERTS | {"parallel__mode": "hsdp", "parallel__shard": 2}),
    "ep 4, shared 4": (4, EXPERTS | {"parallel__expert": 4, "parallel__shared": 4}),
    "fsdp on 4": (4, {"parallel__mode": "fsdp"}),
    "hsdp 2 x 2": (4, {"parallel__mode": "hsdp", "parallel__shard": 2}),
    "ep 2": (2, EXPERTS),
    "ep 2 x replicate 2, shared 2": (
        4,
        EXPERTS | {"parallel__mode": "hsdp", "parallel__shard": 2, "parallel__shared": 2},
    ),
    "single again": (1, {}),
}
"""Layouts that continue one run, a step each."""


class Hop(NamedTuple):
    losses: list[float]
    """Of the step that is saved, and of the next one."""
    rows: list[dict[int, Tensor]]
    """Ids of these steps by the global number of their row: of this rank."""
    validated: float
    """Validation loss at one loop, by all ranks."""
    path: Path
    weights: dict[str, Tensor]
    """Of the model, as saved."""


def hop(directory: Path, name: str, resume: Path | None, changes: dict[str, Any]) -> Hop:
    options = {"run__resume": str(resume)} if resume else {}
    trainer = Trainer(tiny(directory, run__dir=str(directory / name), **CHANGES, **options, **changes))
    losses, rows = take_steps(trainer, trainer.step + 1)
    trainer.position = trainer.loader.state_dict()
    validated = trainer.validate()["val/loss@1"]  # which leaves FSDP's root gathered
    trainer.save(wait=False)
    weights = {key: whole(tensor) for key, tensor in tensors_of(trainer.model).items()}
    more, rows_of_more = take_steps(trainer, trainer.step + 1)
    trainer.checkpoints.wait()
    trainer.resources.close()
    assert trainer.checkpoints.newest is not None
    return Hop(losses + more, rows + rows_of_more, validated, Path(trainer.checkpoints.newest), weights)


def next_loss(directory: Path, name: str, resume: Path, changes: dict[str, Any]) -> float:
    trainer = Trainer(tiny(directory, run__dir=str(directory / name), run__resume=str(resume), **CHANGES, **changes))
    (loss,), _ = take_steps(trainer, trainer.step + 1)
    trainer.resources.close()
    return loss


@pytest.fixture(scope="module")
def hops(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Hop]]:
    directory, done, path = tmp_path_factory.mktemp("hops"), {}, None
    tiny(directory)  # writes the corpus
    for name, (ranks, changes) in HOPS.items():
        everyone = pool.run(hop, directory, name, path, changes, ranks=ranks)
        rows = [{k: v for each in everyone for k, v in each.rows[step].items()} for step in range(2)]
        done[name] = everyone[0]._replace(rows=rows)
        path = done[name].path
    return directory, done


def test_a_run_goes_on_under_one_layout_after_another(hops: tuple[Path, dict[str, Hop]]) -> None:
    directory, done = hops
    trainer = Trainer(tiny(directory, run__dir=str(directory / "uninterrupted"), **CHANGES))
    expected, rows = take_steps(trainer, len(HOPS))
    trainer.resources.close()
    torch.testing.assert_close([each.losses[0] for each in done.values()], expected, rtol=1e-5, atol=0)
    for each, of_step in zip(done.values(), rows, strict=True):  # the same tokens, whoever reads them
        assert each.rows[0].keys() == of_step.keys()
        assert all(torch.equal(ids, of_step[row]) for row, ids in each.rows[0].items())


@pytest.mark.parametrize("layout", ["ep 2 x fsdp 2", "ep 2 x replicate 2", "ep 2 x fsdp 2, shared 2"])
def test_the_same_layout_rounds_alike(pool: RankPool, hops: tuple[Path, dict[str, Hop]], layout: str) -> None:
    directory, done = hops
    ranks, changes = HOPS[layout]
    for loss in pool.run(next_loss, directory, f"{layout} again", done[layout].path, changes, ranks=ranks):
        assert loss == done[layout].losses[1]


@pytest.mark.parametrize("layout", ["ep 2 x fsdp 2", "ep 2 x replicate 2, shared 2"])
def test_all_ranks_validate_as_one_process_measures(hops: tuple[Path, dict[str, Hop]], layout: str) -> None:
    done = hops[1][layout]
    assert main(["sweep", str(done.path), "--loops", "1", "--rules", "none"]) == 0
    (measured,) = done.path.parents[1].glob("sweep/*.json")
    assert json.loads(measured.read_text())["loops"][0]["loss"] == pytest.approx(done.validated, rel=1e-5)


def test_they_are_opened_and_exported(hops: tuple[Path, dict[str, Hop]], tmp_path: Path) -> None:
    """To the bit, by one process; the exported file is read one tensor after the other."""
    _, done = hops
    for layout in ("ep 2 x fsdp 2", "ep 4", "ep 2 x fsdp 2, shared 2"):
        export_model(done[layout].path, tmp_path / layout, max_shard_size="20KB")
        for path in (done[layout].path, tmp_path / layout):
            opened = tensors_of(open_model(path).model)
            assert opened.keys() == done[layout].weights.keys()
            assert all(torch.equal(tensor, done[layout].weights[name]) for name, tensor in opened.items())


def started_from(directory: Path, source: Path) -> dict[str, Tensor]:
    options = {"run__dir": str(directory / "started"), "train__init_from": str(source), "parallel__shared": 2}
    trainer = Trainer(tiny(directory, **CHANGES, **EXPERTS, **options))
    weights = {key: whole(tensor) for key, tensor in tensors_of(trainer.model).items()}
    trainer.resources.close()
    return weights


@pytest.mark.parametrize("exported", [False, True])
def test_divided_experts_start_from_what_others_trained(
    pool: RankPool, hops: tuple[Path, dict[str, Hop]], tmp_path: Path, exported: bool
) -> None:
    """Each rank reads its own part of the experts."""
    directory, done = hops
    source = done["ep 4, shared 4"]
    path = export_model(source.path, tmp_path / "exported").folder if exported else source.path
    for weights in pool.run(started_from, directory, path, ranks=4):
        assert all(torch.equal(tensor, source.weights[name]) for name, tensor in weights.items())
