"""Which stored parameter a weight operand is, and which of its rows it takes.

    %w = ty.cast(@model.layers.0.self_attn.qkv_proj.weight)     the parameter [N, K]
    %v = ty.slice %w {axis = 0, offset = 96, size = 32}         32 of its rows
    ty.linear %x, %v

What is done to a parameter as a whole (scaling, clamping, writing it to a checkpoint) is done below the ops
that take rows of it, so that every user sees it and a checkpoint can hold it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tyir.dialects import ty
from tyir.dialects.ty import tensor_type
from tyir.execution.constexpr import ConstantExpressions, expression_ops
from tyir.ir import Op, Value
from tyir.layers import carry, layer_of
from tyir.types import f32

__all__ = ["HEAD", "ParameterUse", "ParameterUses", "in_f32", "insert_before", "parameter_use"]

HEAD: Final = "lm_head"  # transformers' name for the output head that shares the embedding's table

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ParameterUse:
    """One operand that is a parameter, or some rows of it in some order.

    `root` is the parameter as a value, [N, K] or [N], `name` what the checkpoint calls it
    (`model.layers.0.mlp.up_proj.weight`), `chain` the ops from `root` to the operand, `rows` the rows that
    the operand holds, in its order; None when the chain does more than to take rows.
    """

    user: Op
    index: int
    root: Value
    name: str
    chain: tuple[Op, ...]
    rows: Rows | None

    @property
    def value(self) -> Value:
        """The operand."""
        return self.user.operands[self.index]

    @property
    def shift(self) -> Value | None:
        """The constant that the model adds to a norm's stored weight (1 + w)."""
        return next((op.rhs for op in self.chain if isinstance(op, ty.Add)), None)

    def put(self, root: Value) -> None:
        """Make the operand of another tensor in place of the parameter, which may have another element type:
        casts on the way that are not needed then go.
        """
        wanted, value = tensor_type(self.value).element, root
        for op in self.chain:
            value = _again(op, value, self.user)
        if tensor_type(value).element is not wanted:
            value = insert_before(self.user, ty.Cast(value, element=wanted)).result
        self.user.set_operand(self.index, value)


def insert_before(user: Op, new: Op) -> Op:
    """A new op of the place of another, before it."""
    new.loc = user.loc
    return carry(new, user).insert_before(user)


def in_f32(value: Value, user: Op) -> Value:
    """A parameter in f32, from what is stored: rounding to the model's type on the way is left out."""
    match value.op:
        case ty.Cast() as cast:
            return in_f32(cast.x, user)
        case ty.Transpose() as transpose:
            return insert_before(user, ty.Transpose(in_f32(transpose.x, user), perm=transpose.perm)).result
    if tensor_type(value).element is f32:
        return value
    return insert_before(user, ty.Cast(value, element=f32)).result


def _again(op: Op, x: Value, user: Op) -> Value:
    """An op of a chain, on another operand."""
    new: Op
    match op:
        case ty.Cast():
            if tensor_type(x).element is op.element:
                return x
            new = ty.Cast(x, element=op.element)
        case ty.Slice():
            new = ty.Slice(x, axis=op.axis, offset=op.offset, size=op.size)
        case ty.Take():
            new = ty.Take(x, axis=op.axis, indices=op.indices)
        case ty.Reshape():
            new = ty.Reshape(x, shape=op.shape)
        case ty.Add():
            element = tensor_type(op.rhs).element
            if tensor_type(x).element is not element:
                x = insert_before(user, ty.Cast(x, element=element)).result
            new = ty.Add(x, op.rhs)
        case _:
            raise AssertionError(op)
    return insert_before(user, new).result


def _in_chains(op: Op) -> bool:
    """Whether an op may stand between a parameter and its user."""
    if isinstance(op, ty.Add):  # 1 + w
        return isinstance(op.rhs.op, ty.Constant) and tensor_type(op.lhs).rank == 1
    return isinstance(op, (ty.Cast, ty.Slice, ty.Take, ty.Reshape))


