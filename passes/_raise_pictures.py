"""Rules of `raise-aten` for towers that see pictures: patches, packed projections, positions of a grid."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tyir.attributes import DenseElementsAttr, DictAttr
from tyir.dialects import aten, ty
from tyir.ir import Op, Value
from tyir.passes._raise_matching import dims_of, either_order, element_of, insert, made_by
from tyir.types import TensorType

__all__ = [
    "concat",
    "constant_rows",
    "expand_unit",
    "identity_index",
    "mixed_rows",
    "patches",
    "permute",
    "select",
    "select_of_split",
    "unit_axis_before_transpose",
]


def _constant(value: Value) -> npt.NDArray[np.generic] | None:
    """The numbers of a constant, or of the order of one."""
    if (order := made_by(value, aten.Argsort)) is not None:
        inner = _constant(order.x)
        return None if inner is None else np.argsort(inner, axis=order.dim, kind="stable")
    if (same := made_by(value, aten.To)) is not None and same.x.type is same.out.type:
        return _constant(same.x)
    constant = made_by(value, ty.Constant)
    return None if constant is None else constant.value.to_numpy()


def _static(value: Value) -> tuple[int, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.static_shape


def identity_index(op: Op) -> Value | None:
    """x[0, 1, .., n - 1] --> x: a tower whose patches come in the order of its windows puts none elsewhere"""
    assert isinstance(op, aten.Index)
    index, rows = _constant(op.index), dims_of(op.x)[0]
    return op.x if index is not None and rows is not None and np.array_equal(index, np.arange(rows)) else None


def constant_rows(op: Op) -> Value | None:
    """embedding(w, constant ids) --> rows of w: learned positions of a tower of one size"""
    assert isinstance(op, aten.Embedding)
    ids = _constant(op.ids)
    if ids is None or _is_mixed(op):
        return None
    flat = tuple(int(i) for i in ids.ravel())
    whole = flat == tuple(range(dims_of(op.weight)[0] or 0))
    rows = op.weight if whole else insert(op, ty.Take(op.weight, axis=0, indices=flat)).out
    return insert(op, ty.Reshape(rows, shape=_static(op.out))).out


def _is_mixed(op: aten.Embedding) -> bool:
    """Whether the rows are summed with weights, which `mixed_rows` knows."""
    return len(dims_of(op.ids)) == 2 and all(
        isinstance(user, aten.Mul) and all(isinstance(u, aten.Sum) for u in user.out.users)
        for user in op.out.users
    )


def mixed_rows(op: Op) -> Value | None:
    """sum(embedding(w, rows [N, J]) * weights [N, J, 1], over J) --> ty.mix_rows w: positions learned on one
    grid, resampled to another
    """
    assert isinstance(op, aten.Sum)
    product = made_by(op.x, aten.Mul)
    if product is None or op.keepdim or len(op.dim) != 1 or op.dim[0] % 3 != 1:
        return None
    for rows, factor in either_order(product):
        lookup, column = made_by(rows, aten.Embedding), made_by(factor, aten.Unsqueeze)
        if lookup is None or column is None or column.dim % 3 != 2:
            continue
        ids, weights = _constant(lookup.ids), _constant(column.x)
        if ids is None or weights is None or ids.shape != weights.shape:
            continue
        table = ty.MixRows(
            lookup.weight,
            rows=DenseElementsAttr.from_numpy(np.ascontiguousarray(ids)),
            weights=DenseElementsAttr.from_numpy(np.ascontiguousarray(weights)),
            element=element_of(op.out),
        )
        return insert(op, table, lookup, product).out
    return None


def select_of_split(op: Op) -> Value | None:
    """select(permute(view(x [N, P H D]) [N, P, H, D]) [P, N, H, D], p) --> view(slice(x)) [N, H, D]: q, k and
    v of a packed projection
    """
    assert isinstance(op, aten.Select)
    moved = made_by(op.x, aten.Permute)
    axis = op.dim % len(dims_of(op.x))
    source = op.x
    if moved is not None:
        order = [d % len(moved.dims) for d in moved.dims]
        axis = order[axis]
        if [d for d in order if d != axis] != sorted(d for d in order if d != axis):
            return None
        source = moved.x
    split = source.op
    if not isinstance(split, (aten.View, aten.Reshape)):
        return None
    packed, shape = dims_of(split.x), dims_of(source)
    if packed[:-1] != shape[:axis] or any(d is None for d in shape[axis:]):
        return None
    parts, *rest = (d or 0 for d in shape[axis:])
    size = int(np.prod(rest))
    if packed[-1] != parts * size:
        return None
    start = op.index % parts * size
    assert isinstance(split.x.type, TensorType)
    fields = {f.name: f for f in aten.Slice.attr_fields}
    numbers = {"dim": len(packed) - 1, "start": start, "end": start + size}
    encoded = DictAttr({name: fields[name].codec.encode(value) for name, value in numbers.items()})
    part = aten.Slice.create([split.x], (split.x.type.with_shape((*packed[:-1], size)),), encoded)
    channels = insert(op, part, split).out
    fields = {f.name: f for f in aten.View.attr_fields}
    target = tuple(-1 if d is None else d for d in dims_of(op.out))
    shaped = DictAttr({"shape": fields["shape"].codec.encode(target)})
    return insert(op, aten.View.create([channels], (op.out.type,), shaped)).out


def select(op: Op) -> Value | None:
    """One entry along a static dimension --> ty.slice, ty.reshape"""
    assert isinstance(op, aten.Select)
    dims = dims_of(op.x)
    axis = op.dim % len(dims)
    length = dims[axis]
    if length is None:
        return None
    entry = insert(op, ty.Slice(op.x, axis=axis, offset=op.index % length, size=1)).out
    return insert(op, ty.Reshape(entry, shape=tuple(-1 if d is None else d for d in dims_of(op.out)))).out


def permute(op: Op) -> Value | None:
    assert isinstance(op, aten.Permute)
    rank = len(op.dims)
    return insert(op, ty.Transpose(op.x, perm=tuple(d % rank for d in op.dims))).out


def patches(op: Op) -> Value | None:
    """conv(x [N, C, ..], w [M, C, ..]) of one window each --> linear of x and w in rows: a patch embedding"""
    assert isinstance(op, aten.Conv)
    x, weight = _static(op.x), _static(op.weight)
    if x[1:] != weight[1:] or op.stride != weight[2:]:
        return None
    columns = int(np.prod(weight[1:]))
    rows = insert(op, ty.Reshape(op.x, shape=(x[0], columns))).out
    matrix = insert(op, ty.Reshape(op.weight, shape=(weight[0], columns))).out
    made = insert(op, ty.Linear(rows, matrix, op.bias)).out
    return insert(op, ty.Reshape(made, shape=_static(op.out))).out


def concat(op: Op) -> Value | None:
    """cat of tensors of static shapes --> ty.concat: a class token before the patches"""
    assert isinstance(op, aten.Cat)
    if any(None in dims_of(t) for t in op.tensors):
        return None
    return insert(op, ty.Concat(op.tensors, axis=op.dim % len(dims_of(op.out)))).out


def expand_unit(op: Op) -> Value | None:
    """An expansion that adds dimensions of 1 only --> ty.reshape"""
    assert isinstance(op, aten.Expand)
    before, after = dims_of(op.x), dims_of(op.out)
    if None in after or int(np.prod(_static(op.x))) != int(np.prod(_static(op.out))):
        return None
    return insert(op, ty.Reshape(op.x, shape=_static(op.out))).out if before != after else op.x


def unit_axis_before_transpose(op: Op) -> Value | None:
    """reshape(transpose(x) [..] to [1, ..]) --> transpose(reshape(x)), where transposes then meet"""
    assert isinstance(op, ty.Reshape)
    inner = made_by(op.x, ty.Transpose)
    if inner is None or None in dims_of(op.x) or op.shape != (1, *_static(op.x)):
        return None
    whole = insert(op, ty.Reshape(inner.x, shape=(1, *_static(inner.x)))).out
    return insert(op, ty.Transpose(whole, perm=(0, *(p + 1 for p in inner.perm))), inner).out
