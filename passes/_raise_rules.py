"""The rewrite rules of `raise-aten`, in the order they are tried.

A rule takes the op at the root of its pattern and returns the value that replaces the op's result, or None when the pattern is not there.  It inserts
new ops before the root and erases nothing: what the pattern consumed is dead afterwards and the driver removes it.  Every rule keeps the value's type
and its meaning up to rounding: `ty` ops compute in f32 and round once where the graph rounds after every op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from tyir.attributes import DenseElementsAttr, DictAttr, IntegerAttr
from tyir.dialects import aten, ty
from tyir.ir import Op, Value
from tyir.location import UNKNOWN, Location, fuse, module_path
from tyir.types import TensorType, Type, f16, f32, i64

__all__ = ["PHASES", "Phase", "Rule"]

Rule = Callable[[Op], Value | None]
_OpT = TypeVar("_OpT", bound=Op)
_HEADS_FIRST: Final = (0, 2, 1, 3)  # [b, H, s, D] <-> [b, s, H, D]


# ---------------------------------------------------------------------------------------------------- matching


def _made_by(value: Value | None, kind: type[_OpT]) -> _OpT | None:
    """The op that defines `value` when it is a `kind`."""
    return value.op if value is not None and isinstance(value.op, kind) else None


def _dims(value: Value) -> tuple[int | None, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.dims


def _element(value: Value) -> Type:
    assert isinstance(value.type, TensorType)
    return value.type.element


def _either_order(op: aten.Mul | aten.Add) -> Iterator[tuple[Value, Value]]:
    """Both orders of a commutative op's two tensors."""
    if op.y is not None:
        yield op.x, op.y
        yield op.y, op.x


def _through_float(value: Value) -> Value:
    """The value before f16 <-> f32 conversions."""
    while (to := _made_by(value, aten.To)) is not None and {_element(to.x), _element(to.out)} <= {f16, f32}:
        value = to.x
    return value


def _is_last(dim: int, value: Value) -> bool:
    return dim % len(_dims(value)) == len(_dims(value)) - 1


def _insert(root: Op, new: _OpT, *matched: Op | None) -> _OpT:
    """Insert `new` before the root, with one location per module that the matched ops came from."""
    new.loc = _merged([*(op.loc for op in matched if op is not None), root.loc])
    new.insert_before(root)
    return _named(new)


def _as(type: Type, value: Value, root: Op) -> Value | None:
    """`value` with the element type of `type`: models round to f16 in different places of one pattern, and `cast_back` removes what meets.  None when shapes differ."""
    assert isinstance(type, TensorType) and isinstance(value.type, TensorType)
    if value.type.dims != type.dims:
        return None
    return value if value.type is type else _insert(root, ty.Cast(value, element=type.element)).out


def _named(op: _OpT) -> _OpT:
    """Name the results after the op, so that the text does not carry names of ops that are gone."""
    for value in op.results:
        value.name = op.name.partition(".")[2]
    return op


def _merged(locations: list[Location]) -> Location:
    """Fused locations with one entry, the last, for each module path: an RMS norm is one place of the model, not six lines of it."""
    by_module: dict[str | None, Location] = {}
    for location in locations:
        if location is not UNKNOWN:
            path = module_path(location)
            by_module.pop(path, None)
            by_module[path] = location
    return fuse(by_module.values())


# ---------------------------------------------------------------------------------------------------- identities


def same_type(op: Op) -> Value | None:
    """A conversion, view, expansion or slice that changes nothing --> its operand."""
    if isinstance(op, aten.Slice) and not (op.start == 0 and op.end >= 2**63 - 1):
        length = _dims(op.x)[op.dim % len(_dims(op.x))]
        return op.x if length is not None and op.x.type is op.out.type else None
    (x,) = op.operands
    dynamic = isinstance(op, (aten.View, aten.Reshape)) and _dims(x).count(None) > 1
    return x if x.type is op.result.type and not dynamic else None


