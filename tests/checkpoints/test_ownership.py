"""Whose checkpoints a place holds: nothing of another run, or of a person, is continued, deleted or overwritten."""

import errno
import gc
import json
import os
import shutil
import threading
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem

from mythos.checkpoints.checkpoint import Checkpoints
from mythos.checkpoints.stored_checkpoint import complete_checkpoints, read_meta
from mythos.distributed.ranks import Ranks
from mythos.distributed.run_lock import RunLock
from mythos.errors import DiskFullError, MythosError
from mythos.files import storage
from mythos.trainer import Trainer
from tests.runs import measurements, tiny
from tests.trainers import run

pytestmark = pytest.mark.usefixtures("no_plots")


class Folder(LocalFileSystem):
    """An "object store" with links: files below a directory, under a scheme of its own."""

    protocol = "folder"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return super()._strip_protocol(str(path).removeprefix("folder://"))


fsspec.register_implementation("folder", Folder, clobber=True)


JOBS: dict[Path, Checkpoints] = {}


@pytest.fixture(autouse=True)
def end_jobs() -> Iterator[None]:
    yield
    while JOBS:
        JOBS.popitem()[1].close()


def begin(directory: Path, place: Path | str, **settings: int) -> Checkpoints:
    """The checkpoints of the run in a directory, as its trainer begins them; what its last job had locked is free."""
    if directory in JOBS and isinstance(place, Path):
        JOBS.pop(directory).close()
    directory.mkdir(exist_ok=True)
    checkpoints = Checkpoints(place, Ranks(), **{"keep": 1, "keep_every": 0, "asynchronous": False, **settings})
    with RunLock(directory) as lock:
        checkpoints.claim(lock, directory.name)
    JOBS[directory] = checkpoints
    return checkpoints


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, {"model.a": torch.full((3,), float(step))}, {})


