"""Local files: which are opened, atomic writes, and which errors count as a full disk."""

import errno
import os
import socket
from pathlib import Path

import pytest
from safetensors import SafetensorError

from mythos.errors import DiskFullError
from mythos.files.local import (
    advise,
    check_regular_files,
    is_full,
    open_regular,
    read_regular,
    remedy,
    replacing,
    replacing_folder,
    unused_stem,
    write_whole,
)


def test_regular_files_and_links_to_them_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"text")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "lost").symlink_to(tmp_path / "none")
    (tmp_path / "folder").mkdir()
    check_regular_files(tmp_path)
    assert read_regular(tmp_path / "file") == read_regular(str(tmp_path / "link")) == b"text"
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "lost")


@pytest.mark.parametrize("make", ["fifo", "link to a fifo", "folder", "socket", "device"])
def test_others_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: str) -> None:
    monkeypatch.chdir(tmp_path)  # the address of a socket is short
    path = Path("it")
    if make == "folder":
        path.mkdir()
    elif make == "socket":
        socket.socket(socket.AF_UNIX).bind("it")
    elif make == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo("fifo")
        path.symlink_to("fifo") if "link" in make else os.rename("fifo", path)
    with pytest.raises(OSError, match=r"it is not a regular file|Is a directory"):
        open_regular(path)
    if make != "folder":
        with pytest.raises(OSError, match="it is not a regular file"):
            check_regular_files(tmp_path)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "file"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    caused(RuntimeError("x"), OSError(errno.ENOSPC, "x")),
    DiskFullError("x"),
]
OTHERS = [
    OSError(errno.EACCES, os.strerror(errno.EACCES)),
    FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), "latest"),
    IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), "latest"),
    OSError(errno.EROFS, os.strerror(errno.EROFS)),
    OSError(errno.EFBIG, os.strerror(errno.EFBIG)),
    RuntimeError("out of memory"),
]


@pytest.mark.parametrize("error", FULL + OTHERS, ids=str)
def test_only_a_full_disk_is_called_full(error: Exception) -> None:
    assert is_full(error) == (error in FULL)
    assert remedy(error) == ("Free some space" if error in FULL else "Fix that")
    if isinstance(error, OSError):
        assert remedy(error) in advise(error)


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("durable", [False, True])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, unique: bool, durable: bool) -> None:
    path = tmp_path / "a.txt"
    write_whole(path, "naïve", unique=unique, durable=durable)
    write_whole(path, b"bytes", unique=unique, durable=durable)
    with pytest.raises(KeyboardInterrupt), replacing(path, unique=unique, durable=durable) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and path.read_bytes() == b"bytes"
        assert (temporary.name == "a.txt.tmp") == (not unique)
        raise KeyboardInterrupt
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.txt": b"bytes"}
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "a.txt", b"")


@pytest.mark.parametrize("make", ["fifo", "device", "folder", "loop"])
def test_only_a_file_is_replaced(tmp_path: Path, make: str) -> None:
    path = tmp_path / "it"
    if make == "fifo":
        os.mkfifo(path)
    elif make == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/null" if make == "device" else "it")
    before = os.lstat(path)
    with pytest.raises(OSError, match=r"it is not a regular file|Is a directory|Too many levels"):
        write_whole(path, b"text")
    assert os.lstat(path).st_mode == before.st_mode and [file.name for file in tmp_path.iterdir()] == ["it"]


def test_what_has_the_name_of_the_temporary_file_is_not_written_to(tmp_path: Path) -> None:
    """A FIFO would block, and a link would be followed."""
    for make in (lambda path: path.symlink_to(tmp_path / "other"), os.mkfifo, Path.touch):
        (tmp_path / "other").write_bytes(b"other")
        make(tmp_path / "it.tmp")
        write_whole(tmp_path / "it", b"text")
        assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"it": b"text", "other": b"other"}


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "folder"
    with pytest.raises(KeyboardInterrupt), replacing_folder(path) as temporary:
        (temporary / "a").write_text("half")
        raise KeyboardInterrupt
    assert not list(path.parent.iterdir())
    with replacing_folder(path) as temporary:
        (temporary / "a").write_text("whole")
    with pytest.raises(OSError, match="not empty"), replacing_folder(path) as temporary:
        (temporary / "b").write_text("in the way of nothing")
    assert [file.name for file in path.parent.rglob("*")] == ["folder", "a"]


def test_an_unused_stem_overwrites_nothing(tmp_path):
    stem = tmp_path / "lr0.1"
    (tmp_path / "lr0.1.png").write_text("mine")
    (tmp_path / "lr0.1-2.json").symlink_to(tmp_path / "nowhere")
    with unused_stem(stem, "json", "png") as third:
        assert third.name == "lr0.1-3" and (tmp_path / "lr0.1-3.json").exists()
        with unused_stem(stem, "json", "png") as fourth:  # as another process at the same time
            assert fourth.name == "lr0.1-4"
    with pytest.raises(ZeroDivisionError), unused_stem(stem, "json", "png") as fifth:
        (tmp_path / f"{fifth.name}.png").write_text("half")
        raise ZeroDivisionError
    assert {path.name for path in tmp_path.iterdir()} == {"lr0.1.png", *(f"lr0.1-{n}.json" for n in (2, 3, 4))}
    assert (tmp_path / "lr0.1.png").read_text() == "mine"
    with pytest.raises(OSError), unused_stem(tmp_path / "none" / "a", "json"):
        pass
