"""The cache: appending rows, rows of the rotary tables, embedding rows, the row that a step's results are of.

Everything whose address depends on the position, on token ids or on a number of the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Collection

from tyir.artifacts.token_blocks import TokenBlocks
from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Lowering, Place, element_bytes, sram_range
from tyir.backends.edge10.lowering.emitter import Emitter
from tyir.backends.edge10.lowering.ops.stored_rows import row_bytes
from tyir.backends.edge10.memory.allocate import SramPlan, align
from tyir.backends.edge10.memory.places import Scratch, root
from tyir.dialects import edge10
from tyir.dialects.func import Call
from tyir.dialects.kv import Append, QuantizeGroups, QuantizeRows, Rows, TakeRows
from tyir.dialects.ty import Embedding, SelectRow, tensor_type
from tyir.ir import Value
from tyir.targets.machine import Machine
from tyir.types import f16

__all__ = [
    "lower_append",
    "lower_embedding",
    "lower_quantize_rows",
    "lower_rows",
    "lower_select_row",
    "lower_take_rows",
    "rows_before",
    "selection_scratch",
]


def lower_append(op: Append, lowering: Lowering) -> None:
    """`kv.append`: rows [b, s, G, D] (or [b, s, G]) to positions pos.. of each sequence's cache; what lies
    beyond the capacity is dropped, and of a cache that is cut by tokens what belongs to other dies.
    """
    batch, tokens, groups, *dim = tensor_type(op.rows).static_shape
    capacity = op.held
    row = math.prod(dim) * element_bytes(op.rows)
    for sequence in range(batch):
        source, cache = (
            lowering.place(op.rows).at(sequence * tokens * groups * row),
            lowering.place(op.cache).at(sequence * groups * capacity * row),
        )
        sizes = (tokens, groups, capacity, row)
        if op.layout == "NHD":  # all heads of a token are one row
            sizes = (tokens, 1, capacity, groups * row)
        if (blocks := op.token_blocks) is None:
            _append(source, cache, sequence, sizes, lowering)
        elif tokens == 1:
            _append_own(source, cache, sequence, sizes, blocks, lowering)
        else:
            for number in range(1 + (tokens + blocks.size - 2) // (blocks.count * blocks.size)):
                _append_run(source, cache, sequence, sizes, blocks, number, lowering)


def _append(
    source: Place, cache: Place, sequence: int, sizes: tuple[int, int, int, int], lowering: Lowering
) -> None:
    """One sequence: `sizes` are tokens, heads, positions of the cache, and bytes of a row."""
    tokens, groups, capacity, row = sizes
    emitter, pos = lowering.emitter, lowering.position(sequence)
    for piece in lowering.pieces(tokens, 0 if source.in_sram else groups * row):
        sram = source.offset + piece.first * groups * row
        if not source.in_sram:
            sram = piece.temp
            lowering.load_bytes(source.at(piece.first * groups * row), sram, piece.rows * groups * row)
        count = emitter.affine([pos], [-1], capacity - piece.first, high=piece.rows)
        first = emitter.affine([pos], [1], piece.first)
        _store_rows(sram, cache, first, count, piece.rows, sizes, lowering)


def rows_before(emitter: Emitter, blocks: TokenBlocks, position: Value, held: int) -> Value:
    """How many of the `held` rows of a cache that is cut by tokens hold positions below this one."""
    turn = blocks.count * blocks.size
    turns = emitter.affine([position], [1], divisor=turn)
    rest = emitter.affine([position, turns], [1, -turn], -blocks.number * blocks.size, high=blocks.size)
    return emitter.affine([turns, rest], [blocks.size, 1], high=held)


def _append_own(
    source: Place,
    cache: Place,
    sequence: int,
    sizes: tuple[int, int, int, int],
    blocks: TokenBlocks,
    lowering: Lowering,
) -> None:
    """One token's rows, where the position is the die's; nothing is stored where it is not."""
    _, groups, held, row = sizes
    emitter, pos, sram = lowering.emitter, lowering.position(sequence), source.offset
    if not source.in_sram:
        sram = lowering.plan.temp
        lowering.load_bytes(source, sram, groups * row)
    first = rows_before(emitter, blocks, pos, held)
    end = rows_before(emitter, blocks, emitter.affine([pos], [1], 1), held)
    count = emitter.affine([end, first], [1, -1])
    _store_rows(sram, cache, first, count, 1, sizes, lowering)


def _append_run(
    source: Place,
    cache: Place,
    sequence: int,
    sizes: tuple[int, int, int, int],
    blocks: TokenBlocks,
    number: int,
    lowering: Lowering,
) -> None:
    """Of a step's rows, which lie in DRAM, those of the `number`-th block of the die's that they reach into:
    which of them that are is known by the position only, and an address in DRAM can follow it.
    """
    tokens, groups, held, row = sizes
    assert not source.in_sram, "assign_places keeps them in DRAM"
    emitter, pos, size = lowering.emitter, lowering.position(sequence), blocks.size
    turn, start = blocks.count * size, blocks.number * size
    # The first block that does not end before pos.
    block = emitter.affine([pos], [1], turn - start - size, divisor=turn)
    first, end = (
        emitter.affine([block, pos], [turn, -1], number * turn + start + after, high=tokens)
        for after in (0, size)
    )
    into = emitter.affine([pos, block], [1, -turn], -number * turn - start)  # rows of the block before pos
    for piece in lowering.pieces(min(tokens, size), groups * row):
        token = emitter.affine([first], [1], piece.first, high=tokens)
        to = emitter.affine([block, into], [size, 1], number * size + piece.first, high=held)
        last = emitter.affine([to, end, token], [1, 1, -1], high=held)
        count = emitter.affine([last, to], [1, -1], high=piece.rows)
        emitter.emit(
            edge10.Load,
            emitter.offset(lowering.address(source), token, groups * row),
            count,
            offset=source.offset,
            sram=piece.temp,
            shape=(1, edge10.DYNAMIC, groups * row),
            dram_strides=(0, groups * row),
            sram_strides=(0, groups * row),
            queue="eidma",
            reads=source.access(tokens * groups * row, write=False),
            writes=[sram_range(piece.temp, piece.rows * groups * row, write=True)],
        )
        _store_rows(piece.temp, cache, to, count, piece.rows, sizes, lowering)


def _store_rows(
    sram: int,
    cache: Place,
    first: Value,
    count: Value,
    most: int,
    sizes: tuple[int, int, int, int],
    lowering: Lowering,
) -> None:
    """`count` tokens' rows to rows `first`.. of each head of a cache."""
    _, groups, held, row = sizes
    emitter = lowering.emitter
    emitter.emit(
        edge10.Store,
        emitter.offset(lowering.address(cache), first, row),
        count,
        offset=cache.offset,
        sram=sram,
        shape=(groups, edge10.DYNAMIC, row),
        dram_strides=(held * row, row),
        sram_strides=(row, groups * row),
        reads=[sram_range(sram, most * groups * row)],
        writes=cache.access(groups * held * row, write=True),
    )


