"""Blocks of a function, which are split over dies or left whole: attention, MLPs, embedding and head, with what either
costs; and the groups of dies that execute them.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from tyir.attributes import StringAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.func import Func
from tyir.dialects.kv import Append, CachedAttention, QuantizeRows, head_axis
from tyir.dialects.ty import (
    Attention,
    Embedding,
    Linear,
    Norm,
    QuantizedLinear,
    Reshape,
    Rope,
    SelectRow,
    Softcap,
    TopK,
    record_words,
    tensor_type,
)
from tyir.execution.constexpr import ConstantExpressions
from tyir.ir import Op, Value
from tyir.layers import layer_of, path_of
from tyir.passes._placement import LINEAR, through_reshape
from tyir.passes._tokens_cut import TokenGroups
from tyir.passes._weight_times import weight_bytes, weight_ns
from tyir.sharding import (
    PARTIAL,
    Placement,
    Range,
    Split,
    even_ranges,
    head_ranges,
    vocabulary_ranges,
)
from tyir.targets.collectives import all_gather_ns, all_reduce_ns
from tyir.targets.machine import Machine
from tyir.traits import Elementwise
from tyir.types import f16

__all__ = ["Block", "DieGroup", "attention_block", "blocks_of", "rows_of", "stages_of"]


@dataclass
class Block:
    """Ops that are split together over `dies` dies: their cuts, the weights' bytes per unit of the cut, and
    what the joining collective moves for one token.
    """

    dies: int
    cuts: dict[Op, Placement] = field(default_factory=dict)
    caches: dict[Value, Placement] = field(default_factory=dict)
    # bytes, largest die's share, rows that are multiplied with them
    weights: list[tuple[int, float, int]] = field(default_factory=list)
    joined_bytes: int = 0
    gathers: bool = False  # the head's columns are gathered, everything else is reduced
    counted: set[Op] = field(default_factory=set)  # the ops whose weights these are
    normed: Op | None = None  # a norm over what would be cut: every die needs all of it
    attention: CachedAttention | None = None
    by_tokens: str = ""  # why its caches are cut by tokens, if they are

    def replicated_ns(self, machine: Machine) -> float:
        return sum(weight_ns(b, rows, machine) for b, _, rows in self.weights)

    def split_ns(self, machine: Machine) -> float:
        """The largest share of the weights, and a collective's latency and bytes."""
        share = sum(weight_ns(b * s, rows, machine) for b, s, rows in self.weights)
        if self.gathers:
            return share + all_gather_ns(1, [self.joined_bytes // self.dies] * self.dies, machine)
        return share + all_reduce_ns(self.joined_bytes, f16, self.dies, machine)

    def pin(self) -> str | None:
        found = {p.value for op in self.cuts if isinstance(p := op.attributes.get("tyir.pin"), StringAttr)}
        if len(found) > 1 or found - {"split", "replicated"}:
            raise TyirError(
                Diagnostic(
                    f"tyir.pin of {path_of(next(iter(self.cuts)))} is {' and '.join(sorted(found))}",
                    help='pin "split" or "replicated"',
                )
            )
        return next(iter(found), None)

    def add(self, op: Op, cut: Split) -> None:
        """A linear whose rows (or, for the consumer, columns) are cut."""
        total = max(offset + size for offset, size in cut.ranges)  # several dies may have the same
        share = max(s for _, s in cut.ranges) / max(total, 1)
        self.weights.append((weight_bytes(op), share, rows_of(op.results[0])))
        self.counted.add(op)


def blocks_of(function: Func, dies: int, stages: int) -> list[Block]:
    """The blocks of a function, in `stages` stages of `dies` dies in all."""
    constants = ConstantExpressions()
    group = stages_of(function, dies, stages)
    blocks = [attention_block(a, group(a)) for a in function.walk_type(CachedAttention)]
    blocks += [_tower_attention_block(a, group(a)) for a in function.walk_type(Attention)]
    taken = {op for block in blocks for op in block.cuts}
    for linear in [op for op in function.body if isinstance(op, LINEAR)]:
        sources = _gated_sources(linear.x, constants)
        if sources and linear not in taken and not taken & set(sources):
            blocks.append(_mlp_block(linear, group(linear)))
    lookups = [e for e in function.walk_type(Embedding) if not constants.is_constant(e.out)]
    blocks += [_embedding_block(e, dies) for e in lookups]
    result = _before_cap(next((value.op for value in function.body.terminator.operands), None))
    head = _before_cap(result.x.op) if isinstance(result, TopK) else result
    if isinstance(head, LINEAR) and head not in taken:
        blocks.append(_head_block(head, dies))
        if isinstance(result, TopK):
            blocks[-1].joined_bytes = 4 * record_words(result.k) * dies
    return blocks


def _before_cap(op: Op | None) -> Op | None:
    """What makes the values that a soft cap takes; the op itself when it is none."""
    return _before_cap(op.x.op) if isinstance(op, Softcap) else op


def stages_of(function: Func, dies: int, stages: int) -> Callable[[Op], DieGroup]:
    """Which dies share an op: those of its layer's stage, layers being dealt out evenly; all of them outside
    the layers.
    """
    layers = sorted({layer for op in function.body if (layer := layer_of(op)) is not None})
    if stages > max(len(layers), 1):
        fitting = [k for k in range(1, len(layers) + 1) if dies % k == 0]
        raise TyirError(
            f"pp={stages} stages for a decoder of {len(layers)} layers: every stage needs one",
            help=f"use pp={fitting[-1] if fitting else 1}",
        )
    shares = even_ranges(len(layers), stages)
    stage_of = {
        layer: next(s for s, (o, n) in enumerate(shares) if o <= i < o + n) for i, layer in enumerate(layers)
    }

    def group(op: Op) -> DieGroup:
        if isinstance(op, SelectRow) and op.x.op is not None:
            return group(op.x.op)  # the last stage selects: what it hands on is one row
        layer = layer_of(op)
        return (
            DieGroup(dies, 0, dies)
            if layer is None
            else DieGroup(dies, stage_of[layer] * (dies // stages), dies // stages)
        )

    return group


@dataclass(frozen=True)
class DieGroup:
    """`size` neighbouring dies of `total`, from die `first`."""

    total: int
    first: int
    size: int

    def ranges(self, units: int, unit: int = 1) -> tuple[Range, ...]:
        """An even cut over the group's dies; the others get nothing."""
        return self.placed(even_ranges(units, self.size, unit))

    def placed(self, own: tuple[Range, ...]) -> tuple[Range, ...]:
        """The group's ranges with those of the other dies, which get nothing."""
        return ((0, 0),) * self.first + own + ((0, 0),) * (self.total - self.first - self.size)


def attention_block(
    attention: CachedAttention, dies: DieGroup, by_tokens: TokenGroups | None = None
) -> Block:
    """Query heads inside the groups that read one key/value head; of those what a die's query heads read, or
    with caches that are cut by tokens those of its group of dies.
    """
    block = Block(dies.size, attention=attention)
    heads = attention.kv_heads
    if by_tokens is None:
        queries = dies.placed(head_ranges(heads, dies.size))
        groups = tuple((heads[o], heads[o + s - 1] - heads[o] + 1) if s else (0, 0) for o, s in queries)
    else:
        queries, groups = dies.placed(by_tokens.queries()), dies.placed(by_tokens.caches())
    _demand(attention.q, Split(2, queries), block)  # further rotations are of the same product
    for cache in (attention.k, attention.v, *attention.scales):
        append = cache.op
        assert isinstance(append, Append)
        if append.rows.index == 0:  # scales come from where the 8-bit rows come from
            _demand(append.rows, Split(2, groups), block)
        block.caches[append.cache] = Split(head_axis(append.layout), groups)
    _consumers(attention.out, Split(2, queries), block)
    return block


def _tower_attention_block(attention: Attention, dies: DieGroup) -> Block:
    """Heads evenly, of a tower's attention, where each has its own keys and values."""
    block = Block(dies.size)
    heads = Split(2, dies.ranges(tensor_type(attention.q).dims[2] or 0))
    for value in (attention.q, attention.k, attention.v):
        _demand(value, heads, block)
    _consumers(attention.out, heads, block)
    return block


def _mlp_block(down: Linear | QuantizedLinear, dies: DieGroup) -> Block:
    block = Block(dies.size)
    width = tensor_type(down.x).dims[-1] or 0
    unit = _mlp_unit(width, down.group_size if isinstance(down, QuantizedLinear) else 128, dies.size)
    split = Split(tensor_type(down.x).rank - 1, dies.ranges(width, unit))
    _demand(down.x, split, block)
    block.add(down, split)
    block.joined_bytes = _row_bytes(down.out)
    return block


def _embedding_block(embedding: Embedding, dies: int) -> Block:
    """The table is read one row a token, so what counts is its place in memory: it is split whenever
    something else is.
    """
    block = Block(dies, cuts={embedding: PARTIAL})
    block.joined_bytes = _row_bytes(embedding.out)
    rows = tensor_type(embedding.table).static_shape[0]
    share = max(s for _, s in vocabulary_ranges(rows, dies)) / rows
    block.weights.append((weight_bytes(embedding), share, 1))
    return block


def _head_block(head: Linear | QuantizedLinear, dies: int) -> Block:
    split = Split(
        tensor_type(head.out).rank - 1, vocabulary_ranges(tensor_type(head.out).dims[-1] or 0, dies)
    )
    block = Block(dies, cuts={head: split}, gathers=True)
    block.add(head, split)
    block.joined_bytes = _row_bytes(head.out)
    return block


def _mlp_unit(width: int, group_size: int, dies: int) -> int:
    """The granule of an MLP cut: whole quantisation groups where there is one for every die, else the largest
    halving of them that gives one.
    """
    unit = math.gcd(width, group_size)
    while width // unit < dies and unit % 2 == 0 and unit > 16:
        unit //= 2
    return unit


def rows_of(value: Value) -> int:
    """Rows of a value: one token's where the length is not known, all patches of a vision tower."""
    t = tensor_type(value)
    return math.prod(d or 1 for d in t.dims[:-1]) if t.is_static else 1


def _row_bytes(value: Value) -> int:
    """Bytes of those rows."""
    t = tensor_type(value)
    return t.with_shape([rows_of(value), t.dims[-1]]).nbytes


def _demand(value: Value, split: Split, block: Block) -> None:
    """Ask for a value cut this way: followed back to the linears that can produce it so."""
    op = value.op
    if isinstance(op, LINEAR):
        if split.axis == tensor_type(op.out).rank - 1:
            block.cuts[op] = split
            block.add(op, split)
    elif isinstance(op, QuantizeRows):
        _demand(op.rows, split, block)
    elif isinstance(op, Rope) or (isinstance(op, Norm) and split.axis != tensor_type(op.x).rank - 1):
        _demand(op.x, split, block)
    elif isinstance(op, Norm):
        block.normed = op
    elif isinstance(op, Reshape):
        if (back := through_reshape(split, tensor_type(op.out).dims, tensor_type(op.x).dims)) is not None:
            _demand(op.x, back, block)
    elif op is not None and op.has_trait(Elementwise):
        for operand in op.operands:
            _demand(operand, split, block)


def _consumers(value: Value, split: Split, block: Block) -> None:
    """The linears that take the cut value as addends, for their bytes."""
    for user in value.users:
        if isinstance(user, Reshape):
            after = through_reshape(split, tensor_type(user.x).dims, tensor_type(user.out).dims)
            if after is not None:
                _consumers(user.out, after, block)
        elif isinstance(user, LINEAR):
            block.add(user, split)
            block.joined_bytes = _row_bytes(user.out)


def _gated_sources(value: Value, constants: ConstantExpressions) -> list[Op]:
    """The linears that feed a value through elementwise ops only; empty when it has other sources or none."""
    op = value.op
    if isinstance(op, LINEAR):
        return [op]
    if op is None or not op.has_trait(Elementwise):
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