def tree(directory: Path) -> dict[str, bytes]:
    """Every file below a directory, links not followed."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if not path.is_symlink() else os.readlink(path).encode()
        for path in sorted(directory.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def age(path: Path) -> None:
    """Make a checkpoint one of a version that knew no ids."""
    meta = {key: value for key, value in json.loads((path / "meta.json").read_text()).items() if key != "run"}
    content = json.dumps(meta).encode()
    (path / "meta.json").write_bytes(content)
    (path / "committed").write_text(json.dumps({"meta_crc32": zlib.crc32(content)}))


# --- deleting


@pytest.mark.parametrize("scheme", ["", "folder://"])
def test_only_this_runs_checkpoints_are_deleted(tmp_path, scheme):
    other = begin(tmp_path / "other", tmp_path / "elsewhere", keep=9)
    save(other, 2, 3)
    place = tmp_path / "place"
    mine = begin(tmp_path / "mine", f"{scheme}{place}")
    save(mine, 1)
    # By people: copies under names that are no steps, or another step's, notes, links, and another run's copy.
    shutil.copytree(place / "step-00000001", place / "step-00000001-best")
    shutil.copytree(place / "step-00000001", place / "step-00000090")
    shutil.copytree(place / "step-00000001", place / "step-1")
    shutil.copytree(place / "step-00000001", place / "step-00000001.tmp.old")
    (place / "step-notes").mkdir()
    (place / "step-notes" / "a.txt").write_text("a")
    (place / "step-00000004.tmp").mkdir()
    (place / "step-00000004.tmp" / "a.txt").write_text("a")
    (place / "step-00000091").write_text("a file")
    (place / "step-00000002").symlink_to(tmp_path / "elsewhere" / "step-00000002")
    (place / "step-00000092.tmp").symlink_to(tmp_path / "elsewhere")
    shutil.copytree(tmp_path / "elsewhere" / "step-00000003", place / "step-00000003")
    before, theirs = tree(place), tree(tmp_path / "elsewhere")
    save(mine, 5, 6)
    after = tree(place)
    assert tree(tmp_path / "elsewhere") == theirs
    kept = {name: content for name, content in before.items() if not name.startswith(("step-00000001/", "latest"))}
    assert {name: after[name] for name in kept} == kept
    # Its own, and no more than it keeps: none of the others counts as the newest.
    assert not (place / "step-00000001").exists() and not (place / "step-00000005").exists()
    assert (place / "step-00000006" / "committed").exists()
    assert mine.find("auto") == mine.newest == mine.storage.address("step-00000006")


@pytest.mark.parametrize("scheme", ["", "folder://"])
def test_what_a_person_has_put_into_a_checkpoint_stays(tmp_path, scheme):
    mine = begin(tmp_path / "mine", f"{scheme}{tmp_path / 'place'}")
    save(mine, 1)
    (tmp_path / "place" / "step-00000001" / "scores.csv").write_text("a")
    save(mine, 2)
    assert [path.name for path in (tmp_path / "place" / "step-00000001").iterdir()] == ["scores.csv"]


def test_what_killed_saves_of_other_runs_left_stays(tmp_path):
    place = tmp_path / "place"
    mine = begin(tmp_path / "mine", place)
    save(mine, 1)
    for step, owner in ((7, "0" * 32), (8, json.loads((tmp_path / "mine" / ".lock").read_text())["run"])):
        (place / f"step-{step:08d}.tmp").mkdir()
        (place / f"step-{step:08d}.tmp" / "owner").write_text(owner)
        (place / f"step-{step:08d}.tmp" / "shard-00001-x.safetensors").write_text("half")
    save(mine, 2)
    assert {path.name for path in place.glob("*.tmp")} == {"step-00000007.tmp"}
    with pytest.raises(MythosError, match=r"File exists.*step-00000007\.tmp.*Fix that"):
        save(mine, 7)
    assert (place / "step-00000007.tmp" / "shard-00001-x.safetensors").exists()


@pytest.mark.parametrize("interrupted", range(1, 4))
def test_a_deletion_that_was_interrupted_is_finished(tmp_path, monkeypatch, interrupted):
    place = tmp_path / "place"
    mine = begin(tmp_path / "mine", place)
    save(mine, 1)
    unlink, calls = Path.unlink, []

    def killed(path: Path, **options: bool) -> None:
        if path.parent.name == "step-00000001":
            calls.append(path)
            if len(calls) == interrupted:
                raise OSError(errno.EIO, "killed")
        unlink(path, **options)

    monkeypatch.setattr(Path, "unlink", killed)
    save(mine, 2)
    monkeypatch.undo()
    assert (place / "step-00000001" / "meta.json").exists()
    again = begin(tmp_path / "mine", place)
    save(again, 3)
    assert [path.name for path in place.glob("step-*")] == ["step-00000003"]


@pytest.mark.parametrize("scheme", ["", "folder://"])
def test_another_checkpoint_of_the_same_name_is_not_overwritten(tmp_path, scheme):
    place = tmp_path / "place"
    mine = begin(tmp_path / "mine", f"{scheme}{place}")
    other = begin(tmp_path / "other", tmp_path / "elsewhere")
    save(other, 2)
    shutil.copytree(tmp_path / "elsewhere" / "step-00000002", place / "step-00000002")
    before = tree(place)
    with pytest.raises(MythosError, match="In the way, and not written by this run"):
        save(mine, 2)
    assert tree(place) == before


def test_a_damaged_checkpoint_of_another_run_is_not_marked(tmp_path, caplog):
    place = tmp_path / "place"
    mine = begin(tmp_path / "mine", place)
    save(mine, 1)
    shutil.copytree(place / "step-00000001", place / "step-00000009")
    before = tree(place / "step-00000009")
    again = begin(tmp_path / "mine", place)
    assert again.find("auto") == place / "step-00000001"
    assert "step-00000009 is damaged: meta.json: ValueError: it is of step 1" in caplog.text
    assert tree(place / "step-00000009") == before


@pytest.mark.parametrize("file", ["meta.json", "committed"])
@pytest.mark.parametrize("what", ["id", "step"])
def test_a_checkpoint_stays_this_runs_when_a_file_that_tells_it_is_damaged(tmp_path, caplog, file, what):
    place = tmp_path / "place"
    mine = begin(tmp_path / "mine", place, keep=9)
    save(mine, 1, 2)
    path = place / "step-00000002" / file
    run_id = json.loads((tmp_path / "mine" / ".lock").read_text())["run"]
    old, new = (run_id, f"{int(run_id[0] == '0')}{run_id[1:]}") if what == "id" else ('"step": 2', '"step": 3')
    path.write_text(path.read_text().replace(old, new))
    again = begin(tmp_path / "mine", place, keep=9)
    # The marker has no checksum of its own; readers ignore what it says of the run.
    if file == "meta.json":
        assert again.find("auto") == place / "step-00000001" and "step-00000002 is damaged" in caplog.text
    save(again, 2)
    assert begin(tmp_path / "mine", place).find("auto") == place / "step-00000002"
    assert json.loads(path.read_text())["step"] == 2


# --- sharing


@pytest.fixture
def url() -> Iterator[str]:
    """A folder of fsspec's file system in memory."""
    place = f"/{uuid.uuid4().hex}"
    yield f"memory:/{place}"
    fsspec.filesystem("memory").rm(place, recursive=True)


