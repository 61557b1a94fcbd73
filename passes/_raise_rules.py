"""The rewrite rules of `raise-aten`, in the order they are tried.

A rule takes the op at the root of its pattern and returns the value that replaces the op's result, or None
when the pattern is not there.  It inserts new ops before the root and erases nothing: what the pattern
consumed is dead afterwards and the driver removes it.  Every rule keeps the value's type and its meaning up
to rounding: `ty` ops compute in f32 and round once where the graph rounds after every op.
"""

from __future__ import annotations

from typing import Final

from tyir.dialects import aten, ty
from tyir.ir import Op, Value
from tyir.passes._raise_matching import (
    dims_of,
    either_order,
    element_of,
    insert,
    is_last,
    made_by,
    through_float,
    with_element_of,
)
from tyir.passes._raise_rotary import reordered_rope, rope, rope_angles
from tyir.rewrite import Phase
from tyir.types import f16, f32

__all__ = ["PHASES"]


# ------------------------------------------------------------------------------------------------- identities


def same_type(op: Op) -> Value | None:
    """A conversion, view, expansion or slice that changes nothing --> its operand."""
    if isinstance(op, aten.Slice) and not (op.start == 0 and op.end >= 2**63 - 1 and op.step == 1):
        length = dims_of(op.x)[op.dim % len(dims_of(op.x))]
        return op.x if length is not None and op.x.type is op.out.type else None
    (x,) = op.operands
    dynamic = isinstance(op, (aten.View, aten.Reshape)) and dims_of(x).count(None) > 1
    return x if x.type is op.result.type and not dynamic else None


def cat_of_one(op: Op) -> Value | None:
    """cat(x, nothing) --> x: what a rotary embedding leaves out is empty when it turns whole heads"""
    assert isinstance(op, aten.Cat)
    filled = [t for t in op.tensors if 0 not in dims_of(t)]
    return filled[0] if len(filled) == 1 and filled[0].type is op.out.type else None


# ------------------------------------------------------------------------------------------------- structures


def rms_norm(op: Op) -> Value | None:
    """w * to(to(x) * rsqrt(mean(to(x)^2) + eps)) --> ty.rms_norm x, w"""
    assert isinstance(op, aten.Mul)
    for weight, normed in either_order(op):
        scaled = made_by(through_float(normed), aten.Mul)
        if len(dims_of(weight)) != 1 or scaled is None:
            continue
        for wide, scale in either_order(scaled):
            rsqrt = made_by(scale, aten.Rsqrt)
            shifted = made_by(rsqrt.x, aten.Add) if rsqrt else None
            mean = made_by(shifted.x, aten.Mean) if shifted and shifted.scalar is not None else None
            square = (
                made_by(mean.x, aten.Pow)
                if mean and len(mean.dim) == 1 and mean.keepdim and is_last(mean.dim[0], mean.x)
                else None
            )
            if (
                square is None
                or square.exponent != 2
                or square.x is not wide
                or shifted is None
                or shifted.scalar is None
            ):
                continue
            x = through_float(wide)
            return with_element_of(
                op.out.type,
                insert(op, ty.RmsNorm(x, through_float(weight), eps=shifted.scalar), scaled).out,
                op,
            )
    return None


def silu_mul(op: Op) -> Value | None:
    """silu(gate) * up --> ty.silu_mul gate, up"""
    assert isinstance(op, aten.Mul)
    for activated, up in either_order(op):
        silu = made_by(activated, aten.Silu)
        if silu is not None and silu.x.type is up.type:
            return insert(op, ty.SiluMul(silu.x, up), silu).out
    return None


# --------------------------------------------------------------------------------------------------- op by op


def quantized_linear(op: Op) -> Value | None:
    """linear(x, dequantize(q, scales, zeros)) --> ty.quantized_linear x, q, scales, zeros"""
    assert isinstance(op, aten.Linear)
    weight = made_by(op.weight, ty.Cast)
    stored = made_by(weight.x if weight is not None else op.weight, ty.Dequantize)
    if stored is None:
        return None
    return insert(
        op,
        ty.QuantizedLinear(
            op.x, stored.q, stored.scales, stored.zeros, op.bias, group_size=stored.group_size
        ),
    ).out


