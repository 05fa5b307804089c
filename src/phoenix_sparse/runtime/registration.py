"""Make torch and transformers know packed models once both they and Phoenix are imported, in whatever order.

`import phoenix_sparse` stays light: where they aren't imported yet, their import is watched for.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

FOLLOWERS = {
    # The products that models traced and exported on a CPU call. A GPU's are for those who import them: the torch of
    # Cerebras environments, in which workers import Phoenix, is too old to define them.
    "torch": ("phoenix_sparse.runtime.kernels.linear", "phoenix_sparse.runtime.kernels.sliced"),
    "transformers.quantizers": ("phoenix_sparse.runtime.quantizer",),
}
"""By the name of a module, those of ours that register with it."""


def register() -> None:
    """Register at once with what is imported, and with the others as soon as they are."""
    for name in FOLLOWERS:
        if name in sys.modules:
            _follow(name)
        elif not any(isinstance(finder, _Watch) and finder.name == name for finder in sys.meta_path):
            sys.meta_path.insert(0, _Watch(name))


def _follow(name: str) -> None:
    for ours in FOLLOWERS[name]:
        importlib.import_module(ours)


class _Watch(MetaPathFinder):
    """Finds nothing by itself; lets the module that is waited for be followed by our own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            spec = None if isinstance(finder, _Watch) else finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Then(spec.loader, self)
                return spec
        return None


class _Then(Loader):
    """Loads a module as its own loader does, then has ours register."""

    def __init__(self, loader: Loader, watch: _Watch) -> None:
        self.loader, self.watch = loader, watch

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self.loader  # whoever asks for its files asks the loader
        self.loader.exec_module(module)
        # Not before: many only ask whether there is such a module.
        if self.watch in sys.meta_path:
            sys.meta_path.remove(self.watch)
        _follow(self.watch.name)
