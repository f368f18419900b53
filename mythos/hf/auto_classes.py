"""Lets transformers' Auto classes and Trainer know our model, without importing transformers before others do.

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

FOLLOWED_BY = {
    "transformers.models.auto.configuration_auto": "mythos.hf.config",
    "transformers.trainer": "mythos.hf.trainer",
}
"""What is imported right after each of these modules of transformers."""


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in FOLLOWED_BY:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, FOLLOWED_BY[fullname])
        return spec


class _Loader(Loader):
    """Loads as the loader it wraps, and then imports a module of ours."""

    def __init__(self, wrapped: Loader, ours: str) -> None:
        self.wrapped, self.ours = wrapped, ours

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.wrapped.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.wrapped
        import_module(self.ours)


def register() -> None:
    """Register with transformers: now, if its modules have been imported, else as soon as they are."""
    sys.meta_path.insert(0, _Finder())
    for theirs, ours in FOLLOWED_BY.items():
        if theirs in sys.modules:
            import_module(ours)
