"""Trained models on disk: opened from a run directory, a checkpoint or an exported folder, and exported."""

import contextlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mythos.checkpoint import complete_checkpoints, read_meta, read_tensors, saved_shapes, verified_copy
from mythos.config import Config, config_from_dict, load_config
from mythos.data.tokenizer import REQUEST_FILE, Tokenizer
from mythos.errors import MythosError, short_reason
from mythos.model.config import ModelConfig
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.storage import MARKER, LocalStorage, locate, require_space

MODEL_TYPE = "mythos"
RUN_FILE = "config.yaml"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"

PREFIX = "model."
"""What the names of a model's tensors begin with in checkpoints, which hold the optimizer's beside them."""

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
    if "://" in text:
        return _open_checkpoint(text, device)
    with _told(path):
        exported, is_run = ((folder / file).is_file() for file in (CONFIG_FILE, RUN_FILE))
        what = "it is no model" if folder.exists() else "there is nothing"
    if exported:
        return _open_export(folder, device)
    if is_run:
        run = load_config(folder / RUN_FILE)
        place = run.checkpoint.dir or folder / "checkpoints"
        with _told(place):
            found = complete_checkpoints(place)
        if not found:
            raise MythosError(
                f"{path}: the run has no complete checkpoint yet. Runs save every checkpoint.every steps and at their "
                "end; continue it with the command that started it."
            )
        return _open_checkpoint(found[-1], device, folder)
    if folder.name.startswith("step-"):
        return _open_checkpoint(text, device)
    raise MythosError(
        f"{path}: {what}. Give a run directory (with {RUN_FILE}), a checkpoint (checkpoints/step-XXXXXXXX in it), or a "
        f"folder written by scripts/export_hf.py (with {CONFIG_FILE})."
    )


@contextlib.contextmanager
def _told(path: str | Path) -> Iterator[None]:
    """Tell of a place that cannot be looked at as MythosError."""
    try:
        yield
    except MythosError:
        raise
    except Exception as error:  # libraries of remote file systems share no base class
        raise MythosError(f"{path} cannot be read: {short_reason(error)}") from error


def run_directory(path: str | Path) -> Path | None:
    """The run directory that a path is, or that lies two folders above it, as above a checkpoint; None without one."""
    folder = Path(os.path.abspath(path))
    places = [] if "://" in str(path) else [folder, folder.parent.parent]
    return next((place for place in places if (place / RUN_FILE).is_file()), None)


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
    with _told(path):
        complete = name.removeprefix("step-").isdigit() and storage.exists(name, MARKER)
    if not complete:
        raise MythosError(
            f"{path} is no complete checkpoint: a folder step-XXXXXXXX with a file '{MARKER}', which is written last."
        )
    meta = read_meta(path)
    if not isinstance(meta.get("config"), dict) or not isinstance(meta.get("step"), int):
        raise MythosError(f"checkpoint {path} is damaged: its meta.json lacks the configuration or the step")
    run = config_from_dict(meta["config"])
    with verified_copy(path) as copy:
        shapes = saved_shapes(path, copy)
        there = {key.removeprefix(PREFIX): shapes[key] for key in shapes if key.startswith(PREFIX)}
        model = _fitting_model(str(path), run.model, there).to_empty(device=device)
        tensors = {PREFIX + name: tensor for name, tensor in _tensors(model).items()}
        read_tensors(path, copy, tensors, no_dist=True)
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
    try:
        with safe_open(folder / WEIGHTS_FILE, framework="pt") as weights:
            there = {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys()}  # noqa: SIM118
            model = _fitting_model(str(folder), config, there).to_empty(device=device)
            for key, tensor in _tensors(model).items():
                tensor.copy_(weights.get_tensor(key))
    except (OSError, SafetensorError) as error:
        raise MythosError(f"{folder / WEIGHTS_FILE} cannot be read: {error}. Export the model again.") from error
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


def _fitting_model(path: str, config: ModelConfig, there: dict[str, tuple[int, ...]]) -> RecurrentDepthTransformer:
    """A model in eval mode on the meta device whose tensors have the names and shapes of those in a file.

    No memory is asked for before that is known: sizes in a damaged configuration may be of any order.

    Raises MythosError for differing tensors, and for sizes that no model can have.
    """
    try:
        if config.prelude_layers + config.core_layers + config.coda_layers > len(there):
            raise ValueError(f"more layers than the {len(there)} tensors in the file")
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config).eval()
    except (RuntimeError, TypeError, ValueError) as error:  # of torch, where a size overflows
        raise MythosError(
            f"{path} does not fit its own configuration: {short_reason(error)}. It is damaged."
        ) from error
    here = {name: tuple(tensor.shape) for name, tensor in _tensors(model).items()}
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        first = differing[0]
        raise MythosError(
            f"{path} does not fit its own configuration: {len(differing)} tensors differ, first {first}: "
            f"{there.get(first, 'absent')} in the file, {here.get(first, 'absent')} in the model. It is damaged, or of "
            "another version of mythos."
        )
    return model


def _tensors(model: RecurrentDepthTransformer) -> dict[str, Tensor]:
    """Every tensor of the model by name, the live ones."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items()}
