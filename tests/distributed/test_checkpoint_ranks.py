"""Checkpoints of many processes: any layout loads what any other saved, and a failure on one rank is everyone's."""

import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mythos.checkpoints import checkpoint, shards
from mythos.checkpoints.checkpoint import Checkpoints
from mythos.checkpoints.stored_checkpoint import complete_checkpoints, read_meta
from mythos.distributed.ranks import Ranks
from mythos.errors import MythosError
from tests.distributed.pool import RankPool

WORLD = 4
TIMEOUT = timedelta(seconds=30)


class Shelf(LocalFileSystem):
    """An "object store" that several processes see: files below a directory, under a scheme of its own."""

    protocol = "shelf"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("shelf://"))


fsspec.register_implementation("shelf", Shelf, clobber=True)


def reference() -> dict[str, Tensor]:
    """Shapes that four ranks, and mostly also two, cannot share evenly; some leave ranks without any row."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"even": (8, 4), "uneven": (7, 3), "wide": (3, 50), "row": (1, 9), "vector": (5,), "cube": (6, 2, 3)}
    values = {f"model.{name}": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values["model.half"] = torch.randn(5, 3, generator=generator).bfloat16()
    values["plain.step"] = torch.tensor(3.0)
    values["plain.counts"] = torch.arange(6)
    values["plain.bias"] = torch.randn(11, generator=generator)
    return values


class Layout:
    """How some of the processes hold tensors; the other processes sit by."""

    def __init__(self, members: int, mesh: DeviceMesh | None, placements: list[Any]) -> None:
        group = dist.new_group(list(range(members)), timeout=TIMEOUT) if members > 1 else None
        self.member = dist.get_rank() < members
        self.ranks = Ranks(group) if self.member else None
        self.mesh, self.placements = mesh, placements

    def hold(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same values as this layout has them."""
        return {
            name: distribute_tensor(value.clone(), self.mesh, self.placements, src_data_rank=None)
            if self.mesh is not None and name.startswith("model.")
            else value.clone()
            for name, value in values.items()
        }

    def open(self, directory: Path | str, asynchronous: bool = False) -> Checkpoints:
        return Checkpoints(directory, self.ranks, keep=9, keep_every=0, asynchronous=asynchronous)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assert_equal(tensors: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    for name, value in expected.items():
        actual = whole(tensors[name])
        assert actual.dtype == value.dtype and torch.equal(actual, value), f"{where}: {name}"


def said_alike(ranks: Ranks, work: Callable[[], Any]) -> str:
    """The MythosError that work raises, the same on every rank."""
    with pytest.raises(MythosError) as caught:
        work()
    texts = ranks.gather(str(caught.value))
    assert texts == [texts[0]] * ranks.size, texts
    return texts[0]


def fail_once(rank: int, error: Exception) -> None:
    """The next file that the rank writes cannot be written."""
    if dist.get_rank() != rank:
        return
    write = shards.save_file

    def fail(*arguments: Any, **options: Any) -> None:
        shards.save_file = write
        raise error

    shards.save_file = fail


# The checks, as each process runs them


def check_every_layout_loads_every_other(directory: Path, layouts: dict[str, Layout]) -> None:
    expected = reference()
    for name, layout in layouts.items():
        if layout.member:
            layout.open(directory / name).save(1, layout.hold(expected), {"layout": name})
    dist.barrier()
    for name, layout in layouts.items():
        if not layout.member:
            continue
        for saved in layouts:
            checkpoints = layout.open(directory / saved)
            path = checkpoints.find("auto")
            assert read_meta(path)["layout"] == saved
            tensors = layout.hold({key: torch.full_like(value, -1) for key, value in expected.items()})
            checkpoints.load(path, tensors)
            assert_equal(tensors, expected, f"{saved} loaded under {name}")


def check_nothing_is_written_twice(directory: Path, layouts: dict[str, Layout]) -> None:
    values = {f"model.{i}": torch.zeros(32, 8) for i in range(8)} | {"plain.a": torch.zeros(64)}
    for name in ("ddp4", "fsdp4", "hsdp"):
        checkpoints = layouts[name].open(directory / name)
        checkpoints.save(1, layouts[name].hold(values), {})
        sizes = []
        for file in sorted(checkpoints.newest.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                sizes.append(sum(opened.get_tensor(key).nbytes for key in opened.keys()))  # noqa: SIM118
        assert sum(sizes) == sum(value.nbytes for value in values.values()), (name, sizes)
        assert len(sizes) == WORLD and max(sizes) - min(sizes) <= 256, (name, sizes)
        assert sum(buffer.nbytes for buffer in checkpoints._buffers.values()) == 0


def check_other_models_are_refused_alike(directory: Path, layouts: dict[str, Layout]) -> None:
    for name in ("fsdp4", "ddp4"):
        layout = layouts[name]
        checkpoints = layout.open(directory / name)
        checkpoints.save(1, layout.hold(reference()), {})
        other = layout.hold(reference() | {"model.uneven": torch.zeros(7, 4)})
        text = said_alike(layout.ranks, partial(checkpoints.load, checkpoints.newest, other))
        assert "model.uneven: (7, 3) in the checkpoint, (7, 4) in the model" in text


def check_asynchronous_saves_have_the_values_of_their_time(directory: Path, layouts: dict[str, Layout]) -> None:
    for name in ("fsdp4", "hsdp", "ddp4"):
        layout = layouts[name]
        checkpoints = layout.open(directory / name, asynchronous=True)
        live = layout.hold(reference())
        for step in (1, 2, 3):
            for tensor in live.values():
                tensor.fill_(step)
            checkpoints.save(step, live, {})
            for tensor in live.values():
                tensor.fill_(-1)
            dist.barrier()  # training speaks meanwhile, on another group
        checkpoints.wait()
        # Of what several ranks hold alike, only one keeps a copy.
        copied = layout.ranks.gather(sum(buffer.nbytes for buffer in checkpoints._buffers.values()))
        assert sum(copied) == sum(value.nbytes for value in reference().values()), copied
        checkpoints.close()
        for step in (1, 2, 3):
            checkpoints.load(directory / name / f"step-{step:08d}", live)
            assert_equal(live, {key: torch.full_like(value, step) for key, value in reference().items()}, name)


def check_sharded_training_continues_in_one_process(directory: Path, layouts: dict[str, Layout]) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2))  # fewer rows than ranks

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(torch.arange(10.0).view(2, 5) / 10).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    sharded, single = build(), build()
    fully_shard(sharded, mesh=layouts["fsdp4"].mesh)
    sharded_optimizer, optimizer = (torch.optim.AdamW(model.parameters(), lr=0.1) for model in (sharded, single))
    checkpoints = layouts["fsdp4"].open(directory, asynchronous=True)
    step(sharded, sharded_optimizer)
    step(single, optimizer)
    checkpoints.save(1, checkpoint.training_state(sharded, sharded_optimizer), {})
    step(sharded, sharded_optimizer)  # while it is written
    checkpoints.wait()
    expected = checkpoint.training_state(single, optimizer)
    loaded = {name: torch.zeros_like(value) for name, value in expected.items()}
    if dist.get_rank() == 0:
        layouts["one"].open(directory).load(checkpoints.newest, loaded)
        for name, value in expected.items():
            torch.testing.assert_close(loaded[name], value, msg=lambda text, name=name: f"{name}: {text}")


