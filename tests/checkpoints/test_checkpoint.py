"""Checkpoints: complete or not there, refused when they do not fit, never lost to a failing one."""

import io
import json
import logging
import os
import re
import shutil
import sys
import threading
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mythos.checkpoints import checkpoint, shards
from mythos.checkpoints.checkpoint import Checkpoints
from mythos.checkpoints.stored_checkpoint import complete_checkpoints, read_meta
from mythos.config.presets import preset_config
from mythos.config.sections import OptimConfig
from mythos.distributed.ranks import Ranks
from mythos.errors import MythosError
from mythos.files import storage
from mythos.files.storage import step_of
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.training.optim import build_optimizer


def tensors() -> dict[str, torch.Tensor]:
    return {"model.a": torch.arange(6.0).view(2, 3), "optim.a.step": torch.tensor(3.0), "model.n": torch.arange(4)}


def blank() -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(value) for name, value in tensors().items()}


def open_checkpoints(directory: Path | str, **settings: Any) -> Checkpoints:
    return Checkpoints(directory, Ranks(), **{"keep": 10, "keep_every": 0, "asynchronous": False, **settings})


def save(directory: Path, step: int, values: dict[str, torch.Tensor] | None = None, **meta: Any) -> Path:
    """Write a checkpoint as a run without a past does; returns its path."""
    saving = open_checkpoints(directory)
    saving.save(step, values or tensors(), meta)
    assert saving.newest == directory / f"step-{step:08d}"
    return saving.newest


def load(path: Path | str, values: dict[str, torch.Tensor]) -> None:
    open_checkpoints("unused").load(path, values)


def shard(path: Path) -> Path:
    [file] = path.glob("*.safetensors")
    return file


def flip(file: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_round_trip_and_layout(tmp_path):
    path = save(tmp_path, 100, tokens=7)
    assert path == tmp_path / "step-00000100"
    assert (tmp_path / "latest").read_text() == "step-00000100"
    # Sums by another way than the one under test: of the bytes at once.
    content, meta = shard(path).read_bytes(), (path / "meta.json").read_bytes()
    files = {shard(path).name: {"bytes": len(content), "crc32": zlib.crc32(content)}}
    assert json.loads(meta) == read_meta(path) == {"step": 100, "tokens": 7, "files": files}
    assert json.loads((path / "committed").read_text()) == {"meta_crc32": zlib.crc32(meta)}
    loaded = blank()
    load(path, loaded)
    for name, value in tensors().items():
        assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype
    # Readable without this project, and without unpickling anything.
    stored = load_file(shard(path))
    assert torch.equal(stored["model.a"], tensors()["model.a"])
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json", ""}
    assert not list(tmp_path.rglob("*.tmp"))


def test_views_are_saved_as_what_they_show(tmp_path):
    base = torch.arange(24.0).view(4, 6)
    values = {"model.rows": base[1:3], "model.turned": base[3:].t(), "model.half": base.bfloat16()[:, ::2]}
    loaded = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in values.items()}
    load(save(tmp_path, 1, values), loaded)
    assert all(torch.equal(loaded[name], value) for name, value in values.items())


