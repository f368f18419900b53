"""Lets transformers' Auto classes know our model, without importing transformers before somebody else does.

transformers takes seconds to import, and most of this package does not need it. So our configuration is imported, and
registers itself, right after the module that holds AutoConfig has been; the first configuration that is made registers
the model.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO = "transformers.models.auto.configuration_auto"
OURS = "mythos.hf.config"


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """Loads as the loader it wraps, and then imports our module."""

    def __init__(self, wrapped: Loader) -> None:
        self.wrapped = wrapped

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.wrapped.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.wrapped
        import_module(OURS)


def register() -> None:
    """Register with transformers: now, if its Auto classes have been imported, else as soon as they are."""
    if AUTO in sys.modules:
        import_module(OURS)
    else:
        sys.meta_path.insert(0, _Finder())