def check_failure_of_one_rank_is_everyones(directory: Path, layouts: dict[str, Layout]) -> None:
    for name, asynchronous in (("fsdp4", False), ("ddp4", True)):
        layout = layouts[name]
        checkpoints = layout.open(directory / name, asynchronous)
        checkpoints.save(1, layout.hold(reference()), {}, wait=True)
        fail_once(2, OSError(28, "No space left on device"))

        def save(checkpoints: Checkpoints = checkpoints, layout: Layout = layout) -> None:
            checkpoints.save(2, layout.hold(reference()), {})
            deadline = time.monotonic() + 20
            while not checkpoints.failed:  # in time, every rank knows without asking
                assert time.monotonic() < deadline
                time.sleep(0.01)
            checkpoints.wait()

        text = said_alike(layout.ranks, save)
        assert "rank 2: [Errno 28] No space left on device; the newest complete checkpoint is" in text, text
        assert [path.name for path in complete_checkpoints(directory / name)] == ["step-00000001"]
        assert not list((directory / name).glob("*.tmp"))
        checkpoints.save(3, layout.hold(reference()), {}, wait=True)
        assert checkpoints.newest.name == "step-00000003"
        checkpoints.close()


def check_failure_to_copy_on_one_rank_is_everyones(directory: Path, layouts: dict[str, Layout]) -> None:
    layout = layouts["fsdp4"]
    checkpoints = layout.open(directory, asynchronous=True)
    if dist.get_rank() == 3:
        checkpoints._to_host = lambda part, copied: [][0]
    text = said_alike(layout.ranks, lambda: checkpoints.save(1, layout.hold(reference()), {}))
    assert "step 1 could not be written" in text and "rank 3: IndexError" in text


