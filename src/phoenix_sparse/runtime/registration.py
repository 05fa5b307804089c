"""Make transformers know packed models once both it and Phoenix are imported, in whatever order.

`import phoenix_sparse` stays light: where transformers isn't imported yet, its import is watched for.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

WATCHED = "transformers.quantizers"


def register() -> None:
    """Register at once where transformers is imported, or else as soon as it is."""
    if WATCHED in sys.modules:
        importlib.import_module("phoenix_sparse.runtime.quantizer")
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


class _Watch(MetaPathFinder):
    """Finds nothing by itself; lets the module that is waited for be followed by our own."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WATCHED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            sys.meta_path.remove(self)
            spec.loader = _Then(spec.loader)
        return spec


class _Then(Loader):
    """Loads a module, then registers."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        importlib.import_module("phoenix_sparse.runtime.quantizer")