def linear(op: Op) -> Value | None:
    assert isinstance(op, aten.Linear)
    return insert(op, ty.Linear(op.x, op.weight, op.bias)).out if len(dims_of(op.weight)) == 2 else None


def embedding(op: Op) -> Value | None:
    assert isinstance(op, aten.Embedding)
    return insert(op, ty.Embedding(op.weight, op.ids)).out if len(dims_of(op.ids)) == 2 else None


def add(op: Op) -> Value | None:
    assert isinstance(op, aten.Add)
    return insert(op, ty.Add(op.x, op.y)).out if op.y is not None and op.x.type is op.y.type else None


def mul(op: Op) -> Value | None:
    assert isinstance(op, aten.Mul)
    return insert(op, ty.Mul(op.x, op.y)).out if op.y is not None and op.x.type is op.y.type else None


def scale(op: Op) -> Value | None:
    """x * number, x / number --> ty.scale"""
    assert isinstance(op, (aten.Mul, aten.Div))
    if op.scalar is None or op.x.type is not op.out.type or (isinstance(op, aten.Div) and op.scalar == 0):
        return None
    return insert(op, ty.Scale(op.x, factor=op.scalar if isinstance(op, aten.Mul) else 1 / op.scalar)).out


def silu(op: Op) -> Value | None:
    assert isinstance(op, aten.Silu)
    return insert(op, ty.Silu(op.x)).out


def cast(op: Op) -> Value | None:
    assert isinstance(op, aten.To)
    return insert(op, ty.Cast(op.x, element=op.element)).out


def reshape(op: Op) -> Value | None:
    """A change of shape with at most one dynamic dimension --> ty.reshape"""
    shape = tuple(-1 if d is None else d for d in dims_of(op.result))
    return insert(op, ty.Reshape(op.operands[0], shape=shape)).out if shape.count(-1) <= 1 else None


def transpose(op: Op) -> Value | None:
    assert isinstance(op, aten.Transpose)
    rank = len(dims_of(op.x))
    perm = list(range(rank))
    first, second = op.dim0 % rank, op.dim1 % rank
    perm[first], perm[second] = second, first
    return insert(op, ty.Transpose(op.x, perm=tuple(perm))).out


def slice_(op: Op) -> Value | None:
    """A slice along a static dimension --> ty.slice"""
    assert isinstance(op, aten.Slice)
    axis = op.dim % len(dims_of(op.x))
    size, length = dims_of(op.out)[axis], dims_of(op.x)[axis]
    if size is None or length is None or op.step != 1:
        return None
    start = max(op.start + length, 0) if op.start < 0 else op.start
    return insert(op, ty.Slice(op.x, axis=axis, offset=start, size=size)).out


# ---------------------------------------------------------------------------------------------------- tidying


def cast_back(op: Op) -> Value | None:
    """cast(cast(x: f16 to f32) to f16) --> x"""
    assert isinstance(op, ty.Cast)
    inner = made_by(op.x, ty.Cast)
    wider = inner is not None and element_of(inner.x) is f16 and inner.element is f32
    return inner.x if inner is not None and wider and inner.x.type is op.out.type else None


def norm_before_transpose(op: Op) -> Value | None:
    """rms_norm(transpose(x)) --> transpose(rms_norm(x)) where the normed axis stays the last: between heads
    and tokens the transposes then cancel
    """
    assert isinstance(op, ty.RmsNorm)
    inner = made_by(op.x, ty.Transpose)
    if inner is None or inner.perm[-1] != len(inner.perm) - 1:
        return None
    return insert(
        op, ty.Transpose(insert(op, ty.RmsNorm(inner.x, op.weight, eps=op.eps)).out, perm=inner.perm), inner
    ).out


def merge(op: Op) -> Value | None:
    """transpose(transpose(x)), reshape(reshape(x)) --> one of them, or x where they undo each other"""
    assert isinstance(op, (ty.Transpose, ty.Reshape))
    if (folded := op.fold()) is not None:
        return folded[0]
    merged = op.merged()
    if merged is None:
        return None
    if (folded := merged.fold()) is not None:
        merged.drop_references()
        return folded[0]
    return insert(op, merged, op.x.op).out


