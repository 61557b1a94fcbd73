"""Where each value of a step lives on the dies, and the collectives that follow from it.

A placement is `REPLICATED` (every die has all of it), `PARTIAL` (every die has an addend) or a `Split` (every die has a range along one axis; ranges may
overlap, which is how key/value heads are replicated only where a query group crosses dies).

1. `choose` decides the splits that are a matter of choice: heads for attention, whole groups for the MLP, rows for the vocabulary.
2. `place` walks the step forward, gives every value its placement by one rule per op, and inserts `dist.all_reduce` / `dist.all_gather` (still with global
   shapes) where an operand is needed whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from tyir.constexpr import ConstantExpressions
from tyir.dialects.dist import AllGather, AllReduce
from tyir.dialects.func import Func, Return
from tyir.dialects.kv import Append, CachedAttention
from tyir.dialects.ty import Add, Cast, Embedding, Linear, Mul, QuantizedLinear, Reshape, RmsNorm, Rope, Silu, SiluMul, tensor_type
from tyir.ir import Op, Value
from tyir.location import Location

__all__ = ["PARTIAL", "REPLICATED", "Partition", "Placement", "Split", "choose", "even_ranges", "place"]

Range = tuple[int, int]
ELEMENTWISE: Final = (Add, Mul, Silu, SiluMul, Cast)
LINEAR: Final = (Linear, QuantizedLinear)


@dataclass(frozen=True)
class Split:
    """(offset, size) along `axis` for each die, in die order."""

    axis: int
    ranges: tuple[Range, ...]

    def along(self, axis: int) -> Split:
        return Split(axis, self.ranges)

    def scaled(self, axis: int, times: int, by: int = 1) -> Split:
        """The same cut in other units: offsets and sizes times `times`, divided by `by` (which must divide them)."""
        return Split(axis, tuple((o * times // by, s * times // by) for o, s in self.ranges))


@dataclass(frozen=True)
class _Whole:
    name: str


REPLICATED: Final = _Whole("replicated")
PARTIAL: Final = _Whole("partial")
Placement = Split | _Whole


@dataclass
class Partition:
    """What is known of a step: placements of values, chosen output cuts of linears, operands to be cut locally."""

    dies: int
    placement: dict[Value, Placement] = field(default_factory=dict)
    columns: dict[Op, Split] = field(default_factory=dict)
    local_slices: dict[tuple[Op, int], Split] = field(default_factory=dict)

    def of(self, value: Value) -> Placement:
        return self.placement.get(value, REPLICATED)


def even_ranges(total: int, dies: int, unit: int = 1) -> tuple[Range, ...]:
    """`total` cut into contiguous ranges of whole units, as even as can be, larger ones first; trailing dies may get nothing."""
    units = total // unit
    ranges, offset = [], 0
    for die in range(dies):
        size = (units // dies + (die < units % dies)) * unit
        ranges.append((offset, size))
        offset += size
    return tuple(ranges)


def mlp_unit(width: int, group_size: int, dies: int) -> int:
    """The granule of an MLP cut: whole quantisation groups where there is one for every die, else the largest halving of them that gives one."""
    unit = math.gcd(width, group_size)
    while width // unit < dies and unit % 2 == 0 and unit > 16:
        unit //= 2
    return unit


# ------------------------------------------------------------------------------------------------------------- choices


def choose(function: Func, dies: int) -> Partition:
    """The cuts of attention, MLP, embedding and head."""
    partition = Partition(dies)
    constants = ConstantExpressions()
    for attention in function.walk_type(CachedAttention):
        _choose_heads(attention, partition)
    for linear in [op for op in function.body if isinstance(op, LINEAR)]:
        sources = _gated_sources(linear.x, constants)
        if sources and not any(s in partition.columns for s in sources):
            width = tensor_type(linear.x).dims[-1] or 0
            unit = mlp_unit(width, linear.group_size if isinstance(linear, QuantizedLinear) else 128, dies)
            _demand(linear.x, Split(tensor_type(linear.x).rank - 1, even_ranges(width, dies, unit)), partition)
    head = function.body.terminator.operands[0].op
    if isinstance(head, LINEAR):
        vocabulary = tensor_type(head.out).dims[-1] or 0
        partition.columns[head] = Split(tensor_type(head.out).rank - 1, vocabulary_ranges(vocabulary, dies))
    return partition


def vocabulary_ranges(vocabulary: int, dies: int) -> tuple[Range, ...]:
    """Rows of embedding and head per die, in units of 16 where the vocabulary allows (whole tiles on every die)."""
    return even_ranges(vocabulary, dies, math.gcd(vocabulary, 16) if vocabulary >= 16 * dies else 1)


def _choose_heads(attention: CachedAttention, partition: Partition) -> None:
    """Query heads evenly; of the key/value heads those that a die's query heads read."""
    heads = attention.kv_heads
    queries = even_ranges(len(heads), partition.dies)
    groups = tuple((heads[o], heads[o + s - 1] - heads[o] + 1) if s else (0, 0) for o, s in queries)
    _demand(attention.q, Split(2, queries), partition)
    for cache in (attention.k, attention.v):
        append = cache.op
        assert isinstance(append, Append)
        _demand(append.rows, Split(2, groups), partition)
        partition.placement[append.cache] = Split(1, groups)