def test_everything_that_trains_is_saved(tmp_path):
    def build(seed: int) -> tuple[RecurrentDepthTransformer, torch.optim.Optimizer]:
        model = RecurrentDepthTransformer(preset_config("mythos_nano", vocab_size=128)).initialize(seed)
        return model, build_optimizer(model, OptimConfig())

    model, optimizer = build(0)
    ids = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        output = model(ids[:, :-1], ids[:, 1:], loops=3)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.rebalance(output.expert_load)
    path = save(tmp_path, 3, checkpoint.training_state(model, optimizer))
    other, other_optimizer = build(1)
    load(path, checkpoint.training_state(other, other_optimizer))
    for (name, one), two in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(one, two), name
    assert any("router.bias" in name and tensor.abs().max() > 0 for name, tensor in other.state_dict().items())
    for one, two in zip(optimizer.state.values(), other_optimizer.state.values(), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_incomplete_directories_do_not_count(tmp_path):
    first = save(tmp_path, 1)
    second = save(tmp_path, 2)
    (second / "committed").unlink()
    (tmp_path / "step-00000003.tmp").mkdir()
    assert complete_checkpoints(tmp_path) == [first]
    reopened = open_checkpoints(tmp_path)
    assert reopened.find("auto") == first == reopened.newest
    with pytest.raises(MythosError, match=r"no complete checkpoint.*step-00000001"):
        reopened.find(str(second))


def test_find(tmp_path):
    assert open_checkpoints(tmp_path / "none").find("auto") is None
    assert open_checkpoints(tmp_path).find("never") is None
    path = save(tmp_path, 5)
    assert open_checkpoints(tmp_path).find(str(path)) == path
    with pytest.raises(MythosError, match=r"never, but .*step-00000005"):
        open_checkpoints(tmp_path).find("never")


def test_a_path_counts_until_the_run_has_checkpoints_of_its_own(tmp_path):
    other = save(tmp_path / "other", 9)
    run = tmp_path / "run"
    assert open_checkpoints(run).find(str(other)) == other
    first, second = save(run, 1), save(run, 2)
    assert open_checkpoints(run).find(str(other)) == second
    with pytest.raises(MythosError, match=r"is followed by newer checkpoints up to .*step-00000002"):
        open_checkpoints(run).find(str(first))


def test_prune_keeps_the_newest_and_the_milestones(tmp_path):
    saving = open_checkpoints(tmp_path, keep=2, keep_every=20)
    (tmp_path / "step-00000005.tmp").mkdir()
    (tmp_path / "step-00000006").mkdir()  # a kill came between rename and marker, or while it was removed
    for step in (10, 20, 30, 40, 50):
        saving.save(step, {"model.a": torch.zeros(1)}, {})
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [
        "step-00000020",
        "step-00000040",
        "step-00000050",
    ]


def test_saved_again_takes_the_place_of_the_first(tmp_path):
    save(tmp_path, 1, {"model.a": torch.zeros(2), "model.gone": torch.zeros(9)})
    path = save(tmp_path, 1, {"model.a": torch.ones(2)})
    loaded = {"model.a": torch.zeros(2)}
    load(path, loaded)
    assert loaded["model.a"].tolist() == [1, 1]


def test_another_model_is_refused_before_anything_changes(tmp_path):
    path = save(tmp_path, 1)
    here = blank()
    here["model.a"] = torch.zeros(2, 4)
    here["model.extra"] = torch.zeros(1)
    del here["model.n"]
    with pytest.raises(MythosError) as caught:
        load(path, here)
    message = str(caught.value)
    assert "another model: 3 tensors differ" in message
    assert "model.a: (2, 3) in the checkpoint, (2, 4) in the model" in message
    assert "model.extra: absent in the checkpoint" in message
    assert "model.n: (4,) in the checkpoint, absent in the model" in message
    assert all(value.abs().max() == 0 for value in here.values())


@pytest.mark.parametrize("keep", [0, 40, 0.5])
def test_truncated_file_is_named(tmp_path, keep):
    path = save(tmp_path, 1, {"model.a": torch.arange(1000.0)})
    file = shard(path)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(MythosError, match=r"step-00000001 is damaged"):
        load(path, {"model.a": torch.zeros(1000)})


def test_damaged_meta_is_named(tmp_path):
    path = save(tmp_path, 1)
    (path / "meta.json").write_text("{")
    with pytest.raises(MythosError, match=r"step-00000001 is damaged: meta.json"):
        read_meta(path)


# Damage found at the start


def flip_shard(path: Path) -> None:
    flip(shard(path))


def truncate_shard(path: Path) -> None:
    data = shard(path).read_bytes()
    shard(path).write_bytes(data[:-3])


def remove_shard(path: Path) -> None:
    shard(path).unlink()


def change_meta(path: Path) -> None:
    (path / "meta.json").write_text((path / "meta.json").read_text().replace('"tokens": 7', '"tokens": 8'))


def spoil_marker(path: Path) -> None:
    (path / "committed").write_text("{")


DAMAGES = {
    flip_shard: r"shard-00001-.*safetensors: its bytes are not those that were written",
    truncate_shard: r"shard-00001-.*safetensors: has [\d,]+ bytes, [\d,]+ were written",
    remove_shard: r"No such file.*shard-00001",
    change_meta: r"meta\.json: .*checksum",
    spoil_marker: r"meta\.json: ",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_newest_is_reported_and_the_one_before_is_used(tmp_path, caplog, damage):
    first, second = save(tmp_path, 1, tokens=7), save(tmp_path, 2, tokens=7)
    damage(second)
    run = open_checkpoints(tmp_path, keep=1)
    assert run.find("auto") == first == run.newest
    reports = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert f"checkpoint {second} is damaged" in reports[0].getMessage()
    caplog.clear()
    assert open_checkpoints(tmp_path).find("auto") == first and not caplog.records  # reported once
    assert (tmp_path / "latest").read_text() == first.name
    # Pruning must not count the damaged one among those it keeps: it would be all that is left.
    run.save(2, tensors(), {})
    assert open_checkpoints(tmp_path).find("auto") == second
    loaded = blank()
    load(second, loaded)
    assert torch.equal(loaded["model.a"], tensors()["model.a"])


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_all_damaged_is_refused_and_left_as_it_is(tmp_path, damage):
    paths = [save(tmp_path, step, tokens=7) for step in (1, 2)]
    for path in paths:
        damage(path)
    for _ in range(2):
        with pytest.raises(MythosError, match=r"(?s)no undamaged checkpoint.*step-00000002 is damaged") as caught:
            open_checkpoints(tmp_path).find("auto")
        assert sum(bool(re.search(DAMAGES[damage], line)) for line in str(caught.value).splitlines()) == 2
    assert complete_checkpoints(tmp_path) == paths


def test_checksum_is_of_the_whole_file():
    content = torch.arange(700_000).numpy().tobytes()  # several blocks
    assert storage.checksum(io.BytesIO(content)) == {"bytes": len(content), "crc32": zlib.crc32(content)}


def test_damaged_path_is_refused(tmp_path):
    other = save(tmp_path / "other", 9)
    save(tmp_path / "run", 1)
    own = save(tmp_path / "run", 2)
    flip(shard(other))
    with pytest.raises(MythosError, match=r"step-00000009 is damaged"):
        open_checkpoints(tmp_path / "new").find(str(other))
    # Asked for by name, even the run's own newest is not silently replaced by the one before.
    flip(shard(own))
    with pytest.raises(MythosError, match=r"step-00000002 is damaged"):
        open_checkpoints(tmp_path / "run").find(str(own))


def test_checkpoints_without_checksums_are_accepted(tmp_path):
    path = save(tmp_path, 1, tokens=7)
    (path / "meta.json").write_text(json.dumps({"step": 1, "tokens": 7}))
    (path / "committed").write_bytes(b"")
    assert open_checkpoints(tmp_path).find("auto") == path
    assert read_meta(path) == {"step": 1, "tokens": 7}
    loaded = blank()
    load(path, loaded)
    assert torch.equal(loaded["model.a"], tensors()["model.a"])


def empty_marker(path: Path) -> None:
    (path / "committed").write_bytes(b"")


def other_step(path: Path) -> None:
    """Let meta.json and the marker agree on another step than the directory's name."""
    text = (path / "meta.json").read_text().replace('"step": 2', '"step": 5').encode()
    (path / "meta.json").write_bytes(text)
    (path / "committed").write_text(json.dumps({"meta_crc32": zlib.crc32(text)}))


def fifo(name: str) -> Any:
    def spoil(path: Path) -> None:
        [file] = path.glob(name)
        file.unlink()
        os.mkfifo(file)

    return spoil


def directory_as_shard(path: Path) -> None:
    file = shard(path)
    file.unlink()
    file.mkdir()


FALSIFIED = {
    "empty marker": (empty_marker, "meta.json: "),
    "other step": (other_step, "it is of step 5, the directory's name of step 2"),
    "fifo as shard": (fifo("*.safetensors"), "it is not a regular file"),
    "fifo as meta.json": (fifo("meta.json"), "it is not a regular file"),
    "fifo as marker": (fifo("committed"), "it is not a regular file"),
    "directory as shard": (directory_as_shard, "Is a directory"),
}


@pytest.mark.parametrize("name", FALSIFIED)
def test_what_no_save_can_have_written_is_refused_at_once(tmp_path, caplog, name):
    spoil, problem = FALSIFIED[name]
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    spoil(second)
    assert open_checkpoints(tmp_path).find("auto") == first
    assert problem in caplog.text
    spoil(first) if name != "other step" else shutil.rmtree(first)
    with pytest.raises(MythosError, match="no undamaged checkpoint"):
        open_checkpoints(tmp_path).find("auto")


def test_fifo_beside_the_listed_shards_is_not_opened(tmp_path):
    path = save(tmp_path, 1)
    os.mkfifo(path / "shard-00002-model.safetensors")
    with pytest.raises(MythosError, match=r"step-00000001 is damaged: .*it is not a regular file"):
        load(path, blank())


# Failing saves


def assert_first_survives(directory: Path, first: Path) -> None:
    assert complete_checkpoints(directory) == [first]
    assert (directory / "latest").read_text() == first.name
    loaded = blank()
    load(first, loaded)
    assert torch.equal(loaded["model.a"], tensors()["model.a"])
    assert not list(directory.glob("*.tmp"))


def test_full_disk_known_beforehand_leaves_the_previous_one(tmp_path, monkeypatch):
    saving = open_checkpoints(tmp_path)
    saving.save(1, tensors(), {})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MythosError, match=r"1,000 are free.*newest complete checkpoint is .*step-00000001"):
        saving.save(2, tensors(), {})
    assert_first_survives(tmp_path, tmp_path / "step-00000001")


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_met_while_writing_leaves_the_previous_one(tmp_path, monkeypatch, asynchronous):
    saving = open_checkpoints(tmp_path, asynchronous=asynchronous)
    saving.save(1, tensors(), {}, wait=True)
    # A limit on the size of a file fails a write half-way, as a full disk does.
    resource = pytest.importorskip("resource")
    import signal

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1 << 40, 0, 1 << 40))
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(MythosError, match=r"could not be written.*newest complete checkpoint is .*step-00000001"):
            saving.save(2, {"model.a": torch.zeros(1 << 16)}, {})
            assert asynchronous  # its error comes with the next call
            saving.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert_first_survives(tmp_path, tmp_path / "step-00000001")
    saving.save(3, tensors(), {}, wait=True)  # and goes on once there is room again
    assert saving.newest == tmp_path / "step-00000003"


