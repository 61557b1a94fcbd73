"""Where the model's parameters come from: a `WeightFormat` says which stored tensors make a parameter and
writes the IR that does so.

A parameter is one stored tensor of the same name (`PlainFormat`), or what a format of `quant_formats.py`
makes of several: it claims `q_proj.weight` when `q_proj.qweight` exists and emits the ops that combine it
with scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import numpy.typing as npt

from tyir.attributes import DictAttr, SymbolRefAttr
from tyir.dialects import ty
from tyir.execution.weights import CheckpointReader
from tyir.frontends.checkpoint import Checkpoint, StoredTensor
from tyir.ir import Op, Value
from tyir.types import FloatType, TensorType, Type, f32

__all__ = [
    "DeltaFormat",
    "PlainFormat",
    "TensorReader",
    "WeightFormat",
    "Weights",
    "global_of",
    "is_delta",
    "with_base",
]

Emit = Callable[[Op], Op]


class WeightFormat(Protocol):
    """One way of storing parameters."""

    def stored_keys(self, name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
        """The stored tensors that make parameter `name`; empty when this format does not hold it."""

    def problem(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, StoredTensor]) -> str | None:
        """Why the stored tensors do not make a parameter of this shape, or None."""

    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value:
        """Emit the ops that make the parameter with element type `element`."""


class PlainFormat:
    """One tensor of the parameter's own name and shape, in any float dtype."""

    def stored_keys(self, name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
        return (name,) if name in tensors else ()

    def problem(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, StoredTensor]) -> str | None:
        stored = tensors[name].type
        if stored.dims != shape:
            return f"tensor '{name}' has shape {list(stored.dims)}, config.json asks for {list(shape)}"
        if not isinstance(stored.element, FloatType) or stored.element.name not in _PLAIN_ELEMENTS:
            return (
                f"tensor '{name}' has element type {stored.element}; a plain weight is one of"
                f" {', '.join(_PLAIN_ELEMENTS)}"
            )
        return None

    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value:
        out = emit(weights.reference(name)).result
        stored = out.type
        assert isinstance(stored, TensorType)
        return out if stored.element is element else emit(ty.Cast(out, element=element)).result


_PLAIN_ELEMENTS: Final = ("f16", "bf16", "f32", "f64")


_BASE: Final = "base."  # what stands before the name of a base checkpoint's tensor
# A vocabulary may have grown: the rows that the base lacks are taken as they are.
_GROWING: Final = ("embed_tokens.weight", "lm_head.weight")


def with_base(delta: Checkpoint, base: Checkpoint) -> Checkpoint:
    """The base's tensors of the same names beside the deltas, in files named by absolute paths."""
    tensors = dict(delta.tensors)
    for name, stored in base.tensors.items():
        moved = replace(stored, file=str(base.folder / stored.file))
        tensors[_BASE + name if name in delta.tensors else name] = moved
    stamps = {str(base.folder / name): stamp for name, stamp in base.stamps.items()}
    return replace(delta, tensors=tensors, stamps={**delta.stamps, **stamps})


def is_delta(checkpoint: Checkpoint) -> bool:
    """Whether tensors are to be added to others."""
    names = checkpoint.tensors
    return any(name.startswith(_BASE) and name.removeprefix(_BASE) in names for name in names)


class DeltaFormat:
    """base + delta, added in f32 and rounded once."""

    def stored_keys(self, name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
        return (name, _BASE + name) if name in tensors and _BASE + name in tensors else ()

    def problem(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, StoredTensor]) -> str | None:
        plain, rows = PlainFormat(), tensors[_BASE + name].type.static_shape[:1]
        if name.endswith(_GROWING) and rows < shape[:1]:
            return plain.problem(name, shape, tensors) or plain.problem(
                _BASE + name, (*rows, *shape[1:]), tensors
            )
        return plain.problem(name, shape, tensors) or plain.problem(_BASE + name, shape, tensors)

    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value:
        base, delta = (PlainFormat().value(key, f32, weights, emit) for key in (_BASE + name, name))
        (rows, *_), (whole, *_) = (ty.tensor_type(v).static_shape for v in (base, delta))
        if rows == whole:
            out = emit(ty.Add(base, delta)).result
        else:
            first = emit(ty.Slice(delta, axis=0, offset=0, size=rows)).result
            rest = emit(ty.Slice(delta, axis=0, offset=rows, size=whole - rows)).result
            out = emit(ty.Concat((emit(ty.Add(base, first)).result, rest), axis=0)).result
        return out if element is f32 else emit(ty.Cast(out, element=element)).result


def global_of(key: str, stored: StoredTensor) -> ty.Global:
    """The `ty.global` named `key` of a stored tensor."""
    return ty.Global(
        sym_name=key,
        type=stored.type,
        file=stored.file,
        key=stored.key,
        offset=stored.offset,
        nbytes=stored.nbytes,
    )


class TensorReader:
    """Reads stored tensors by memory map; for small tensors that must be looked at, and for checks."""

    def __init__(self, folder: Path) -> None:
        self._reader = CheckpointReader(folder)

    def __call__(self, stored: StoredTensor) -> npt.NDArray[Any]:
        return self._reader.read(global_of(stored.key, stored))


@dataclass
class Weights:
    """The parameters of one import; collects the `ty.global`s they refer to, in order of first use.

    `aliases`: all names of each parameter; `shapes`: what the model needs; `formats`: asked in order which of
    them holds a parameter.
    """

    checkpoint: Checkpoint
    aliases: Mapping[str, Sequence[str]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    formats: Sequence[WeightFormat] = (PlainFormat(),)
    globals: dict[str, ty.Global] = field(default_factory=dict)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape the model needs parameter `name` (or one of its aliases) in."""
        return next(
            self.shapes[alias] for alias in (name, *self.aliases.get(name, ())) if alias in self.shapes
        )

    def find(self, name: str) -> tuple[WeightFormat, str] | None:
        """The format that holds parameter `name` and the name it is stored under (a tied parameter may be
        stored under any of its names).
        """
        for stored_name in self.aliases.get(name, (name,)):
            for weight_format in self.formats:
                if weight_format.stored_keys(stored_name, self.checkpoint.tensors):
                    return weight_format, stored_name
        return None

    def canonical(self, name: str) -> str:
        """One name for all aliases of a parameter."""
        found = self.find(name)
        return found[1] if found else name

    def value(self, name: str, element: Type, emit: Emit) -> Value:
        """Emit the ops that make parameter `name`, which must have been found."""
        found = self.find(name)
        assert found is not None, name
        return found[0].value(found[1], element, self, emit)

    def reference(self, key: str) -> ty.GetGlobal:
        """A detached `ty.get_global` of a stored tensor, whose `ty.global` is noted."""
        stored = self.checkpoint.tensors[key]
        if key not in self.globals:
            self.globals[key] = global_of(key, stored)
        return ty.GetGlobal.create((), (stored.type,), DictAttr({"symbol": SymbolRefAttr(key)}))
