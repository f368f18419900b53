"""Models of other code bases on a disk or on the hub: a configuration, and tensors that are read one by one."""

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
"""Names of a file of weights, in the order of preference; with `.index.json` after it, of an index of several."""
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ForeignModel:
    """A model that is not ours, as it is stored."""

    folder: Path
    values: dict[str, Any]
    """Its config.json."""
    shapes: dict[str, tuple[int, ...]]
    """Of its tensors."""
    read: Callable[[str], Tensor]
    """Gives a tensor by name, as it is stored."""


def located(source: str | Path, revision: str | None = None, tokenizer_only: bool = False) -> Path:
    """The folder of a model, or of a tokenizer: itself, or what is downloaded of a repository of the hub.

    Of the weights safetensors are preferred, and no other kind is then downloaded.

    Raises:
        MythosError: there is no such folder, or the hub does not have it or cannot be reached.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise MythosError(f"--revision: got {revision}, and {source} is a folder; it is for an id of the hub")
        return folder
    if folder.exists() or not HUB_ID.fullmatch(str(source)):
        raise MythosError(f"{source} is no folder; give one, or OWNER/NAME of a repository on the hub")
    try:
        wanted = [*TOKENIZER_FILES]
        if not tokenizer_only:
            files = HfApi().list_repo_files(str(source), revision=revision)
            kind = next((name.rsplit(".", 1)[1] for name in WEIGHTS if stored_as(name, files)), None)
            wanted += [CONFIG_FILE, *([f"*.{kind}", "*.index.json"] if kind else [])]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=wanted))
    except Exception as error:  # of the network, of the hub, of a name that is none
        raise MythosError(
            f"{source}: there is no such folder, and the hub does not give it: {short_reason(error)}. Give a folder, "
            "or download it elsewhere by `hf download`."
        ) from error


def stored_as(name: str, files: Sequence[str]) -> bool:
    """Whether weights are there under a name, whole or by an index."""
    return name in files or f"{name}.index.json" in files


def read_values(folder: Path) -> dict[str, Any]:
    """A folder's config.json. Raises MythosError where there is none, or it is none."""
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
    """Open a folder; tensors can be read until the block ends, and lie in memory only as long as they are used.

    Raises:
        MythosError: there are no weights, or what is there cannot be read.
    """
    values = read_values(folder)
    readers: dict[str, Callable[[], Tensor]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    with contextlib.ExitStack() as stack:
        for file in _weights_files(folder):
            with _reading(file):
                if file.suffix == ".safetensors":
                    opened = stack.enter_context(safe_open(file, framework="pt"))
                    for name in opened.keys():  # noqa: SIM118
                        shapes[name] = tuple(opened.get_slice(name).get_shape())
                        readers[name] = lambda opened=opened, name=name: opened.get_tensor(name)
                else:
                    for name, tensor in _unpickled(file).items():
                        shapes[name], readers[name] = tuple(tensor.shape), lambda tensor=tensor: tensor

        def read(name: str) -> Tensor:
            with _reading(folder):
                return readers[name]()

        yield ForeignModel(folder, values, shapes, read)


def _weights_files(folder: Path) -> list[Path]:
    there = [path.name for path in folder.iterdir()]
    name = next((name for name in WEIGHTS if stored_as(name, there)), None)
    if name is None:
        known = ", ".join(WEIGHTS)
        raise MythosError(f"{folder} has no weights: none of {known}, nor an index of one in several files")
    if name in there:
        return [folder / name]
    return indexed_files(folder / f"{name}.index.json", "Download the model again.")


def _unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch's own kind, by an unpickler that makes nothing else."""
    # Not mapped into memory, a file of the kind before zip archives is read as a whole.
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, struct.error) as error:
        # torch's unpickler is written in Python, and takes the pickle for a sound one.
        raise ValueError(f"its pickle is damaged: {type(error).__name__}: {error}") from error
    if not isinstance(loaded, dict) or not all(isinstance(tensor, Tensor) for tensor in loaded.values()):
        raise ValueError("it holds other things than tensors by name")
    return loaded


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Tell of weights that cannot be read as MythosError."""
    try:
        yield
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise MythosError(f"{file} cannot be read: {short_reason(error)}. Download the model again.") from error
