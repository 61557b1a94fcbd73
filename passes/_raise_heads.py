"""Rules of `raise-aten` for projections and norms of heads: parts that each head packs, norms written head by
head.
"""

from __future__ import annotations

from collections.abc import Sequence

from tyir.attributes import DictAttr
from tyir.dialects import aten, ty
from tyir.ir import Op, Value
from tyir.passes._raise_matching import dims_of, insert, is_last, made_by
from tyir.types import TensorType

__all__ = ["HEADS_FIRST", "norms_of_heads", "part_of_heads", "take_channels"]

HEADS_FIRST = (0, 2, 1, 3)  # [b, H, s, D] <-> [b, s, H, D]


def take_channels(
    root: Op, value: Value, heads: int, size: int, channels: Sequence[int], first: int = 0
) -> Value:
    """Of the rows of a projection's weight (or bias) that make `heads` heads of `size` channels, from row
    `first` on, those of the given channels of each head, in that order; of a quantised weight, those of all
    its tensors.
    """
    made = value.op
    if isinstance(made, ty.Cast):
        taken = take_channels(root, made.x, heads, size, channels, first)
        return insert(root, ty.Cast(taken, element=made.element)).out
    if isinstance(made, ty.Dequantize):
        q, scales, zeros = (
            take_channels(root, v, heads, size, channels, first) for v in (made.q, made.scales, made.zeros)
        )
        return insert(root, ty.Dequantize(q, scales, zeros, group_size=made.group_size)).out
    assert isinstance(value.type, TensorType)
    rows, *rest = value.type.static_shape
    if heads * size != rows:
        value = insert(root, ty.Slice(value, axis=0, offset=first, size=heads * size)).out
    by_head = insert(root, ty.Reshape(value, shape=(heads, size, *rest))).out
    taken = insert(root, ty.Take(by_head, axis=1, indices=tuple(channels))).out
    return insert(root, ty.Reshape(taken, shape=(heads * len(channels), *rest))).out


def part_of_heads(op: Op) -> Value | None:
    """slice(view(linear(x, w)) [b, s, H, 3 D]) along a head's channels --> view(linear(x, rows of w)) [b, s, H, D]

    For projections that pack q, k and v of each head (GPT-NeoX): the third that the slice takes.  Two parts
    would be the channels that a rotation turns and leaves.
    """  # noqa: E501
    assert isinstance(op, aten.Slice)
    moved = made_by(op.x, aten.Transpose)
    split = moved.x.op if moved is not None else op.x.op
    if not isinstance(split, (aten.View, aten.Reshape)) or not is_last(op.dim, op.x) or op.step != 1:
        return None
    linear, shape = made_by(split.x, aten.Linear), dims_of(split.result)
    if linear is None or len(shape) != 4 or not _in_thirds(op.x):
        return None
    _, _, heads, size = shape
    if heads is None or size is None or dims_of(linear.weight)[0] != heads * size:
        return None
    channels = range(op.start, op.start + size // 3)
    operands = [linear.x, take_channels(op, linear.weight, heads, size, channels)]
    if linear.bias is not None:
        operands.append(take_channels(op, linear.bias, heads, size, channels))
    assert isinstance(linear.out.type, TensorType) and isinstance(split.result.type, TensorType)
    flat = linear.out.type.with_shape((*dims_of(linear.out)[:-1], heads * size // 3))
    part = insert(op, aten.Linear.create(operands, (flat,), DictAttr({})), linear).out
    by_head = split.result.type.with_shape((*shape[:-1], size // 3))
    sizes = tuple(-1 if d is None else d for d in by_head.dims)
    fields = {f.name: f for f in aten.View.attr_fields}
    shaped = aten.View.create([part], (by_head,), DictAttr({"shape": fields["shape"].codec.encode(sizes)}))
    out = insert(op, shaped, split).out
    if moved is None:
        return out
    return insert(op, aten.Transpose.create([out], (op.out.type,), moved.properties), moved).out


def _in_thirds(value: Value) -> bool:
    """Whether all that reads a value takes one of the thirds of its last axis."""
    size = dims_of(value)[-1] or 1
    wanted = {(n * size // 3, (n + 1) * size // 3) for n in range(3)}
    found = {
        (user.start, min(user.end, size))
        for user in value.users
        if isinstance(user, aten.Slice) and is_last(user.dim, value) and user.step == 1
    }
    return size % 3 == 0 and found <= wanted and all(isinstance(user, aten.Slice) for user in value.users)


def norms_of_heads(op: Op) -> Value | None:
    """cat of layer_norm(x[:, h], w_h) for each head h of x [b, H, s, D] --> layer_norm(x, w_0 .. w_h stacked)

    StableLM has a norm for each head.
    """
    assert isinstance(op, aten.Cat)
    norms = [made_by(t, ty.LayerNorm) for t in op.tensors]
    parts = [made_by(n.x, aten.Slice) if n is not None else None for n in norms]
    first, part = norms[0], parts[0]
    if first is None or part is None or len(dims_of(op.out)) != 4 or op.dim % 4 != 1:
        return None
    x = part.x
    for number, (norm, piece) in enumerate(zip(norms, parts)):
        if norm is None or piece is None or piece.x is not x or piece.dim % 4 != 1 or norm.bias is not None:
            return None
        if (piece.start, piece.end) != (number, number + 1) or norm.properties is not first.properties:
            return None
    if dims_of(x)[1] != len(norms):
        return None
    weights = tuple(norm.weight for norm in norms if norm is not None)
    (size,) = dims_of(weights[0])
    rows = [insert(op, ty.Reshape(w, shape=(1, size or 0))).out for w in weights]
    weight = insert(op, ty.Concat(tuple(rows), axis=0), *norms).out
    inner = made_by(x, aten.Transpose)
    if inner is not None and {inner.dim0 % 4, inner.dim1 % 4} == {1, 2}:
        by_token = inner.x
    else:
        by_token = insert(op, ty.Transpose(x, perm=HEADS_FIRST)).out
    normed = insert(op, ty.LayerNorm(by_token, weight, eps=first.eps), *norms).out
    return insert(op, ty.Transpose(normed, perm=HEADS_FIRST)).out
