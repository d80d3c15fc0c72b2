"""The operators are registered as soon as a process has torch, and torch is not imported for them."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_operators() -> None:
    """Registers ``torch.ops.pycompress``: now where torch is loaded, else when it will be.

    ``torch.export.load`` and compiled packages look operators up by name, and name no module that would define them. A
    program that says ``import pycompress`` has asked for them, before or after ``import torch``.
    """
    if sys.modules.get("torch") is not None:
        importlib.import_module("pycompress.ops")
    else:
        sys.meta_path.insert(0, _TorchFinder())


class _TorchFinder(MetaPathFinder):
    """Finds torch where it is, and gives it a loader that goes on to the operators."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torch":
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = None if finder is self or find is None else find(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _TorchLoader(spec.loader, self)
                return spec
        return None


class _TorchLoader(Loader):
    """Torch's own loader, and the operators after it."""

    def __init__(self, loader: Loader, finder: _TorchFinder) -> None:
        self._loader, self._finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        if self._finder in sys.meta_path:
            sys.meta_path.remove(self._finder)
            _register()

    def __getattr__(self, name: str) -> object:  # who finds torch without importing it may ask for more
        return getattr(self._loader, name)


def _register() -> None:
    """Within the import of torch: an error here would leave the process a torch that is half imported."""
    if "pycompress.ops" in sys.modules:  # its import, which goes on after torch's, maybe in a thread that waits for it
        return
    try:
        importlib.import_module("pycompress.ops")
    except Exception as error:
        warnings.warn(f"pycompress: its operators are not registered with torch: {error}", stacklevel=2)
