"""Configuration that a run takes over from the model that it starts from (train.init_from), read without torch."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from mythos.errors import MythosError, short_reason
from mythos.files.plain_yaml import load_yaml
from mythos.files.storage import MARKER, META, locate, open_storage
from mythos.files.text import parse_json, read_json, read_text
from mythos.model.config import ModelConfig

MODEL_TYPE = "mythos"
RUN_FILE = "config.yaml"
CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"

ModelAndTokenizer = tuple[dict[str, Any], dict[str, Any] | None]
"""The fields of the model section, and of the tokenizer section if there is a tokenizer."""


def inherited_sections(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the sections `model` and `tokenizer` of a run from a model on disk.

    `source` is train.init_from, `values` are the run's own settings. The source replaces the preset: fields that the
    run sets are kept. Its tokenizer is used if the run is on text and names none; a run that names one gets as many
    token ids as that tokenizer has. Once a run has a checkpoint, the sections are read from its own directory, so it
    can continue after the source has changed or is gone.

    Raises MythosError if the source was not written by mythos, or its configuration cannot be read.
    """
    run, own_tokenizer = values.get("run", {}), values.get("tokenizer", {})
    run_dir = Path(run.get("dir") or f"runs/{run.get('name', 'debug')}")
    checkpoints = values.get("checkpoint", {}).get("dir") or run_dir / "checkpoints"
    model, tokenizer = _from_own_run(run_dir, checkpoints, source) or _from_source(source)
    try:
        ModelConfig.model_validate(model)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise MythosError(f"the configuration in {source} is damaged: {problems}") from error
    if values.get("data", {}).get("kind") == "reasoning":
        tokenizer = None
    elif own_tokenizer:
        model["vocab_size"], tokenizer = "auto", None
    sections = {"model": {**model, **values.get("model", {})}}
    return sections if tokenizer is None else sections | {"tokenizer": tokenizer}


def _from_own_run(run_dir: Path, checkpoints: str | Path, source: str) -> ModelAndTokenizer | None:
    """Read the sections of the run itself, if it started from this source and has a checkpoint."""
    # Any failure here is no error: the source is read instead, and reports what is wrong with it.
    with contextlib.suppress(Exception):
        if open_storage(checkpoints).complete():
            config, _ = load_yaml(read_text(run_dir / RUN_FILE))
            init_from = config["train"].get("init_from")
            if init_from is not None and Path(init_from) == Path(source):  # equal but for redundant separators
                return _model_fields(config["model"]), config["tokenizer"]
    return None


def _from_source(source: str) -> ModelAndTokenizer:
    """Read the sections of a run directory, a checkpoint or an export."""
    folder, is_local = Path(source), "://" not in source
    try:
        if is_local and (folder / CONFIG_FILE).is_file():
            model, tokenizers = read_json(folder / CONFIG_FILE), [folder]
            if model.get("model_type") != MODEL_TYPE:
                raise MythosError(
                    f"{source} is a model of type {model.get('model_type')!r}, not of mythos: `mythos import` converts "
                    "published looped models, `mythos retrofit` dense ones"
                )
        elif is_local and (folder / RUN_FILE).is_file():
            model, tokenizers = load_yaml(read_text(folder / RUN_FILE))[0]["model"], [folder / "tokenizer"]
        else:
            model, tokenizers = _from_checkpoint(source)
        tokenizer = next((path for path in tokenizers if (path / TOKENIZER_FILE).is_file()), None)
        return _model_fields(model), None if tokenizer is None else {"name": str(tokenizer)}
    except MythosError:
        raise
    except Exception as error:  # libraries of remote file systems share no base class
        raise MythosError(f"{source} cannot be read: {short_reason(error)}") from error


def _from_checkpoint(source: str) -> tuple[dict[str, Any], list[Path]]:
    """Read a checkpoint's model section, and the folders where its tokenizer may be."""
    storage, name = locate(source)
    if not storage.exists(name, MARKER):
        raise MythosError(
            f"{source} is neither a run directory (with {RUN_FILE}), nor a complete checkpoint "
            f"(checkpoints/step-XXXXXXXX, with a file '{MARKER}'), nor an exported folder (with {CONFIG_FILE})"
        )
    config = parse_json(storage.read(name, META))["config"]
    run = config["run"]
    beside = [] if "://" in source else [Path(source).absolute().parent.parent / "tokenizer"]
    return config["model"], [*beside, Path(run["dir"] or f"runs/{run['name']}") / "tokenizer"]


def _model_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: section[name] for name in ModelConfig.model_fields if name in section}
