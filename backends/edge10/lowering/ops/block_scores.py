"""Which blocks of the cache a prompt's step sees: what sampled queries see in all of them (`kv.block_scores`), and the
blocks with most of it (`kv.pick_blocks`); and state that is overwritten (`kv.replace`).

    for each cache head, each range of keys, and each block of it:
        load K;  for each strip of samples:  scores = q K^T (cube, drain);  score_block -> a number for each row;  store them
    for each cache head:
        load these numbers by pieces;  block_weights -> a weight for each block and range;  top_k -> the list of each range

A block's numbers go to DRAM, where they lie by blocks: which block it is follows the turn of the loop, and only an address
in DRAM can.  They are some hundred bytes to a block of 64 KiB.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final

from tyir.artifacts.sparse_prefill import QUARTER
from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Area, Lowering, Place, acc_range, sram_range
from tyir.backends.edge10.lowering.dependences import ACC, Slot, Tracker
from tyir.backends.edge10.lowering.emitter import Emitter
from tyir.backends.edge10.lowering.ops.attention_block import (
    HeadRun,
    between,
    chunk_starts,
    head_runs,
    in_turn,
)
from tyir.backends.edge10.lowering.ops.stored_rows import emit_dequant_rows, row_bytes
from tyir.backends.edge10.lowering.tiling import accumulator_bytes, spans
from tyir.backends.edge10.memory.allocate import SramPlan, align
from tyir.backends.edge10.memory.places import Scratch
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.kv import LOWEST, BlockScores, PickBlocks, Replace
from tyir.dialects.ty import tensor_type
from tyir.ir import Value
from tyir.targets.machine import Machine
from tyir.types import f32

__all__ = [
    "lower_block_scores",
    "lower_pick_blocks",
    "lower_replace",
    "pick_scratch",
    "score_scratch",
]

_DEPTHS: Final = ((4, 3), (3, 3), (3, 2), (2, 2), (1, 2), (1, 1))  # blocks of keys, and of scores, in SRAM
_PIECE: Final = 64 << 10  # bytes of the numbers of some blocks that are worth a transfer


@dataclass(frozen=True)
class _Strips:
    """How samples meet a block of `keys` keys: `count` samples at a time, `columns` keys to a product; a turn
    has `sets` blocks, and `buffers` of scores.
    """

    count: int
    columns: int
    sets: int
    buffers: int

    def layout(self, op: BlockScores, heads: int, *, transfers: bool) -> dict[str, int]:
        """Bytes of each temporary for a cache head's `heads` query heads."""
        _, tokens, _, dim = tensor_type(op.q).static_shape
        samples, keys = op.choice.samples(tokens), op.choice.block
        sizes = {f"k{number}": align(keys * dim * 2) for number in range(self.sets)}
        if op.scales:
            row, scales = row_bytes(op.k), row_bytes(op.scales[0])
            sizes |= {"k_q": align(keys * row), "k_scales": align(keys * scales)}
        rows = self.count * heads
        for number in range(self.buffers):
            sizes |= {f"scores{number}": align(rows * keys * 4), f"seen{number}": align(rows * 4)}
        sizes |= {"total": align(samples * heads * 4), "temperature": align(4)}
        if transfers:
            sizes |= {f"q{n}": align(samples * heads * dim * 2) for n in range(len(op.queries))}
        return sizes