def check_all_ranks_detect_damage(directory: Path, layouts: dict[str, Layout]) -> None:
    layout = layouts["fsdp4"]
    checkpoints = layout.open(directory)
    for step in (1, 2):
        checkpoints.save(step, layout.hold(reference()), {})
        if dist.get_rank() == 0 and step == 2:
            file = directory / "step-00000002" / "shard-00003-model-00001-of-00001.safetensors"
            data = file.read_bytes()
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    dist.barrier()
    assert "shard-00003" in said_alike(layout.ranks, lambda: checkpoints.find(str(directory / "step-00000002")))
    assert checkpoints.find("auto") == directory / "step-00000001"
    if dist.get_rank() == 0:
        for file in (directory / "step-00000001").glob("shard-00002*"):
            file.unlink()
    dist.barrier()
    assert "no undamaged checkpoint" in said_alike(layout.ranks, lambda: checkpoints.find("auto"))


def check_tensors_with_rows_missing_are_not_loaded(directory: Path, layouts: dict[str, Layout]) -> None:
    layout = layouts["fsdp4"]
    checkpoints = layout.open(directory)
    tensors = layout.hold({"model.even": reference()["model.even"]})
    checkpoints.save(1, tensors, {})
    if dist.get_rank() == 0:
        [file] = checkpoints.newest.glob("shard-00002*")
        file.unlink()
    dist.barrier()
    text = said_alike(layout.ranks, lambda: checkpoints.load(checkpoints.newest, tensors))
    assert "damaged: only a part of model.even is stored" in text, text


def check_object_store(directory: Path, layouts: dict[str, Layout]) -> None:
    url = f"shelf://{directory}"
    checkpoints = layouts["hsdp"].open(url, asynchronous=True)
    for step in (1, 2):
        checkpoints.save(step, layouts["hsdp"].hold({k: v + step for k, v in reference().items()}), {})
    checkpoints.wait()
    fail_once(1, OSError(28, "No space left on device"))
    assert "rank 1: [Errno 28]" in said_alike(
        layouts["hsdp"].ranks, lambda: checkpoints.save(3, layouts["hsdp"].hold(reference()), {}, wait=True)
    )
    checkpoints.close()
    again = layouts["fsdp4"].open(url)
    path = again.find("auto")
    assert path == f"{url}/step-00000002", path
    tensors = layouts["fsdp4"].hold(reference())
    again.load(path, tensors)
    assert_equal(tensors, {k: v + 2 for k, v in reference().items()}, "object store")


CHECKS = {name.removeprefix("check_"): check for name, check in list(globals().items()) if name.startswith("check_")}


def run_check(name: str, directory: Path) -> None:
    """What each process does."""
    dist.init_process_group("gloo", timeout=TIMEOUT)
    meshes = {count: DeviceMesh("cpu", list(range(count))) for count in (2, WORLD)}
    layouts = {
        "one": Layout(1, None, []),
        "fsdp2": Layout(2, meshes[2], [Shard(0)]),
        "fsdp4": Layout(WORLD, meshes[WORLD], [Shard(0)]),
        "hsdp": Layout(WORLD, DeviceMesh("cpu", [[0, 1], [2, 3]]), [Replicate(), Shard(0)]),
        "ddp2": Layout(2, None, []),
        "ddp4": Layout(WORLD, None, []),
    }
    CHECKS[name](directory, layouts)
    dist.barrier()


@pytest.mark.parametrize("name", CHECKS)
def test_ranks(pool: RankPool, tmp_path: Path, name: str) -> None:
    pool.run(run_check, name, tmp_path, ranks=WORLD, timeout=60)
