"""What the importer recognised as what: `tyir-import --explain`.

ty.rms_norm      25 = 24 layers x 1 + 1   input_layernorm, ... (modeling_qwen2.py:57)
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from tyir.attributes import DictAttr, IntegerAttr, StringAttr
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.ir import Op
from tyir.layers import layer_of, path_of
from tyir.location import FileLoc, FusedLoc, Location, NameLoc
from tyir.passes.raise_aten import raise_aten

__all__ = ["explain"]


def explain(module: Module) -> str:
    """A table of the raised module's ops and rules; `module` (at stage aten) is left as it was."""
    raised = module.clone()
    assert isinstance(raised, Module)
    rules: dict[str, int] = {}
    before = sum(1 for op in module.walk() if op.dialect == "aten")
    raise_aten(raised, rules)
    return "\n".join([*_head(module, before), *_ops(raised), *_weights(raised), *_rules(rules)])


def _head(module: Module, nodes: int) -> Iterator[str]:
    model = module.attributes["tyir.model"]
    assert isinstance(model, DictAttr)
    architecture, layers = model.get("architecture"), model.get("num_hidden_layers")
    name = architecture.value if isinstance(architecture, StringAttr) else "model"
    yield (
        f"{name}: {layers.value if isinstance(layers, IntegerAttr) else '?'} layers, {nodes} graph operations"
        " recognised as"
    )


def _ops(module: Module) -> Iterator[str]:
    """One line per kind of op, with variants that matter (bias, window, group size) told apart."""
    groups: dict[str, list[Op]] = defaultdict(list)
    for function in module.walk_type(Func):
        for op in function.body:
            if (
                not isinstance(op, (Return, ty.GetGlobal, ty.Constant))
                and op.dialect != "quant"
                and not _of_weights(op)
            ):
                groups[_kind(op)].append(op)
    width = max(map(len, groups), default=0)
    for kind, ops in sorted(groups.items()):
        yield f"  {kind:<{width}}  {_counts(ops):<28}  {_places(ops)}"


def _of_weights(op: Op) -> bool:
    """Whether the op works on nothing but weights."""
    return bool(op.operands) and all(
        isinstance(v.op, (ty.GetGlobal, ty.Constant)) or (v.op is not None and _of_weights(v.op))
        for v in op.operands
    )


def _kind(op: Op) -> str:
    if isinstance(op, ty.QuantizedLinear):
        return (
            f"ty.quantized_linear (int4, groups of {op.group_size}{', bias' if op.bias is not None else ''})"
        )
    if isinstance(op, ty.Linear):
        return "ty.linear" + (" (bias)" if op.bias is not None else "")
    if isinstance(op, ty.Attention):
        q, k = ty.tensor_type(op.q).dims[2], ty.tensor_type(op.k).dims[2]
        return f"ty.attention ({q} heads, {k} key/value heads{f', window {op.window}' if op.window else ''})"
    return op.name


def _counts(ops: list[Op]) -> str:
    """`48 = 24 layers x 2`, `25 = 24 layers x 1 + 1`."""
    layers = Counter(layer_of(op) for op in ops)
    outside = layers.pop(None, 0)
    if not layers:
        return str(len(ops))
    low, high = min(layers.values()), max(layers.values())
    each = str(low) if low == high else f"{low}..{high}"
    return f"{len(ops)} = {len(layers)} layer{'s' * (len(layers) > 1)} x {each}" + (
        f" + {outside}" if outside else ""
    )


def _places(ops: list[Op], most: int = 4) -> str:
    """The modules inside a layer and the source line of the first."""
    names: dict[str, None] = {}
    for op in ops:
        path, layer = path_of(op) or "", layer_of(op)
        names[
            path.partition(f".{layer}.")[2]
            or (f"layer {layer}" if layer is not None and path.endswith(f".{layer}") else path)
        ] = None
        if len(names) > most:
            break
    shown = [n if not n.startswith("layer ") else "the layer itself" for n in names]
    shown = list(dict.fromkeys(shown))
    line = _line(ops[0].loc)
    return ", ".join(shown[:most]) + (", ..." if len(shown) > most else "") + (f" ({line})" if line else "")


def _line(location: Location | None) -> str:
    if isinstance(location, FileLoc):
        return f"{location.file}:{location.line}"
    if isinstance(location, NameLoc):
        return _line(location.child)
    return _line(location.parts[-1]) if isinstance(location, FusedLoc) else ""


def _weights(module: Module) -> Iterator[str]:
    stored = Counter(str(op.type.element) for op in module.body if isinstance(op, ty.Global))
    yield "weights: " + ", ".join(
        f"{count} tensors of {element}" for element, count in sorted(stored.items())
    )


def _rules(rules: dict[str, int]) -> Iterator[str]:
    yield "rules used: " + ", ".join(f"{name} x {count}" for name, count in sorted(rules.items()))
