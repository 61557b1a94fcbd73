"""Attention over the cache, and of vision towers: which queries are worked on at a time, and where.

For each piece of the queries (and each cache head, when all heads together do not fit) there is one loop over keys
(`attention_block.py`).  Attention of a vision tower sees both ways within segments and has no cache: its keys and values
are the layer's own, in DRAM, and the loop runs over a segment's rows.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import replace

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Area, Lowering, element_bytes, sram_range
from tyir.backends.edge10.lowering.ops.attention_block import Attending, AttentionBlock, head_runs
from tyir.backends.edge10.lowering.ops.stored_rows import stored_bytes
from tyir.backends.edge10.lowering.tiling import AttentionBlocks, attention_blocks, segment_blocks, spans
from tyir.backends.edge10.memory.allocate import SramPlan, align
from tyir.backends.edge10.memory.places import Scratch
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.kv import CachedAttention, DualChunkAttention, MergeAttention, SparseAttention
from tyir.dialects.ty import Attention, default_kv_heads, tensor_type
from tyir.ir import Value
from tyir.targets.machine import Machine
from tyir.types import f16, f32

__all__ = ["attention_scratch", "lower_attention", "lower_merge_attention"]


_Any = CachedAttention | SparseAttention | Attention


def _described(op: _Any) -> Attending:
    if isinstance(op, SparseAttention):
        return Attending(
            *(op.queries, op.k, op.v, op.out, op.scales, op.kv_heads, op.cache_heads, op.held),
            *("HND", op.scale, 0, op.softcap),
            temperature=op.temperature,
            sparse=op,
        )
    if isinstance(op, CachedAttention):
        known = Attending(
            *(op.queries, op.k, op.v, op.out, op.scales, op.kv_heads, op.cache_heads, op.held),
            *(op.layout, op.scale, op.window, op.softcap),
            blocks=op.token_blocks,
        )
        if isinstance(op, DualChunkAttention):
            return replace(known, step=op.step, temperature=op.temperature)
        return known
    _, rows, groups, _ = tensor_type(op.k).static_shape
    heads = default_kv_heads(tensor_type(op.q).static_shape[2], groups)
    return Attending(
        *((op.q,), op.k, op.v, op.out, (), heads, groups, rows, "NHD", op.scale, 0, op.softcap, (0, rows))
    )


def attention_scratch(
    op: _Any,
    arena: int,
    machine: Machine,
    plan: SramPlan,
    held: Collection[Value] = (),
) -> Scratch | None:
    """What the attention of many tokens takes of an arena beside its queries, whose place its result takes,
    unless it is a part that is to be merged; few tokens, and an arena with less room than the temporaries, do
    with these.
    """
    known = _described(op)
    room = arena - len(known.queries) * align(tensor_type(op.q).nbytes)
    apart = known.blocks is not None or known.sparse is not None  # of the queries' place
    room -= align(tensor_type(op.out).nbytes) if apart else 0
    if tensor_type(op.q).static_shape[1] <= machine.cube.rows or room <= 0:
        return None
    try:
        blocks = _blocks(known, room, machine, transfers=False, longest=_longest(op))
        found = Scratch(_bytes(known, blocks), 0)
        return found if found.sram_bytes > plan.temp_bytes else None
    except TyirError:
        return None


def lower_attention(op: _Any, lowering: Lowering, scratch: Area | None = None) -> None:
    """With the temporaries or, if its queries and result lie in SRAM, with `scratch`."""
    known = _described(op)
    area = Area(lowering.plan.temp, lowering.plan.temp_bytes)
    brought = isinstance(op, Attention) and _takes_their_place(known, lowering)
    if brought:
        known = replace(known, queries=(op.out,))
    in_sram = all(lowering.place(value).in_sram for value in (*known.queries, op.out))
    if scratch is not None and in_sram:
        area = scratch
    blocks = _blocks(known, area.nbytes, lowering.machine, transfers=not in_sram, longest=_longest(op))
    runs = head_runs(known.kv_heads)
    batch, tokens, *_ = tensor_type(op.q).static_shape
    parts = list(_parts(op, known, blocks.queries, tokens, lowering.first_token))
    for sequence in range(batch):
        for number, (part, first, count) in enumerate(parts):
            if brought:
                for _, row, rows in parts[number + 1 if number else 0 : number + 2]:
                    _bring_queries(op, lowering, sequence * tokens + row, rows)
            for members in [runs] if blocks.all_heads else [[r] for r in runs]:
                AttentionBlock(part, lowering, blocks, members, sequence, first, count, area.offset).lower()


def _parts(
    op: _Any, known: Attending, most: int, tokens: int, before: int
) -> Iterator[tuple[Attending, int, int]]:
    """The attention with the rows that some queries see, the first of these and their number; `before` rows
    of keys come before the first query.
    """
    if isinstance(op, (CachedAttention, SparseAttention)):
        yield from ((known, first, count) for first, count in spans(tokens, most))
        return
    for low, high in op.spans():
        begin, end = max(low - before, 0), min(high - before, tokens)
        for first, count in spans(max(end - begin, 0), most):
            yield replace(known, segment=(low, high)), begin + first, count


def _takes_their_place(op: Attending, lowering: Lowering) -> bool:
    """Whether a tower's queries lie in DRAM and its result in SRAM: rows of queries are then brought to where
    those of the result take their place, one part ahead of the part that is worked on, so that the cubes wait
    for the first alone.
    """
    return not lowering.place(op.queries[0]).in_sram and lowering.place(op.out).in_sram


def _bring_queries(op: _Any, lowering: Lowering, first: int, rows: int) -> None:
    *_, heads, dim = tensor_type(op.q).static_shape
    row = heads * dim * element_bytes(op.q)
    place = lowering.place(op.out).offset + first * row
    lowering.load_bytes(lowering.place(op.q).at(first * row), place, rows * row)


def lower_merge_attention(op: MergeAttention, lowering: Lowering) -> None:
    """`kv.merge_attention`: one vector command makes rows of attention of what all dies' keys come to."""
    *outer, width = tensor_type(op.parts).static_shape
    place, target = lowering.place(op.parts), lowering.place(op.out)
    row, made = width * 4, tensor_type(op.out).static_shape[-1] * 2
    spilled = (0 if place.in_sram else align(row)) + (0 if target.in_sram else align(made))
    for piece in lowering.pieces(math.prod(outer), spilled):
        source, out, temp = place.offset + piece.first * row, target.offset + piece.first * made, piece.temp
        if not place.in_sram:
            source, temp = temp, temp + align(piece.rows * row)
            lowering.load_bytes(place.at(piece.first * row), source, piece.rows * row)
        if not target.in_sram:
            out = temp
        lowering.emitter.emit(
            edge10.VectorOp,
            function="merge_attention",
            inputs=(source,),
            outputs=(out,),
            rows=piece.rows,
            cols=width,
            group=op.count,
            input_types=ArrayAttr([f32]),
            output_types=ArrayAttr([f16]),
            reads=[sram_range(source, piece.rows * row)],
            writes=[sram_range(out, piece.rows * made, write=True)],
        )
        if not target.in_sram:
            lowering.store_bytes(target.at(piece.first * made), out, piece.rows * made)