# Saving while training goes on


@pytest.fixture
def held(monkeypatch) -> Iterator[threading.Event]:
    """Background writes wait until this is set."""
    go = threading.Event()
    write = shards.save_file

    def slow(*arguments: Any, **options: Any) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(20)
        write(*arguments, **options)

    monkeypatch.setattr(shards, "save_file", slow)
    yield go
    go.set()


def test_what_changes_after_save_returned_is_not_written(tmp_path, held):
    saving = open_checkpoints(tmp_path, asynchronous=True)
    live, meta = tensors(), {"data": {"row": 1}}
    saving.save(1, live, meta)
    assert saving.newest is None and not complete_checkpoints(tmp_path)  # it did return before
    for value in live.values():
        value.fill_(99)
    meta["data"]["row"] = 99
    held.set()
    saving.wait()
    assert saving.newest == tmp_path / "step-00000001"
    assert read_meta(saving.newest)["data"] == {"row": 1}
    loaded = blank()
    saving.load(saving.newest, loaded)
    assert all(torch.equal(loaded[name], value) for name, value in tensors().items())


def test_each_save_has_the_values_of_its_own_time(tmp_path):
    saving = open_checkpoints(tmp_path, asynchronous=True)
    live = {"model.a": torch.zeros(50_000)}
    for step in range(1, 6):
        live["model.a"].fill_(step)
        saving.save(step, live, {}, wait=step == 5)
        live["model.a"].fill_(-1)
    for step in range(1, 6):
        loaded = {"model.a": torch.zeros(50_000)}
        saving.load(tmp_path / f"step-{step:08d}", loaded)
        assert loaded["model.a"].eq(step).all()


