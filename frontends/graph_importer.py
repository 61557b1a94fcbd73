"""An exported graph to a function at stage `aten`, one op per node, in one walk.

Dead nodes (assertions, checks of position ids) are dropped first; a node that writes into a tensor is never
dead, whether or not anything reads its result, and is refused: ops of the IR have values only.  Then every
remaining node must have a row in `aten_table.ROWS`; those without are collected and reported together, with
counts, the first layer and the model's source line.  Symbolic sizes vanish: result types carry `?` instead.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from tyir.attributes import DenseElementsAttr, DictAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import aten, func, ty
from tyir.frontends.aten_table import ANGLES, PARTS, ROWS, UNBIND, FromResult, Row
from tyir.frontends.layer_reuse import LAYER_BEGIN, LAYER_COPY, LAYER_END
from tyir.frontends.torch_export import WRAPPER_PREFIX
from tyir.frontends.weights import Weights
from tyir.ir import Block, Op, Value
from tyir.layers import layer_in, place, place_attributes
from tyir.location import FileLoc, Location, NameLoc, module_path
from tyir.types import TensorType, Type, bf16, f16, f32, f64, i1, i8, i16, i32, i64, ui8

__all__ = ["import_graph"]

_ELEMENTS: Final[dict[torch.dtype, Type]] = {
    torch.float16: f16,
    torch.bfloat16: bf16,
    torch.float32: f32,
    torch.float64: f64,
    torch.bool: i1,
    torch.int8: i8,
    torch.uint8: ui8,
    torch.int16: i16,
    torch.int32: i32,
    torch.int64: i64,
}
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+)')


@dataclass
class _Layer:
    """A traced decoder layer: the nodes between its marks, and how many layers of the model it stands for."""

    begin: fx.Node
    body: dict[fx.Node, None] = field(default_factory=dict)
    end: fx.Node | None = None
    count: int = 1


def traced_layers(nodes: Iterable[fx.Node]) -> dict[str, _Layer]:
    """The layers that `layer_reuse` has marked, by path."""
    layers: dict[str, _Layer] = {}
    current: _Layer | None = None
    for node in nodes:
        target = str(node.target)
        if target == LAYER_BEGIN:
            current = layers[_text(node.args[1])] = _Layer(node)
        elif target == LAYER_END:
            layers[_text(node.args[1])].end, current = node, None
        elif target == LAYER_COPY:
            layers[_text(node.args[2])].count += 1
        elif current is not None:
            current.body[node] = None
    return layers


def _text(argument: object) -> str:
    assert isinstance(argument, str)
    return argument


@dataclass
class _Unsupported:
    """Nodes that cannot be represented, by what they have in common."""

    layers: Mapping[str, _Layer]
    nodes: dict[str, list[fx.Node]] = field(default_factory=dict)

    def add(self, what: str, node: fx.Node) -> None:
        """Note a node, as often as its layer stands for layers of the model."""
        count = next((layer.count for layer in self.layers.values() if node in layer.body), 1)
        self.nodes.setdefault(what, []).extend([node] * count)

    def raise_if_any(self) -> None:
        if not self.nodes:
            return
        total = sum(len(nodes) for nodes in self.nodes.values())
        lines = [
            f"{what}: {_times(len(nodes))}, first {describe(location_of(nodes[0]))}"
            for what, nodes in sorted(self.nodes.items())
        ]
        kinds = f"{len(self.nodes)} kinds of operations" if len(self.nodes) > 1 else "1 kind of operation"
        message = (
            f"the model uses {kinds} ({total} node{'s' if total > 1 else ''}) that cannot be imported:\n  "
            + "\n  ".join(lines)
        )
        raise TyirError(
            Diagnostic(
                message,
                help=(
                    "models with these operations cannot be imported yet; frontends/README.md says how an"
                    " operation is added"
                ),
            )
        )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def describe(location: Location) -> str:
    """`in layer 3, model.layers.3.mlp (modeling_qwen2.py:45)`."""
    layer = layer_in(module_path(location) or "")
    words = [f"in layer {layer}"] if layer is not None else ["outside the layers"]
    if isinstance(location, NameLoc):
        words.append(location.name)
        location = location.child or location
    return ", ".join(words) + (f" ({location.file}:{location.line})" if isinstance(location, FileLoc) else "")


def location_of(node: fx.Node, moved: tuple[str, str] | None = None) -> Location:
    """The module path (its beginning exchanged as `moved` says) and the innermost line of the model's own
    source.
    """
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if "transformers/models/" in f[0].replace("\\", "/")] or frames
    file = FileLoc(PurePath(own[-1][0]).name, int(own[-1][1]), 1) if own else None
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path, module_class = (str(part) for part in stack[-1]) if stack else ("", node.name)
    root = not path or path == WRAPPER_PREFIX.rstrip(
        "."
    )  # the model itself has no path: its class stands for it
    return NameLoc(
        module_class.rpartition(".")[2] if root else _moved(path.removeprefix(WRAPPER_PREFIX), moved), file
    )


def _moved(path: str, moved: tuple[str, str] | None) -> str:
    """`path`, when it is in module moved[0], as a path in moved[1]."""
    if moved is None or not f"{path}.".startswith(f"{moved[0]}."):
        return path
    return moved[1] + path[len(moved[0]) :]


def tensor_type_of(value: torch.Tensor) -> TensorType:
    """The IR type of a traced tensor; every symbolic size is `?`."""
    return TensorType(tuple(d if isinstance(d, int) else None for d in value.shape), _ELEMENTS[value.dtype])


def _writes(node: fx.Node) -> bool:
    """Whether a node changes one of its operands (`copy_`, `index_put_`): its readers need not be its
    users.
    """
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and bool(getattr(schema, "is_mutable", False))


def live_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that the output depends on, in order, leaving out pure size arithmetic (which result types
    replace); what a node writes into may be the output's, so such nodes are live as well.
    """
    live: set[fx.Node] = set()
    stack = [n for n in graph.nodes if n.op == "output" or _writes(n)]
    while stack:
        node = stack.pop()
        if node not in live:
            live.add(node)
            stack.extend(n for n in node.all_input_nodes if not _is_size(n))
    return [n for n in graph.nodes if n in live]


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, int))


