"""Check plain values against a tree of configuration sections and collect every problem before raising."""

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeGuard, get_args, get_origin

import yaml
from pydantic import ValidationError

from mythos.errors import MythosError
from mythos.files.plain_yaml import MOST_BYTES, OTHER_NUMBER, load_yaml
from mythos.files.text import MOST_NESTED, read_text, unusable_text
from mythos.model.registry import Registry
from mythos.section import Section

PLAIN_TEXT = "text without the character NUL and without halves of surrogate pairs"
MOST_PROBLEMS = 50
"""Problems listed in one message."""
# 3e-4 and 1e9: YAML 1.1 reads an exponent without a decimal point as text.
_EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


class _Flow(yaml.SafeDumper):
    """Write sections as mappings, and values of any other class as text."""


_Flow.add_multi_representer(Section, lambda dumper, section: dumper.represent_dict(section.model_dump(mode="json")))
# The stubs do not know that None stands for all other classes.
_Flow.add_representer(None, lambda dumper, value: dumper.represent_str(str(value)))  # type: ignore[arg-type]


class Problems:
    """Problems of a configuration: one line each, and the dotted paths that have been reported."""

    def __init__(self, source: str, root: type[Section]) -> None:
        """Start empty; ``source`` (a file name) opens the final message, ``root`` is the whole schema."""
        self.source = source
        self.root = root
        self.paths: set[str] = set()
        self.lines: list[str] = []

    def add(self, path: str, message: str) -> None:
        """Report a path, once."""
        if path not in self.paths:
            self.paths.add(path)
            self.lines.append(f"{path}: {message}")

    def add_contradiction(self, paths: Sequence[str], message: str) -> None:
        """Report values that cannot be used together, unless one of their paths has been reported itself."""
        if not any(path == known or path.startswith(f"{known}.") for path in paths for known in self.paths):
            self.lines.append(f"{', '.join(paths)}: {message}")

    def raise_any(self) -> None:
        """Raise MythosError with all lines if there are any."""
        if self.lines:
            count = "1 problem" if len(self.lines) == 1 else f"{len(self.lines)} problems"
            lines = self.lines[:MOST_PROBLEMS]
            if len(lines) < len(self.lines):
                lines.append("...")
            raise MythosError("\n  ".join([f"{self.source}: {count} in the configuration", *lines]))


def read_yaml(path: Path, problems: Problems) -> dict[str, Any]:
    """Read the mapping in a YAML file and report duplicate keys, of which PyYAML silently keeps the last.

    Numbers are decimal: 0100 and 0x10 are read as text. Raises MythosError if the file cannot be read, is empty or too
    large, or is not a YAML mapping of bounded depth.
    """
    try:
        text = read_text(path, MOST_BYTES)
    except UnicodeDecodeError as error:
        raise MythosError(f"{path}: not valid YAML: {error}; save it as UTF-8") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise MythosError(f"{path}: cannot be read ({reason}); give the path of a YAML file") from error
    try:
        data, tree = load_yaml(text)
    except (yaml.YAMLError, ValueError) as error:
        raise MythosError(f"{path}: not valid YAML: {error}") from error
    if data is None:
        raise MythosError(f"{path}: the file is empty; `mythos configs quickstart` prints an example")
    if not isinstance(data, dict):
        raise MythosError(
            f"{path}: got {shown(data)}; allowed: a mapping of sections; `mythos configs quickstart` prints an example"
        )
    assert tree is not None  # load_yaml returns a tree with every value but None
    for key, line in _duplicate_keys(tree, "", set()):
        problems.add(key, f"given again in line {line}; keep one of them")
    return data


def apply_override(data: dict[str, Any], override: str, problems: Problems) -> dict[str, Any]:
    """Return ``data`` with one ``key.path=value`` applied; a mapping as value sets each of its keys."""
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")) or path.count(".") > MOST_NESTED:
        problems.add(shortened(override), "not an override; give key.path=value, e.g. optim.lr=3e-4")
        return data
    try:
        value, _ = load_yaml(text)
    except (yaml.YAMLError, ValueError):
        value = text  # for instance *.txt, which YAML reads as an alias
    section_path, _, name = path.rpartition(".")
    section = dict(sections(problems.root)).get(section_path)
    schema = field_schemas(section).get(name, {}) if section else {}
    accepts_text = "text" in [allowed(option) for option in _options(schema)]
    if accepts_text and not isinstance(value, str | list | dict | None):
        value = text  # run.name=7 is the text 7
    for keys, leaf in _leaves(path.split("."), value):
        try:
            data = _replaced(data, keys, leaf)
        except KeyError as error:
            problems.add(error.args[0], f"is not a section, so {shortened(override)} cannot be set")
    return data


