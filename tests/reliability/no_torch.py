"""Loaded into a process, keeps torch and transformers from being loaded: who needs them fails internally."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

SLOW = ("torch", "transformers")


class _Refused(Loader):
    def exec_module(self, module: ModuleType) -> None:
        raise RuntimeError(f"{module.__name__} is loaded, which takes seconds")


class _Refuser(MetaPathFinder):
    """Finds the real packages, whose sources may be looked at, and refuses to execute them."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in SLOW:
            return None
        sys.meta_path.remove(self)
        try:
            real = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        return None if real is None else ModuleSpec(name, _Refused(), origin=real.origin, is_package=True)


sys.meta_path.insert(0, _Refuser())