def _demand(value: Value, split: Split, partition: Partition) -> None:
    """Ask for a value cut this way: followed back to the linears that can produce it so."""
    op = value.op
    if isinstance(op, LINEAR):
        if split.axis == tensor_type(op.out).rank - 1:
            partition.columns[op] = split
    elif isinstance(op, Rope) or (isinstance(op, RmsNorm) and split.axis != tensor_type(op.x).rank - 1):
        _demand(op.x, split, partition)
    elif isinstance(op, Reshape):
        if (back := through_reshape(split, tensor_type(op.out).dims, tensor_type(op.x).dims)) is not None:
            _demand(op.x, back, partition)
    elif isinstance(op, ELEMENTWISE):
        for operand in op.operands:
            _demand(operand, split, partition)


def _gated_sources(value: Value, constants: ConstantExpressions) -> list[Op]:
    """The linears that feed a value through elementwise ops only; empty when it has other sources or none."""
    op = value.op
    if isinstance(op, LINEAR):
        return [op]
    if not isinstance(op, (Mul, Silu, SiluMul)):
        return []
    sources: list[Op] = []
    for operand in op.operands:
        if constants.is_constant(operand):
            continue
        found = _gated_sources(operand, constants)
        if not found:
            return []
        sources += found
    return sources


def through_reshape(split: Split, source: Sequence[int | None], target: Sequence[int | None]) -> Split | None:
    """The same cut seen on the other side of a reshape that splits or joins axes at the cut one; None when it cannot be expressed."""
    axis = split.axis
    if tuple(source[:axis]) != tuple(target[:axis]) or axis >= len(target):
        return None
    before, after = source[axis], target[axis]
    if before is None or after is None:
        return None
    if before == after:
        return split
    larger, smaller = max(before, after), min(before, after)
    ratio = larger // smaller
    if larger % smaller:
        return None
    if after > before:
        return split.scaled(axis, ratio)
    return split.scaled(axis, 1, ratio) if all(o % ratio == 0 and s % ratio == 0 for o, s in split.ranges) else None


# ------------------------------------------------------------------------------------------------------------- placement


def place(function: Func, partition: Partition) -> None:
    """Give every value of the step its placement and insert the collectives."""
    if partition.dies == 1:
        partition.columns.clear()
        partition.placement.clear()
        return
    for op in function.body:
        for op_class, rule in _RULES:
            if isinstance(op, op_class):
                rule(op, partition)
                break
        else:
            for index in range(len(op.operands)):
                _whole(op, index, partition)