class _Skip(Exception):
    """The node cannot be represented; the argument says what to call it."""


def _argument_map(node: fx.Node) -> dict[str, Any]:
    """Schema argument name to the value given or the default."""
    schema = node.target._schema  # an OpOverload: only those have rows
    given = dict(zip((a.name for a in schema.arguments), node.args))
    return {a.name: node.kwargs.get(a.name, given.get(a.name, a.default_value)) for a in schema.arguments}


def _check_rest(row: Row, node: fx.Node, arguments: dict[str, Any]) -> None:
    """Arguments the row does not account for must have their defaults."""
    known = {*row.operands, *row.ignored, *(v for v in row.properties.values() if isinstance(v, str))}
    for argument in node.target._schema.arguments:
        value = arguments[argument.name]
        wanted = row.required.get(argument.name, argument.default_value)
        if argument.name not in known and value is not None and value != wanted:
            raise _Skip(f"{node.target} with {argument.name} = {value}")


def _plain(value: Any, node: fx.Node, name: str) -> Any:
    """A property's number or list of numbers."""
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
        return tuple(value)
    raise _Skip(f"{node.target} with a {name} that is not a constant")


@dataclass
class _Importer:
    weights: Weights
    parameters: dict[str, str]
    buffers: dict[str, Callable[[], Any]]
    layers: Mapping[str, _Layer]
    block: Block
    values: dict[fx.Node, Value] = field(default_factory=dict)
    emitted: dict[str, Value] = field(default_factory=dict)
    angles: dict[fx.Node, ty.RopeAngles] = field(default_factory=dict)
    places: dict[str, DictAttr] = field(default_factory=dict)
    moved: tuple[str, str] | None = (
        None  # the traced layer whose nodes are being converted, and the layer they are converted for
    )

    def operand(self, node: fx.Node) -> Value:
        """The value of a node; weights and constants are emitted at their first use."""
        if node in self.values:
            return self.values[node]
        name = self.parameters.get(node.name)
        name = None if name is None else _moved(name, self.moved)
        key = self.weights.canonical(name) if name is not None else node.name
        if key not in self.emitted:
            self.emitted[key] = self.weight(key, node) if name is not None else self.constant(node)
            self.emitted[key].name = re.sub(r"\W", "_", key)
        return self.emitted[key]

    def weight(self, name: str, node: fx.Node) -> Value:
        """The parameter in the dtype the model keeps it in, which may be wider than the model's own."""

        def emit(op: Op) -> Op:
            op.loc = NameLoc(name)
            return self.block.append(op if isinstance(op, ty.GetGlobal) else place(op, name))

        return self.weights.value(name, tensor_type_of(node.meta["val"]).element, emit)

    def constant(self, node: fx.Node) -> Value:
        array = np.asarray(self.buffers[node.name](), order="C")
        op = self.block.append(ty.Constant(value=DenseElementsAttr.from_numpy(array)))
        op.loc = location_of(node)
        return place(op, module_path(op.loc) or "").result

    def place(self, location: Location) -> DictAttr:
        """Layer and module path, as attributes."""
        path = module_path(location) or ""
        if path not in self.places:
            self.places[path] = place_attributes(path)
        return self.places[path]

    def convert(self, node: fx.Node) -> None:
        """Append the op of one node."""
        if str(node.target) in PARTS or str(node.target) == UNBIND:
            return
        if str(node.target) == ANGLES:
            self.angles[node] = self.rope_angles(node)
            return
        if str(node.target) == LAYER_COPY:
            self.values[node] = self.layer_copy(node)
            return
        if node.target is operator.getitem:
            self.values[node] = self.part(node)
            return
        row = ROWS[str(node.target)]
        arguments = _argument_map(node)
        operands = [self.operand(n) for n in _operand_nodes(row, node, arguments)]
        if row.op is None:
            self.values[node] = operands[0]
            return
        result = tensor_type_of(node.meta["val"])
        location = location_of(node, self.moved)
        op = row.op.create(
            operands,
            (result,),
            _properties(row, node, arguments, result),
            self.place(location),
            loc=location,
            result_names=(node.name,),
        )
        self.values[node] = self.block.append(op).result

    def layer_copy(self, node: fx.Node) -> Value:
        """The nodes of a traced layer once more, for another layer's input and parameters."""
        x, path, source = node.args
        assert isinstance(x, fx.Node)
        layer, outer = self.layers[_text(source)], self.values
        assert layer.end is not None
        self.values, self.moved = {**outer, layer.begin: self.operand(x)}, (_text(source), _text(path))
        for inner in layer.body:
            self.convert(inner)
        result = self.operand(layer.end.all_input_nodes[0])
        self.values, self.moved = outer, None
        return result

    def part(self, node: fx.Node) -> Value:
        """One result of a node that has several: of one of `PARTS` a slice, of an unbind a select."""
        whole, index = node.args
        assert isinstance(whole, fx.Node) and isinstance(index, int)
        if str(whole.target) == ANGLES:
            return self.angles[whole].results[index]
        arguments = _argument_map(whole)
        kind: type[aten.Slice | aten.Select] = aten.Select
        properties = {"dim": arguments["dim"], "index": index}
        if str(whole.target) != UNBIND:
            sizes = _part_sizes(whole)
            start = sum(sizes[: index % len(sizes)])
            kind = aten.Slice
            properties = {"dim": arguments["dim"], "start": start, "end": start + sizes[index % len(sizes)]}
        fields = {f.name: f for f in kind.attr_fields}
        encoded = DictAttr({name: fields[name].codec.encode(value) for name, value in properties.items()})
        x, result = self.operand(arguments["self"]), tensor_type_of(node.meta["val"])
        location = location_of(whole, self.moved)
        op = kind.create(
            [x], (result,), encoded, self.place(location), loc=location, result_names=(node.name,)
        )
        return self.block.append(op).results[0]

    def rope_angles(self, node: fx.Node) -> ty.RopeAngles:
        """The tables that a rotary module makes of its positions (`tyir.frontends.vision.rotary`)."""
        arguments = _argument_map(node)
        op = ty.RopeAngles(
            self.operand(arguments["positions"]),
            inv_freq=DenseElementsAttr.from_numpy(np.asarray(arguments["inv_freq"], np.float32)),
            scale=arguments["scale"],
            element=tensor_type_of(node.meta["val"][0]).element,
            axis=tuple(arguments["axis"]),
            loc=location_of(node, self.moved),
        )
        op.cos.name, op.sin.name = "cos", "sin"
        self.block.append(op)
        return place(op, module_path(op.loc) or "")