def _strips(op: BlockScores, room: int, machine: Machine, *, transfers: bool) -> _Strips:
    """The largest strips that fit, in as many buffers as do; `TyirError` when none do."""
    tokens = tensor_type(op.q).static_shape[1]
    samples, most = op.choice.samples(tokens), max(r.heads for r in head_runs(op.kv_heads))
    unit = machine.cube.columns
    for parts in range(1, samples + 1):
        count = -(-samples // parts)
        columns = machine.accumulator_bytes // 2 // accumulator_bytes(count * most, unit, machine) * unit
        if columns < unit:
            continue
        pieces = -(-op.choice.block // columns)
        columns = align(-(-op.choice.block // pieces), unit)
        for sets, buffers in _DEPTHS:
            found = _Strips(count, columns, sets, buffers)
            if sum(found.layout(op, most, transfers=transfers).values()) <= room:
                return found
    raise TyirError(
        f"the scores of a sampled query's {most} heads with {op.choice.block} keys do not fit {room} bytes of"
        " SRAM",
        help="use a smaller block= of --sparse-prefill",
    )


def score_scratch(
    op: BlockScores, arena: int, machine: Machine, plan: SramPlan, held: Collection[Value] = ()
) -> Scratch | None:
    """Room in the arena beside the queries, where that is more than the temporaries have."""
    room = arena - len(op.queries) * align(tensor_type(op.q).nbytes)
    try:
        strips = _strips(op, room, machine, transfers=False)
    except TyirError:
        return None
    most = max(r.heads for r in head_runs(op.kv_heads))
    found = sum(strips.layout(op, most, transfers=False).values())
    return Scratch(found, 0) if found > plan.temp_bytes else None


def lower_block_scores(op: BlockScores, lowering: Lowering, scratch: Area | None = None) -> None:
    """`kv.block_scores`, with the temporaries or, if its queries lie in SRAM, with `scratch`."""
    in_sram = all(lowering.place(value).in_sram for value in op.queries)
    area = scratch if scratch is not None and in_sram else None
    area = area or Area(lowering.plan.temp, lowering.plan.temp_bytes)
    strips = _strips(op, area.nbytes, lowering.machine, transfers=not in_sram)
    for run in head_runs(op.kv_heads):
        _Scoring(op, lowering, strips, run, area.offset, transfers=not in_sram).lower()


class _Scoring:
    """One cache head's keys with the samples of its query heads; temporaries from `start` on."""

    def __init__(
        self,
        op: BlockScores,
        lowering: Lowering,
        strips: _Strips,
        run: HeadRun,
        start: int,
        *,
        transfers: bool,
    ) -> None:
        self.op, self.lowering, self.strips, self.run, self.transfers = op, lowering, strips, run, transfers
        _, tokens, self.heads, self.dim = tensor_type(op.q).static_shape
        self.keys, self.every = op.choice.block, op.choice.every
        self.samples, self.tokens = op.choice.samples(tokens), tokens
        self.at: dict[str, int] = {}
        for name, size in strips.layout(op, run.heads, transfers=transfers).items():
            self.at[name] = start
            start += size
        self.end = start
        part = accumulator_bytes(strips.count * run.heads, strips.columns, lowering.machine)
        count = min(4, lowering.machine.accumulator_bytes // part)
        self.parts = [Slot(n * part, (n + 1) * part, ACC) for n in range(count)]
        self.turn = 0  # counts the products of a turn of the loop

    def lower(self) -> None:
        lowering, emitter = self.lowering, self.lowering.emitter
        queries = [self._queries(number) for number in range(len(self.op.queries))]
        if self.op.temperature is not None:
            place = lowering.place(self.op.temperature)
            lowering.load_bytes(place, self.at["temperature"], 4, queue="ebdma")
        nbytes = self.samples * self.run.heads * 4
        emitter.emit(
            edge10.VectorOp,
            function="fill",
            inputs=(),
            outputs=(self.at["total"],),
            rows=1,
            cols=nbytes // 4,
            constant=LOWEST,
            input_types=ArrayAttr([]),
            output_types=ArrayAttr([f32]),
            writes=[sram_range(self.at["total"], nbytes, write=True)],
        )
        visible = emitter.affine([lowering.position(0)], [1], self.tokens, high=self.op.held)
        if self.op.step is None:
            self._loop(queries[0], 0, visible)
        else:
            own, last = chunk_starts(emitter, emitter.position(0), self.op.step)
            for number, low, high in ((2, 0, last), (1, last, own), (0, own, visible)):
                self._loop(queries[number], low, high)
        self._give_totals()

    def _queries(self, number: int) -> tuple[int, tuple[int, int]]:
        """Offset in SRAM of the first sample of a rotation, and the strides [sample, head]."""
        place, row = self.lowering.place(self.op.queries[number]), self.dim * 2
        place, stride = place.at(self.run.first * row), self.every * self.heads * row
        if place.in_sram:
            return place.offset, (stride, row)
        target, heads = self.at[f"q{number}"], self.run.heads * row
        self.lowering.load(place, target, (1, self.samples, heads), dram_strides=(0, stride))
        return target, (heads, row)

    def _give_totals(self) -> None:
        """To their columns of the result."""
        place, heads = self.lowering.place(self.op.totals).at(self.run.first * 4), self.run.heads
        source, nbytes = self.at["total"], self.samples * heads * 4
        if not place.in_sram:
            self.lowering.store(place, source, (1, self.samples, heads * 4), dram_strides=(0, self.heads * 4))
            return
        extent = (self.samples - 1) * self.heads * 4 + heads * 4
        self.lowering.emitter.emit(
            edge10.VectorOp,
            function="copy",
            inputs=(source,),
            outputs=(place.offset,),
            rows=self.samples,
            cols=heads,
            output_strides=(self.heads * 4, 0),
            input_types=ArrayAttr([f32]),
            output_types=ArrayAttr([f32]),
            reads=[sram_range(source, nbytes)],
            writes=[sram_range(place.offset, extent, write=True)],
        )

    # -- the loop over a range of keys
    # ---------------------------------------------------------------------------------
    def _loop(self, queries: tuple[int, tuple[int, int]], low: Value | int, high: Value) -> None:
        outer, rows = self.lowering.emitter, self.keys * self.strips.sets
        first = [] if isinstance(low, int) else [low]
        turns = outer.affine([high, *first], [1, *[-1] * len(first)], rows - 1, divisor=rows)
        slots = [*self._slots()]
        body = Emitter.body(len(slots) + 1)
        index, *tokens = body.args
        inner = Tracker(slots, tokens[:-1], tokens[-1], self._cache_tokens(outer))
        self.lowering.emitter = emitter = outer.nested(body, inner, max(1, self.op.held // 2 // rows))
        try:
            self.turn = 0
            for number in range(self.strips.sets):
                begin = emitter.affine([index, *first], [rows, *[1] * len(first)], number * self.keys)
                self._block(number, queries, begin, high)
            carried, rest = inner.finish()
            body.append(edge10.Yield(tokens=tuple(emitter.join(t) for t in (*carried, rest))))
        finally:
            self.lowering.emitter = outer
        outer.loop(outer.affine([], []), turns, body, inner)

    def _slots(self) -> Iterator[Slot]:
        """What is handed from turn to turn by tokens of its own."""
        ends = [*list(self.at.values())[1:], self.end]
        yield from (Slot(low, high) for low, high in zip(self.at.values(), ends) if low < high)
        yield from self.parts
        place = self.lowering.place(self.op.scores)  # or each turn's products would wait for the last stores
        yield Slot(place.offset, place.offset + tensor_type(self.op.scores).nbytes, place.base)

    def _cache_tokens(self, outer: Emitter) -> dict[str | Value, Value]:
        """The cache as the loop finds it: its blocks need not wait for the queries."""
        found: dict[str | Value, Value] = {}
        for value in (self.op.k, *self.op.scales):
            place = self.lowering.place(value)
            waits = outer.tracker.waits(place.access(tensor_type(value).nbytes, write=False), None)
            found[place.base] = outer.join(waits)
        return found

    def _block(self, number: int, queries: tuple[int, tuple[int, int]], first: Value, high: Value) -> None:
        emitter = self.lowering.emitter
        keys = emitter.affine([high, first], [1, -1], high=self.keys)
        self._load(number, first, keys)
        strips = list(spans(self.samples, self.strips.count))
        buffers = in_turn(self.strips.sets * len(strips), self.strips.buffers)
        for strip, (sample, count) in enumerate(strips):
            buffer = buffers[number * len(strips) + strip]
            scores, seen = self.at[f"scores{buffer}"], self.at[f"seen{buffer}"]
            self._products(f"k{number}", queries, (sample, count), keys, scores)
            rows = count * self.run.heads
            total, heat = self.at["total"] + sample * self.run.heads * 4, None
            if self.op.temperature is not None:
                heat = self.at["temperature"]
            emitter.emit(
                edge10.ScoreBlock,
                keys,
                first,
                scores=scores,
                score_stride=self.keys * 4,
                out=seen,
                total=total,
                rows=rows,
                heads=self.run.heads,
                first_query=self.lowering.first_token + sample * self.every,
                every=self.every,
                scale=self.op.scale,
                softcap=self.op.softcap,
                temperature=heat,
                reads=[
                    sram_range(scores, rows * self.keys * 4),
                    sram_range(total, rows * 4),
                    *([] if heat is None else [sram_range(heat, 4)]),
                ],
                writes=[sram_range(seen, rows * 4, write=True), sram_range(total, rows * 4, write=True)],
            )
            self._store(seen, (sample, count), first, keys)

    def _load(self, number: int, first: Value, keys: Value) -> None:
        """A block of keys as f16."""
        op, target, row = self.op, self.at[f"k{number}"], self.dim * 2
        if not op.scales:
            self._load_rows(op.k, target, row, "eidma", first, keys)
            return
        q, scales = self.at["k_q"], self.at["k_scales"]
        self._load_rows(op.k, q, row_bytes(op.k), "eidma", first, keys)
        self._load_rows(op.scales[0], scales, row_bytes(op.scales[0]), "ebdma", first, keys)
        places, stored = (q, scales, target), (op.k, op.scales[0])
        emit_dequant_rows(self.lowering.emitter, keys, places, stored, (1, self.keys), self.dim)

    def _load_rows(self, value: Value, sram: int, row: int, queue: str, first: Value, keys: Value) -> None:
        emitter, cache = self.lowering.emitter, self.lowering.place(value)
        before = self.run.group * self.op.held * row
        emitter.emit(
            edge10.Load,
            emitter.offset(self.lowering.address(cache), first, row),
            keys,
            offset=cache.offset + before,
            sram=sram,
            shape=(1, edge10.DYNAMIC, row),
            dram_strides=(self.op.held * row, row),
            sram_strides=(self.keys * row, row),
            queue=queue,
            reads=cache.access(before + self.op.held * row, write=False),
            writes=[sram_range(sram, self.keys * row, write=True)],
        )

    def _products(
        self,
        block: str,
        queries: tuple[int, tuple[int, int]],
        samples: tuple[int, int],
        keys: Value,
        scores: int,
    ) -> None:
        """scores = q K^T of some samples [first, number], some keys at a time."""
        (first, count), (lhs, strides), emitter = samples, queries, self.lowering.emitter
        heads, row = self.run.heads, self.dim * 2
        lhs += first * strides[0]
        for column, columns in spans(self.keys, self.strips.columns):
            part = self.parts[self.turn % len(self.parts)]
            self.turn += 1
            here = emitter.affine([keys], [1], -column, high=columns) if columns < self.keys else keys
            rhs, width = self.at[block] + column * row, align(columns, self.lowering.machine.cube.columns) * 4
            whole = acc_range(part.low, count * heads * width, write=True)
            emitter.emit(
                edge10.Matmul,
                here,
                lhs=lhs,
                lhs_strides=strides,
                rhs=rhs,
                rhs_stride=row,
                transposed=True,
                acc=part.low,
                acc_stride=width,
                m=(count, heads),
                n=edge10.DYNAMIC,
                k=self.dim,
                reads=[
                    sram_range(lhs, (count - 1) * strides[0] + (heads - 1) * strides[1] + row),
                    sram_range(rhs, columns * row),
                ],
                writes=[whole],
            )
            target, target_row = scores + column * 4, self.keys * 4
            emitter.emit(
                edge10.Drain,
                here,
                acc=part.low,
                acc_stride=width,
                m=(count, heads),
                n=edge10.DYNAMIC,
                sram=target,
                sram_strides=(heads * target_row, target_row),
                element=f32,
                reads=[acc_range(part.low, count * heads * width)],
                writes=[sram_range(target, (count * heads - 1) * target_row + columns * 4, write=True)],
            )

    def _store(self, seen: int, samples: tuple[int, int], first: Value, keys: Value) -> None:
        """A strip's numbers of a block to where they lie in DRAM; nothing of a block that has no keys."""
        (sample, count), emitter = samples, self.lowering.emitter
        place, heads = self.lowering.place(self.op.scores), self.run.heads
        assert not place.in_sram, "assign_places keeps them in DRAM"
        block = emitter.affine([first], [1], divisor=self.keys)
        planes = self.samples * self.heads * 4
        emitter.emit(
            edge10.Store,
            emitter.offset(self.lowering.address(place), block, planes),
            emitter.affine([keys], [count], high=count),
            offset=place.offset + (sample * self.heads + self.run.first) * 4,
            sram=seen,
            shape=(1, edge10.DYNAMIC, heads * 4),
            dram_strides=(planes, self.heads * 4),
            sram_strides=(count * heads * 4, heads * 4),
            reads=[sram_range(seen, count * heads * 4)],
            writes=place.access(tensor_type(self.op.scores).nbytes, write=True),
        )


# --------------------------------------------------------------------------------------------------- choosing


def _picking(op: PickBlocks, room: int) -> tuple[dict[str, int], int]:
    """Bytes of each temporary, and how many blocks' numbers a piece has."""
    _, blocks, samples, heads = tensor_type(op.scores).static_shape
    row = samples * max(r.heads for r in head_runs(op.kv_heads)) * 4
    keep = align(op.choice.keep * 4)
    sizes = {"totals": align(samples * heads * 4), "values": keep, "sum": align(4)}
    sizes |= {f"ids{n}": align(op.choice.keep * 4) for n in range(op.lists)}
    sizes |= {f"weights{n}": align(blocks * 4) for n in range(op.lists)}
    left = room - sum(sizes.values())
    piece = min(blocks, left // 2 // row, max(_PIECE // row, 1))
    if piece < 1:
        raise TyirError(
            f"the weights of {blocks} blocks do not fit {room} bytes of SRAM",
            help="use a larger block= of --sparse-prefill",
        )
    return sizes | {f"piece{n}": align(piece * row) for n in range(2)}, piece


def pick_scratch(
    op: PickBlocks, arena: int, machine: Machine, plan: SramPlan, held: Collection[Value] = ()
) -> Scratch | None:
    """Room in the arena where the temporaries have too little."""
    try:
        _picking(op, plan.temp_bytes)
    except TyirError:
        return Scratch(sum(_picking(op, arena)[0].values()), 0)
    return None


def lower_pick_blocks(op: PickBlocks, lowering: Lowering, scratch: Area | None = None) -> None:
    """`kv.pick_blocks`."""
    area = scratch or Area(lowering.plan.temp, lowering.plan.temp_bytes)
    sizes, piece = _picking(op, area.nbytes)
    at, start = {}, area.offset
    for name, size in sizes.items():
        at[name], start = start, start + size
    totals = lowering.place(op.totals)
    if not totals.in_sram:
        lowering.load_bytes(totals, at["totals"], tensor_type(op.totals).nbytes)
        totals = Place("sram", at["totals"])
    for run in head_runs(op.kv_heads):
        _pick(op, lowering, run, at, totals, piece)


def _ranges(op: PickBlocks, emitter: Emitter, pos: Value) -> list[tuple[Value, Value]]:
    """The candidates of each range, in blocks."""
    size = op.choice.block
    end = emitter.affine([pos], [1], -op.choice.window, divisor=size)
    nothing = emitter.affine([], [])
    if op.step is None:
        return [(nothing, end)]
    first, second = (
        between(emitter, emitter.affine([start], [1], divisor=size), end)
        for start in chunk_starts(emitter, pos, op.step)
    )
    return [(first, end), (second, first), (nothing, second)]


def _measures(emitter: Emitter, tokens: int) -> Value:
    """1 in the last of `QUARTER` steps, 0 in the others (`BlockChoice.measures`)."""
    step = emitter.affine([emitter.position(0)], [1], divisor=tokens)
    turn = emitter.affine([step], [1], divisor=QUARTER)
    return emitter.affine([step, turn], [1, -QUARTER], 2 - QUARTER, high=1)


def _pick(
    op: PickBlocks, lowering: Lowering, run: HeadRun, at: dict[str, int], totals: Place, piece: int
) -> None:
    """The lists of one cache head."""
    emitter, scores = lowering.emitter, lowering.place(op.scores)
    _, blocks, samples, heads = tensor_type(op.scores).static_shape
    ranges = _ranges(op, emitter, lowering.position(0))
    end, row = ranges[0][1], samples * run.heads * 4
    measures = _measures(emitter, op.tokens)
    total = totals.at(run.first * 4).offset
    for number, (first, count) in enumerate(spans(blocks, piece)):
        x = at[f"piece{number % 2}"]
        here = emitter.affine([end], [1], -first, high=count)
        whole = samples * heads * 4
        if run.heads == heads:  # the samples of a block follow each other
            shape, strides, inner = (1, edge10.DYNAMIC, row), (blocks * whole, whole), (count * row, row)
        else:  # of each block the samples' rows of the run's heads
            shape, strides = (edge10.DYNAMIC, samples, run.heads * 4), (whole, heads * 4)
            inner = (row, run.heads * 4)
        emitter.emit(
            edge10.Load,
            lowering.address(scores),
            here,
            offset=scores.offset + first * whole + run.first * 4,
            sram=x,
            shape=shape,
            dram_strides=strides,
            sram_strides=inner,
            queue="eidma",
            reads=scores.access(tensor_type(op.scores).nbytes, write=False),
            writes=[sram_range(x, count * row, write=True)],
        )
        for which, (low, high) in enumerate(ranges):
            out = at[f"weights{which}"] + first * 4
            emitter.emit(
                edge10.BlockWeights,
                here,
                low,
                high,
                measures,
                x=x,
                totals=total,
                total_stride=heads * 4,
                out=out,
                rows=count,
                samples=samples,
                heads=run.heads,
                first=first,
                reads=[
                    sram_range(x, count * row),
                    sram_range(total, (samples - 1) * heads * 4 + run.heads * 4),
                ],
                writes=[sram_range(out, count * 4, write=True)],
            )
    nbytes = op.choice.keep * 4
    for which in range(op.lists):
        target = lowering.place(op.blocks).at((run.group * op.lists + which) * nbytes)
        ids = target.offset if target.in_sram else at[f"ids{which}"]
        best = (at["values"], ids, at["sum"])
        lists = [sram_range(offset, size, write=True) for offset, size in zip(best, (nbytes, nbytes, 4))]
        emitter.emit(
            edge10.TopK,
            values=at[f"weights{which}"],
            stride=blocks * 4,
            element=f32,
            rows=1,
            cols=blocks,
            best=best,
            best_strides=(nbytes, nbytes, 4),
            k=op.choice.keep,
            reads=[sram_range(at[f"weights{which}"], blocks * 4)],
            writes=lists,
        )
        if not target.in_sram:
            lowering.store_bytes(target, ids, nbytes)


def lower_replace(op: Replace, lowering: Lowering) -> None:
    """`kv.replace`."""
    lowering.move(lowering.place(op.values), lowering.place(op.state), tensor_type(op.state).nbytes)