def cat_of_one(op: Op) -> Value | None:
    """cat(x, nothing) --> x: what a rotary embedding leaves out is empty when it turns whole heads"""
    assert isinstance(op, aten.Cat)
    filled = [t for t in op.tensors if 0 not in _dims(t)]
    return filled[0] if len(filled) == 1 and filled[0].type is op.out.type else None


# ---------------------------------------------------------------------------------------------------- structures


def rms_norm(op: Op) -> Value | None:
    """w * to(to(x) * rsqrt(mean(to(x)^2) + eps)) --> ty.rms_norm x, w"""
    assert isinstance(op, aten.Mul)
    for weight, normed in _either_order(op):
        scaled = _made_by(_through_float(normed), aten.Mul)
        if len(_dims(weight)) != 1 or scaled is None:
            continue
        for wide, scale in _either_order(scaled):
            rsqrt = _made_by(scale, aten.Rsqrt)
            shifted = _made_by(rsqrt.x, aten.Add) if rsqrt else None
            mean = _made_by(shifted.x, aten.Mean) if shifted and shifted.scalar is not None else None
            square = _made_by(mean.x, aten.Pow) if mean and len(mean.dim) == 1 and mean.keepdim and _is_last(mean.dim[0], mean.x) else None
            if square is None or square.exponent != 2 or square.x is not wide or shifted is None or shifted.scalar is None:
                continue
            x = _through_float(wide)
            return _as(op.out.type, _insert(op, ty.RmsNorm(x, _through_float(weight), eps=shifted.scalar), scaled).out, op)
    return None


def silu_mul(op: Op) -> Value | None:
    """silu(gate) * up --> ty.silu_mul gate, up"""
    assert isinstance(op, aten.Mul)
    for activated, up in _either_order(op):
        silu = _made_by(activated, aten.Silu)
        if silu is not None and silu.x.type is up.type:
            return _insert(op, ty.SiluMul(silu.x, up), silu).out
    return None


@dataclass(frozen=True)
class _Angles:
    """What a cosine or sine table is made of: function(cat(p * f, p * f)) * scale."""

    wave: aten.Cos | aten.Sin
    positions: Value
    inv_freq: DenseElementsAttr
    scale: float


def _match_angles(root: Op) -> _Angles | None:
    op: Op | None = root
    if isinstance(op, aten.To):
        op = op.x.op
    scale = 1.0
    if isinstance(op, aten.Mul) and op.scalar is not None:
        scale, op = op.scalar, op.x.op
    if not isinstance(op, (aten.Cos, aten.Sin)):
        return None
    doubled = _made_by(op.x, aten.Cat)
    if (
        doubled is None
        or len(doubled.tensors) != 2
        or doubled.tensors[0] is not doubled.tensors[1]
        or not _is_last(doubled.dim, doubled.out)
    ):
        return None
    product = _made_by(doubled.tensors[0], aten.Mul)
    for positions, frequencies in _either_order(product) if product else ():
        constant = _made_by(frequencies, ty.Constant)
        to = _made_by(positions, aten.To)
        column = _made_by(to.x, aten.Unsqueeze) if to else None
        if (
            constant is not None
            and column is not None
            and _is_last(column.dim, column.out)
            and len(_dims(column.x)) == 2
            and len(_dims(constant.out)) == 1
        ):
            return _Angles(op, column.x, constant.value, scale)
    return None


def rope_angles(op: Op) -> Value | None:
    """to(cos(cat(p * f, p * f)) * scale) --> aten.cat(c, c) with c, s = ty.rope_angles p; likewise for sin.  One op serves both tables."""
    found = _match_angles(op)
    if found is None:
        return None
    angles = _shared_angles(ty.RopeAngles(found.positions, inv_freq=found.inv_freq, scale=found.scale, element=_element(op.result)))
    angles.loc = _merged([angles.loc, found.wave.loc])
    half = angles.results[0 if isinstance(found.wave, aten.Cos) else 1]
    return _insert(op, aten.Cat.create((half, half), (op.result.type,), DictAttr({"dim": IntegerAttr(-1, i64)}))).out


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
    return _shared_angles(ty.RopeAngles(angles.positions, inv_freq=angles.inv_freq, scale=angles.scale, element=element, loc=angles.loc))