def _part_sizes(node: fx.Node) -> list[int]:
    """The lengths of the parts that a node of `PARTS` makes; they must not depend on the prompt's length."""
    dim = _argument_map(node)["dim"]
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        raise _Skip(f"{node.target} of a dynamic dimension")
    return sizes


def _operand_nodes(row: Row, node: fx.Node, arguments: dict[str, Any]) -> list[fx.Node]:
    """The nodes whose values are the op's operands; a list argument counts as many, None and numbers as
    none.
    """
    nodes: list[fx.Node] = []
    given = [arguments[name] is not None for name in row.operands]
    if given != sorted(given, reverse=True):
        raise _Skip(f"{node.target} without {row.operands[given.index(False)]}")
    for name in row.operands:
        value = arguments[name]
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if item is None and item is not value:
                raise _Skip(
                    f"{node.target} with {name} = {value}"
                )  # x[:, index]: another axis than the first
            if isinstance(item, fx.Node) and not _is_size(item):
                nodes.append(item)
            elif item is not None and not (name == row.scalar and isinstance(item, (int, float))):
                raise _Skip(f"{node.target} with {name} = {item}")
    return nodes


def _properties(row: Row, node: fx.Node, arguments: dict[str, Any], result: TensorType) -> DictAttr:
    """The op's properties, encoded as its declaration wants them."""
    assert row.op is not None
    values: dict[str, Any] = {}
    for name, source in row.properties.items():
        if source is FromResult.SHAPE:
            values[name] = tuple(-1 if d is None else d for d in result.dims)
        elif source is FromResult.ELEMENT:
            values[name] = result.element
        elif arguments[source] is not None:
            values[name] = _plain(arguments[source], node, source)
    if row.scalar is not None and isinstance(arguments[row.scalar], (int, float)):
        values["scalar"] = arguments[row.scalar]
    fields = {f.name: f for f in row.op.attr_fields}
    return DictAttr({name: fields[name].codec.encode(value) for name, value in values.items()})