def refuse(directory: Path, place: Path | str) -> str:
    with pytest.raises(MythosError) as caught:
        begin(directory, place)
    return str(caught.value)


def test_another_runs_directory_is_refused(tmp_path):
    place = tmp_path / "place"
    first = begin(tmp_path / "a", place)
    save(first, 4)
    first.close()
    for _ in range(2):  # the refusal leaves nothing behind that changes the answer
        message = refuse(tmp_path / "b", place)
    assert f"{place} contains the checkpoints of another run, the run a in {tmp_path / 'a'}" in message
    for way in (
        "checkpoint.dir to a directory of its own",
        "run.resume=",
        "train.init_from=",
        f"run.dir={tmp_path / 'a'}",
    ):
        assert way in message
    assert f"{place / 'step-00000004'}" in message
    assert begin(tmp_path / "a", place).find("auto") == place / "step-00000004"


def test_another_runs_object_store_is_refused(tmp_path, url):
    first = begin(tmp_path / "a", url)
    # Before anything is saved there, too: nothing else could keep the two apart.
    assert f"{url} is in use by the run a in {tmp_path / 'a'}" in refuse(tmp_path / "b", url)
    save(first, 4)
    begin(tmp_path / "a", url)  # of a job that was killed, the object is left, and its run may go on
    first.close()
    assert "contains the checkpoints of another run, the run a" in refuse(tmp_path / "b", url)


def test_a_run_moves_with_its_directory(tmp_path):
    place = tmp_path / "place"
    save(begin(tmp_path / "a", place), 1)
    JOBS[tmp_path / "a"].close()
    (tmp_path / "a").rename(tmp_path / "moved")
    mine = begin(tmp_path / "moved", place)
    save(mine, 2)
    assert complete_checkpoints(place) == [place / "step-00000002"]
    # But not with a copy of it, while the original is there.
    mine.close()
    shutil.copytree(tmp_path / "moved", tmp_path / "copy")
    assert "another run, the run moved in" in refuse(tmp_path / "copy", place)


def test_a_run_whose_directory_is_lost_goes_on_in_a_new_one_of_the_same_path(tmp_path):
    place = tmp_path / "place"
    save(begin(tmp_path / "a", place), 1)
    shutil.rmtree(tmp_path / "a")
    save(begin(tmp_path / "a", place), 2)
    assert complete_checkpoints(place) == [place / "step-00000002"], "it knows the first one as its own"


def test_a_place_is_locked_while_a_job_saves_there(tmp_path):
    first = begin(tmp_path / "a", tmp_path / "place")
    with pytest.raises(MythosError, match=f"place is in use by process {os.getpid()} on .*another checkpoint.dir"):
        begin(tmp_path / "b", tmp_path / "place")
    threading.Timer(0.3, first.close).start()
    begin(tmp_path / "b", tmp_path / "place").close()
    assert not list((tmp_path / "place").iterdir())


def test_older_runs_go_on_in_their_own_directory(tmp_path):
    """Their checkpoints have no id; the owner follows from the directory in their configuration, or from their path."""
    shared = {"checkpoint__dir": str(tmp_path / "shared"), "checkpoint__every": 2, "checkpoint__keep": 9}
    run(tiny(tmp_path, train__steps=4, **shared))
    run(tiny(tmp_path, train__steps=4, run__dir=str(tmp_path / "usual")))
    (tmp_path / "run" / ".lock").unlink()
    (tmp_path / "usual" / ".lock").unlink()
    for path in [*(tmp_path / "shared").glob("step-*"), *(tmp_path / "usual" / "checkpoints").glob("step-*")]:
        age(path)
    (tmp_path / "usual").rename(tmp_path / "moved")
    with pytest.raises(MythosError, match=f"shared contains the checkpoints of another run, {tmp_path / 'run'}"):
        Trainer(tiny(tmp_path, train__steps=6, run__dir=str(tmp_path / "b"), **shared))
    for directory, changes in (("run", {**shared, "checkpoint__keep": 1}), ("moved", {})):
        trainer = Trainer(tiny(tmp_path, train__steps=6, run__dir=str(tmp_path / directory), **changes))
        assert trainer.step == 4
        trainer.run()
    assert complete_checkpoints(tmp_path / "shared") == [tmp_path / "shared" / "step-00000006"]