def _whole(op: Op, index: int, partition: Partition) -> None:
    """Make an operand available in full on every die: reduce what is partial, gather what is split.  Done once per value."""
    value = op.operands[index]
    placement = partition.of(value)
    if placement is REPLICATED:
        return
    collective: Op
    if isinstance(placement, Split):
        collective = AllGather(
            value, axis=placement.axis, sizes=tuple(s for _, s in placement.ranges), loc=_loc(value), result_types=[value.type]
        )
    else:
        collective = AllReduce(value, loc=_loc(value), result_types=[value.type])
    collective.insert_before(op)
    value.replace_all_uses_with(collective.result, unless=lambda user: user is collective)
    partition.placement[collective.result] = REPLICATED


def _loc(value: Value) -> Location:
    assert value.op is not None
    return value.op.loc


def _cut(op: Op, index: int, split: Split, partition: Partition) -> None:
    """Make an operand available cut as asked: as it is, or by a local slice of the whole."""
    if partition.of(op.operands[index]) == split:
        return
    _whole(op, index, partition)
    partition.local_slices[op, index] = split


def _place_linear(op: Op, partition: Partition) -> None:
    x = op.operands[0]
    if partition.of(x) is PARTIAL:
        _whole(op, 0, partition)
    placement = partition.of(op.operands[0])
    if isinstance(placement, Split) and placement.axis == tensor_type(x).rank - 1:
        partition.placement[op.result] = PARTIAL
        return
    _whole(op, 0, partition)
    if op in partition.columns:
        partition.placement[op.result] = partition.columns[op]


def _place_embedding(op: Op, partition: Partition) -> None:
    partition.placement[op.result] = PARTIAL


def _place_elementwise(op: Op, partition: Partition) -> None:
    for index, value in enumerate(op.operands):
        if partition.of(value) is PARTIAL:
            _whole(op, index, partition)
    splits = [p for v in op.operands if isinstance(p := partition.of(v), Split)]
    if splits:
        for index in range(len(op.operands)):
            _cut(op, index, splits[0], partition)
        partition.placement[op.result] = splits[0]


def _place_norm(op: Op, partition: Partition) -> None:
    placement = partition.of(op.operands[0])
    if isinstance(placement, Split) and placement.axis != tensor_type(op.operands[0]).rank - 1:
        partition.placement[op.result] = placement
    else:
        _whole(op, 0, partition)


def _place_rope(op: Op, partition: Partition) -> None:
    placement = partition.of(op.operands[0])
    if isinstance(placement, Split) and placement.axis == 2:
        partition.placement[op.result] = placement
    else:
        _whole(op, 0, partition)
    for index in (1, 2):
        _whole(op, index, partition)


def _place_reshape(op: Op, partition: Partition) -> None:
    placement = partition.of(op.operands[0])
    if isinstance(placement, Split):
        split = through_reshape(placement, tensor_type(op.operands[0]).dims, tensor_type(op.result).dims)
        if split is not None:
            partition.placement[op.result] = split
            return
    _whole(op, 0, partition)


def _place_append(op: Op, partition: Partition) -> None:
    cache = partition.of(op.operands[0])
    assert isinstance(cache, Split)
    _cut(op, 1, cache.along(2), partition)
    partition.placement[op.result] = cache


def _place_attention(op: Op, partition: Partition) -> None:
    assert isinstance(op, CachedAttention)
    queries = Split(2, even_ranges(len(op.kv_heads), partition.dies))
    _cut(op, 0, queries, partition)
    partition.placement[op.result] = queries


def _place_return(op: Op, partition: Partition) -> None:
    """Everything but the caches leaves whole."""
    for index, value in enumerate(op.operands):
        if not isinstance(value.op, Append):
            _whole(op, index, partition)


_RULES: Final[tuple[tuple[type | tuple[type, ...], Callable[[Op, Partition], None]], ...]] = (
    (LINEAR, _place_linear),
    (Embedding, _place_embedding),
    (ELEMENTWISE, _place_elementwise),
    (RmsNorm, _place_norm),
    (Rope, _place_rope),
    (Reshape, _place_reshape),
    (Append, _place_append),
    (CachedAttention, _place_attention),
    (Return, _place_return),
)
