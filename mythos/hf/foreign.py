"""Models of other code bases, on disk or on the hub: a configuration, and tensors that are read one by one."""

import contextlib
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mythos.checkpoints.stored_model import indexed_files
from mythos.config.inherited import CONFIG_FILE, TOKENIZER_FILE
from mythos.errors import MythosError, short_reason
from mythos.files.text import read_json

TOKENIZER_FILES = (TOKENIZER_FILE, "tokenizer_config.json", "special_tokens_map.json")
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "model.pt")
"""Names of a weight file, most preferred first; NAME.index.json is the index of a model in several files."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ForeignModel:
    """A stored model of another code base."""

    folder: Path
    values: dict[str, Any]
    """The content of config.json."""
    shapes: dict[str, tuple[int, ...]]
    """Shapes of the tensors by name."""
    read: Callable[[str], Tensor]
    """Reads a tensor by name, in its stored type."""


def local_folder(source: str | Path, revision: str | None = None, tokenizer_only: bool = False) -> Path:
    """The folder of a model or a tokenizer; a hub repository is downloaded first.

    Only one kind of weight file is downloaded: safetensors if there are any. Raises MythosError if there is no such
    folder, and the hub does not have it or cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise MythosError(f"--revision: got {revision}, but {source} is a folder; use it with a hub id only")
        return folder
    if folder.exists() or not HUB_ID.fullmatch(str(source)):
        raise MythosError(f"{source} is not a folder; give one, or OWNER/NAME of a repository on the hub")
    try:
        patterns = [*TOKENIZER_FILES]
        if not tokenizer_only:
            files = HfApi().list_repo_files(str(source), revision=revision)
            kind = next((name.rsplit(".", 1)[1] for name in WEIGHTS if stored_as(name, files)), None)
            patterns += [CONFIG_FILE, *([f"*.{kind}", "*.index.json"] if kind else [])]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as error:  # network, hub and name errors share no base class
        raise MythosError(
            f"{source}: there is no such folder, and the hub does not provide it: {short_reason(error)}. Give a "
            "folder, or download it elsewhere by `hf download`."
        ) from error


def stored_as(name: str, files: Sequence[str]) -> bool:
    """Whether the files include weights of this name, as one file or as an index of several."""
    return name in files or f"{name}.index.json" in files


def read_values(folder: Path) -> dict[str, Any]:
    """The content of a folder's config.json. Raises MythosError if it is missing or not a JSON object."""
    path = folder / CONFIG_FILE
    try:
        values = read_json(path)
        if not isinstance(values, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError) as error:
        raise MythosError(f"{path} cannot be read: {error}. Give a folder with a model's configuration.") from error
    return values


@contextlib.contextmanager
def foreign_model(folder: Path) -> Iterator[ForeignModel]:
    """Open a folder; tensors can be read until the block ends, and each is in memory only while it is used.

    Raises MythosError if there are no weights, or they cannot be read.
    """
    values = read_values(folder)
    readers: dict[str, Callable[[str], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    with contextlib.ExitStack() as stack:
        for file in _weight_files(folder):
            with _read_errors(file):
                if file.suffix == ".safetensors":
                    opened = stack.enter_context(safe_open(file, framework="pt"))
                    for name in opened.keys():  # noqa: SIM118 (it is no dict and has no __iter__)
                        shapes[name] = tuple(opened.get_slice(name).get_shape())
                        readers[name] = opened.get_tensor
                else:
                    tensors = _unpickled(file)
                    shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
                    readers |= dict.fromkeys(tensors, tensors.__getitem__)

        def read(name: str) -> Tensor:
            with _read_errors(folder):
                return readers[name](name)

        yield ForeignModel(folder, values, shapes, read)


def _weight_files(folder: Path) -> list[Path]:
    files = [path.name for path in folder.iterdir()]
    name = next((name for name in WEIGHTS if stored_as(name, files)), None)
    if name is None:
        known = ", ".join(WEIGHTS)
        raise MythosError(f"{folder} has no weights: none of {known}, nor an index of one in several files")
    if name in files:
        return [folder / name]
    return indexed_files(folder / f"{name}.index.json", "Download the model again.")


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file written by torch.save; the unpickler creates tensors only and runs no other code."""
    # Files older than torch's zip format cannot be memory-mapped and are read completely.
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, struct.error) as error:
        # torch's restricted unpickler is written in Python and does not check the pickle for damage.
        raise ValueError(f"its pickle is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError("it contains other things than tensors by name")
    return loaded


@contextlib.contextmanager
def _read_errors(file: Path) -> Iterator[None]:
    """Raise MythosError for weights that cannot be read."""
    try:
        yield
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise MythosError(f"{file} cannot be read: {short_reason(error)}. Download the model again.") from error
