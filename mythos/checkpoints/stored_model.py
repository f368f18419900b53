"""Trained models on disk: run directories, checkpoints and exported folders."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from mythos.checkpoints.stored_checkpoint import (
    complete_checkpoints,
    read_meta,
    read_tensors,
    saved_shapes,
    verified_copy,
)
from mythos.config.inherited import CONFIG_FILE, MODEL_TYPE, RUN_FILE, TOKENIZER_FILE
from mythos.config.loading import config_from_dict, load_config
from mythos.config.model_paths import incomplete_checkpoint, require_model
from mythos.config.sections import Config
from mythos.data.tokenizer import Tokenizer
from mythos.errors import MythosError, short_reason, without_credentials
from mythos.files.storage import MARKER, LocalStorage, is_step, locate
from mythos.files.text import read_json, unusable_text
from mythos.model.config import ModelConfig, model_contradictions
from mythos.model.layers import local_part, local_slices
from mythos.model.rdt import RecurrentDepthTransformer
from mythos.section import MOST, MOST_LOOPS

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = f"{WEIGHTS_FILE}.index.json"

PREFIX = "model."
"""Prefix of the names of a model's tensors in exports and in checkpoints, which have the optimizer's tensors too."""

TRANSFORMERS_KEYS = {
    "architectures",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "eos_token_id",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "transformers_version",
    "use_cache",
}
"""Keys that transformers adds to a config.json by itself."""

HEADER = {
    "auto_map",
    "mask_documents",
    "mean_loops",
    "model_type",
    "sequence_length",
    "step",
    "versions",
} | TRANSFORMERS_KEYS
"""Keys of an exported config.json beside the fields of the model."""


@dataclass(frozen=True)
class OpenedModel:
    """A trained model in eval mode, with everything needed to use it."""

    model: RecurrentDepthTransformer
    tokenizer: Tokenizer | None
    """None for a run without text."""
    mean_loops: int
    """Mean loops of training, rounded; called 'full depth'."""
    step: int
    """Optimizer steps of its training."""
    run: Config | None
    """The run's configuration; None for an exported model."""
    source: str
    """Path or URL of the weights, for people and files of results: without credentials."""
    corpora: Mapping[str, str] = field(default_factory=dict)
    """Hash of the text of each data source in training, by its name; empty if it is not known."""
    sequence_length: int | None = None
    """Tokens of a sequence in training; None for exports of earlier versions, and models of other projects."""
    mask_documents: bool = False
    """Whether a token saw those of its own document only (`data.mask_documents`)."""

    def require_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises MythosError if there is none."""
        if self.tokenizer is not None:
            return self.tokenizer
        if self.run is not None and self.run.data.kind == "reasoning":
            raise MythosError(f"{self.source} is of a reasoning run, which knows no text: use `mythos reasoning`")
        raise MythosError(
            f"{self.source}: there is no tokenizer beside it, so no text can be encoded. Give the run directory, or "
            "copy its folder tokenizer/ beside the folder that contains the checkpoint."
        )


@dataclass(frozen=True)
class StoredModel:
    """A trained model on disk: its configuration, and a function that reads its tensors."""

    model: RecurrentDepthTransformer
    """On the meta device, in eval mode: names and shapes only."""
    read: Callable[[dict[str, Tensor]], None]
    """Fills tensors in place, by name; any subset of the model's. Of a DTensor, this rank's part."""
    tokenizer: Path | None
    """Folder of its tokenizer; None for a run without text."""
    mean_loops: int
    step: int
    run: Config | None
    source: str
    corpora: Mapping[str, str] = field(default_factory=dict)
    sequence_length: int | None = None
    mask_documents: bool = False


def open_model(path: str | Path, device: torch.device | str = "cpu") -> OpenedModel:
    """Open a run directory (its newest complete checkpoint), a checkpoint step-XXXXXXXX, or an exported folder.

    A checkpoint may have been written by any number of processes and be in any storage that runs write to; every file
    is compared with its checksum. Only safetensors and JSON are read. Parameters are float32.

    Raises MythosError if the path is none of these, a run has no complete checkpoint, or a file is damaged.
    """
    with stored_model(path) as stored:
        model = stored.model.to_empty(device=device)
        stored.read(tensors_of(model))
        tokenizer = None if stored.tokenizer is None else Tokenizer.load(stored.tokenizer)
        source = without_credentials(stored.source)
        return OpenedModel(
            model,
            tokenizer,
            stored.mean_loops,
            stored.step,
            stored.run,
            source,
            stored.corpora,
            stored.sequence_length,
            stored.mask_documents,
        )


@contextlib.contextmanager
def stored_model(path: str | Path) -> Iterator[StoredModel]:
    """Open a model like `open_model`, without its tensors, which can be read until the block ends.

    Raises MythosError as `open_model`.
    """
    text = str(path).rstrip("/") or "/"
    folder = Path(text)
    run_dir = None
    if "://" not in text:
        with _readable(path):
            require_model(text)
            exported, is_run = ((folder / file).is_file() for file in (CONFIG_FILE, RUN_FILE))
        if exported:
            with _stored_export(folder) as stored:
                yield stored
            return
        if is_run:
            run = load_config(folder, to_train=False)
            directory = run.checkpoint.dir or folder / "checkpoints"
            with _readable(directory):
                complete = complete_checkpoints(directory)
            if not complete:
                elsewhere = f" in {directory}, its checkpoint.dir" if run.checkpoint.dir else ""
                raise MythosError(
                    f"{path}: the run has no complete checkpoint yet{elsewhere}. Runs save every "
                    "checkpoint.every steps and at their end; continue it with the command that started it."
                )
            text, run_dir = str(complete[-1]), folder
    with _stored_checkpoint(text, run_dir) as stored:
        yield stored


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Turn an error of reading a directory into MythosError."""
    try:
        yield
    except MythosError:
        raise
    except Exception as error:  # libraries of remote file systems share no base class
        raise MythosError(f"{path} cannot be read: {short_reason(error)}") from error


