"""Trained models on disk: opened from a run directory, a checkpoint or an exported folder, and exported."""

import json
import os
import platform
import shutil
import tempfile
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from mythos.checkpoint import complete_checkpoints, read_meta
from mythos.config import Config, config_from_dict, load_config
from mythos.data.tokenizer import REQUEST_FILE, Tokenizer
from mythos.errors import MythosError, short_reason
from mythos.model.config import ModelConfig
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.storage import MARKER, LocalStorage, checksum, locate, require_space

MODEL_TYPE = "mythos"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"

HEADER = {"model_type", "mean_loops", "step", "versions"}
"""What an exported config.json says beside the fields of the model."""


@dataclass(frozen=True)
class OpenedModel:
    """A trained model in eval mode, with what it takes to use it."""

    model: RecurrentDepthTransformer
    tokenizer: Tokenizer | None
    """None for a run without text."""
    mean_loops: int
    """Mean loops of training, rounded: what 'full depth' means."""
    step: int
    """Optimizer steps it was trained for."""
    run: Config | None
    """The run's configuration; None for an exported model."""
    source: str
    """Where the weights came from."""


def open_model(path: str | Path, device: torch.device | str = "cpu") -> OpenedModel:
    """Open a run directory (its newest complete checkpoint), a checkpoint step-XXXXXXXX, or an exported folder.

    A checkpoint may be of any number of processes and in any storage that runs write to; every file is compared with
    its checksum. Only safetensors and JSON are read. Parameters are float32.

    Raises:
        MythosError: the path is none of these, a run has no complete checkpoint, or what is there is damaged.
    """
    text = str(path).rstrip("/") or "/"
    folder = Path(text)
    if "://" not in text and (folder / CONFIG_FILE).is_file():
        return _open_export(folder, device)
    if "://" in text or folder.name.startswith("step-"):
        return _open_checkpoint(text, device)
    if (folder / "config.yaml").is_file():
        run = load_config(folder / "config.yaml")
        found = complete_checkpoints(run.checkpoint.dir or folder / "checkpoints")
        if not found:
            raise MythosError(
                f"{path}: the run has no complete checkpoint yet. Runs save every checkpoint.every steps and at their "
                "end; continue it with the command that started it."
            )
        return _open_checkpoint(found[-1], device, folder)
    what = "there is nothing" if "://" not in text and not folder.exists() else "it is no model"
    raise MythosError(
        f"{path}: {what}. Give a run directory (with config.yaml), a checkpoint (checkpoints/step-XXXXXXXX in it), or "
        f"a folder written by scripts/export_hf.py (with {CONFIG_FILE})."
    )


def export_model(opened: OpenedModel, folder: str | Path) -> None:
    """Write a folder of config.json, model.safetensors and the tokenizer's files, whole or not at all.

    config.json holds `model_type: mythos`, every field of the model section, the mean loops, the steps of training and
    the versions it was written with. The tensors have the names of the model's parameters and buffers.

    Raises:
        MythosError: the folder has something in it, or cannot be written.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise MythosError(f"{folder} exists and is not empty; give a folder that is new or empty.")
    header = {
        "model_type": MODEL_TYPE,
        "mean_loops": opened.mean_loops,
        "step": opened.step,
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("mythos-rdt", "torch", "safetensors")},
    }
    tensors = {name: tensor.cpu().contiguous() for name, tensor in _tensors(opened.model).items()}
    try:
        aside = folder.with_name(f".{folder.name}.{os.getpid()}")
    except ValueError as error:  # "."
        raise MythosError(f"{folder} has no name; give a folder that is new or empty.") from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        require_space(folder.parent, sum(tensor.nbytes for tensor in tensors.values()))
        aside.mkdir()
        if opened.tokenizer is not None:
            opened.tokenizer.save(aside / "tokenizer")
            for file in (aside / "tokenizer").iterdir():
                file.rename(aside / file.name)
            (aside / "tokenizer").rmdir()
        save_file(tensors, aside / WEIGHTS_FILE, metadata={"format": "pt"})
        values = header | opened.model.config.model_dump(mode="json")
        (aside / CONFIG_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        aside.replace(folder)
    except (OSError, SafetensorError) as error:
        raise MythosError(f"{folder} cannot be written: {error}. Make room or give another folder.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _open_checkpoint(path: Path | str, device: torch.device | str, run_dir: Path | None = None) -> OpenedModel:
    storage, name = locate(path)
    if not name.removeprefix("step-").isdigit() or not storage.exists(name, MARKER):
        raise MythosError(
            f"{path} is no complete checkpoint: a folder step-XXXXXXXX with a file '{MARKER}', which is written last."
        )
    meta = read_meta(path)
    if not isinstance(meta.get("config"), dict) or not isinstance(meta.get("step"), int):
        raise MythosError(f"checkpoint {path} is damaged: its meta.json lacks the configuration or the step")
    run = config_from_dict(meta["config"])
    model = _empty_model(run.model, device)
    _load_checkpoint(path, meta, {f"model.{name}": tensor for name, tensor in _tensors(model).items()})
    # A checkpoint holds no tokenizer: it lies beside the checkpoints, or with the run that wrote them elsewhere.
    places = [run_dir or run.run_dir]
    if isinstance(storage, LocalStorage):
        places.insert(0, Path(path).parent.parent)
    tokenizer = next((place / "tokenizer" for place in places if (place / "tokenizer").is_dir()), None)
    return OpenedModel(
        model,
        Tokenizer.load(tokenizer) if tokenizer else None,
        round(run.depth_mean),
        meta["step"],
        run,
        str(path),
    )


def _load_checkpoint(path: Path | str, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Fill tensors from a checkpoint that holds them among others, however they were sharded."""
    storage, name = locate(path)
    with ExitStack() as stack:
        if isinstance(storage, LocalStorage):
            folder = storage.address(name)
        else:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"mythos-{name}-")))
        try:
            for file, expected in meta.get("files", {}).items():
                if not isinstance(storage, LocalStorage):
                    with storage.open(name, file) as source, open(folder / file, "wb") as target:
                        shutil.copyfileobj(source, target)
                with open(folder / file, "rb") as stream:
                    if checksum(stream) != expected:
                        raise MythosError(f"checkpoint {path} is damaged: {file} is not as it was written")
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
            reader = dcp.HuggingFaceStorageReader(str(folder))
            saved = reader.read_metadata().state_dict_metadata
            there = {key: tuple(saved[key].size) for key in saved if key.startswith("model.")}
            _check_fit(str(path), there, tensors)
            dcp.load(tensors, storage_reader=reader, no_dist=True)
        except (OSError, SafetensorError, CheckpointException) as error:
            reason = str(error) or type(error).__name__
            raise MythosError(f"checkpoint {path} is damaged: {reason.splitlines()[0]}") from error


