"""Lets transformers' Auto classes know our model, without importing transformers before somebody else does.

transformers takes seconds to import, and most of this package does not need it. So our classes are imported, and
register themselves, right after the module that holds the Auto classes has been.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO = "transformers.models.auto."
REGISTERS = {f"{AUTO}configuration_auto": "mythos.hf.config", f"{AUTO}modeling_auto": "mythos.hf.model"}
"""For a module of Auto classes, the one that registers ours there when it is imported."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in REGISTERS:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as the loader it wraps, and then imports the module that registers our classes."""

    def __init__(self, wrapped: Loader) -> None:
        self.wrapped = wrapped

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.wrapped.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.wrapped
        import_module(REGISTERS[module.__name__])


def register() -> None:
    """Register with transformers: now, if its Auto classes have been imported, else as soon as they are."""
    for auto, ours in REGISTERS.items():
        if auto in sys.modules:
            import_module(ours)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