def tensors_of(model: RecurrentDepthTransformer) -> dict[str, Tensor]:
    """Every tensor of a model by name; not copies."""
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor.detach() for name, tensor in named.items()}


@contextlib.contextmanager
def _stored_checkpoint(path: Path | str, run_dir: Path | None) -> Iterator[StoredModel]:
    storage, name = locate(path)
    with _readable(path):
        complete = is_step(name) and storage.exists(name, MARKER)
    if not complete:
        raise incomplete_checkpoint(path)
    meta = read_meta(path)
    if not isinstance(meta.get("config"), dict) or type(meta.get("step")) is not int:
        raise MythosError(f"checkpoint {path} is damaged: its meta.json lacks the configuration or the step")
    run = config_from_dict(meta["config"], to_train=False)
    # A checkpoint has no tokenizer. It is beside the directory of checkpoints, or, if that is elsewhere, in the run's.
    folders = [run_dir or run.run_dir]
    if isinstance(storage, LocalStorage):
        folders.insert(0, Path(path).parent.parent)
    tokenizer = next((folder / "tokenizer" for folder in folders if (folder / "tokenizer").is_dir()), None)
    with verified_copy(path) as copy:
        shapes = saved_shapes(path, copy)
        model_shapes = {key.removeprefix(PREFIX): shapes[key] for key in shapes if key.startswith(PREFIX)}

        def read(tensors: dict[str, Tensor]) -> None:
            read_tensors(path, copy, {PREFIX + name: tensor for name, tensor in tensors.items()}, no_dist=True)

        model = _fitting_model(str(path), run.model, model_shapes)
        yield StoredModel(
            model,
            read,
            tokenizer,
            round(run.depth_mean),
            meta["step"],
            run,
            str(path),
            _corpora(meta),
            run.data.sequence_length,
            run.data.mask_documents,
        )


def _corpora(meta: dict[str, Any]) -> dict[str, str]:
    """The hash of each data source's text in a checkpoint's meta.json, by its name; {} for a reasoning task."""
    data = meta.get("data")
    sources = data.get("sources") if isinstance(data, dict) else None
    named = sources.items() if isinstance(sources, dict) else ()
    return {name: source["corpus"] for name, source in named if isinstance(source, dict) and "corpus" in source}


