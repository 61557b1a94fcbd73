"""The rewrite rules of `raise-aten`, in the order they are tried.

A rule takes the op at the root of its pattern and returns the value that replaces the op's result, or None
when the pattern is not there.  It inserts new ops before the root and erases nothing: what the pattern
consumed is dead afterwards and the driver removes it.  Every rule keeps the value's type and its meaning up
to rounding: `ty` ops compute in f32 and round once where the graph rounds after every op.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from tyir.attributes import DenseElementsAttr, DictAttr
from tyir.dialects import aten, ty
from tyir.ir import Op, Value
from tyir.passes._raise_heads import norms_of_heads, part_of_heads
from tyir.passes._raise_matching import (
    dims_of,
    either_order,
    element_of,
    insert,
    is_constant,
    is_last,
    made_by,
    scalar_of,
    through_float,
    with_element_of,
)
from tyir.passes._raise_pictures import (
    concat,
    constant_rows,
    expand_unit,
    identity_index,
    mixed_rows,
    patches,
    permute,
    select,
    select_of_split,
    unit_axis_before_transpose,
)
from tyir.passes._raise_rotary import reordered_rope, rope, rope_angles
from tyir.rewrite import Phase
from tyir.traits import Elementwise
from tyir.types import TensorType, f16, f32, storage_dtype

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


def _squares(scale: Value) -> tuple[Value, float] | None:
    """y and eps when the value is rsqrt(mean(y^2) + eps) over the last axis."""
    rsqrt = made_by(scale, aten.Rsqrt)
    shifted = made_by(rsqrt.x, aten.Add) if rsqrt else None
    mean = made_by(shifted.x, aten.Mean) if shifted else None
    if shifted is None or shifted.scalar is None or mean is None or not _over_last(mean):
        return None
    square = made_by(mean.x, aten.Pow)
    return (square.x, shifted.scalar) if square is not None and square.exponent == 2 else None


def _over_last(mean: aten.Mean) -> bool:
    return len(mean.dim) == 1 and mean.keepdim and is_last(mean.dim[0], mean.x)


def _norm_weight(op: Op, weight: Value) -> Value:
    """The weight of a norm; of 1 + w (Gemma) the sum as a weight of its own, in the type of w."""
    shifted = made_by(through_float(weight), aten.Add)
    if shifted is None or shifted.scalar is None or shifted.y is not None:
        return through_float(weight)
    w = through_float(shifted.x)
    wide = insert(op, ty.Cast(w, element=f32), shifted).out if element_of(w) is not f32 else w
    number = np.full([d or 0 for d in dims_of(w)], shifted.scalar, np.float32)
    constant = insert(op, ty.Constant(value=DenseElementsAttr.from_numpy(number)), shifted).out
    total = insert(op, ty.Add(wide, constant), shifted).out
    return insert(op, ty.Cast(total, element=element_of(w)), shifted).out if w is not wide else total


def rms_norm(op: Op) -> Value | None:
    """w * to(to(x) * rsqrt(mean(to(x)^2) + eps)) --> ty.rms_norm x, w"""
    assert isinstance(op, aten.Mul)
    for weight, normed in either_order(op):
        scaled = made_by(through_float(normed), aten.Mul)
        if len(dims_of(weight)) != 1 or scaled is None:
            continue
        for wide, scale in either_order(scaled):
            squares = _squares(scale)
            if squares is None or squares[0] is not wide:
                continue
            x = through_float(wide)
            norm = insert(op, ty.RmsNorm(x, _norm_weight(op, weight), eps=squares[1]), scaled).out
            return with_element_of(op.out.type, norm, op)
    return None


def layer_norm(op: Op) -> Value | None:
    """w * to((y - mean(y)) * rsqrt(mean((y - mean(y))^2) + eps)) with y = to(x) --> ty.layer_norm x, w

    w [h], or [heads, D]: Cohere writes the norm out.
    """
    assert isinstance(op, aten.Mul)
    for weight, normed in either_order(op):
        scaled = made_by(through_float(normed), aten.Mul)
        if len(dims_of(weight)) not in (1, 2) or not is_constant(weight) or scaled is None:
            continue
        for centred, scale in either_order(scaled):
            squares = _squares(scale)
            wide, squared = _centred(centred), None if squares is None else _centred(squares[0])
            if squares is None or wide is None or wide is not squared:
                continue
            norm = ty.LayerNorm(through_float(wide), _norm_weight(op, weight), eps=squares[1])
            return with_element_of(op.out.type, insert(op, norm, scaled).out, op)
    return None


def _centred(value: Value) -> Value | None:
    """y when the value is y - mean(y) over the last axis."""
    difference = made_by(value, aten.Sub)
    mean = made_by(difference.y, aten.Mean) if difference is not None else None
    if difference is None or mean is None or not _over_last(mean):
        return None
    return difference.x if mean.x is difference.x else None


def whole_layer_norm(op: Op) -> Value | None:
    """aten.layer_norm over the last axis --> ty.layer_norm; without a weight, ones stand for it"""
    assert isinstance(op, aten.LayerNorm)
    if len(op.normalized_shape) != 1:
        return None
    vectors = [through_float(v) for v in op.vectors]
    if not vectors:
        ones = np.ones(op.normalized_shape, storage_dtype(element_of(op.x)))
        vectors = [insert(op, ty.Constant(value=DenseElementsAttr.from_numpy(ones))).out]
    x = through_float(op.x)
    norm = insert(op, ty.LayerNorm(x, *vectors, eps=op.eps)).out
    return with_element_of(op.out.type, norm, op)


def gelu(op: Op) -> Value | None:
    """(0.5 * x) * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))) --> ty.gelu x {approximate = tanh};
    x * sigmoid(1.702 * x) --> ty.gelu x {approximate = quick}
    """
    assert isinstance(op, aten.Mul)
    for first, second in either_order(op):
        half = made_by(first, aten.Mul)
        if half is not None and _is(half.scalar, 0.5) and _is_one_and_tanh(second, half.x):
            return insert(op, ty.Gelu(half.x, approximate="tanh"), half).out
        gate = made_by(second, aten.Sigmoid)
        inner = made_by(gate.x, aten.Mul) if gate is not None else None
        if gate is not None and inner is not None and inner.x is first and _is(inner.scalar, 1.702):
            return insert(op, ty.Gelu(first, approximate="quick"), gate).out
    return None


def _is(number: float | None, wanted: float) -> bool:
    return number is not None and abs(number - wanted) < 1e-6


def _is_one_and_tanh(value: Value, x: Value) -> bool:
    """Whether the value is 1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))."""
    total = made_by(value, aten.Add)
    tanh = made_by(total.x, aten.Tanh) if total is not None and _is(total.scalar, 1) else None
    inner = made_by(tanh.x, aten.Mul) if tanh is not None else None
    cubic = made_by(inner.x, aten.Add) if inner is not None and _is(inner.scalar, 0.7978845608) else None
    for straight, bent in either_order(cubic) if cubic is not None else ():
        scaled = made_by(bent, aten.Mul)
        power = made_by(scaled.x, aten.Pow) if scaled is not None and _is(scaled.scalar, 0.044715) else None
        if straight is x and power is not None and power.x is x and power.exponent == 3:
            return True
    return False


def softcap(op: Op) -> Value | None:
    """c * tanh(x / c) --> ty.softcap x"""
    assert isinstance(op, aten.Mul)
    tanh = made_by(op.x, aten.Tanh)
    inner = tanh.x.op if tanh is not None else None
    if op.scalar is None or op.scalar <= 0 or not isinstance(inner, (aten.Div, aten.Mul)):
        return None
    if inner.scalar is None or inner.scalar == 0:
        return None
    cap = inner.scalar if isinstance(inner, aten.Div) else 1 / inner.scalar
    return insert(op, ty.Softcap(inner.x, cap=op.scalar), tanh).out if _is(cap / op.scalar, 1) else None


def scale_by_constant(op: Op) -> Value | None:
    """x * c with a constant c of no dimensions --> ty.scale x: the scaled embedding of Gemma"""
    assert isinstance(op, aten.Mul)
    for x, factor in either_order(op):
        number = scalar_of(factor)
        if number is not None and x.type is op.out.type:
            return insert(op, ty.Scale(x, factor=number)).out
    return None


def shifted_embedding(op: Op) -> Value | None:
    """embedding(w, ids + n) --> embedding(w[n:], ids): positions that begin at a later row (OPT)"""
    assert isinstance(op, aten.Embedding)
    shifted = made_by(op.ids, aten.Add)
    if shifted is None or shifted.scalar is None or shifted.y is not None:
        return None
    rows, first = dims_of(op.weight)[0] or 0, int(shifted.scalar)
    if not 0 <= first < rows or first != shifted.scalar:
        return None
    table = insert(op, ty.Slice(op.weight, axis=0, offset=first, size=rows - first)).out
    return insert(op, aten.Embedding.create((table, shifted.x), (op.out.type,), DictAttr({})), shifted).out


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


def addmm(op: Op) -> Value | None:
    """bias + x @ w --> ty.linear x, transpose(w), bias: the Conv1D of GPT-2"""
    assert isinstance(op, aten.Addmm)
    if len(dims_of(op.bias)) != 1:
        return None
    return insert(op, ty.Linear(op.x, insert(op, ty.Transpose(op.weight, perm=(1, 0))).out, op.bias)).out


def embedding(op: Op) -> Value | None:
    assert isinstance(op, aten.Embedding)
    return insert(op, ty.Embedding(op.weight, op.ids)).out if len(dims_of(op.ids)) == 2 else None


def add(op: Op) -> Value | None:
    assert isinstance(op, aten.Add)
    return insert(op, ty.Add(op.x, op.y)).out if op.y is not None and op.x.type is op.y.type else None


def sub(op: Op) -> Value | None:
    """x - y --> ty.add x, -y"""
    assert isinstance(op, aten.Sub)
    if op.y is None or op.x.type is not op.y.type:
        return None
    return insert(op, ty.Add(op.x, insert(op, ty.Scale(op.y, factor=-1.0)).out)).out


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


def gelu_alone(op: Op) -> Value | None:
    assert isinstance(op, aten.Gelu)
    return insert(op, ty.Gelu(op.x, approximate=op.approximate)).out


def relu(op: Op) -> Value | None:
    assert isinstance(op, aten.Relu)
    return insert(op, ty.Relu(op.x)).out


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
    """norm(transpose(x)) --> transpose(norm(x)) where the normed axis stays the last: between heads and
    tokens the transposes then cancel
    """
    assert isinstance(op, ty.Norm)
    inner = made_by(op.x, ty.Transpose)
    if inner is None or inner.perm[-1] != len(inner.perm) - 1 or len(dims_of(op.weight)) != 1:
        return None
    norm = type(op).create((inner.x, *op.operands[1:]), (inner.x.type,), op.properties)
    return insert(op, ty.Transpose(insert(op, norm).result, perm=inner.perm), inner).out


def gelu_mul(op: Op) -> Value | None:
    """gelu(gate) * up --> ty.gelu_mul gate, up"""
    assert isinstance(op, ty.Mul)
    for activated, up in ((op.lhs, op.rhs), (op.rhs, op.lhs)):
        gate = made_by(activated, ty.Gelu)
        if gate is not None and len(activated.users) == 1:
            return insert(op, ty.GeluMul(gate.x, up, approximate=gate.approximate), gate).out
    return None


def reshape_before(op: Op) -> Value | None:
    """reshape(f(x)) --> f(reshape(x)) where f and the reshape leave the last axis alone: tokens that a module
    lines up [b s, h] stay [b, s, h]
    """
    assert isinstance(op, ty.Reshape)
    return None if _rows_of(op.x, op.shape) is None else _reshaped(op, op.x, op.shape)


def _rows_of(value: Value, shape: tuple[int, ...]) -> int | None:
    """How many operands of the op that makes a value are rows like the value's own, so that they can take
    another shape instead of it; None for other ops.
    """
    inner, dims = value.op, dims_of(value)
    if inner is None or dims[-1] != shape[-1] or len(dims) >= len(shape) or len(value.users) != 1:
        return None
    if inner.has_trait(Elementwise):
        return len(inner.operands)
    of_tokens = isinstance(inner, ty.RmsNorm) or (
        isinstance(inner, ty.LayerNorm) and len(dims_of(inner.weight)) == 1
    )
    return 1 if of_tokens or isinstance(inner, (ty.Linear, ty.QuantizedLinear)) else None


def _reshaped(root: Op, value: Value, shape: tuple[int, ...]) -> Value:
    """The value in another shape, reshaped as early as its ops allow."""
    inner, count = value.op, _rows_of(value, shape)
    if inner is None or count is None:
        return insert(root, ty.Reshape(value, shape=shape)).out
    rows = [_reshaped(root, v, (*shape[:-1], dims_of(v)[-1] or 0)) for v in inner.operands[:count]]
    assert isinstance(value.type, TensorType)
    type_ = value.type.with_shape(None if d == -1 else d for d in shape)
    new = type(inner).create((*rows, *inner.operands[count:]), (type_,), inner.properties)
    return insert(root, new, inner).result


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
        (aten.Index, identity_index),
    ),
    # Structures whose parts (mul, to) would otherwise be raised one by one.
    (
        (aten.Mul, rms_norm),
        (aten.Mul, layer_norm),
        (aten.LayerNorm, whole_layer_norm),
        (aten.Mul, silu_mul),
        (aten.Mul, gelu),
        (aten.Mul, softcap),
        (aten.Mul, scale_by_constant),
        (aten.Embedding, constant_rows),
        (aten.Embedding, shifted_embedding),
        (aten.Sum, mixed_rows),
        (aten.To, rope_angles),
        (aten.Mul, rope_angles),
        (aten.Cos, rope_angles),
        (aten.Sin, rope_angles),
    ),
    # Projections and norms of heads that are packed or written out head by head.
    ((aten.Slice, part_of_heads), (aten.Cat, norms_of_heads), (aten.Select, select_of_split)),
    # Rope reads the tables that a previous phase has made; rotations of other channels than halves of whole
    # heads must be seen before it takes a part of one.
    ((ty.Attention, reordered_rope),),
    ((aten.Add, rope),),
    # What is left, op by op.
    (
        (aten.Linear, quantized_linear),
        (aten.Linear, linear),
        (aten.Addmm, addmm),
        (aten.Embedding, embedding),
        (aten.Add, add),
        (aten.Sub, sub),
        (aten.Mul, mul),
        (aten.Mul, scale),
        (aten.Div, scale),
        (aten.Silu, silu),
        (aten.Gelu, gelu_alone),
        (aten.Relu, relu),
        (aten.To, cast),
        (aten.View, reshape),
        (aten.Reshape, reshape),
        (aten.Unsqueeze, reshape),
        (aten.Transpose, transpose),
        (aten.Slice, slice_),
        (aten.Select, select),
        (aten.Permute, permute),
        (aten.Conv, patches),
        (aten.Cat, concat),
        (aten.Expand, expand_unit),
    ),
    # Lines of tokens become sequences again, and what stands between two shapes goes.
    ((ty.Reshape, unit_axis_before_transpose), (ty.Reshape, reshape_before)),
    ((ty.Reshape, merge),),
    # Parts of a packed projection become projections of their own, which dies can share out.
    (
        (ty.Slice, slice_of_linear),
        (ty.Scale, scale_before_linear),
        (ty.RmsNorm, norm_before_transpose),
        (ty.LayerNorm, norm_before_transpose),
        (ty.Mul, gelu_mul),
        (ty.Cast, cast_back),
    ),
    # Rope and attention work on [b, s, H, D], the graph on [b, H, s, D]: the transposes between them meet and
    # cancel.
    ((ty.Transpose, merge), (ty.Reshape, merge)),
)
