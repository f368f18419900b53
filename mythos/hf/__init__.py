"""transformers integration: configuration, model, cache, and export in transformers' format.

`import mythos` registers the classes below with transformers' Auto classes (see `mythos.hf.auto_classes`). They are
imported on first use, because transformers' model modules take seconds to import.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mythos.hf.cache import MythosCache
    from mythos.hf.config import MythosConfig
    from mythos.hf.model import MythosForCausalLM

__all__ = ["MythosCache", "MythosConfig", "MythosForCausalLM"]

MODULES = {"MythosCache": "mythos.hf.cache", "MythosConfig": "mythos.hf.config", "MythosForCausalLM": "mythos.hf.model"}

SHARD_SIZE = "5GB"
"""Default size limit of one weight file. Defined here so that the command line can show it without importing torch."""


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(MODULES[name]), name)
