"""transformers integration: configuration, model and cache, and export in its format.

Importing `mythos` is enough for transformers' Auto classes to know them (see `mythos.hf.auto_classes`). The names
below are imported on first use, because transformers' models take seconds to import.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mythos.hf.cache import MythosCache
    from mythos.hf.config import MythosConfig
    from mythos.hf.model import MythosForCausalLM

__all__ = ["MythosCache", "MythosConfig", "MythosForCausalLM"]

HOMES = {"MythosCache": "mythos.hf.cache", "MythosConfig": "mythos.hf.config", "MythosForCausalLM": "mythos.hf.model"}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(HOMES[name]), name)
