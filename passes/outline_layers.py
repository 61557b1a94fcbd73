"""Decoder layers that are the same program with other weights become one function, called once per layer.

    %w0 = ty.get_global @model.layers.0.mlp.up_proj.weight ...           %y0 = func.call @layer_s8(%x, %w0, ...)   loc("model.layers.0")
    %h0 = ty.linear(%x, %w0)                                     -->     %y1 = func.call @layer_s8(%y0, %w1, ...)  loc("model.layers.1")
    ... the same for layer 1 ...                                         func.func @layer_s8(%x, %w, ...)

Layers are found by `tyir.layer` and compared op by op; layers that differ in
structure get functions of their own (`@layer_s8_1`).  Kernels, command programs and compile time then do
not grow with depth.  Runs after outline-params: weights enter as arguments.
"""  # noqa: E501

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from tyir.attributes import DictAttr, IntegerAttr, SymbolRefAttr
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func, Return
from tyir.dialects.ty import GetGlobal
from tyir.execution.entry_points import aliasing
from tyir.ir import Op, Value
from tyir.layers import any_layer, layer_of, layer_root, path_of, place, place_attributes, within_layer
from tyir.location import FusedLoc, Location, NameLoc
from tyir.pipeline import Pass, PassContext
from tyir.traits import InPlace
from tyir.types import i64

__all__ = ["OutlineLayers"]


@dataclass(frozen=True)
class OutlineLayers(Pass):
    """One function per distinct decoder layer."""

    stage: ClassVar[tuple[str, ...]] = ("static",)
    to_stage: ClassVar[str | None] = "program"

    def run(self, op: Op, context: PassContext) -> None:
        for module in [m for m in op.walk_type(Module) if any(isinstance(o, Func) for o in m.body)]:
            for function in [o for o in module.body if isinstance(o, Func)]:
                _outline(function, context)


def _outline(function: Func, context: PassContext) -> None:
    layers: dict[tuple[Any, ...], Func] = {}
    suffix = str(function.sym_name).removeprefix("main")
    for number, ops in _segments(function):
        segment = _Segment(ops)
        layer = layers.get(segment.key)
        if layer is None:
            name = f"layer{suffix}" + (f"_{len(layers)}" if layers else "")
            layer = layers[segment.key] = segment.to_function(name).insert_before(function)
        segment.replace_with_call(layer, number)
        context.statistics["calls"] = context.statistics.get("calls", 0) + 1


def _segments(function: Func) -> list[tuple[int, list[Op]]]:
    """Runs of consecutive ops of one decoder layer (weight references in between belong to no layer)."""
    segments: list[tuple[int, list[Op]]] = []
    current: int | None = None
    for op in function.body:
        if isinstance(op, GetGlobal):
            continue
        layer = layer_of(op)
        if layer is not None and layer == current:
            segments[-1][1].append(op)
        elif layer is not None:
            segments.append((layer, [op]))
        current = layer
    return segments


class _Segment:
    """The ops of one layer, with what they take from outside and give to it."""

    def __init__(self, ops: Sequence[Op]) -> None:
        self.ops = ops
        inside = {v: (i, v.index) for i, op in enumerate(ops) for v in op.results}
        externals: dict[Value, int] = {}
        members = set(ops)
        rows: list[Any] = []
        for op in ops:
            refs = [
                inside[v] if v in inside else externals.setdefault(v, len(externals)) for v in op.operands
            ]
            rows.append((op.name, op.properties, tuple(refs), tuple(r.type for r in op.results)))
        self.inputs = list(externals)
        self.outputs = [v for v in inside if any(user not in members for user in v.uses)]
        self.key = (tuple(rows), tuple(v.type for v in self.inputs), tuple(inside[v] for v in self.outputs))

    def to_function(self, name: str) -> Func:
        function = Func.make(name, [v.type for v in self.inputs], [_argument_name(v) for v in self.inputs])
        function.sym_visibility = "private"
        mapping = dict(zip(self.inputs, function.args))
        for op in self.ops:
            copy = op.clone(mapping)
            copy.loc = _any_layer(op.loc)
            if (path := path_of(op)) is not None:
                place(copy, any_layer(path))
            function.body.append(copy)
        function.body.append(Return(values=[mapping[v] for v in self.outputs]))
        function.refresh_type()
        function.set_res_attrs([_alias(v, self.inputs) for v in self.outputs])
        return function

    def replace_with_call(self, function: Func, layer: int) -> None:
        call = Call(
            args=self.inputs,
            callee=SymbolRefAttr(str(function.sym_name)),
            result_types=[v.type for v in self.outputs],
            attributes=_call_attributes(self.ops, layer),
            loc=NameLoc(_root(self.ops) or "layer"),
        ).insert_before(self.ops[-1])
        for old, new in zip(self.outputs, call.results):
            old.replace_all_uses_with(new)
        for op in reversed(self.ops):
            op.erase()


def _alias(value: Value, inputs: Sequence[Value]) -> DictAttr:
    """Which argument a result is, when it is one updated in place."""
    current = value
    while (op := current.op) is not None and op.has_trait(InPlace):
        current = op.operands[0]
    updated = current is not value and current in inputs
    return aliasing(DictAttr(), inputs.index(current)) if updated else DictAttr()


def _root(ops: Sequence[Op]) -> str | None:
    """`model.layers.3` for the ops of that layer."""
    paths = (path_of(op) for op in ops)
    return next((root for path in paths if path is not None and (root := layer_root(path))), None)


def _call_attributes(ops: Sequence[Op], layer: int) -> DictAttr:
    """The place of a layer's call."""
    root = _root(ops)
    number = DictAttr({"tyir.layer": IntegerAttr(layer, i64)})
    return (
        number if root is None else DictAttr({**dict(place_attributes(root).items()), **dict(number.items())})
    )


def _any_layer(location: Location) -> Location:
    """The location with `*` for the layer number: `model.layers.*.mlp.up_proj`."""
    if isinstance(location, NameLoc):
        return NameLoc(any_layer(location.name), location.child)
    if isinstance(location, FusedLoc):
        return FusedLoc(tuple(_any_layer(part) for part in location.parts))
    return location


def _argument_name(value: Value) -> str | None:
    op = value.op
    if isinstance(op, GetGlobal):
        return within_layer(op.symbol.leaf)
    return re.sub(r"_?\d+$", "", value.name) if value.name else None
