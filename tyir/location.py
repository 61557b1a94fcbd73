"""Where an op comes from.  Front ends attach the module path and the model's source line; rewrites must
carry locations on.

loc("f.py":3:1)   loc("model.layers.0.mlp"("f.py":3:1))   loc(fused["a", "b"])   loc(callsite("a" at "b"))   loc(unknown)
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, final

from tyir.attribute import Attribute

__all__ = [
    "UNKNOWN",
    "CallSiteLoc",
    "FileLoc",
    "FusedLoc",
    "Location",
    "NameLoc",
    "UnknownLoc",
    "fuse",
    "module_path",
]


class Location(Attribute):
    """Base of all locations; usable as an attribute value (`#file = loc(...)`)."""

    __slots__ = ()


@final
class UnknownLoc(Location):
    """`loc(unknown)`, not printed at all at the end of an op."""

    __slots__ = ()


@final
class FileLoc(Location):
    """`loc("file":line:col)`."""

    __slots__ = ("col", "file", "line")

    def __init__(self, file: str, line: int, col: int) -> None:
        self.file: Final = file
        self.line: Final = line
        self.col: Final = col


@final
class NameLoc(Location):
    """`loc("name")` or `loc("name"(child))`; front ends put the module path here."""

    __slots__ = ("child", "name")

    def __init__(self, name: str, child: Location | None = None) -> None:
        self.name: Final = name
        self.child: Final = child


@final
class FusedLoc(Location):
    """`loc(fused[a, b])`: an op made of several."""

    __slots__ = ("parts",)

    def __init__(self, parts: tuple[Location, ...]) -> None:
        self.parts: Final = tuple(parts)


@final
class CallSiteLoc(Location):
    """`loc(callsite(callee at caller))`: an op inlined from a function."""

    __slots__ = ("callee", "caller")

    def __init__(self, callee: Location, caller: Location) -> None:
        self.callee: Final = callee
        self.caller: Final = caller


UNKNOWN: Final = UnknownLoc()


def fuse(locations: Iterable[Location]) -> Location:
    """One location for an op that replaces several: duplicates and unknowns vanish, one remaining location
    stands alone.
    """
    parts: dict[Location, None] = {}
    for location in locations:
        for part in location.parts if isinstance(location, FusedLoc) else (location,):
            if part is not UNKNOWN:
                parts[part] = None
    if not parts:
        return UNKNOWN
    return next(iter(parts)) if len(parts) == 1 else FusedLoc(tuple(parts))


def module_path(location: Location) -> str | None:
    """The model's module path (`model.layers.3.self_attn.q_proj`) an op came from: the last one of a fused
    location.
    """
    if isinstance(location, NameLoc):
        return location.name
    if isinstance(location, FusedLoc):
        for part in reversed(location.parts):
            if (path := module_path(part)) is not None:
                return path
    if isinstance(location, CallSiteLoc):
        return module_path(location.callee)
    return None
