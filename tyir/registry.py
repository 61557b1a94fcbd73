"""Names to classes: dialects by module (`tyir.dialects.<name>`), loaded when first asked for; nothing is
registered on import.

A user's dialect is a module given to `load_dialect_module` (tools: `--load-dialect file.py`) or an entry
point of the group `tyir.dialects`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from functools import cache
from types import ModuleType

from tyir.ir import Op, unregistered_op
from tyir.opdef import DeclaredOp

__all__ = [
    "dialect_names",
    "dialect_ops",
    "load_dialect_module",
    "op_class",
    "registered_class",
    "unload_dialect",
]

_extra: dict[str, ModuleType] = {}


@cache
def dialect_names() -> tuple[str, ...]:
    """All dialects that exist, loaded or not."""
    import tyir.dialects

    names = {m.name for m in pkgutil.iter_modules(tyir.dialects.__path__)}
    names.update(e.name for e in importlib.metadata.entry_points(group="tyir.dialects"))
    return tuple(sorted(names | set(_extra)))


@cache
def dialect_ops(dialect: str) -> dict[str, type[DeclaredOp]]:
    """Op name to class for one dialect; empty when there is no such dialect."""
    module = _dialect_module(dialect)
    return {} if module is None else _declared(module)


def _declared(module: ModuleType) -> dict[str, type[DeclaredOp]]:
    """The ops a module (or package) declares itself; those it imports from other dialects stay theirs."""
    found = [o for o in vars(module).values() if isinstance(o, type) and issubclass(o, DeclaredOp)]
    return {o.name: o for o in found if f"{o.__module__}.".startswith(f"{module.__name__}.")}


def _dialect_module(dialect: str) -> ModuleType | None:
    if dialect in _extra:
        return _extra[dialect]
    if importlib.util.find_spec(f"tyir.dialects.{dialect}") is not None:
        return importlib.import_module(f"tyir.dialects.{dialect}")
    for entry in importlib.metadata.entry_points(group="tyir.dialects", name=dialect):
        module = entry.load()
        assert isinstance(module, ModuleType)
        return module
    return None


def load_dialect_module(module: ModuleType) -> list[str]:
    """Make a user's dialect known: every declared op of the module, under the dialect its names begin with;
    returns the dialects.
    """
    names = list(dict.fromkeys(name.partition(".")[0] for name in _declared(module)))
    _extra.update(dict.fromkeys(names, module))
    _forget_lookups()
    return names


def unload_dialect(dialect: str) -> None:
    """Forget a dialect that `load_dialect_module` made known."""
    _extra.pop(dialect, None)
    _forget_lookups()


def _forget_lookups() -> None:
    for cached in (dialect_names, dialect_ops, registered_class, op_class):
        cached.cache_clear()


@cache
def registered_class(name: str) -> type[DeclaredOp] | None:
    """The declared class of an op, or None."""
    return dialect_ops(name.partition(".")[0]).get(name) if name.partition(".")[0].isidentifier() else None


@cache
def op_class(name: str) -> type[Op]:
    """The class for an op name, declared or not."""
    return registered_class(name) or unregistered_op(name)