def lower_quantize_rows(op: QuantizeRows, lowering: Lowering) -> None:
    """`kv.quantize_rows` and `kv.quantize_groups`: one vector command makes the rows and their scales."""
    *outer, dim = tensor_type(op.rows).static_shape
    values, grouped = (op.rows, op.q, op.scales), isinstance(op, QuantizeGroups)
    parts = [(lowering.place(v), row_bytes(v)) for v in values]
    spilled = sum(align(size) for place, size in parts if not place.in_sram)
    for piece in lowering.pieces(math.prod(outer), spilled):
        offsets, temp = [], piece.temp
        for place, size in parts:
            offsets.append(place.offset + piece.first * size if place.in_sram else temp)
            temp += 0 if place.in_sram else align(piece.rows * size)
        source, *targets = (
            sram_range(offset, piece.rows * size, write=n > 0)
            for n, (offset, (_, size)) in enumerate(zip(offsets, parts))
        )
        if not parts[0][0].in_sram:
            lowering.load_bytes(parts[0][0].at(piece.first * dim * 2), offsets[0], piece.rows * dim * 2)
        lowering.emitter.emit(
            edge10.VectorOp,
            function="quantize_groups" if grouped else "quantize_rows",
            inputs=(offsets[0],),
            outputs=tuple(offsets[1:]),
            rows=piece.rows,
            cols=dim,
            input_types=ArrayAttr([f16]),
            group=dim // tensor_type(op.scales).static_shape[-1] if grouped else 1,
            output_types=ArrayAttr([tensor_type(v).element for v in values[1:]]),
            reads=[source],
            writes=targets,
        )
        for offset, (place, size) in zip(offsets[1:], parts[1:]):
            if not place.in_sram:
                lowering.store_bytes(place.at(piece.first * size), offset, piece.rows * size)


