"""Processes that find each other and agree, and what is said where they cannot."""

import logging
import os
import socket
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import pytest
import torch

from mythos.distributed.layout import Layout, named_layout
from mythos.distributed.ranks import World, check_fit, join_world
from mythos.errors import MythosError
from mythos.planning import layout as planning
from mythos.planning import rank_state
from mythos.planning.flops import count_parameters
from mythos.planning.memory import Activations
from mythos.trainer import Trainer
from tests.distributed.pool import RankPool
from tests.runs import tiny

GIB = 2**30


def talk(directory: Path) -> tuple[Any, ...]:
    world = join_world(tiny(directory, data__streams=4))
    ranks = world.ranks
    results = (
        ranks.gather({"rank": ranks.rank}),
        ranks.broadcast(10 + ranks.rank),
        ranks.any(False, ranks.rank == 2),
        world.sum(torch.tensor([1.5, ranks.rank])).tolist(),
    )
    world.in_turn(lambda: (directory / "order").open("a").write(f"{ranks.rank}\n"))
    order = [int(line) for line in (directory / "order").read_text().split()]
    with pytest.raises(MythosError) as caught:
        ranks.agreed(lambda: fail_on(ranks.rank, 1))
    world.leave()
    return *results, order, str(caught.value)


def fail_on(rank: int, failing: int) -> None:
    if rank == failing:
        raise MythosError("no such file")


def test_agreement(pool: RankPool, tmp_path: Path) -> None:
    for gathered, broadcast, flags, total, order, problem in pool.run(talk, tmp_path, ranks=4):
        assert gathered == [{"rank": n} for n in range(4)]
        assert (broadcast, flags, total) == (10, [False, True], [6.0, 6.0])
        assert order[0] == 0 and sorted(order) == [0, 1, 2, 3]
        assert problem == "rank 1: no such file"


def part(directory: Path) -> tuple[int, int]:
    before = threads()
    world = join_world(tiny(directory, data__streams=2))
    world.ranks.any(True)
    while_together = threads()
    world.leave()
    return len(while_together - before), len(threads() - before)


def threads() -> set[int]:
    """Ids of this process's threads, those of libraries among them."""
    return {thread.id for thread in psutil.Process().threads()}


def test_no_thread_of_a_group_is_left_to_release_tensors_while_python_ends(pool: RankPool, tmp_path: Path) -> None:
    for while_together, after in pool.run(part, tmp_path, ranks=2):
        assert while_together > 0 and after == 0


def join(directory: Path, changes: dict[str, Any]) -> None:
    rank = int(os.environ["RANK"])
    join_world(tiny(directory, **{key: v[rank] if isinstance(v, list) else v for key, v in changes.items()}))


def test_unequal_configurations_are_reported_by_rank_and_key(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(MythosError, match=r"different configurations:\n  rank 2: optim.lr=0.5, rank 0: 0.1\n"):
        pool.run(join, tmp_path, {"data__streams": 4, "optim__lr": [0.1, 0.1, 0.5, 0.1]}, ranks=4)


def test_number_of_processes_that_does_not_divide_the_streams(pool: RankPool, tmp_path: Path) -> None:
    with pytest.raises(MythosError, match=r"data.streams: 8 is not a multiple of the 3 processes.*nearest: 1, 2, 4"):
        pool.run(join, tmp_path, {"data__streams": 8}, ranks=3)


def environment(monkeypatch: pytest.MonkeyPatch, rank: int, port: int, address: str = "127.0.0.1") -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": address, "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))


def test_port_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment(monkeypatch, 0, port)
        with pytest.raises(MythosError, match=rf"cannot listen on 127.0.0.1:{port}, which is in use: set MASTER_PORT"):
            join_world(tiny(tmp_path, parallel__timeout=3))


