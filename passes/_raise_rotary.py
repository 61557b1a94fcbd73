"""Rules of `raise-aten` for rotary embeddings: the tables, the rotation, and rotations of other channels than
halves of whole heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tyir.attributes import DenseElementsAttr, DictAttr, IntegerAttr
from tyir.dialects import aten, ty
from tyir.ir import Op, Value
from tyir.layers import carry
from tyir.passes._raise_heads import HEADS_FIRST, take_channels
from tyir.passes._raise_matching import (
    dims_of,
    either_order,
    element_of,
    insert,
    is_last,
    made_by,
    merged_locations,
    through_float,
    with_element_of,
)
from tyir.types import Type, i64

__all__ = ["reordered_rope", "rope", "rope_angles"]


@dataclass(frozen=True)
class _Angles:
    """What a cosine or sine table is made of: function(cat(p * f, p * f)) * scale, or with each p * f twice
    in place (`neighbours`).
    """

    wave: aten.Cos | aten.Sin
    positions: Value
    inv_freq: DenseElementsAttr
    scale: float
    neighbours: bool


def _match_angles(root: Op) -> _Angles | None:
    op: Op | None = root
    if isinstance(op, aten.To):
        op = op.x.op
    scale = 1.0
    if isinstance(op, aten.Mul) and op.scalar is not None:
        scale, op = op.scalar, op.x.op
    if not isinstance(op, (aten.Cos, aten.Sin)):
        return None
    half = _doubled(op.x)
    product = made_by(half, aten.Mul)
    for positions, frequencies in either_order(product) if product else ():
        constant = made_by(frequencies, ty.Constant)
        to = made_by(positions, aten.To)
        column = made_by(to.x, aten.Unsqueeze) if to else None
        if (
            constant is not None
            and column is not None
            and is_last(column.dim, column.out)
            and len(dims_of(column.x)) == 2
            and len(dims_of(constant.out)) == 1
        ):
            neighbours = isinstance(op.x.op, aten.RepeatInterleave)
            return _Angles(op, column.x, constant.value, scale, neighbours)
    return None


def _doubled(value: Value) -> Value | None:
    """h when the value is cat(h, h), or each entry of h twice in place, along the last axis."""
    spread, joined = made_by(value, aten.RepeatInterleave), made_by(value, aten.Cat)
    if spread is not None:
        return spread.x if spread.repeats == 2 and is_last(spread.dim, value) else None
    if joined is None or len(joined.tensors) != 2 or joined.tensors[0] is not joined.tensors[1]:
        return None
    return joined.tensors[0] if is_last(joined.dim, value) else None


def rope_angles(op: Op) -> Value | None:
    """to(cos(cat(p * f, p * f)) * scale) --> aten.cat(c, c) with c, s = ty.rope_angles p; likewise for sin,
    and for frequencies that are repeated in place.

    One op serves both tables.
    """
    found = _match_angles(op)
    if found is None:
        return None
    angles = _shared_angles(
        ty.RopeAngles(
            found.positions, inv_freq=found.inv_freq, scale=found.scale, element=element_of(op.result)
        )
    )
    carry(angles, found.wave).loc = merged_locations([angles.loc, found.wave.loc])
    half = angles.results[0 if isinstance(found.wave, aten.Cos) else 1]
    last = DictAttr({"dim": IntegerAttr(-1, i64)})
    if found.neighbours:
        twice = last.with_entry("repeats", IntegerAttr(2, i64))
        return insert(op, aten.RepeatInterleave.create((half,), (op.result.type,), twice)).out
    return insert(op, aten.Cat.create((half, half), (op.result.type,), last)).out


def _shared_angles(wanted: ty.RopeAngles) -> ty.RopeAngles:
    """The function's tables that are as `wanted`, which is inserted when there are none."""
    for user in wanted.positions.users:
        if user is not wanted and isinstance(user, ty.RopeAngles) and user.properties is wanted.properties:
            wanted.drop_references()
            return user
    wanted.cos.name, wanted.sin.name = "cos", "sin"
    _insert_after_definition(wanted.positions, wanted)
    return wanted