def _check(nodes: Iterable[fx.Node], bound: set[str], layers: Mapping[str, _Layer]) -> None:
    """Report every node that has no row, an argument its row does not cover, or a result that is not one
    tensor with at most one dynamic dimension.
    """
    unsupported = _Unsupported(layers)
    for node in nodes:
        if node.op == "placeholder":
            if node.name not in bound:
                unsupported.add(f"constant tensor {node.name}", node)
            continue
        target, value = str(node.target), node.meta.get("val")
        if target == LAYER_COPY:
            continue
        if _writes(node):
            unsupported.add(f"{target}, which writes into its operand", node)
            continue
        if (
            node.target is operator.getitem
        ):  # one of several results: the op that made them is what is missing
            continue
        if target in (ANGLES, UNBIND):
            continue
        if target not in ROWS and target not in PARTS:
            unsupported.add(target, node)
            continue
        try:
            if target in PARTS:
                _part_sizes(node)
                continue
            arguments = _argument_map(node)
            _operand_nodes(ROWS[target], node, arguments)
            _check_rest(ROWS[target], node, arguments)
            if (
                not isinstance(value, torch.Tensor)
                or value.dtype not in _ELEMENTS
                or tensor_type_of(value).dims.count(None) > 1
            ):
                raise _Skip(f"{target} with result {value}")
            if ROWS[target].op is not None:
                _properties(ROWS[target], node, arguments, tensor_type_of(value))
        except _Skip as reason:
            unsupported.add(str(reason), node)
    unsupported.raise_if_any()


def import_graph(
    program: torch.export.ExportedProgram,
    weights: Weights,
    buffer: Callable[[str], Any],
    name: str = "main",
) -> func.Func:
    """`@main`, or the function `name`, of an exported program.

    `buffer` gives the array of a buffer that is not stored.  `TyirError` lists everything unsupported.
    """
    inputs: list[str] = []
    parameters: dict[str, str] = {}
    buffers: dict[str, Callable[[], Any]] = {}
    for spec in program.graph_signature.input_specs:
        argument, target = spec.arg.name, str(spec.target or "").removeprefix(WRAPPER_PREFIX)
        if spec.kind is torch.export.graph_signature.InputKind.USER_INPUT:
            inputs.append(argument)
        elif weights.find(target) is not None:
            parameters[argument] = target
        elif spec.kind is torch.export.graph_signature.InputKind.BUFFER:
            buffers[argument] = partial(buffer, target)
    nodes = live_nodes(program.graph_module.graph)
    by_name = {n.name: n for n in program.graph_module.graph.nodes if n.op == "placeholder"}
    body = [n for n in nodes if n.op != "output"]
    layers = traced_layers(body)
    _check(body, {*inputs, *parameters, *buffers}, layers)
    main = func.Func.make(name, [tensor_type_of(by_name[n].meta["val"]) for n in inputs], inputs)
    importer = _Importer(weights, parameters, buffers, layers, main.body)
    importer.values.update({by_name[n]: arg for n, arg in zip(inputs, main.args)})
    for node in body:
        if node.op != "placeholder":
            importer.convert(node)
    main.body.append(func.Return(values=tuple(importer.operand(n) for n in _outputs(nodes))))
    main.refresh_type()
    return main


def _outputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    (output,) = (n for n in nodes if n.op == "output")
    returned = output.args[0]
    return [
        n
        for n in (returned if isinstance(returned, (tuple, list)) else (returned,))
        if isinstance(n, fx.Node)
    ]
