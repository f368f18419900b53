"""Load the whole configuration: one YAML file per run, overrides by key=value, every problem reported at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mythos.config.checking import (
    Problems,
    allowed,
    apply_override,
    read_yaml,
    sections,
    shown,
    suggestion,
    valid_values,
)
from mythos.config.inherited import inherited_sections
from mythos.config.presets import PRESETS
from mythos.config.rules import contradictions, training_contradictions
from mythos.config.sections import Config
from mythos.errors import MythosError
from mythos.files.local import write_whole
from mythos.model.config import ModelConfig
from mythos.section import Section


def packaged_configs() -> dict[str, Path]:
    """Return the configurations that come with the package, by name: the files of configs/."""
    # In a checkout a link to configs/; an installation has a folder of its own.
    folder = Path(__file__).parents[1] / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"), key=lambda path: path.stem)}


def config_file(name: str) -> Path:
    """Resolve a path, or the name of a packaged configuration if no file has that name.

    Raises MythosError for a name, without folder or suffix, that is neither.
    """
    path, packaged = Path(name), packaged_configs()
    if path.exists() or path.name != name or path.suffix:
        return path
    if name not in packaged:
        raise MythosError(
            f"{name}: neither a file nor a configuration that comes with mythos ({', '.join(packaged)}); give one of "
            "these, or the path of a YAML file"
        )
    return packaged[name]


def load_config(path: str | Path, overrides: Sequence[str] = (), *, to_train: bool = True) -> Config:
    """Read a YAML file, apply ``key.path=value`` overrides, fill in the preset, and check everything.

    ``path`` may be the name of a packaged configuration (:func:`config_file`). Values of overrides are YAML
    (``eval.loops=[1,4]``, ``depth.mean=null``); ``3e-4`` and ``1e9`` are numbers. Set ``to_train`` to false to use a
    trained run: rules that only training needs are skipped, because the run may be older than they are.

    Raises MythosError with one line per problem.
    """
    problems = Problems(str(path), Config)
    data = read_yaml(config_file(str(path)), problems)
    for override in overrides:
        data = apply_override(data, override, problems)
    return _build(data, problems, to_train)


def config_from_dict(data: Mapping[str, Any], *, to_train: bool = True) -> Config:
    """Build the configuration from plain values, as ``load_config`` does from a file.

    Raises MythosError with one line per problem.
    """
    return _build(dict(data), Problems("configuration", Config), to_train)


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
    schemas = known[section].model_json_schema()["properties"]
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


def _build(data: dict[str, Any], problems: Problems, to_train: bool) -> Config:
    """Check each field by itself, fill in preset and defaults, then check the fields against each other."""
    values = _with_model(valid_values(Config, data, problems), problems)
    if not to_train:
        _complete_stored_data(values.get("data", {}))
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
        model = config.model.model_copy(update={"vocab_size": config.data.task.vocabulary})
        config = config.model_copy(update={"model": model})
    for paths, message in contradictions(config):
        problems.add_contradiction(paths, message)
    if to_train:
        for paths, message in training_contradictions(config, problems.paths):
            problems.add_contradiction(paths, message)
    problems.raise_any()
    return config


def _complete_stored_data(data: dict[str, Any]) -> None:
    """Set txt where a run of version 0.1 stored none; the documents of its text files are paragraphs."""
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