def _angles_for(angles: ty.RopeAngles, element: Type) -> ty.RopeAngles:
    """The same tables in the element type of what they turn."""
    if angles.element is element:
        return angles
    return _shared_angles(
        carry(
            ty.RopeAngles(
                angles.positions,
                inv_freq=angles.inv_freq,
                scale=angles.scale,
                element=element,
                axis=angles.axis,
                loc=angles.loc,
            ),
            angles,
        )
    )


def _insert_after_definition(value: Value, op: Op) -> None:
    """Insert `op` as early as its operand allows."""
    if value.op is not None:
        op.insert_after(value.op)
    else:
        assert value.block is not None
        value.block.insert(op, before=value.block.first_op)


def _table(value: Value, index: int) -> tuple[ty.RopeAngles, int, bool] | None:
    """The `ty.rope_angles` whose result c (number `index`) a table was made of, its heads axis, and whether
    it stands for neighbouring channels.

    unsqueeze(cat(c, c), axis), or repeat_interleave(its first half, 2), or unsqueeze(repeat_interleave(c, 2))
    """
    spread = made_by(value, aten.RepeatInterleave)
    if spread is not None:
        half = made_by(spread.x, aten.Slice)
        size = dims_of(half.x)[-1] if half is not None else None
        if half is None or size is None or not is_last(spread.dim, value) or not is_last(half.dim, half.x):
            return None
        if (spread.repeats, half.start, half.end, half.step) != (2, 0, size // 2, 1):
            return None
        value = half.x
    row = made_by(value, aten.Unsqueeze)
    table = _doubled(row.x) if row is not None else None
    angles = made_by(table, ty.RopeAngles)
    if row is None or angles is None or table is not angles.results[index]:
        return None
    neighbours = spread is not None or isinstance(row.x.op, aten.RepeatInterleave)
    return angles, row.dim % len(dims_of(row.out)), neighbours


def _parts(
    x: Value, first: aten.Slice | None, second: aten.Slice | None
) -> tuple[tuple[int, int, int], ...] | None:
    """(start, end, step) of two slices of x's channels."""
    size = dims_of(x)[-1]
    if size is None or first is None or second is None:
        return None
    both = (first, second)
    same = all(through_float(p.x) is through_float(x) and is_last(p.dim, x) for p in both)
    return tuple((p.start, min(p.end, size), p.step) for p in both) if same else None


def _turns_halves(value: Value, x: Value) -> bool:
    """Whether value is cat(-x[.., D/2:], x[.., :D/2])."""
    joined, size = made_by(value, aten.Cat), dims_of(x)[-1] or 0
    if joined is None or len(joined.tensors) != 2 or not is_last(joined.dim, x):
        return False
    negated = made_by(joined.tensors[0], aten.Neg)
    upper, lower = made_by(negated.x if negated else None, aten.Slice), made_by(joined.tensors[1], aten.Slice)
    return _parts(x, upper, lower) == ((size // 2, size, 1), (0, size // 2, 1))


def _turns_neighbours(value: Value, x: Value) -> bool:
    """Whether value is stack(-x[.., 1::2], x[.., 0::2]) with the last two axes made one."""
    flat, size = made_by(through_float(value), aten.Reshape), dims_of(x)[-1] or 0
    stacked = made_by(flat.x, aten.Stack) if flat is not None else None
    if (
        flat is None
        or stacked is None
        or len(stacked.tensors) != 2
        or not is_last(stacked.dim, stacked.out)
        or dims_of(flat.out) != dims_of(x)
    ):
        return False
    negated = made_by(stacked.tensors[0], aten.Neg)
    odd, even = made_by(negated.x if negated else None, aten.Slice), made_by(stacked.tensors[1], aten.Slice)
    return _parts(x, odd, even) == ((1, size, 2), (0, size, 2))


@dataclass(frozen=True)
class _Rotation:
    """x * cos + turned(x) * sin over all channels of x [.., D]; `axis` is that of the heads, `neighbours`
    says which channels are turned together.
    """

    x: Value
    angles: ty.RopeAngles
    axis: int
    neighbours: bool
    product: Op


def _rotation(value: Value) -> _Rotation | None:
    op = made_by(value, aten.Add)
    for straight, turned in either_order(op) if op is not None else ():
        first, second = made_by(straight, aten.Mul), made_by(turned, aten.Mul)
        for x, cos in either_order(first) if first and second else ():
            table = _table(cos, 0)
            for rotated, sin in (
                either_order(second) if first and second and table and len(dims_of(x)) in (3, 4) else ()
            ):
                axes = (1, 2) if len(dims_of(x)) == 4 else (1,)  # a tower's lines of patches [N, H, D]
                if table is None or first is None or _table(sin, 1) != table or table[1] not in axes:
                    continue
                if (_turns_neighbours if table[2] else _turns_halves)(rotated, x):
                    return _Rotation(x, *table, first)
    return None


def rope(op: Op) -> Value | None:
    """x * cos + rotate_half(x) * sin --> ty.rope x, c, s, between transposes when x is [b, H, s, D], between
    reshapes when it is [N, H, D].
    """
    found = _rotation(op.result)
    if found is None or found.neighbours:
        return None
    if len(dims_of(found.x)) == 3:
        # ty.rope computes in f32 and rounds once, as the graph does of f16 widened before
        x = through_float(found.x)
        angles = _angles_for(found.angles, element_of(x))
        sequence, cos, sin = (
            insert(op, ty.Reshape(v, shape=(1, *(d or 0 for d in dims_of(v))))).out
            for v in (x, angles.cos, angles.sin)
        )
        turned = insert(op, ty.Rope(sequence, cos, sin), found.product).out
        out = insert(op, ty.Reshape(turned, shape=tuple(d or 0 for d in dims_of(x)))).out
        return with_element_of(op.out.type, out, op) if isinstance(op, aten.Add) else None
    x, angles = found.x, _angles_for(found.angles, element_of(found.x))
    by_token = x if found.axis == 2 else insert(op, ty.Transpose(x, perm=HEADS_FIRST)).out
    out = insert(op, ty.Rope(by_token, angles.cos, angles.sin), found.product).out
    out = out if found.axis == 2 else insert(op, ty.Transpose(out, perm=HEADS_FIRST)).out
    return with_element_of(op.out.type, out, op) if isinstance(op, aten.Add) else None


# --------------------------------------------------------------------------------------------- other channels


@dataclass(frozen=True)
class _Heads:
    """q or k of an attention, rotated in some of its channels: `projected` [b, s, H D] before the rotation,
    `order` of a head's channels in which halves turn, `norm` of the heads before it.
    """

    projected: Value
    heads: int
    angles: ty.RopeAngles
    order: tuple[int, ...]
    norm: ty.Norm | None


def reordered_rope(op: Op) -> Value | None:
    """attention(rotated(linear(h, wq)), rotated(linear(h, wk)), v) --> the same with rows of wq and wk reordered so that `ty.rope` turns whole heads.

    For rotations of neighbouring channels (GLM, Ernie, Helium) and of the first channels only (Phi, GLM;
    the others get frequency 0).  A common order of q's and k's channels does not change their products.
    """  # noqa: E501
    assert isinstance(op, ty.Attention)
    q, k = _heads(op.q), _heads(op.k)
    if q is None or k is None or q.order != k.order or q.angles is not k.angles:
        return None
    turned_q, turned_k = _turned_heads(op, q, element_of(op.q)), _turned_heads(op, k, element_of(op.k))
    return insert(op, ty.Attention.create((turned_q, turned_k, op.v), (op.out.type,), op.properties)).out


def _heads(value: Value) -> _Heads | None:
    """What a rotation of some or neighbouring channels is made of; None for what `rope` knows."""
    by_token = made_by(value, aten.Transpose)
    joined = by_token.x if by_token is not None else value
    cat = made_by(through_float(joined), aten.Cat)
    kept = made_by(cat.tensors[1], aten.Slice) if cat is not None and len(cat.tensors) == 2 else None
    found = _rotation(through_float(cat.tensors[0] if cat is not None and kept is not None else joined))
    if by_token is None or found is None or found.axis != 1 or not (found.neighbours or kept is not None):
        return None
    x, turned, size = through_float(found.x), dims_of(found.x)[-1] or 0, dims_of(joined)[-1] or 0
    if kept is not None:
        part = made_by(x, aten.Slice)
        if part is None or _parts(part.x, part, kept) != ((0, turned, 1), (turned, size, 1)):
            return None
        x = part.x
    x, norm = _before_norm(x, None)
    turned_over = x.op if isinstance(x.op, (aten.Transpose, ty.Transpose)) else None
    if turned_over is None:
        return None
    x, norm = _before_norm(turned_over.operands[0], norm)
    split = x.op
    if not isinstance(split, (aten.View, aten.Reshape)) or len(dims_of(split.x)) != 3 or (size - turned) % 2:
        return None
    heads = dims_of(split.result)[2]
    projected = (
        split.x if _projection(split.x) is not None and dims_of(split.x)[2] == (heads or 0) * size else None
    )
    return (
        None
        if projected is None or heads is None
        else _Heads(projected, heads, found.angles, _order(turned, size, found.neighbours), norm)
    )


def _before_norm(value: Value, known: ty.Norm | None) -> tuple[Value, ty.Norm | None]:
    """The value before a norm of heads and that norm; the value itself where there is none."""
    made = through_float(value)
    if (cast := made_by(made, ty.Cast)) is not None:  # the norm's own, where the graph keeps it in f32
        made = cast.x
    norm = made.op
    if known is None and isinstance(norm, ty.Norm):
        return through_float(norm.x), norm
    return value, known


def _order(turned: int, size: int, neighbours: bool) -> tuple[int, ...]:
    """The channels of a head whose first `turned` are rotated, such that channel i is rotated with channel i
    + size / 2.
    """
    first, second = (
        (range(0, turned, 2), range(1, turned, 2))
        if neighbours
        else (range(turned // 2), range(turned // 2, turned))
    )
    middle = (turned + size) // 2
    return (*first, *range(turned, middle), *second, *range(middle, size))


def _projection(value: Value) -> tuple[aten.Linear, int] | None:
    """The linear that makes `value`, as a whole or from a channel on."""
    part = made_by(value, aten.Slice)
    whole = made_by(part.x if part is not None else value, aten.Linear)
    usable = part is None or (is_last(part.dim, part.x) and part.step == 1)
    return (whole, part.start if part is not None else 0) if whole is not None and usable else None


def _turned_heads(root: Op, part: _Heads, element: Type) -> Value:
    """[b, s, H, D], projected with reordered weights and rotated."""
    found = _projection(part.projected)
    assert found is not None
    (linear, first), size = found, len(part.order)
    operands = [
        linear.x,
        *(take_channels(root, v, part.heads, size, part.order, first) for v in linear.operands[1:]),
    ]
    projected = insert(root, aten.Linear.create(operands, (part.projected.type,), DictAttr({})), linear).out
    x = insert(
        root, ty.Reshape(projected, shape=(dims_of(projected)[0] or 1, -1, part.heads, size)), linear
    ).out
    if part.norm is not None:
        vectors = [
            insert(root, ty.Take(v, axis=len(dims_of(v)) - 1, indices=part.order)).out
            for v in part.norm.operands[1:]
        ]
        x = insert(root, type(part.norm).create((x, *vectors), (x.type,), part.norm.properties)).result
    frequencies = part.angles.inv_freq.to_numpy()
    padded = np.concatenate([frequencies, np.zeros(size // 2 - len(frequencies), frequencies.dtype)])
    angles = part.angles
    wanted = ty.RopeAngles(
        angles.positions,
        inv_freq=DenseElementsAttr.from_numpy(padded),
        scale=angles.scale,
        element=element,
        axis=(*angles.axis, *(0,) * (len(padded) - len(frequencies))) if angles.axis else None,
        loc=angles.loc,
    )
    shared = _shared_angles(carry(wanted, angles))
    return insert(root, ty.Rope(x, shared.cos, shared.sin)).out
