"""Load the whole configuration: one YAML file per run, overrides by key=value, every problem reported at once."""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mythos.config.checking import (
    Problems,
    allowed,
    apply_override,
    field_schemas,
    read_yaml,
    sections,
    shown,
    suggestion,
    valid_values,
)
from mythos.config.inherited import CONFIG_FILE, RUN_FILE, inherited_sections
from mythos.config.model_paths import did_you_mean
from mythos.config.presets import PRESETS
from mythos.config.rules import contradictions, training_contradictions
from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.files.local import write_whole
from mythos.files.storage import is_step
from mythos.model.config import ModelConfig
from mythos.section import Section

logger = logging.getLogger(__name__)


def packaged_configs() -> dict[str, Path]:
    """Return the configurations that come with the package, by name: the files of configs/."""
    # In a checkout a link to configs/; an installation has a folder of its own.
    folder = Path(__file__).parents[1] / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def config_file(name: str) -> Path:
    """Resolve a path, a run directory, or the name of a packaged configuration if no file has that name.

    Raises MythosError for a folder that is no run, and for a name without suffix that is none of these.
    """
    path, packaged = Path(name), packaged_configs()
    if (path / RUN_FILE).is_file():
        return path / RUN_FILE
    if path.is_dir() and name not in packaged:
        raise MythosError(f"{name}: {_folder_problem(path)}")
    if path.name != name and not path.suffix and not os.path.lexists(path):
        raise MythosError(
            f"{name}: no such file or folder; give the path of a YAML file, or the directory of a run to continue."
            f"{did_you_mean(path)}"
        )
    if path.is_file() or path.name != name or path.suffix:
        return path
    if name not in packaged:
        raise MythosError(
            f"{name}: neither a file nor a configuration that comes with mythos ({', '.join(packaged)}); give one of "
            f"these, the path of a YAML file, or a run directory.{did_you_mean(path)}"
        )
    return packaged[name]


def _folder_problem(folder: Path) -> str:
    """Say what to do with a folder that is no run directory."""
    if is_step(folder.name):
        return (
            f"a checkpoint, not a configuration. `mythos train {folder.parent.parent}` continues its run; for a run of "
            f"its own give a configuration with train.init_from={folder} (its weights) or run.resume={folder} (its "
            "optimizer, step and data too)"
        )
    if (folder / CONFIG_FILE).is_file():
        return f"a model, not a configuration. To start from its weights, give one with train.init_from={folder}"
    return (
        f"a folder without {RUN_FILE}; give a YAML file, or the directory of a run to continue.{did_you_mean(folder)}"
    )


def load_config(path: str | Path, overrides: Sequence[str] = (), *, to_train: bool = True) -> Config:
    """Read a YAML file, apply ``key.path=value`` overrides, fill in the preset, and check everything.

    ``path`` may be the name of a packaged configuration, or a run directory, whose config.yaml is read
    (:func:`config_file`); the run is then in that directory, wherever its configuration says that it is, and a relative
    ``checkpoint.dir`` is the directory that it was when the run was started. Values of overrides are YAML
    (``eval.loops=[1,4]``, ``depth.mean=null``); ``3e-4`` and ``1e9`` are numbers. An override of ``train.tokens``
    replaces ``train.steps`` of the file, and the other way round, with a warning. Set ``to_train`` to false to use a
    trained run: rules that only training needs are skipped, because the run may be older than they are.

    Raises MythosError with one line per problem.
    """
    problems = Problems(str(path), Config)
    file = config_file(str(path))
    in_file = read_yaml(file, problems)
    if file == Path(path) / RUN_FILE:
        in_file = _in_directory(in_file, Path(path))
        if to_train and not any(override.startswith("checkpoint.dir=") for override in overrides):
            _require_checkpoints(in_file, file)
    data = in_file
    for override in overrides:
        data = apply_override(data, override, problems)
    for option, name in replaced_fields(in_file, data, overrides):
        data = apply_override(data, f"{name}=null", problems)
        if os.environ.get("RANK", "0") == "0":
            old = in_file["train"][name.rpartition(".")[2]]
            logger.warning("%s on the command line replaces %s=%s of %s", option, name, shown(old), path)
    return _build(data, problems, to_train)


