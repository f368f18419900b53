"""Reading stored checkpoints: which are complete, whether they are damaged, and their tensors."""

import contextlib
import logging
import shutil
import tempfile
import warnings
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from mythos.errors import MythosError
from mythos.files.local import check_regular_files
from mythos.files.storage import MARKER, META, LocalStorage, Storage, checksum, is_step, locate, open_storage, step_of
from mythos.files.text import parse_json

NOT_DISTRIBUTED = "torch.distributed is disabled, unavailable or uninitialized"
"""Warning of torch.distributed.checkpoint when a process saves or loads alone."""


def complete_checkpoints(directory: str | Path) -> list[Path | str]:
    """The committed checkpoints of a run, oldest first."""
    storage = open_storage(directory)
    return [storage.address(name) for name in storage.complete()]


def read_meta(path: Path | str) -> dict[str, Any]:
    """A checkpoint's meta.json. Raises MythosError if it cannot be read or is damaged."""
    storage, name = locate(path)
    try:
        content = storage.read(name, META)
        marker = storage.read(name, MARKER)
        meta = parse_json(content)
        # Versions that left the marker empty listed no files, so their checkpoints have no checksums.
        if (marker or "files" in meta) and parse_json(marker)["meta_crc32"] != zlib.crc32(content):
            raise ValueError(f"its checksum is not the one in the file '{MARKER}'")
        step = meta.get("step")
        if is_step(name) and (type(step) is not int or step != step_of(name)):
            raise ValueError(f"it is of step {step}, the directory's name of step {step_of(name)}")
        # Files of a remote checkpoint are copied to a local folder under these names, which must not lead out of it.
        for file in meta.get("files", {}):
            if "/" in file or file in ("", ".", ".."):
                raise ValueError(f"{file!r} is not the name of a file")
        if not all(type(known["bytes"]) is type(known["crc32"]) is int for known in meta.get("files", {}).values()):
            raise ValueError("its list of files has no sizes and checksums")
        return meta
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise MythosError(f"checkpoint {path} is damaged: {META}: {reason(error)}") from error


@contextlib.contextmanager
def verified_copy(path: Path | str) -> Iterator[Path]:
    """A complete checkpoint as a local directory, for one process; a remote one is fetched and deleted afterwards.

    Raises MythosError for a file that cannot be read or is damaged.
    """
    storage, name = locate(path)
    files = listed_files(path)
    with contextlib.ExitStack() as stack:
        if not isinstance(storage, LocalStorage):
            root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mythos-")))
            (root / name).mkdir()
            try:
                fetch(storage, name, files, root / name)
            except Exception as error:  # libraries of remote file systems share no base class
                raise MythosError(f"checkpoint {path} cannot be fetched: {reason(error)}") from error
            storage = LocalStorage(root)
        problems = [problem for file in sorted(files) if (problem := file_problem(storage, name, file, files[file]))]
        if problems:
            raise MythosError(f"checkpoint {path} is damaged: {'; '.join(problems)}")
        yield storage.address(name)


def saved_shapes(path: Path | str, folder: Path) -> dict[str, tuple[int, ...]]:
    """Global shapes of a checkpoint's tensors by name, from its copy in a local folder.

    Raises MythosError if the files cannot be read, or contain only a part of a tensor.
    """
    try:
        with _quiet():
            check_regular_files(folder)
            saved = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    except Exception as error:
        raise MythosError(f"checkpoint {path} is damaged: {type(error).__name__}: {error}") from error
    shapes = {}
    for name, entry in saved.items():
        assert isinstance(entry, TensorStorageMetadata), "safetensors files have tensors only"
        if sum(chunk.sizes.numel() for chunk in entry.chunks) != entry.size.numel():
            raise MythosError(f"checkpoint {path} is damaged: only a part of {name} is stored; a file is missing")
        shapes[name] = tuple(entry.size)
    return shapes


def read_tensors(path: Path | str, folder: Path, tensors: dict[str, Tensor], **group: Any) -> None:
    """Fill tensors in place, by name, from a checkpoint's copy in a local folder; shapes must be equal.

    `group` are torch.distributed.checkpoint's options for the participating ranks. Raises MythosError if the files
    cannot be read.
    """
    try:
        with _quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=NOT_DISTRIBUTED)
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), **group)
    except CheckpointException as error:
        raise MythosError(f"checkpoint {path} is damaged: {first_cause(error)}") from error


def fetch(storage: Storage, name: str, files: Iterable[str], folder: Path) -> None:
    """Copy files of a checkpoint into a folder."""
    for file in files:
        with storage.open(name, file) as source, open(folder / file, "wb") as target:
            shutil.copyfileobj(source, target)


def listed_files(path: Path | str) -> dict[str, dict[str, int]]:
    """Size and CRC-32 of every shard by name; empty for a checkpoint of an earlier version, which has no list."""
    return read_meta(path).get("files", {})


def file_problem(storage: Storage, name: str, file: str, expected: dict[str, int]) -> str | None:
    """The damage to a file of a checkpoint, for people; None if its size and CRC-32 are as `expected`."""
    try:
        with storage.open(name, file) as stream:
            actual = checksum(stream)
    except OSError as error:
        return f"{file}: {reason(error)}"
    if actual["bytes"] != expected["bytes"]:
        return f"{file}: has {actual['bytes']:,} bytes, {expected['bytes']:,} were written"
    if actual["crc32"] != expected["crc32"]:
        return (
            f"{file}: its bytes are not those that were written (CRC-32 {actual['crc32']:08x}, {expected['crc32']:08x})"
        )
    return None


def check_fit(path: Path | str, folder: Path, tensors: dict[str, Tensor]) -> None:
    """Raise MythosError, listing the first differences, if a checkpoint has other tensors than these."""
    here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    there = saved_shapes(path, folder)
    if here != there:
        differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
        lines = [
            f"  {name}: {there.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} in the model"
            for name in differing[:5]
        ]
        raise MythosError(
            f"checkpoint {path} is of another model: {len(differing)} tensors differ, first\n"
            + "\n".join(lines)
            + "\nUse the config.yaml it was written with, or another run.name."
        )


def first_cause(error: CheckpointException) -> str:
    """The underlying message, without the traceback of every rank that the exception itself prints."""
    rank, (cause, _) = min(error.failures.items())
    return f"rank {rank}: {reason(cause)}" if rank else reason(cause)


def reason(error: BaseException) -> str:
    """An error's message, preceded by its type unless it is an OSError or a MythosError."""
    return str(error) if isinstance(error, OSError | MythosError) else f"{type(error).__name__}: {error}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence torch.distributed.checkpoint below ERROR within a with block."""
    logger = logging.getLogger("torch.distributed.checkpoint")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
