"""One rule per op: how it wants its operands placed, and where that leaves its result.  All steps of
partitioning ask here.

Placements are read from and written to the IR (`tyir.sharding` on ops and in `arg_attrs`), so each step is a
pass whose result can be printed and edited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from tyir.attributes import DenseArrayAttr, DictAttr
from tyir.dialects.dist import AllGather, AllReduce, CollectivePermute
from tyir.dialects.func import Func
from tyir.dialects.kv import Append, CachedAttention, DualChunkAttention, QuantizeRows
from tyir.dialects.ty import (
    Attention,
    Embedding,
    LayerNorm,
    Linear,
    QuantizedLinear,
    Reshape,
    RmsNorm,
    Rope,
    TopKCandidates,
    record_words,
    tensor_type,
)
from tyir.ir import Op, Value
from tyir.sharding import PARTIAL, REPLICATED, Placement, Split, from_attribute
from tyir.traits import Elementwise

__all__ = [
    "LINEAR",
    "Rule",
    "executing_dies",
    "holding_dies",
    "placement_of",
    "rule_for",
    "through_reshape",
]

Dims = Sequence[int | None]
LINEAR: Final = (Linear, QuantizedLinear)
Rule = tuple[list[Placement], Placement]  # what the operands must be, what the result then is


def placement_of(value: Value) -> Placement:
    """The placement written for a value; the results of an op share theirs."""
    if isinstance(value.owner, Op):
        return from_attribute(value.owner.attributes.get("tyir.sharding"))
    function = value.owner.parent_op
    return (
        from_attribute(function.arg_attr(value.index).get("tyir.sharding"))
        if isinstance(function, Func)
        else REPLICATED
    )


def executing_dies(op: Op) -> tuple[int, ...]:
    """The dies that execute an op; empty: all."""
    return _named_dies(op.attributes)


def holding_dies(value: Value) -> tuple[int, ...]:
    """The dies that have a value, whole or in part; empty: all."""
    if isinstance(value.owner, Op):
        return executing_dies(value.owner)
    function = value.owner.parent_op
    return _named_dies(function.arg_attr(value.index)) if isinstance(function, Func) else ()


def _named_dies(attributes: DictAttr) -> tuple[int, ...]:
    named = attributes.get("tyir.dies")
    return named.ints() if isinstance(named, DenseArrayAttr) else ()


def rule_for(op: Op) -> Rule:
    """The rule of an op whose operands' placements are known.

    An op without a rule of its own needs everything whole.
    """
    if op.has_trait(Elementwise):
        return _elementwise(op)
    for op_class, rule in _RULES:
        if isinstance(op, op_class):
            return rule(op)
    return [REPLICATED] * len(op.operands), REPLICATED


def _last_axis(value: Value) -> int:
    return tensor_type(value).rank - 1


def _linear(op: Op) -> Rule:
    """x cut along its channels: the weight's columns are cut alike and the result is an addend.

    Otherwise the annotation says how the weight's rows are cut, which takes all rows of x.  Without one the
    result is cut as the rows of x are, or these as it says.
    """
    x, asked = placement_of(op.operands[0]), placement_of(op.results[0])
    rest: list[Placement] = [REPLICATED] * (len(op.operands) - 1)
    if isinstance(x, Split) and x.axis == _last_axis(op.operands[0]):
        return [x, *rest], PARTIAL
    if isinstance(asked, Split) and asked.axis == _last_axis(op.results[0]):
        return [REPLICATED, *rest], asked
    if isinstance(x, Split):
        return [x, *rest], x
    return ([asked, *rest], asked) if isinstance(asked, Split) else ([REPLICATED, *rest], REPLICATED)


def _embedding(op: Op) -> Rule:
    """Rows of the vocabulary, if so annotated: each die looks up what it has, ids of other dies give
    zeros.
    """
    return [REPLICATED, REPLICATED], placement_of(op.results[0])


def _elementwise(op: Op) -> Rule:
    """Everything cut like the first operand that is cut."""
    splits = [p for v in op.operands if isinstance(p := placement_of(v), Split)]
    wanted: Placement = splits[0] if splits else REPLICATED
    return [wanted] * len(op.operands), wanted


def _norm(op: Op) -> Rule:
    """Any cut but one along the normalised axis, x's or that of the annotation; vectors that each head has of
    its own are cut alike.
    """
    last = _last_axis(op.operands[0])
    x = placement_of(op.operands[0])
    x = x if isinstance(x, Split) else placement_of(op.results[0])
    wanted: Placement = x if isinstance(x, Split) and x.axis != last else REPLICATED
    vectors: list[Placement] = [
        wanted.along(0)
        if isinstance(wanted, Split) and wanted.axis == last - 1 and tensor_type(v).rank == 2
        else REPLICATED
        for v in op.operands[1:]
    ]
    return [wanted, *vectors], wanted


def _rope(op: Op) -> Rule:
    """Heads (axis 2) may be cut, or rows (axis 1) and the angles with them."""
    x = placement_of(op.operands[0])
    wanted: Placement = x if isinstance(x, Split) and x.axis in (1, 2) else REPLICATED
    angles: Placement = wanted if isinstance(wanted, Split) and wanted.axis == 1 else REPLICATED
    return [wanted, angles, angles], wanted


def _reshape(op: Op) -> Rule:
    """A cut that can be seen on both sides of the reshape."""
    x = placement_of(op.operands[0])
    if isinstance(x, Split):
        out = through_reshape(x, tensor_type(op.operands[0]).dims, tensor_type(op.result).dims)
        if out is not None:
            return [x], out
    return [REPLICATED], REPLICATED


def _append(op: Op) -> Rule:
    """New rows are cut as the cache is."""
    cache = placement_of(op.operands[0])
    rows: Placement = cache.along(2) if isinstance(cache, Split) else REPLICATED
    return [cache, rows, REPLICATED], cache


def _attention(op: Op) -> Rule:
    """The die's query heads over its cache heads."""
    assert isinstance(op, CachedAttention)
    q = placement_of(op.q)
    caches = [placement_of(v) for v in (op.k, op.v)]
    if not isinstance(caches[0], Split):
        return [REPLICATED] * len(op.operands), REPLICATED
    far = [q, q, REPLICATED] if isinstance(op, DualChunkAttention) else []
    return [q, *caches, REPLICATED, *(placement_of(v) for v in op.scales), *far], q


