"""Back ends by name, imported when asked for.

`edge10` is `tyir.backends.edge10.compile`; others are entry points of the group `tyir.backends` that name a
module of the same form.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, cast

import tyir.backends
from tyir.diagnostics import TyirError, did_you_mean
from tyir.dialects.builtin import Module
from tyir.manifest import BuildOptions

__all__ = ["Backend", "backend_names", "find_backend"]

_GROUP: Final = "tyir.backends"
_NAMES: Final = ("CompileContext", "check_target", "compile_module")


class Backend(Protocol):
    """The three names that a back end's module has; docs/backends.md says what each must do."""

    @property
    def CompileContext(self) -> Callable[..., Any]: ...

    @property
    def check_target(self) -> Callable[[Path], None]: ...

    @property
    def compile_module(self) -> Callable[[Module, Path, BuildOptions | Mapping[str, Any], Any], Path]: ...


def backend_names() -> list[str]:
    """Every back end, sorted; nothing is imported for it."""
    names = {
        m.name
        for m in pkgutil.iter_modules(tyir.backends.__path__)
        for folder in tyir.backends.__path__
        if (Path(folder) / m.name / "compile.py").is_file()
    }
    return sorted(names | {e.name for e in importlib.metadata.entry_points(group=_GROUP)})


def find_backend(name: str) -> Backend:
    """The back end of a name; `TyirError` when there is none, or its module is not a back end's."""
    names = backend_names()
    if name not in names:
        raise TyirError(
            f"there is no back end '{name}'", help=did_you_mean(name, names) or f"one of {', '.join(names)}"
        )
    entries = importlib.metadata.entry_points(group=_GROUP, name=name)
    module = next((e.load() for e in entries), None) or importlib.import_module(f"{_GROUP}.{name}.compile")
    missing = [n for n in _NAMES if not hasattr(module, n)]
    if missing:
        raise TyirError(
            f"the back end '{name}' has no {', '.join(missing)}",
            help="docs/backends.md says what is needed",
        )
    return cast(Backend, module)