def _insert_after_definition(value: Value, op: Op) -> None:
    """Insert `op` as early as its operand allows."""
    if value.op is not None:
        op.insert_after(value.op)
    else:
        assert value.block is not None
        value.block.insert(op, before=value.block.first_op)


def _half_table(value: Value, index: int) -> tuple[ty.RopeAngles, int] | None:
    """unsqueeze(cat(c, c), axis) with c result `index` of a `ty.rope_angles` --> that op and the heads axis."""
    row = _made_by(value, aten.Unsqueeze)
    doubled = _made_by(row.x, aten.Cat) if row else None
    angles = _made_by(doubled.tensors[0], ty.RopeAngles) if doubled and len(doubled.tensors) == 2 else None
    if (
        row is None
        or doubled is None
        or angles is None
        or doubled.tensors[0] is not doubled.tensors[1]
        or doubled.tensors[0] is not angles.results[index]
    ):
        return None
    return angles, row.dim % len(_dims(row.out))


def _rotates(value: Value, x: Value) -> bool:
    """Whether value is rotate_half(x) = cat(-x[.., D/2:], x[.., :D/2])."""
    joined, size = _made_by(value, aten.Cat), _dims(x)[-1]
    if joined is None or size is None or len(joined.tensors) != 2 or not _is_last(joined.dim, x):
        return False
    negated = _made_by(joined.tensors[0], aten.Neg)
    upper, lower = _made_by(negated.x if negated else None, aten.Slice), _made_by(joined.tensors[1], aten.Slice)
    if upper is None or lower is None or upper.x is not x or lower.x is not x or not (_is_last(upper.dim, x) and _is_last(lower.dim, x)):
        return False
    return (upper.start, min(upper.end, size), lower.start, lower.end) == (size // 2, size, 0, size // 2)


def rope(op: Op) -> Value | None:
    """x * cos + rotate_half(x) * sin --> ty.rope x, c, s, between transposes when x is [b, H, s, D]."""
    assert isinstance(op, aten.Add)
    for straight, turned in _either_order(op):
        first, second = _made_by(straight, aten.Mul), _made_by(turned, aten.Mul)
        for x, cos in _either_order(first) if first and second else ():
            tables = _half_table(cos, 0)
            for rotated, sin in _either_order(second) if second and tables else ():
                other = _half_table(sin, 1)
                if (
                    other is None
                    or other != tables
                    or tables is None
                    or not _rotates(rotated, x)
                    or tables[1] not in (1, 2)
                    or len(_dims(x)) != 4
                ):
                    continue
                angles, axis = _angles_for(tables[0], _element(x)), tables[1]
                by_token = x if axis == 2 else _insert(op, ty.Transpose(x, perm=_HEADS_FIRST)).out
                out = _insert(op, ty.Rope(by_token, angles.cos, angles.sin), first).out
                out = out if axis == 2 else _insert(op, ty.Transpose(out, perm=_HEADS_FIRST)).out
                return _as(op.out.type, out, op)
    return None


# ---------------------------------------------------------------------------------------------------- op by op


def quantized_linear(op: Op) -> Value | None:
    """linear(x, dequantize(q, scales, zeros)) --> ty.quantized_linear x, q, scales, zeros"""
    assert isinstance(op, aten.Linear)
    weight = _made_by(op.weight, ty.Cast)
    stored = _made_by(weight.x if weight is not None else op.weight, ty.Dequantize)
    if stored is None:
        return None
    return _insert(op, ty.QuantizedLinear(op.x, stored.q, stored.scales, stored.zeros, op.bias, group_size=stored.group_size)).out


def linear(op: Op) -> Value | None:
    assert isinstance(op, aten.Linear)
    return _insert(op, ty.Linear(op.x, op.weight, op.bias)).out if len(_dims(op.weight)) == 2 else None


def embedding(op: Op) -> Value | None:
    assert isinstance(op, aten.Embedding)
    return _insert(op, ty.Embedding(op.weight, op.ids)).out if len(_dims(op.ids)) == 2 else None


def add(op: Op) -> Value | None:
    assert isinstance(op, aten.Add)
    return _insert(op, ty.Add(op.x, op.y)).out if op.y is not None and op.x.type is op.y.type else None


def mul(op: Op) -> Value | None:
    assert isinstance(op, aten.Mul)
    return _insert(op, ty.Mul(op.x, op.y)).out if op.y is not None and op.x.type is op.y.type else None


def scale(op: Op) -> Value | None:
    """x * number, x / number --> ty.scale"""
    assert isinstance(op, (aten.Mul, aten.Div))
    if op.scalar is None or op.x.type is not op.out.type or (isinstance(op, aten.Div) and op.scalar == 0):
        return None
    return _insert(op, ty.Scale(op.x, factor=op.scalar if isinstance(op, aten.Mul) else 1 / op.scalar)).out


def silu(op: Op) -> Value | None:
    assert isinstance(op, aten.Silu)
    return _insert(op, ty.Silu(op.x)).out


def cast(op: Op) -> Value | None:
    assert isinstance(op, aten.To)
    return _insert(op, ty.Cast(op.x, element=op.element)).out


def reshape(op: Op) -> Value | None:
    """A change of shape with at most one dynamic dimension --> ty.reshape"""
    shape = tuple(-1 if d is None else d for d in _dims(op.result))
    return _insert(op, ty.Reshape(op.operands[0], shape=shape)).out if shape.count(-1) <= 1 else None


def transpose(op: Op) -> Value | None:
    assert isinstance(op, aten.Transpose)
    rank = len(_dims(op.x))
    perm = list(range(rank))
    first, second = op.dim0 % rank, op.dim1 % rank
    perm[first], perm[second] = second, first
    return _insert(op, ty.Transpose(op.x, perm=tuple(perm))).out


def slice_(op: Op) -> Value | None:
    """A slice along a static dimension --> ty.slice"""
    assert isinstance(op, aten.Slice)
    axis = op.dim % len(_dims(op.x))
    size, length = _dims(op.out)[axis], _dims(op.x)[axis]
    if size is None or length is None:
        return None
    start = max(op.start + length, 0) if op.start < 0 else op.start
    return _insert(op, ty.Slice(op.x, axis=axis, offset=start, size=size)).out


# ---------------------------------------------------------------------------------------------------- tidying


def cast_back(op: Op) -> Value | None:
    """cast(cast(x: f16 to f32) to f16) --> x"""
    assert isinstance(op, ty.Cast)
    inner = _made_by(op.x, ty.Cast)
    wider = inner is not None and _element(inner.x) is f16 and inner.element is f32
    return inner.x if inner is not None and wider and inner.x.type is op.out.type else None


def norm_before_transpose(op: Op) -> Value | None:
    """rms_norm(transpose(x)) --> transpose(rms_norm(x)) where the normed axis stays the last: between heads and tokens the transposes then cancel"""
    assert isinstance(op, ty.RmsNorm)
    inner = _made_by(op.x, ty.Transpose)
    if inner is None or inner.perm[-1] != len(inner.perm) - 1:
        return None
    return _insert(op, ty.Transpose(_insert(op, ty.RmsNorm(inner.x, op.weight, eps=op.eps)).out, perm=inner.perm), inner).out


def merge_transposes(op: Op) -> Value | None:
    """transpose(transpose(x)) --> x, or one transpose"""
    assert isinstance(op, ty.Transpose)
    if op.perm == tuple(range(len(op.perm))):
        return op.x
    inner = _made_by(op.x, ty.Transpose)
    if inner is None:
        return None
    perm = tuple(inner.perm[p] for p in op.perm)
    return inner.x if perm == tuple(range(len(perm))) else _insert(op, ty.Transpose(inner.x, perm=perm), inner).out


def merge_reshapes(op: Op) -> Value | None:
    """reshape(reshape(x)) --> reshape(x); a reshape to x's own shape --> x"""
    assert isinstance(op, ty.Reshape)
    inner = _made_by(op.x, ty.Reshape)
    x = inner.x if inner is not None else op.x
    if x.type is op.out.type and _dims(x).count(None) <= 1:
        return x
    return None if inner is None else _insert(op, ty.Reshape(x, shape=op.shape), inner).out


def slice_of_linear(op: Op) -> Value | None:
    """slice(linear(x, w, b)) along its channels --> linear(x, slice(w), slice(b)), when all of the linear's results are used through such slices"""
    assert isinstance(op, ty.Slice)
    whole = op.x.op
    if not isinstance(whole, (ty.Linear, ty.QuantizedLinear)) or not all(_is_channels(user) for user in op.x.users) or not _is_channels(op):
        return None

    def rows(value: Value) -> Value:
        return _insert(op, ty.Slice(value, axis=0, offset=op.offset, size=op.size), whole).out

    bias = rows(whole.bias) if whole.bias is not None else None
    if isinstance(whole, ty.Linear):
        return _insert(op, ty.Linear(whole.x, rows(whole.weight), bias, element=whole.element), whole).out
    q, scales, zeros = rows(whole.q), rows(whole.scales), rows(whole.zeros)
    return _insert(op, ty.QuantizedLinear(whole.x, q, scales, zeros, bias, group_size=whole.group_size, element=whole.element), whole).out


def _is_channels(op: Op) -> bool:
    return isinstance(op, ty.Slice) and _is_last(op.axis, op.x)


def scale_before_linear(op: Op) -> Value | None:
    """scale(linear(x, w)) --> linear(scale(x), w) where x has fewer channels: less to scale, and the head's sums stay unrounded"""
    assert isinstance(op, ty.Scale)
    whole = op.x.op
    if not isinstance(whole, (ty.Linear, ty.QuantizedLinear)) or whole.bias is not None or len(op.x.users) != 1:
        return None
    inner, outer = _dims(whole.x)[-1], _dims(whole.out)[-1]
    if inner is None or outer is None or inner >= outer:
        return None
    x = _insert(op, ty.Scale(whole.x, factor=op.factor)).out
    if isinstance(whole, ty.Linear):
        return _insert(op, ty.Linear(x, whole.weight, element=whole.element), whole).out
    return _insert(
        op, ty.QuantizedLinear(x, whole.q, whole.scales, whole.zeros, group_size=whole.group_size, element=whole.element), whole
    ).out


Phase = tuple[tuple[type[Op], Rule], ...]

# Each phase is one sweep over a function from its end to its beginning, so that the largest pattern at a place is tried before its parts.
PHASES: Final[tuple[Phase, ...]] = (
    # Identities first: the patterns below need not look through them.
    ((aten.To, same_type), (aten.View, same_type), (aten.Reshape, same_type), (aten.Expand, same_type), (aten.Slice, same_type), (aten.Cat, cat_of_one)),
    # Structures whose parts (mul, to) would otherwise be raised one by one.
    ((aten.Mul, rms_norm), (aten.Mul, silu_mul), (aten.To, rope_angles), (aten.Mul, rope_angles), (aten.Cos, rope_angles), (aten.Sin, rope_angles)),
    # Rope reads the tables that the previous phase has made.
    ((aten.Add, rope),),
    # What is left, op by op.
    (
        (aten.Linear, quantized_linear), (aten.Linear, linear), (aten.Embedding, embedding), (aten.Add, add), (aten.Mul, mul), (aten.Mul, scale), (aten.Div, scale), (aten.Silu, silu), (aten.To, cast),
        (aten.View, reshape), (aten.Reshape, reshape), (aten.Unsqueeze, reshape), (aten.Transpose, transpose), (aten.Slice, slice_),
    ),
    # Parts of a packed projection become projections of their own, which dies can share out.
    ((ty.Slice, slice_of_linear), (ty.Scale, scale_before_linear), (ty.RmsNorm, norm_before_transpose), (ty.Cast, cast_back)),
    # Rope and attention work on [b, s, H, D], the graph on [b, H, s, D]: the transposes between them meet and cancel.
    ((ty.Transpose, merge_transposes), (ty.Reshape, merge_reshapes)),
)  # fmt: skip