def replaced_fields(
    in_file: Mapping[str, Any], data: Mapping[str, Any], overrides: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield overrides of a field that excludes another one, set by the file only, and the name of that other field."""
    before, after = in_file.get("train"), data.get("train")
    if not isinstance(before, dict) or not isinstance(after, dict):
        return
    by_name = {override.partition("=")[0]: override for override in overrides}
    for name, other in (("steps", "tokens"), ("tokens", "steps")):
        option = by_name.get(f"train.{name}")
        if option and f"train.{other}" not in by_name and after.get(name) is not None and before.get(other) is not None:
            yield option, f"train.{other}"


def config_from_dict(data: Mapping[str, Any], *, to_train: bool = True) -> Config:
    """Build the configuration from plain values, as ``load_config`` does from a file.

    Raises MythosError with one line per problem.
    """
    return _build(dict(data), Problems("configuration", Config), to_train)


def overridden(data: dict[str, Any], overrides: Iterable[str], source: str) -> dict[str, Any]:
    """`data` with every ``key.path=value`` applied. Raises MythosError, which begins with `source`, for wrong ones."""
    problems = Problems(source, Config)
    for override in overrides:
        data = apply_override(data, override, problems)
    problems.raise_any()
    return data


def dump_config(config: Config) -> str:
    """Write every field as YAML, from which ``load_config`` builds an equal object."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def save_config(config: Config, path: str | Path) -> None:
    """Write :func:`dump_config` to a file, whole or not at all."""
    write_whole(Path(path), dump_config(config))


def describe(section: str | None = None) -> str:
    """Explain the configuration: its sections, or every field of one section with type, default and meaning.

    ``section`` is a name such as ``model`` or ``depth.curriculum``. Raises MythosError for an unknown name.
    """
    known = dict(sections(Config))
    if section is None:
        lines = [f"  {name:<12} {_summary(kind)}" for name, kind in known.items() if "." not in name]
        where = (
            "Fields are declared and explained in mythos/config/sections.py, mythos/model/config.py and "
            "mythos/config/data.py."
        )
        return "\n".join(
            ["Sections:", *lines, "", "mythos train --help SECTION prints every field of a section.", where]
        )
    if section not in known:
        raise MythosError(f"{section}: unknown section; {suggestion(section, list(known))}")
    lines = [f"{section}: {_summary(known[section])}"]
    schemas = field_schemas(known[section])
    for name, field in known[section].model_fields.items():
        path = f"{section}.{name}"
        if path in known:
            lines += ["", describe(path)]
        else:
            lines += ["", f"{path}: {allowed(schemas[name])} (default {shown(field.get_default())})"]
            lines += [f"    {line}" for line in (field.description or "").splitlines()]
    return "\n".join(lines)


def _summary(section: type[Section]) -> str:
    return (section.__doc__ or "").splitlines()[0]


def _in_directory(data: dict[str, Any], directory: Path) -> dict[str, Any]:
    """The configuration of a run to continue: run.dir set if its path leads elsewhere, run.resume auto if never.

    A relative checkpoint.dir, which only runs of earlier versions store, becomes absolute if the directory is found.
    """
    run, checkpoint = data.get("run") or {}, data.get("checkpoint") or {}
    if not isinstance(run, dict) or not isinstance(checkpoint, dict):  # reported when the values are checked
        return data
    stored = str(run.get("dir") or f"runs/{run.get('name', Config().run.name)}").replace("\0", "")
    moved = os.path.realpath(stored) != os.path.realpath(directory)
    changes = ({"dir": str(directory)} if moved else {}) | ({"resume": "auto"} if run.get("resume") == "never" else {})
    if place := next(filter(os.path.isdir, _former_places(checkpoint.get("dir"), stored, directory)), None):
        data = {**data, "checkpoint": {**checkpoint, "dir": place}}
    return {**data, "run": {**run, **changes}} if changes else data


def _is_relative(place: Any) -> bool:
    return isinstance(place, str) and place != "" and "://" not in place and not os.path.isabs(place)


def _former_places(place: Any, run_dir: str, directory: Path) -> Iterator[str]:
    """Directories that a run's relative `place` may mean: relative to where it was started, then to where we are.

    A run whose stored `run_dir` is a/b and that is in /x/a/b was started in /x.
    """
    if not _is_relative(place) or "\0" in place:
        return
    parts, real = Path(os.path.normpath(run_dir)).parts, Path(os.path.realpath(directory)).parts
    if not os.path.isabs(run_dir) and real[-len(parts) :] == parts:
        yield os.path.join(*real[: -len(parts)], place)
    yield os.path.abspath(place)


def _require_checkpoints(data: Mapping[str, Any], file: Path) -> None:
    """Raise MythosError if a run's checkpoint.dir is relative still: training would begin anew in another directory."""
    checkpoint = data.get("checkpoint")
    place = checkpoint.get("dir") if isinstance(checkpoint, dict) else None
    if _is_relative(place):
        raise MythosError(
            f"checkpoint.dir: {file} has {place}, which is relative to the folder that the run was started in, and "
            f"there is none here, in {os.getcwd()}. Give checkpoint.dir=PATH, the directory with its checkpoints."
        )


def _build(data: dict[str, Any], problems: Problems, to_train: bool) -> Config:
    """Check each field by itself, fill in preset and defaults, then check the fields against each other."""
    values = _with_tokenizer_of_tokens(_with_model(valid_values(Config, data, problems), problems))
    if not to_train:
        complete_stored_data(values.get("data", {}))
    if values["model"].get("injection") == "none":
        values.setdefault("eval", {}).setdefault("loops", [1])
    try:
        config = Config.model_validate(values)
    except ValidationError as error:  # in an inherited section: all other values have been validated
        for one in error.errors():
            path = ".".join(map(str, one["loc"]))
            problems.add(path, f"in {values.get('train', {}).get('init_from')}: {one['msg']}")
        problems.raise_any()
        raise
    if config.data.kind == "reasoning" and config.model.vocab_size == "auto":
        config = config.with_fields("model", vocab_size=config.data.task.vocabulary)
    for paths, message in contradictions(config):
        problems.add_contradiction(paths, message)
    if to_train:
        for paths, message in training_contradictions(config, problems.paths):
            problems.add_contradiction(paths, message)
    problems.raise_any()
    place = config.checkpoint.dir
    if to_train and place is not None and _is_relative(place):
        # The run stores it, and is continued from other folders too.
        config = config.with_fields("checkpoint", dir=os.path.abspath(place))
    return config


def _with_tokenizer_of_tokens(values: dict[str, Any]) -> dict[str, Any]:
    """Without tokenizer.name, use the tokenizer in the (first) folder of token shards, if there is one."""
    data, tokenizer = values.get("data", {}), values.get("tokenizer", {})
    sources = [data, *data.get("sources", {}).values()]
    folders = [source.get("path") for source in sources if source.get("kind") == "tokens"]
    if "name" in tokenizer or not folders or not isinstance(folders[0], str):
        return values
    return values | {"tokenizer": {**tokenizer, "name": str(Path(folders[0]) / "tokenizer")}}


def complete_stored_data(data: dict[str, Any]) -> None:
    """Set txt in the data section of a run of version 0.1, which stored none: its documents of text are paragraphs."""
    for source in (data, *data.get("sources", {}).values()):
        if source.get("kind") in ("files", "hub") or source.get("validation", {}).get("path"):
            source.setdefault("txt", "paragraph")


def _with_model(values: dict[str, Any], problems: Problems) -> dict[str, Any]:
    """Fill in the model from train.init_from or the preset, and the tokenizer from train.init_from."""
    model = values.get("model", {})
    preset = model.get("preset", ModelConfig.model_fields["preset"].default)
    init_from = values.get("train", {}).get("init_from")
    try:
        if init_from is not None and "preset" not in model:
            return values | inherited_sections(init_from, values)
        if preset in PRESETS:
            return values | {"model": {**PRESETS[preset], **model}}
        problems.add("model.preset", f"got {shown(preset)}; {suggestion(preset, list(PRESETS))}")
    except MythosError as error:
        problems.add("train.init_from", str(error))
    # The model is unknown, so a field left at its default must not be reported as a contradiction.
    problems.paths |= {f"model.{name}" for name in ModelConfig.model_fields if name not in model}
    return values | {"model": model}
