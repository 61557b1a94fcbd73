"""Which decoder layer and which module of the model an op belongs to.

    %y = ty.linear(%x, %w) {tyir.layer = 3 : i64, tyir.path = "model.layers.3.mlp.up_proj"}

Front ends write both, passes that make ops out of others carry them on.  They decide what is quantised, which
dies execute an op and what becomes a layer's function; locations, which anybody may strip, only speak to
people.  In the function that equal layers share `*` stands for the number, which its calls name.  References
to weights have neither: their symbol says what they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final, TypeVar

from tyir.attributes import DictAttr, IntegerAttr, StringAttr
from tyir.diagnostics import TyirError
from tyir.ir import Op
from tyir.location import UNKNOWN, Location, NameLoc
from tyir.types import i64

__all__ = [
    "any_layer",
    "carry",
    "is_named_in",
    "layer_in",
    "layer_of",
    "layer_root",
    "location_by_path",
    "path_in_calls",
    "path_of",
    "place",
    "place_attributes",
    "place_in_layer",
    "require_layers",
    "within_layer",
    "without_place",
]

_OpT = TypeVar("_OpT", bound=Op)

LAYER: Final = "tyir.layer"
PATH: Final = "tyir.path"
# `model.layers.3.mlp`, `transformer.h.3`, `blocks.3.norm`
_LAYER: Final = re.compile(r"((?:^|\.)(?:layers|h|blocks)\.)(\d{1,9})(?=\.|$)")


# ---------------------------------------------------------------------------------------------- paths as text


def layer_in(path: str) -> int | None:
    """The decoder layer that a module path (or a weight's name) lies in, None outside the layers."""
    match = _LAYER.search(path)
    return int(match[2]) if match else None


def layer_root(path: str) -> str | None:
    """`model.layers.3` for every path in that layer."""
    match = _LAYER.search(path)
    return path[: match.end()] if match else None


def within_layer(path: str) -> str:
    """`mlp.up_proj` for `model.layers.3.mlp.up_proj`; a path outside the layers as it is."""
    match = _LAYER.search(path)
    return path[match.end() :].lstrip(".") if match else path


def any_layer(path: str) -> str:
    """`model.layers.*.mlp.up_proj` for `model.layers.3.mlp.up_proj`."""
    return _LAYER.sub(r"\1*", path, count=1)


def is_named_in(path: str, names: Iterable[str]) -> bool:
    """Whether one of `names` is the module path, or a run of whole components of it: `mlp.gate` and `visual`
    name `model.visual.0.mlp.gate`, `mlp.gat` and `0.gate` do not.
    """
    return any(name and f".{name}." in f".{path}." for name in names)


# ---------------------------------------------------------------------------------------------- places of ops


def layer_of(op: Op) -> int | None:
    """The decoder layer an op belongs to, None outside the layers."""
    value = op.attributes.get(LAYER)
    return value.value if isinstance(value, IntegerAttr) else None


def path_of(op: Op) -> str | None:
    """The module path of the model an op came from: `model.layers.3.self_attn.q_proj`."""
    value = op.attributes.get(PATH)
    return value.value if isinstance(value, StringAttr) else None


def path_in_calls(op: Op, stack: Sequence[Op]) -> str | None:
    """The module path of an op that is executed inside of these calls, the last of which names the layer."""
    path = path_of(op)
    layer = layer_of(stack[-1]) if stack else None
    return path if path is None or layer is None else path.replace("*", str(layer), 1)


def place_attributes(path: str) -> DictAttr:
    """What an op of this module path says of its place."""
    layer = layer_in(path)
    number = {} if layer is None else {LAYER: IntegerAttr(layer, i64)}
    return DictAttr({**number, PATH: StringAttr(path)})


def place(op: _OpT, path: str) -> _OpT:
    """Say that an op came from a module path; returns the op."""
    op.attributes = DictAttr(
        {**dict(without_place(op.attributes).items()), **dict(place_attributes(path).items())}
    )
    return op


def carry(new: _OpT, *old: Op | None) -> _OpT:
    """Give an op made of others the place of the last of them that has one, unless it has its own; returns
    the new op.
    """
    if PATH not in new.attributes:
        for op in reversed(old):
            if op is not None and PATH in op.attributes:
                found = {key: value for key in (LAYER, PATH) if (value := op.attributes.get(key)) is not None}
                new.attributes = DictAttr({**dict(new.attributes.items()), **found})
                break
    return new


def without_place(attributes: DictAttr) -> DictAttr:
    """The attributes that are not about the place: what equal ops of different layers have in common."""
    return attributes.without(LAYER, PATH)


def place_in_layer(op: Op, layer: int) -> None:
    """Put an op of the function that equal layers share into one of them."""
    path = path_of(op)
    if path is not None and ".*" in path:
        place(op, path.replace(".*", f".{layer}", 1))


def location_by_path(op: Op) -> Location:
    """A location that says what `tyir.path` does, and nothing that could be stripped."""
    path = path_of(op)
    return UNKNOWN if path is None else NameLoc(path)


def require_layers(root: Op, why: str) -> None:
    """`TyirError` when no op below `root` says which decoder layer it belongs to."""
    if not any(LAYER in op.attributes for op in root.walk()):
        raise TyirError(
            f"no op of the module says which decoder layer it belongs to ({LAYER}); {why}",
            help="import the model again with tyir-import, which writes it",
        )