def _open_export(folder: Path, device: torch.device | str) -> OpenedModel:
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.get("model_type") != MODEL_TYPE:
            raise MythosError(
                f"{path}: model_type is {values.get('model_type')!r}; only models of type {MODEL_TYPE!r} are opened, "
                "which scripts/export_hf.py writes"
            )
        config = ModelConfig.model_validate({key: value for key, value in values.items() if key not in HEADER})
        mean_loops, step = int(values["mean_loops"]), int(values["step"])
        if config.vocab_size == "auto" or mean_loops < 1:
            raise ValueError(f"vocab_size is {config.vocab_size}, mean_loops {mean_loops}")
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        else:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise MythosError(f"{path} cannot be read as the configuration of a model: {reason}") from error
    model = _empty_model(config, device)
    tensors = _tensors(model)
    try:
        weights = load_file(folder / WEIGHTS_FILE, device=str(device))
    except (OSError, SafetensorError) as error:
        raise MythosError(f"{folder / WEIGHTS_FILE} cannot be read: {error}. Export the model again.") from error
    _check_fit(str(folder), {key: tuple(value.shape) for key, value in weights.items()}, tensors)
    with torch.no_grad():
        for key, tensor in tensors.items():
            tensor.copy_(weights[key])
    return OpenedModel(model, _exported_tokenizer(folder), mean_loops, step, None, str(folder))


def _exported_tokenizer(folder: Path) -> Tokenizer | None:
    if not (folder / TOKENIZER_FILE).is_file():
        return None
    # Imported here because it costs a second or more. (Asked by AutoTokenizer, the library would look up the model's
    # type, which it does not know.)
    from transformers import PreTrainedTokenizerFast

    try:
        request = json.loads((folder / REQUEST_FILE).read_text(encoding="utf-8"))
        return Tokenizer(PreTrainedTokenizerFast.from_pretrained(str(folder)), request)
    except Exception as error:  # the library's errors share no base class
        raise MythosError(
            f"{folder}: its tokenizer cannot be read: {short_reason(error)}. Export the model again."
        ) from error


def _empty_model(config: ModelConfig, device: torch.device | str) -> RecurrentDepthTransformer:
    """A model in eval mode whose parameters are still to be filled."""
    with torch.device("meta"):
        model = RecurrentDepthTransformer(config)
    return model.to_empty(device=device).eval()


def _tensors(model: RecurrentDepthTransformer) -> dict[str, Tensor]:
    """Every tensor of the model by name, the live ones."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items()}


def _check_fit(path: str, there: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]) -> None:
    here = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        first = differing[0]
        raise MythosError(
            f"{path} does not fit its own configuration: {len(differing)} tensors differ, first {first}: "
            f"{there.get(first, 'absent')} in the file, {here.get(first, 'absent')} in the model. It is damaged, or of "
            "another version of mythos."
        )
