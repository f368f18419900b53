"""Registries of exchangeable parts: the names that a configuration field accepts, and the classes behind them.

No torch import here, so that configurations are read and checked without it. The entries are in `mythos.model.config`.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

Contradiction = tuple[tuple[str, ...], str]
"""Names of fields whose values cannot be combined, and the message."""
Rules = Callable[[Any], Iterator[Contradiction]]
"""Yields the contradictions of a `ModelConfig` that uses the entry."""


class Setting(NamedTuple):
    """A number of loops, and the path of the field that sets it."""

    path: str
    loops: float


class TrainingDepth(NamedTuple):
    """The loops of a training run."""

    mean: Setting
    deepest: Setting
    """The most loops of a sequence."""
    backprop: Setting
    """The loops with gradient, at the end of training."""
    gradient_limits: tuple[Setting, ...]
    """The loops with gradient at any time of training, by the fields that could raise them."""


TrainingRules = Callable[[Any, TrainingDepth], Iterator[Contradiction]]
"""Yields full paths of fields with which a `ModelConfig` that uses the entry cannot be trained, though it can run."""


def no_rules(config: Any, depth: TrainingDepth | None = None) -> Iterator[Contradiction]:
    """Rules of an entry that works with all values of the other fields."""
    return iter(())


class Entry(NamedTuple):
    """One implementation, and what is known of it without importing torch."""

    source: type | str | None
    """The class; or "module:Class", imported at first use; or None: the part is left out of the model."""
    rules: Rules = no_rules
    training_rules: TrainingRules = no_rules
    summary: Callable[[Any], str] | None = None
    """Describes the part in a few words; if None, its name does."""


class Registry:
    """Implementations of one part of the model by name.

    As metadata of a field, `Annotated[str, registry]`, it restricts the field to the registered names.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def add(self, name: str, source: type | str | None, rules: Rules = no_rules, **facts: Any) -> None:
        """Register an implementation; `facts` are other fields of `Entry`. Raises ValueError if the name is taken."""
        if name in self.entries:
            raise ValueError(f"{name!r} is registered already; choose another name")
        self.entries[name] = Entry(source, rules, **facts)

    @property
    def names(self) -> tuple[str, ...]:
        """The registered names, in order of registration."""
        return tuple(self.entries)

    def __getitem__(self, name: str) -> Any:
        """The class registered under `name`, or None if the part is left out. Raises KeyError for an unknown name."""
        source = self.entries[name].source
        if not isinstance(source, str):
            return source
        module, _, class_name = source.partition(":")
        return getattr(import_module(module), class_name)

    def contradictions(self, name: str, config: Any) -> Iterator[Contradiction]:
        """Contradictions in a `ModelConfig` that uses the entry `name`."""
        return self.entries[name].rules(config)

    def summary(self, name: str, config: Any) -> str:
        """Describe the entry `name` of a `ModelConfig` in a few words."""
        describe = self.entries[name].summary
        return name if describe is None else describe(config)

    def _check(self, name: str) -> str:
        if name not in self.entries:
            # The error and the words of a Literal.
            *others, last = (repr(allowed) for allowed in self.entries)
            expected = f"{', '.join(others)} or {last}" if others else last
            raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
        return name

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.entries)}