def field_schemas(section: type[Section]) -> dict[str, Any]:
    """The JSON schema of every field, kept for the next call: do not change it."""
    metadata = [part for field in section.model_fields.values() for part in field.metadata]
    return _field_schemas(section, tuple(part.names for part in metadata if isinstance(part, Registry)))


@cache
def _field_schemas(section: type[Section], registered: tuple[tuple[str, ...], ...]) -> dict[str, Any]:
    """The schemas for these registered names. pydantic takes 0.01 s for a section."""
    properties: dict[str, Any] = section.model_json_schema()["properties"]
    return properties


def valid_values(section: type[Section], data: Any, problems: Problems, prefix: str = "") -> dict[str, Any]:
    """Convert and return the values that are valid by themselves; report and leave out the others."""
    if data is None:  # a section whose every line is commented out
        return {}
    if not isinstance(data, dict):
        problems.add(prefix[:-1], f"got {shown(data)}; allowed: a mapping of {', '.join(section.model_fields)}")
        return {}
    schemas = field_schemas(section)
    values: dict[str, Any] = {}
    for name, value in data.items():
        path = f"{prefix}{shortened(str(name))}"
        if name not in section.model_fields:
            problems.add(path, _unknown(str(name), section, problems))
            continue
        kind = section.model_fields[name].annotation
        if _is_section(kind):
            values[name] = valid_values(kind, value, problems, f"{path}.")
            continue
        if (member := _named_sections(kind)) and isinstance(value, dict):
            values[name] = {str(key): valid_values(member, v, problems, f"{path}.{key}.") for key, v in value.items()}
            if unusable_text(list(value)):
                problems.add(path, f"got the names {shown(list(value))}; allowed: {PLAIN_TEXT}")
            continue
        if unusable_text(value):
            problems.add(path, f"got {shown(value)}; allowed: {PLAIN_TEXT}")
            continue
        converted = _converted(schemas[name], value)
        try:
            section.model_validate({name: converted})
            values[name] = converted
        except ValidationError:
            rule = allowed(schemas[name], value)
            if isinstance(value, str) and OTHER_NUMBER.fullmatch(value):
                rule += ", in decimal and without leading zeros"
            problems.add(path, f"got {shown(value)}; allowed: {rule}")
    return values


def sections(root: type[Section], prefix: str = "") -> Iterator[tuple[str, type[Section]]]:
    """Yield the dotted path and the class of every section below ``root``."""
    for name, field in root.model_fields.items():
        if _is_section(field.annotation):
            yield f"{prefix}{name}", field.annotation
            yield from sections(field.annotation, f"{prefix}{name}.")