@contextlib.contextmanager
def _stored_export(folder: Path) -> Iterator[StoredModel]:
    path = folder / CONFIG_FILE
    try:
        values = read_json(path)
        if values.get("model_type") != MODEL_TYPE:
            raise MythosError(
                f"{path}: model_type is {values.get('model_type')!r}; only models of type {MODEL_TYPE!r} are opened, "
                "which `mythos export` writes"
            )
        config = ModelConfig.model_validate({key: value for key, value in values.items() if key not in HEADER})
        mean_loops, step = (int(values[name]) for name in ("mean_loops", "step"))
        length, masked = values.get("sequence_length"), values.get("mask_documents", False)
        if config.vocab_size == "auto" or not (1 <= mean_loops <= MOST_LOOPS and 0 <= step <= MOST):
            raise ValueError(f"vocab_size is {config.vocab_size}, mean_loops {mean_loops}, step {step}")
        if length is not None and not (type(length) is int and 1 <= length <= config.context_length):
            raise ValueError(f"sequence_length is {length!r}, context_length {config.context_length}")
        if type(masked) is not bool:
            raise ValueError(f"mask_documents is {masked!r}")
        problems = [f"{', '.join(names)}: {message}" for names, message in model_contradictions(config)]
        if problems or unusable_text(config.preset):
            raise ValueError("; ".join(problems) or f"preset is {config.preset!a}")
    except (OSError, ValueError, OverflowError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ValidationError):
            reason = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        else:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise MythosError(f"{path} cannot be read as the configuration of a model: {reason}") from error
    index = folder / INDEX_FILE
    files = indexed_files(index, "Export the model again.") if index.is_file() else [folder / WEIGHTS_FILE]
    with contextlib.ExitStack() as stack:
        places: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        opened = {}
        for file in files:
            with _reading(file):
                opened[file] = stack.enter_context(safe_open(file, framework="pt"))
                for key in opened[file].keys():  # noqa: SIM118
                    name = key.removeprefix(PREFIX)  # exports of earlier versions have no prefix
                    places[name] = file, key
                    shapes[name] = tuple(opened[file].get_slice(key).get_shape())

        def read(tensors: dict[str, Tensor]) -> None:
            for name, tensor in tensors.items():
                file, key = places[name]
                with _reading(file):
                    if isinstance(tensor, DTensor):
                        local_part(tensor).copy_(opened[file].get_slice(key)[local_slices(tensor)])
                    else:
                        tensor.copy_(opened[file].get_tensor(key))

        tokenizer = folder if (folder / TOKENIZER_FILE).is_file() else None
        model = _fitting_model(str(folder), config, shapes)
        source = str(folder)
        yield StoredModel(model, read, tokenizer, mean_loops, step, None, source, {}, length, masked)


def indexed_files(index: Path, advice: str) -> list[Path]:
    """The files, beside an index of tensors, that it names. Raises MythosError with the advice if it is damaged."""
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if any(Path(name).name != name or name == ".." or unusable_text(name) for name in names):
            raise ValueError("it names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise MythosError(f"{index} cannot be read: {error}. {advice}") from error
    return [index.parent / name for name in names]


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Turn an error of reading an export's weights into MythosError."""
    try:
        if not file.is_file():  # opening a FIFO would wait for a writer
            raise FileNotFoundError("there is no such file")
        yield
    except (OSError, SafetensorError) as error:
        raise MythosError(f"{file} cannot be read: {error}. Export the model again.") from error


def _fitting_model(path: str, config: ModelConfig, there: dict[str, tuple[int, ...]]) -> RecurrentDepthTransformer:
    """A model in eval mode on the meta device whose tensors have the names and shapes `there`, of a file.

    Nothing is allocated before the shapes are compared: a damaged configuration may have any sizes.

    Raises MythosError for differing tensors, and for sizes that no model can have.
    """
    try:
        if config.prelude_layers + config.core_layers + config.coda_layers > len(there):
            raise ValueError(f"more layers than the {len(there)} tensors in the file")
        with torch.device("meta"):
            model = RecurrentDepthTransformer(config).eval()
    except (RuntimeError, TypeError, ValueError) as error:  # torch raises all three for sizes that overflow
        raise MythosError(
            f"{path} does not fit its own configuration: {short_reason(error)}. It is damaged."
        ) from error
    here = {name: tuple(tensor.shape) for name, tensor in tensors_of(model).items()}
    differing = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if differing:
        first = differing[0]
        raise MythosError(
            f"{path} does not fit its own configuration: {len(differing)} tensors differ, first {first}: "
            f"{there.get(first, 'absent')} in the file, {here.get(first, 'absent')} in the model. It is damaged, or of "
            "another version of mythos."
        )
    return model