def test_waiting_save_is_on_disk_on_return(tmp_path):
    saving = open_checkpoints(tmp_path, asynchronous=True)
    saving.save(1, tensors(), {}, wait=True)
    assert complete_checkpoints(tmp_path) == [tmp_path / "step-00000001"]
    saving.close()


@pytest.mark.parametrize("next_call", ["wait", "save", "find"])
def test_error_of_a_background_save_comes_with_the_next_call(tmp_path, monkeypatch, held, next_call):
    saving = open_checkpoints(tmp_path, asynchronous=True)
    saving.save(1, tensors(), {}, wait=True)
    saving.save(2, tensors(), {})
    assert not saving.failed
    monkeypatch.setattr(storage, "fsync", _raise(OSError(28, "No space left on device")))
    held.set()
    calls = {
        "wait": saving.wait,
        "save": lambda: saving.save(3, tensors(), {}),
        "find": lambda: saving.find("auto"),
    }
    with pytest.raises(MythosError, match=r"step 2 .*No space left on device; the newest .*step-00000001"):
        calls[next_call]()
    monkeypatch.undo()
    assert not saving.failed  # reported once
    assert_first_survives(tmp_path, tmp_path / "step-00000001")
    saving.save(3, tensors(), {})
    saving.close()
    assert len(complete_checkpoints(tmp_path)) == 2