def lower_rows(op: Rows, lowering: Lowering) -> None:
    """`kv.rows`: rows pos.. of a table, for each sequence."""
    batch, tokens, _ = tensor_type(op.out).static_shape
    table_rows = tensor_type(op.table).static_shape[0]
    row = tensor_type(op.table).nbytes // table_rows
    table = lowering.place(op.table)
    for sequence in range(batch):
        target = lowering.place(op.out).at(sequence * tokens * row)
        for piece in lowering.pieces(tokens, 0 if target.in_sram else row):
            sram = target.offset + piece.first * row if target.in_sram else piece.temp
            lowering.emitter.emit(
                edge10.Gather,
                lowering.address(table),
                index="position",
                first=piece.first,
                sram=sram,
                rows=piece.rows,
                row_bytes=row,
                table_rows=table_rows,
                offset=table.offset,
                sequence=sequence,
                modulo=op.modulo,
                shift=op.offset,
                writes=[sram_range(sram, piece.rows * row, write=True)],
            )
            if not target.in_sram:
                lowering.store_bytes(target.at(piece.first * row), sram, piece.rows * row)


def lower_embedding(op: Embedding, lowering: Lowering) -> None:
    """`ty.embedding`: rows by token id."""
    _lower_numbered(op.table, op.ids, op.out, op.offset, lowering)


def lower_take_rows(op: TakeRows, lowering: Lowering) -> None:
    """`kv.take_rows`: rows by their numbers."""
    _lower_numbered(op.table, op.rows, op.out, 0, lowering)


def _lower_numbered(of: Value, numbers: Value, out: Value, first: int, lowering: Lowering) -> None:
    """Rows of a table whose first has the number `first`; the numbers come to SRAM first."""
    table, source, target = lowering.place(of), lowering.place(numbers), lowering.place(out)
    table_rows = tensor_type(of).static_shape[0]
    row = tensor_type(of).nbytes // table_rows
    rows = math.prod(tensor_type(numbers).static_shape)
    for piece in lowering.pieces(rows, 0 if target.in_sram else row + 2 * align(4)):
        ids = source.offset + piece.first * 4 if source.in_sram else piece.temp
        if not source.in_sram:
            lowering.load_bytes(source.at(piece.first * 4), ids, piece.rows * 4)
        sram = target.offset + piece.first * row if target.in_sram else piece.temp + align(piece.rows * 4)
        lowering.emitter.emit(
            edge10.Gather,
            lowering.address(table),
            index="ids",
            ids=ids,
            first=first,
            sram=sram,
            rows=piece.rows,
            row_bytes=row,
            table_rows=table_rows,
            offset=table.offset,
            reads=[sram_range(ids, piece.rows * 4)],
            writes=[sram_range(sram, piece.rows * row, write=True)],
        )
        if not target.in_sram:
            lowering.store_bytes(target.at(piece.first * row), sram, piece.rows * row)


def selection_scratch(
    op: SelectRow, arena: int, machine: Machine, plan: SramPlan, held: Collection[Value] = ()
) -> Scratch:
    """Room in SRAM for the rows' numbers, and in DRAM for an x that may lie in SRAM: gathers read DRAM."""
    source = root(op.x)
    in_dram = isinstance(source.op, Call) and source not in held  # where layers hand it over
    return Scratch(tensor_type(op.row).nbytes, 0 if in_dram else tensor_type(op.x).nbytes)


def lower_select_row(op: SelectRow, lowering: Lowering, scratch: tuple[int, Place]) -> None:
    """`ty.select_row`: of each sequence's rows the one whose number is given, as a table's row is; `scratch`
    is where that lies in SRAM and in DRAM that `selection_scratch` asks for.
    """
    numbers, copy = scratch
    batch, rows, *_ = tensor_type(op.x).static_shape
    row = tensor_type(op.out).nbytes // batch
    source, target = lowering.place(op.x), lowering.place(op.out)
    if source.in_sram:
        lowering.store_bytes(copy, source.offset, tensor_type(op.x).nbytes)
        source = copy
    lowering.move(lowering.place(op.row), Place("sram", numbers), tensor_type(op.row).nbytes)
    for sequence in range(batch):
        of_sequence, result = source.at(sequence * rows * row), target.at(sequence * row)
        for piece in lowering.pieces(1, 0 if target.in_sram else row):
            sram = result.offset if target.in_sram else piece.temp
            lowering.emitter.emit(
                edge10.Gather,
                lowering.address(of_sequence),
                index="ids",
                ids=numbers + sequence * 4,
                sram=sram,
                rows=1,
                row_bytes=row,
                table_rows=rows,
                offset=of_sequence.offset,
                reads=[sram_range(numbers + sequence * 4, 4), *of_sequence.access(rows * row, write=False)],
                writes=[sram_range(sram, row, write=True)],
            )
            if not target.in_sram:
                lowering.store_bytes(result, sram, row)