def test_two_runs_with_one_checkpoint_directory(tmp_path):
    """The second is refused before it trains, and begins elsewhere from the first one's checkpoint."""
    shared = {"checkpoint__dir": str(tmp_path / "shared"), "train__steps": 2}
    first = run(tiny(tmp_path, **shared))
    second = {**shared, "train__steps": 4, "run__dir": str(tmp_path / "second")}
    resume = f"{tmp_path}/shared/step-00000002"
    gc.disable()  # what was refused gives its lock back by itself
    try:
        with pytest.raises(MythosError, match="another run, the run tiny in"):
            Trainer(tiny(tmp_path, **second))
        trainer = Trainer(tiny(tmp_path, **{**second, "checkpoint__dir": None, "run__resume": resume}))
    finally:
        gc.enable()
    assert trainer.step == 2
    trainer.run()
    assert [record["step"] for record in measurements(tmp_path / "second")] == [3, 4]
    assert read_meta(first.checkpoints.newest)["step"] == 2


# --- places that cannot be used


def a_file(place: Path) -> None:
    place.write_text("")


def a_loop(place: Path) -> None:
    place.symlink_to(place)


def below_a_file(place: Path) -> None:
    place.parent.rmdir()
    place.parent.write_text("")


def latest_in_the_way(place: Path) -> None:
    (place / "latest").mkdir(parents=True)


UNUSABLE = {
    a_file: r"File exists",
    a_loop: r"File exists|symbolic links",
    below_a_file: "Not a directory",
    latest_in_the_way: "Is a directory",
}


@pytest.mark.parametrize("spoil", UNUSABLE, ids=lambda spoil: spoil.__name__)
def test_unusable_folders_are_reported_before_training(tmp_path, spoil):
    place = tmp_path / "parent" / "place"
    place.parent.mkdir()
    spoil(place)
    with pytest.raises(MythosError, match=f"checkpoints cannot be written there: .*({UNUSABLE[spoil]}).*") as caught:
        Trainer(tiny(tmp_path, checkpoint__dir=str(place)))
    message = str(caught.value)
    assert "checkpoint.dir" in message and "ree some space" not in message
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EDQUOT])
def test_a_folder_that_takes_no_file_is_reported_before_training(tmp_path, monkeypatch, number):
    def refused(path: Path, content: bytes, **_: bool) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(storage, "write_whole", refused)
    full = number in (errno.ENOSPC, errno.EDQUOT)
    with pytest.raises(DiskFullError if full else MythosError, match=os.strerror(number)) as caught:
        Trainer(tiny(tmp_path, checkpoint__dir=str(tmp_path / "place")))
    assert ("Free some space" in str(caught.value)) == full


def test_a_disk_without_room_for_a_checkpoint_is_reported_before_training(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(
        DiskFullError, match=r"the next checkpoint could not be written.*1,000 are free.*Free some space"
    ):
        Trainer(tiny(tmp_path))
    assert not (tmp_path / "run" / "config.yaml").exists()


# --- true causes


def in_the_way(place: Path) -> None:
    (place / "step-00000002").write_text("")


def latest_became_a_directory(place: Path) -> None:
    (place / "latest").unlink()
    (place / "latest").mkdir()


def lost(place: Path) -> None:
    shutil.rmtree(place)
    place.write_text("")


@pytest.mark.parametrize("spoil", [in_the_way, latest_became_a_directory, lost], ids=lambda spoil: spoil.__name__)
def test_free_space_is_not_advised_where_it_would_not_help(tmp_path, spoil: Callable[[Path], None]):
    mine = begin(tmp_path / "mine", tmp_path / "place", keep=9)
    save(mine, 1)
    spoil(tmp_path / "place")
    with pytest.raises(MythosError, match=r"checkpoint of step 2 could not be written .*Fix that") as caught:
        save(mine, 2)
    assert "ree some space" not in str(caught.value) and not isinstance(caught.value, DiskFullError)