def _attention_of_segments(op: Op) -> Rule:
    """The die's heads, queries as keys and values; or its rows, if they are whole segments, or all rows are
    one: that needs keys and values of all.
    """
    x = placement_of(op.operands[0])
    if isinstance(x, Split) and x.axis == 1:
        assert isinstance(op, Attention)
        if len(op.segments or ()) <= 2:
            return [x, REPLICATED, REPLICATED], x
        bounds = {low for low, size in x.ranges if size}
        return ([x] * 3, x) if bounds <= set(op.segments or ()) else ([REPLICATED] * 3, REPLICATED)
    one_each = len({tensor_type(v).dims[2] for v in op.operands}) == 1
    wanted: Placement = x if isinstance(x, Split) and x.axis == 2 and one_each else REPLICATED
    return [wanted] * 3, wanted


def _quantize_rows(op: Op) -> Rule:
    """Heads (axis 2 of the rows and of their scales) may be cut."""
    x = placement_of(op.operands[0])
    wanted: Placement = x if isinstance(x, Split) and x.axis == 2 else REPLICATED
    return [wanted], wanted


def _candidates(op: Op) -> Rule:
    """Each die the best of its columns: they lie side by side."""
    x = placement_of(op.operands[0])
    assert isinstance(op, TopKCandidates)
    if not isinstance(x, Split) or x.axis != _last_axis(op.x):
        return [REPLICATED], REPLICATED
    words = [record_words(count) for count in op.counts()]
    return [x], Split(_last_axis(op.out), tuple((sum(words[:die]), count) for die, count in enumerate(words)))


def _already_joined(op: Op) -> Rule:
    return [placement_of(v) for v in op.operands], REPLICATED


def through_reshape(split: Split, source: Dims, target: Dims) -> Split | None:
    """The same cut seen on the other side of a reshape that splits or joins axes at the cut one; None when it
    cannot be expressed.
    """
    axis = split.axis
    if tuple(source[:axis]) != tuple(target[:axis]) or axis >= len(target):
        return None
    before, after = source[axis], target[axis]
    if before is None or after is None:
        return None
    larger, smaller = max(before, after), min(before, after)
    ratio = larger // smaller
    if larger % smaller:
        return None
    if after >= before:
        return split.scaled(axis, ratio)
    return (
        split.scaled(axis, 1, ratio)
        if all(o % ratio == 0 and s % ratio == 0 for o, s in split.ranges)
        else None
    )


_RULES: Final[tuple[tuple[type | tuple[type, ...], Callable[[Op], Rule]], ...]] = (
    (LINEAR, _linear),
    (Embedding, _embedding),
    ((RmsNorm, LayerNorm), _norm),
    (Rope, _rope),
    (Reshape, _reshape),
    (QuantizeRows, _quantize_rows),
    (Append, _append),
    (CachedAttention, _attention),
    (Attention, _attention_of_segments),
    (TopKCandidates, _candidates),
    ((AllReduce, AllGather, CollectivePermute), _already_joined),
)
