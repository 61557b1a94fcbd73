"""Every weight a die needs becomes a named tensor of the artifact.

    %w = ty.get_global @model.layers.0.self_attn.q_proj.weight
    %s = ty.slice(%w) {axis = 0, offset = 128, size = 64}
    %y = ty.linear(%x, %s)
    -->
    ty.param @model.layers.0.self_attn.q_proj.weight : tensor<64x256xf16> ({ get_global, slice, ty.yield })
    %s = ty.get_global @model.layers.0.self_attn.q_proj.weight
    %y = ty.linear(%x, %s)

Equal expressions become one parameter, so all sequence lengths share the weights; what remains in the
functions depends on the step's inputs alone.  Runs when dies have been cut.  Before specialize-seqlen it
meets each expression of a die once, behind it once for each length; the result is the same.  A module that
has been through it stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Final

from tyir.attributes import SymbolRefAttr
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import (
    GetGlobal,
    Param,
    QuantizedLinear,
    Reshape,
    RopeAngles,
    RopeTable,
    Yield,
    tensor_type,
)
from tyir.execution.constexpr import ConstantExpressions, clone_expression, expression_ops
from tyir.ir import Block, Op, Region, Value
from tyir.layers import layer_of, path_of
from tyir.pipeline import Pass, PassContext

__all__ = ["OutlineParams"]


@dataclass(frozen=True)
class OutlineParams(Pass):
    """Weight expressions become `ty.param`s of their die, shared by all its functions."""

    stage: ClassVar[tuple[str, ...]] = ("dist", "static")

    def run(self, op: Op, context: PassContext) -> None:
        for module in [m for m in op.walk_type(Module) if any(isinstance(o, Func) for o in m.body)]:
            context.statistics["params"] = context.statistics.get("params", 0) + outline(module)


def outline(module: Module) -> int:
    """Outline the weight expressions of one module's functions; returns how many parameters there are."""
    constants = ConstantExpressions()
    params: dict[tuple[Any, ...], Param] = {}
    names = {str(op.sym_name) for op in module.body if isinstance(op, Param)}  # of a pass before
    outlined = frozenset(names)
    first = module.body.first_op
    for function in [o for o in module.body if isinstance(o, Func)]:
        for user, index, value in list(_roots(function, constants)):
            if isinstance(value.op, GetGlobal) and value.op.symbol.leaf in outlined:
                continue
            key = constants.key(value)
            param = params.get(key)
            if param is None:
                param = params[key] = _make_param(value, _base_name(value, user, index), names)
                module.body.insert(param, before=first)
            ref = GetGlobal(
                symbol=SymbolRefAttr(str(param.sym_name)),
                result_types=[param.type],
                loc=value.op.loc if value.op else user.loc,
            )
            user.set_operand(index, ref.insert_before(user).result)
        for op in reversed(function.body):
            if op.is_unused and op.results and constants.is_constant(op.results[0]):
                op.erase()
    return len(names)


def _roots(function: Func, constants: ConstantExpressions) -> Iterator[tuple[Op, int, Value]]:
    """Where a weight expression meets an op that is none."""
    for op in function.body:
        if op.results and constants.is_constant(op.results[0]):
            continue
        for index, value in enumerate(op.operands):
            if constants.is_constant(value):
                yield op, index, value


def _make_param(value: Value, base: str, names: set[str]) -> Param:
    block = Block()
    block.append(Yield(clone_expression(value, block)))
    name, number = base, 0
    while name in names:
        number += 1
        name = f"{base}.{number}"
    names.add(name)
    assert value.op is not None
    return Param(sym_name=name, type=tensor_type(value), initializer=Region([block]), loc=value.op.loc)


_ROLES: Final = {1: "q", 2: "scales", 3: "zeros"}  # by operand of ty.quantized_linear


def _base_name(value: Value, user: Op, index: int) -> str:
    """The checkpoint tensor's name: `...q_proj.weight`, `rope.cos`.

    Parts of a quantised weight are called by what they are to the linear, `...q_proj.weight.scales`, whatever
    they are called in the checkpoint that they come from, if any.
    """
    symbols = [o.symbol.leaf for o in expression_ops(value) if isinstance(o, GetGlobal)]
    if isinstance(user, QuantizedLinear) and index in _ROLES and symbols:
        module = symbols[0].rpartition(".")[0] if layer_of(user) is not None else path_of(user)
        return f"{module}.weight.{_ROLES[index]}"
    table = value  # of a tower's positions it may have been given another shape
    while isinstance(table.op, Reshape):
        table = table.op.x
    if isinstance(table.op, (RopeTable, RopeAngles)):
        return ("rope.cos", "rope.sin")[table.index]
    return symbols[0] if symbols else "constant"