def parameter_use(user: Op, index: int) -> ParameterUse | None:
    """The parameter that a constant operand is; None for what has no stored tensor at its bottom (a norm's
    ones).
    """
    value, chain = user.operands[index], list[Op]()
    while (op := value.op) is not None and _in_chains(op):
        chain.insert(0, op)
        value = op.operands[0]
    # casts at the bottom belong to the parameter: it is what the model computes with, not what is stored
    while chain and isinstance(chain[0], ty.Cast):
        value = chain.pop(0).result
    name = next((o.symbol.leaf for o in expression_ops(value) if isinstance(o, ty.GetGlobal)), None)
    if name is None:
        return None
    kind = tensor_type(value)
    rows: Rows | None = np.arange(kind.static_shape[0]) if kind.rank in (1, 2) else None
    for op in chain:
        rows = None if rows is None else _rows_after(op, rows, kind.rank - 1)
    return ParameterUse(user, index, value, name, tuple(chain), None if rows is None else rows.reshape(-1))


def _rows_after(op: Op, rows: Rows, inner: int) -> Rows | None:
    """The rows that an op leaves, whose last `inner` dimensions are none but the input channels."""
    before, after = tensor_type(op.operands[0]).static_shape, tensor_type(op.results[0]).static_shape
    if inner and before[-1] != after[-1]:
        return None
    match op:
        case ty.Slice() if op.axis < rows.ndim:
            return np.take(rows, np.arange(op.offset, op.offset + op.size), axis=op.axis)
        case ty.Take() if op.axis < rows.ndim:
            return np.take(rows, op.indices, axis=op.axis)
        case ty.Reshape():
            return rows.reshape(after[: len(after) - inner])
        case ty.Cast() | ty.Add():
            return rows
    return None


class ParameterUses:
    """All operands of a module that are parameters, and by whom each stored tensor is used."""

    def __init__(self, root: Op) -> None:
        self.constants: Final = ConstantExpressions()
        self._uses: dict[tuple[Op, int], ParameterUse] = {}
        self._by_name: dict[str, list[ParameterUse]] = {}
        self._otherwise: set[str] = set()
        for op in root.walk():
            if not op.operands or (op.results and self.constants.is_constant(op.results[0])):
                continue
            for index, value in enumerate(op.operands):
                if self.constants.is_constant(value):
                    self._note(op, index, value)

    def _note(self, op: Op, index: int, value: Value) -> None:
        found = parameter_use(op, index)
        names = {o.symbol.leaf for o in expression_ops(value) if isinstance(o, ty.GetGlobal)}
        if found is not None:
            self._uses[op, index] = found
            self._by_name.setdefault(found.name, []).append(found)
            names.discard(found.name)
        self._otherwise |= names

    def __iter__(self) -> Iterator[ParameterUse]:
        return iter(self._uses.values())

    def of(self, op: Op, index: int) -> ParameterUse | None:
        """The parameter at an operand, where it is one."""
        return self._uses.get((op, index))

    def sharing(self, use: ParameterUse) -> list[ParameterUse] | None:
        """All operands that are rows of the same parameter, this one included; None when it is used in
        another way too, so that changing it would change more.
        """
        found = self._by_name[use.name]
        if use.name in self._otherwise or any(u.rows is None for u in found):
            return None
        return found

    def path(self, use: ParameterUse) -> str:
        """The path of the module that a parameter belongs to; of a head that shares the embedding's table its
        own.
        """
        head = layer_of(use.user) is None and isinstance(use.user, (ty.Linear, ty.QuantizedLinear))
        if head and self._is_embedding(use.name):
            return HEAD
        return use.name.rpartition(".")[0]

    def _is_embedding(self, name: str) -> bool:
        return any(isinstance(use.user, ty.Embedding) for use in self._by_name[name])