def slice_of_linear(op: Op) -> Value | None:
    """slice(linear(x, w, b)) along its channels --> linear(x, slice(w), slice(b)), when all of the linear's
    results are used through such slices
    """
    assert isinstance(op, ty.Slice)
    whole = op.x.op
    if (
        not isinstance(whole, (ty.Linear, ty.QuantizedLinear))
        or not all(_is_channels(user) for user in op.x.users)
        or not _is_channels(op)
    ):
        return None

    def rows(value: Value) -> Value:
        return insert(op, ty.Slice(value, axis=0, offset=op.offset, size=op.size), whole).out

    bias = rows(whole.bias) if whole.bias is not None else None
    if isinstance(whole, ty.Linear):
        return insert(op, ty.Linear(whole.x, rows(whole.weight), bias, element=whole.element), whole).out
    q, scales, zeros = rows(whole.q), rows(whole.scales), rows(whole.zeros)
    return insert(
        op,
        ty.QuantizedLinear(
            whole.x, q, scales, zeros, bias, group_size=whole.group_size, element=whole.element
        ),
        whole,
    ).out


def _is_channels(op: Op) -> bool:
    return isinstance(op, ty.Slice) and is_last(op.axis, op.x)


def scale_before_linear(op: Op) -> Value | None:
    """scale(linear(x, w)) --> linear(scale(x), w) where x has fewer channels: less to scale, and the head's
    sums stay unrounded
    """
    assert isinstance(op, ty.Scale)
    whole = op.x.op
    if (
        not isinstance(whole, (ty.Linear, ty.QuantizedLinear))
        or whole.bias is not None
        or len(op.x.users) != 1
    ):
        return None
    inner, outer = dims_of(whole.x)[-1], dims_of(whole.out)[-1]
    if inner is None or outer is None or inner >= outer:
        return None
    x = insert(op, ty.Scale(whole.x, factor=op.factor)).out
    if isinstance(whole, ty.Linear):
        return insert(op, ty.Linear(x, whole.weight, element=whole.element), whole).out
    return insert(
        op,
        ty.QuantizedLinear(
            x, whole.q, whole.scales, whole.zeros, group_size=whole.group_size, element=whole.element
        ),
        whole,
    ).out


# Each phase is one sweep over a function from its end to its beginning, so that the largest pattern at a
# place is tried before its parts.
PHASES: Final[tuple[Phase, ...]] = (
    # Identities first: the patterns below need not look through them.
    (
        (aten.To, same_type),
        (aten.View, same_type),
        (aten.Reshape, same_type),
        (aten.Expand, same_type),
        (aten.Slice, same_type),
        (aten.Cat, cat_of_one),
    ),
    # Structures whose parts (mul, to) would otherwise be raised one by one.
    (
        (aten.Mul, rms_norm),
        (aten.Mul, silu_mul),
        (aten.To, rope_angles),
        (aten.Mul, rope_angles),
        (aten.Cos, rope_angles),
        (aten.Sin, rope_angles),
    ),
    # Rope reads the tables that the previous phase has made; rotations of other channels than halves of whole
    # heads must be seen before it takes a part of one.
    ((ty.Attention, reordered_rope),),
    ((aten.Add, rope),),
    # What is left, op by op.
    (
        (aten.Linear, quantized_linear),
        (aten.Linear, linear),
        (aten.Embedding, embedding),
        (aten.Add, add),
        (aten.Mul, mul),
        (aten.Mul, scale),
        (aten.Div, scale),
        (aten.Silu, silu),
        (aten.To, cast),
        (aten.View, reshape),
        (aten.Reshape, reshape),
        (aten.Unsqueeze, reshape),
        (aten.Transpose, transpose),
        (aten.Slice, slice_),
    ),
    # Parts of a packed projection become projections of their own, which dies can share out.
    (
        (ty.Slice, slice_of_linear),
        (ty.Scale, scale_before_linear),
        (ty.RmsNorm, norm_before_transpose),
        (ty.Cast, cast_back),
    ),
    # Rope and attention work on [b, s, H, D], the graph on [b, H, s, D]: the transposes between them meet and
    # cancel.
    ((ty.Transpose, merge), (ty.Reshape, merge)),
)