def _raise(error: Exception) -> Any:
    def fail(*arguments: Any, **options: Any) -> None:
        raise error

    return fail


def test_failure_is_seen_without_waiting_and_logged_at_the_end(tmp_path, monkeypatch, caplog):
    saving = open_checkpoints(tmp_path, asynchronous=True)
    monkeypatch.setattr(shards, "save_file", _raise(OSError(5, "Input/output error")))
    saving.save(1, tensors(), {})
    saving._thread.join(20)
    assert saving.failed
    saving.close()
    assert "checkpoint of step 1 could not be written" in caplog.text and "Input/output error" in caplog.text
    assert "there is no earlier checkpoint" in caplog.text


# Other places than a directory


@pytest.fixture
def url() -> Iterator[str]:
    """A folder of fsspec's file system in memory."""
    import fsspec

    place = f"/{uuid.uuid4().hex}"
    yield f"memory:/{place}"
    files = fsspec.filesystem("memory")
    if files.exists(place):
        files.rm(place, recursive=True)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_object_store(url, caplog, tmp_path, monkeypatch, asynchronous):
    import fsspec

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    files = fsspec.filesystem("memory")
    root = url.removeprefix("memory:/")
    saving = open_checkpoints(url, keep=2, asynchronous=asynchronous)
    assert saving.find("auto") is None
    for step in (1, 2, 3):
        saving.save(step, {**tensors(), "optim.a.step": torch.tensor(float(step))}, {"tokens": step})
    saving.wait()
    assert saving.newest == f"{url}/step-00000003" and step_of(saving.newest) == 3
    assert complete_checkpoints(url) == [f"{url}/step-0000000{step}" for step in (2, 3)]
    assert files.cat(f"{root}/latest") == b"step-00000003"
    assert read_meta(saving.newest)["tokens"] == 3
    loaded = blank()
    load(saving.newest, loaded)
    assert torch.equal(loaded["model.a"], tensors()["model.a"]) and loaded["optim.a.step"] == 3
    # One that was never marked does not count, and a damaged one gives way to the one before.
    files.pipe(f"{root}/step-00000004/meta.json", b"{}")
    [file] = files.glob(f"{root}/step-00000003/*.safetensors")
    data = files.cat(file)
    files.pipe(file, data[:-1] + bytes([data[-1] ^ 1]))
    again = open_checkpoints(url, asynchronous=asynchronous)
    assert again.find("auto") == f"{url}/step-00000002"
    assert "step-00000003 is damaged: shard-00001" in caplog.text
    again.save(3, tensors(), {}, wait=True)
    assert open_checkpoints(tmp_path / "run").find(f"{url}/step-00000003/") == f"{url}/step-00000003"
    assert not list(tmp_path.glob("mythos-*"))  # nothing stays behind on the local disk


def test_file_url_is_a_directory(tmp_path):
    saving = open_checkpoints(tmp_path.as_uri())
    saving.save(1, tensors(), {})
    assert saving.newest == tmp_path / "step-00000001" and (saving.newest / "committed").exists()


@pytest.mark.parametrize("scheme, named", [("s3", "s3fs"), ("abfs", "adlfs"), ("nonsense", "nonsense")])
def test_storage_that_is_not_installed_is_named(scheme, named, monkeypatch):
    for package in ("s3fs", "adlfs"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MythosError, match=named):
        open_checkpoints(f"{scheme}://bucket/folder")
