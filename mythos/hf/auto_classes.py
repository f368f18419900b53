"""Registers our classes with transformers' Auto classes and Trainer without importing transformers.

transformers takes seconds to import, and most of this package does not need it. Registration therefore happens in two
steps. An import hook imports `mythos.hf.config`, which registers itself, right after transformers' own module with
AutoConfig. The first configuration that is built then calls `register_model`: a program that only loads a tokenizer
never imports the model.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

IMPORTED_AFTER = {
    "transformers.models.auto.configuration_auto": "mythos.hf.config",
    "transformers.trainer": "mythos.hf.trainer",
}
"""Our module to import right after each of these modules of transformers."""

MODEL_MODULE = "mythos.hf.model"


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in IMPORTED_AFTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, IMPORTED_AFTER[fullname])
        return spec


class _Loader(Loader):
    """Delegates to another loader, then imports one of our modules."""

    def __init__(self, wrapped: Loader, our_module: str) -> None:
        self.wrapped, self.our_module = wrapped, our_module

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.wrapped.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.wrapped.exec_module(module)
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.wrapped
        import_module(self.our_module)


def register() -> None:
    """Register with transformers: now if its modules are already imported, otherwise when they are."""
    sys.meta_path.insert(0, _Finder())
    for their_module, our_module in IMPORTED_AFTER.items():
        if their_module in sys.modules:
            import_module(our_module)


def register_model() -> None:
    """Import the module of the model, which registers the model with AutoModelForCausalLM."""
    import_module(MODEL_MODULE)