def _longest(op: _Any) -> int:
    """Rows of the longest segment; 0 where segments bound nothing."""
    return max(end - first for first, end in op.spans()) if isinstance(op, Attention) else 0


def _blocks(op: Attending, room: int, machine: Machine, *, transfers: bool, longest: int) -> AttentionBlocks:
    _, tokens, heads, dim = tensor_type(op.queries[0]).static_shape
    groups, largest = op.cache_heads, max(r.heads for r in head_runs(op.kv_heads))
    if longest:
        return segment_blocks(tokens, longest, heads, groups, dim, machine, room, transfers=transfers)
    return attention_blocks(
        *(tokens, heads, groups, dim, largest, machine, room),
        capacity=op.capacity,
        transfers=transfers,
        stored=stored_bytes((op.k, op.v), op.scales),
        rotations=len(op.queries),
        block=op.blocks.size if op.blocks is not None else None,
        listed=op.sparse.choice.block if op.sparse is not None else None,
        beside=_beside(op.sparse),
    )


def _beside(op: SparseAttention | None) -> tuple[int, ...]:
    """Bytes of what an attention to some blocks has beside others."""
    return () if op is None else tuple(tensor_type(v).nbytes for v in (op.blocks, op.totals, op.shares))


def _bytes(op: Attending, blocks: AttentionBlocks) -> int:
    """What the blocks take of SRAM, queries and result not counted."""
    _, _, heads, dim = tensor_type(op.queries[0]).static_shape
    heads, groups = (
        (heads, op.cache_heads) if blocks.all_heads else (max(r.heads for r in head_runs(op.kv_heads)), 1)
    )
    return sum(blocks.layout(heads, groups, dim, transfers=False).values())