def flat_fields(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted path and the value of every field of plain sections; an empty mapping is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat_fields(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def allowed(schema: dict[str, Any], value: Any = None) -> str:
    """Say in words which values a field's JSON schema accepts.

    Maxima from 1,000 on only protect arithmetic (`mythos.section`): they are named if `value` exceeds them.
    """
    if "anyOf" in schema:
        return " or ".join(allowed(option, value) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return " | ".join(schema.get("enum") or [schema["const"]])
    kind = schema.get("type", "")
    if kind == "array":
        return _allowed_list(schema, value if isinstance(value, list) else [])
    if kind == "object":
        return "mapping of names to sections"
    words = {"string": "text", "boolean": "true or false"}.get(kind, kind)
    if "examples" in schema:
        words += f" such as {' or '.join(schema['examples'])}"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    if schema.get("maximum", 0) >= 1000 and not _exceeds(value, schema["maximum"]):
        del signs["maximum"]
    bounds = " and ".join(
        f"{sign} {schema[key] if abs(schema[key]) < 10**10 else format(schema[key], 'g')}"
        for key, sign in signs.items()
        if key in schema
    )
    return f"{words} {bounds}".strip()


def _allowed_list(schema: dict[str, Any], values: list[Any]) -> str:
    if "prefixItems" in schema:
        items = [
            allowed(item, values[index] if index < len(values) else None)
            for index, item in enumerate(schema["prefixItems"])
        ]
        return f"list of {len(items)}: {', '.join(items)}"
    excessive = [item for item in values if _exceeds(item, schema["items"].get("maximum", math.inf))]
    return f"list of ({allowed(schema['items'], excessive[0] if excessive else None)})"


def _exceeds(value: Any, bound: float) -> bool:
    """Whether a value, or a number written as text (1e30), is finite and above a bound."""
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        return float(value) > bound
    return isinstance(value, int | float) and bound < value < math.inf


def shown(value: Any) -> str:
    """Write a value as YAML would, shortened."""
    if isinstance(value, str | bool | None):
        text = json.dumps(value, ensure_ascii=unusable_text(value))
    elif isinstance(value, list | tuple | dict | Section) and len(text := str(value)) <= 2000:  # PyYAML is slow
        text = yaml.dump(value, Dumper=_Flow, default_flow_style=True, sort_keys=False, allow_unicode=True, width=1e9)
        text = text.removesuffix("\n")
    else:
        text = str(value)
    return shortened(text)


def shortened(text: str) -> str:
    """Cut a text at 80 characters for a message."""
    return text if len(text) <= 80 else f"{text[:77]}..."


def suggestion(name: str, names: Sequence[str], elsewhere: Sequence[str] = ()) -> str:
    """Suggest the nearest of the valid names, or a path where the name is valid, or list the valid names."""
    nearest = difflib.get_close_matches(name, names, n=1) or elsewhere
    return f"did you mean {nearest[0]}?" if nearest else f"allowed: {', '.join(names)}"


def _unknown(name: str, section: type[Section], problems: Problems) -> str:
    if len(problems.lines) > MOST_PROBLEMS:  # difflib is slow, and this line will not be shown
        return "unknown"
    elsewhere = [f"{path}.{name}" for path, other in sections(problems.root) if name in other.model_fields]
    return f"unknown; {suggestion(name, list(section.model_fields), elsewhere)}"


def _is_section(annotation: Any) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _named_sections(annotation: Any) -> type[Section] | None:
    """The section class of a field of type dict[str, Section], whose keys the user chooses."""
    return get_args(annotation)[1] if get_origin(annotation) is dict else None


def _duplicate_keys(node: yaml.Node, prefix: str, visited: set[int]) -> Iterator[tuple[str, int]]:
    """Yield the path and line of every repeated key; ``visited`` holds the ids of mappings seen through aliases."""
    if not isinstance(node, yaml.MappingNode) or id(node) in visited:
        return
    visited.add(id(node))
    seen: set[str] = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        path = f"{prefix}{key.value}"
        if path in seen:
            yield path, key.start_mark.line + 1
        seen.add(path)
        yield from _duplicate_keys(value, f"{path}.", visited)


def _leaves(keys: list[str], value: Any) -> Iterator[tuple[list[str], Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves([*keys, str(key)], inner)
    else:
        yield keys, value


def _replaced(data: dict[str, Any], keys: list[str], value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a copy with one value replaced; a YAML anchor may share the original between sections.

    Raises KeyError with the path of a value that is not a mapping and cannot be entered.
    """
    key, *rest = keys
    if rest:
        inner = data.get(key)
        if inner is not None and not isinstance(inner, dict):
            raise KeyError(f"{prefix}{key}")
        value = _replaced(inner or {}, rest, value, f"{prefix}{key}.")
    return {**data, key: value}


def _options(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return schema.get("anyOf", [schema])


def _converted(schema: dict[str, Any], value: Any) -> Any:
    """Convert values that YAML reads as another type: 3e-4 and none as text, tuples as lists; list a single text."""
    options = _options(schema)
    types = {option.get("type") for option in options}
    if isinstance(value, str) and value.lower() == "none" and "null" in types:
        return None
    if isinstance(value, str) and types & {"number", "integer"} and _EXPONENT.fullmatch(value):
        value = float(value)
    if isinstance(value, float) and value.is_integer() and "integer" in types:
        return int(value)
    lists_text = any(option.get("items", {}).get("type") == "string" for option in options)
    if isinstance(value, str) and types <= {"array", "null"} and lists_text:
        return [value]  # log.trackers=tensorboard
    if isinstance(value, list) and "array" in types:
        array = next(option for option in options if option["type"] == "array")
        items = array.get("prefixItems", [array.get("items")] * len(value))
        if len(items) == len(value):
            converted = [_converted(item, inner) for item, inner in zip(items, value, strict=True)]
            return tuple(converted) if "prefixItems" in array else converted
    return value
