"""What a run takes from the configuration of the model that it starts from (train.init_from), read without torch."""

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


def inherited(source: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The sections `model` and `tokenizer` of a run with these values, completed by those of a model on a disk.

    The source takes the place of the preset: fields that the run names are kept. Its tokenizer is taken where the run
    is on text and names none; a run that names one has as many token ids as that has. Once a run has a checkpoint, what
    it began with is read from its own directory: it can be continued when the source has changed or is gone.

    Raises MythosError where the source is no model that mythos has written, or its configuration cannot be read.
    """
    run, own = values.get("run", {}), values.get("tokenizer", {})
    run_dir = Path(run.get("dir") or f"runs/{run.get('name', 'debug')}")
    checkpoints = values.get("checkpoint", {}).get("dir") or run_dir / "checkpoints"
    model, tokenizer = _begun(run_dir, checkpoints, source) or _stored(source)
    try:
        ModelConfig.model_validate(model)
    except ValidationError as error:
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise MythosError(f"the configuration in {source} is damaged: {told}") from error
    if values.get("data", {}).get("kind") == "reasoning":
        tokenizer = None
    elif own:
        model["vocab_size"], tokenizer = "auto", None
    sections = {"model": {**model, **values.get("model", {})}}
    return sections if tokenizer is None else sections | {"tokenizer": tokenizer}


Sections = tuple[dict[str, Any], dict[str, Any] | None]
"""The model section, and the tokenizer's, if there is one."""


def _begun(run_dir: Path, checkpoints: str | Path, source: str) -> Sections | None:
    """What the run in a directory began with, if it began from this source and has a checkpoint since."""
    with contextlib.suppress(Exception):  # of a file or a remote file system: then the source is read, or told of
        if open_storage(checkpoints).complete():
            saved, _ = load_yaml(read_text(run_dir / RUN_FILE))
            began = saved["train"].get("init_from")
            if began is not None and Path(began) == Path(source):  # however its separators are written
                return _model_fields(saved["model"]), saved["tokenizer"]
    return None


def _stored(source: str) -> Sections:
    """The sections of a run directory, a checkpoint or an export."""
    folder = Path(source)
    try:
        if "://" not in source and (folder / CONFIG_FILE).is_file():
            section, places = read_json(folder / CONFIG_FILE), [folder]
            if section.get("model_type") != MODEL_TYPE:
                raise MythosError(
                    f"{source} is a model of type {section.get('model_type')!r}, not of mythos: "
                    "`mythos import` makes published looped models ours, `mythos retrofit` dense ones"
                )
        elif "://" not in source and (folder / RUN_FILE).is_file():
            section = load_yaml(read_text(folder / RUN_FILE))[0]["model"]
            places = [folder / "tokenizer"]
        else:
            storage, name = locate(source)
            if not storage.exists(name, MARKER):
                raise MythosError(
                    f"{source} is neither a run directory (with {RUN_FILE}), nor a complete "
                    f"checkpoint (checkpoints/step-XXXXXXXX, with a file '{MARKER}'), nor an exported folder (with "
                    f"{CONFIG_FILE})"
                )
            saved = parse_json(storage.read(name, META))["config"]
            section, run = saved["model"], saved["run"]
            places = [] if "://" in source else [folder.absolute().parent.parent / "tokenizer"]
            places.append(Path(run["dir"] or f"runs/{run['name']}") / "tokenizer")
        tokenizer = next((place for place in places if (place / TOKENIZER_FILE).is_file()), None)
        return _model_fields(section), None if tokenizer is None else {"name": str(tokenizer)}
    except MythosError:
        raise
    except Exception as error:  # libraries of remote file systems share no base class
        raise MythosError(f"{source} cannot be read: {short_reason(error)}") from error


def _model_fields(section: Mapping[str, Any]) -> dict[str, Any]:
    return {name: section[name] for name in ModelConfig.model_fields if name in section}