def test_unreachable_master(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment(monkeypatch, 1, 9)  # nobody listens on the discard port
    with pytest.raises(
        MythosError, match=r"rank 1 of 2 cannot connect to the other ranks at 127.0.0.1:9.*Check MASTER_ADDR"
    ):
        join_world(tiny(tmp_path, parallel__timeout=2))


def test_something_else_at_the_port(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        environment(monkeypatch, 1, silent.getsockname()[1])
        with pytest.raises(
            MythosError, match=r"rank 1 of 2 cannot connect.*another kind of server listens there. Check MASTER_ADDR"
        ):
            join_world(tiny(tmp_path, parallel__timeout=0.5))


# --- the layout


def layout(size: int, local_size: int, **changes: Any) -> Layout:
    settings = {f"parallel__{name}": value for name, value in changes.items()}
    return named_layout(tiny(Path(tempfile.gettempdir()), **settings).parallel, size, local_size)


def test_layouts_by_name() -> None:
    assert layout(4, 4, mode="ddp")[:3] == ("ddp", 4, 1)
    assert layout(4, 2, mode="hsdp")[:3] == ("hsdp", 2, 2)
    assert layout(8, 8, mode="hsdp", replicate=4)[:3] == ("hsdp", 4, 2)
    with pytest.raises(MythosError, match="got single and 4 processes"):
        layout(4, 4, mode="single")
    with pytest.raises(MythosError, match="3 x 2 is not the 8 processes"):
        layout(8, 8, mode="hsdp", replicate=3, shard=2)


def test_layouts_with_divided_experts() -> None:
    whole, copies = layout(8, 8, mode="fsdp", expert=4), layout(8, 4, mode="hsdp", expert=2)
    assert (whole.mode, whole.shard, whole.expert_shard, whole.expert) == ("fsdp", 8, 2, 4)
    assert copies.sizes == {"mode": "hsdp", "replicate": 2, "shard": 4, "expert": 2, "shared": 1}
    assert copies.expert_shard == 2
    parts = layout(8, 8, mode="fsdp", expert=4, shared=2)
    assert (parts.shared, parts.shared_shard, parts.expert_shard) == (2, 4, 2)
    with pytest.raises(MythosError, match="got 4, which does not divide the 2 processes that share a copy"):
        layout(8, 2, mode="hsdp", expert=4)


def test_experts_that_processes_cannot_divide(tmp_path: Path) -> None:
    """One message names everything, before any work."""
    config = tiny(tmp_path, parallel__expert=4, data__streams=4)
    check_fit(config, 4)
    with pytest.raises(MythosError) as caught:
        check_fit(config, 6)
    first, second = str(caught.value).splitlines()
    assert first.startswith("data.streams: 4") and second.startswith("parallel.expert: got 4 and 6 processes; ")
    with pytest.raises(MythosError, match="got 4 and 1 process; the first must divide"):
        Trainer(config)
    with (
        patch("mythos.distributed.ranks.has_mesh_placements", lambda: False),
        pytest.raises(MythosError, match=r"expert parallelism needs torch 2\.13 or later"),
    ):
        check_fit(config, 4)


def agree(directory: Path, memory: list[int]) -> tuple[Layout, list[str]]:
    """The layout that ranks of unequal memory agree on, and what this one logs; activations take nothing."""
    config = tiny(directory, data__streams=2, model__vocab_size=384)
    world = join_world(config)
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    with (
        patch.object(planning, "memory_of_device", lambda world: memory[world.rank]),
        patch.object(rank_state, "step_activations", lambda model, step: Activations(0, 0)),
        patch.object(planning.logger, "handlers", [handler]),
    ):
        chosen = planning.agree_on_layout(config, world)
    world.leave()
    return chosen, [record.getMessage() for record in records]


def test_ranks_agree_on_the_layout_for_the_smallest_device(pool: RankPool, tmp_path: Path) -> None:
    state = 16 * count_parameters(tiny(tmp_path, model__vocab_size=384).model).total
    for memory, mode in (([2 * state, 100 * state], "ddp"), ([100 * state, state - 1], "fsdp")):
        layouts = pool.run(agree, tmp_path, memory, ranks=2)
        assert [layout.mode for layout, _ in layouts] == [mode, mode]
        assert all(not logged for _, logged in layouts)
    layouts = pool.run(agree, tmp_path, [state // 100, 100 * state], ranks=2)
    assert [(layout.mode, layout.fits) for layout, _ in layouts] == [("fsdp", False)] * 2
    ((_, logged), (_, silent)) = layouts
    assert len(logged) == 1 and "does not fit" in logged[0] and silent == []


def test_alone_everything_is_at_once() -> None:
    world = World(torch.device("cpu"), *[join_world(tiny(Path(tempfile.gettempdir()))).ranks] * 2)
    assert (
        world.ranks.gather(1) == [1]
        and world.ranks.broadcast("a") == "a"
        and world.ranks.any(False, True) == [False, True]
    )
    assert world.in_turn(lambda: 5) == 5
    world.leave()
