"""The loop that all attention runs: some queries of a sequence over their keys, by blocks of keys with an
online softmax (as in FlashAttention, arXiv:2205.14135): nothing of size tokens x keys is kept.

    fill m = -1e30, l = 0, o = 0
    for each range of keys, and each block of it:
        load K and V blocks;  for each strip of heads:  scores = q K^T (cube, drain);  softmax block -> p, alpha;  pv = p V (cube, drain);  o = o * alpha + pv
    out = o / l
The accumulators' way to SRAM is what scores are short of: a block's scores are some products of `columns` keys, each drained while the next is made, and its product
with V sums up over the whole block before it is drained, once.

The loop is a software pipeline (Lam, "Software pipelining", 1988): what is done with a strip stands two steps after its scores, so that products, drains and softmax of
three strips overlap, also from turn to turn: a turn's last steps are the first scores of the next turn's blocks.  A turn has two blocks where SRAM has room for them:
one is loaded while the other is used.  Every part of SRAM and of the accumulators is handed from turn to turn by a token of its own.  A turn's blocks past the last key
have no rows: their scores cost nothing, their product with V is zero.

Blocks of an 8-bit or a 4-bit cache are loaded with their scales and de-quantised to f16 first.

Of a cache that is cut by tokens the loop runs over the die's own rows; m, l and o are stored as they are, for kv.merge_attention.

Of a cache of which some blocks are seen (kv.sparse_attention) the loop runs over a list of them, whose numbers lie in SRAM: a block of one head is one row of
a table for the command that gathers rows by number.  Chosen blocks end before the window, so that every query sees all of their keys.  The window is a range
as any other.  At the end the largest scores and totals of the sampled queries say what share of everything that was.

There is one range, of the keys up to the queries or of the queries' segment; with dual chunk attention there are three, each with a rotation of the queries of
its own.  m, l and o pass through all of them, so that nothing is merged, and a range without keys costs next to nothing.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby

from tyir.artifacts.token_blocks import TokenBlocks
from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Lowering, Place, acc_range, sram_range
from tyir.backends.edge10.lowering.dependences import ACC, Access, Slot, Space, Tracker
from tyir.backends.edge10.lowering.emitter import Emitter
from tyir.backends.edge10.lowering.ops.cache import rows_before
from tyir.backends.edge10.lowering.ops.stored_rows import emit_dequant_rows, row_bytes
from tyir.backends.edge10.lowering.tiling import AttentionBlocks, spans
from tyir.backends.edge10.memory.allocate import align
from tyir.dialects import edge10
from tyir.dialects.kv import LOWEST, SparseAttention
from tyir.dialects.ty import tensor_type
from tyir.ir import Value
from tyir.types import f16, f32

__all__ = ["Attending", "AttentionBlock", "HeadRun", "between", "chunk_starts", "head_runs", "in_turn"]


@dataclass(frozen=True)
class Attending:
    """What is lowered: queries [b, s, H, D] over `capacity` rows of keys and values.

    `segment`: the rows (first, end) that its queries see; None where each sees those up to its position.
    `step`: of dual chunk attention the tokens of a chunk; `queries` are then given for the keys of their own
    chunk, of the one before and of those before that, and scores are multiplied by `temperature` [b].
    """

    queries: Sequence[Value]
    k: Value
    v: Value
    out: Value
    scales: Sequence[Value]
    kv_heads: Sequence[int]
    cache_heads: int
    capacity: int
    layout: str
    scale: float
    window: int
    softcap: float | None
    segment: tuple[int, int] | None = None
    step: int = 0
    temperature: Value | None = None
    blocks: TokenBlocks | None = None
    sparse: SparseAttention | None = None


@dataclass(frozen=True)
class HeadRun:
    """Neighbouring query heads that read one cache head."""

    group: int
    first: int
    heads: int


def head_runs(kv_heads: Sequence[int]) -> list[HeadRun]:
    """The runs of query heads whose cache heads these are."""
    runs: list[HeadRun] = []
    first = 0
    for group, members in groupby(kv_heads):
        count = len(list(members))
        runs.append(HeadRun(group, first, count))
        first += count
    return runs


@dataclass(frozen=True)
class _Keys:
    """A range of keys: turns `start` to `end` over rows that are counted from row `low` and end at row
    `high`, and the number of the rotation of the queries that meets them.  `once`: there is one turn at most.
    """

    query: int
    low: Value | int
    high: Value
    start: Value
    end: Value
    once: bool
    listed: int | None = None


@dataclass(frozen=True)
class _Strip:
    """Some heads of a block for `count` of its queries from `query` on, rows numbered [query, head]: `offset`
    rows after the block's first in what is kept from turn to turn.
    """

    runs: Sequence[HeadRun]
    first: int
    heads: int
    query: int
    count: int
    offset: int

    @property
    def rows(self) -> int:
        return self.count * self.heads


@dataclass(frozen=True)
class _Step:
    """A strip's scores over a block of keys: `number` counts from the first of a turn, `set` is where the
    block lies, `buffer` where the scores do.
    """

    number: int
    strip: _Strip
    set: int
    buffer: int


@dataclass(frozen=True)
class _Rows:
    """A block's rows: how many, the first, and the position of it; of a block in a list, which that is: its
    place there, whether there is one (1 or 0), and the list's number.
    """

    keys: Value
    first: Value
    position: Value
    place: Value | None = None
    there: Value | None = None
    listed: int = 0


def between(emitter: Emitter, value: Value, high: Value) -> Value:
    """The smaller of two numbers that are not negative."""
    over = emitter.affine([value, high], [1, -1])  # 0 at least
    return emitter.affine([value, over], [1, -1])


def _larger(emitter: Emitter, value: Value, low: Value) -> Value:
    """The larger of two numbers that are not negative."""
    missing = emitter.affine([low, value], [1, -1])  # 0 at least
    return emitter.affine([value, missing], [1, 1])


def chunk_starts(emitter: Emitter, position: Value, step: int) -> tuple[Value, Value]:
    """Where the chunk of `step` tokens begins that a step at a position lies in, and the one before."""
    chunk = emitter.affine([position], [1], divisor=step)
    own, last = (emitter.affine([chunk], [step], -back) for back in (0, step))
    return own, last


def in_turn(steps: int, buffers: int) -> list[int]:
    """Which of the buffers each step of a turn takes, so that a buffer is taken again as late as can be, from
    turn to turn too.

    Three steps are under way at a time: with four buffers the third step after is the first to take one
    again, whatever their number.  With fewer it may be the second, never the next where there are three.
    """
    if buffers == 4:
        fours = steps % 3 if steps >= 4 * (steps % 3) else 0
        groups = [4] * fours + [3] * ((steps - 4 * fours) // 3)
        found = [number for size in groups for number in range(size)]
        return found + [number % 4 for number in range(steps - len(found))]
    found = [number % buffers for number in range(steps)]
    if buffers == 3 and steps % 3 == 1:
        found[-1] = 1
    return found


class AttentionBlock:
    """`count` queries of a sequence from `first` on, for some runs of heads; temporaries from `start` on."""

    def __init__(
        self,
        op: Attending,
        lowering: Lowering,
        blocks: AttentionBlocks,
        runs: Sequence[HeadRun],
        sequence: int,
        first: int,
        count: int,
        start: int,
    ) -> None:
        self.op, self.lowering, self.runs, self.sequence, self.first, self.count = (
            op,
            lowering,
            runs,
            sequence,
            first,
            count,
        )
        self.blocks, self.keys = blocks, blocks.keys
        _, _, self.all_heads, self.dim = tensor_type(op.queries[0]).static_shape
        self.cache_heads, self.capacity = op.cache_heads, op.capacity
        self.first_group, self.groups = (0, op.cache_heads) if blocks.all_heads else (runs[0].group, 1)
        self.first_head, self.heads = runs[0].first, sum(r.heads for r in runs)
        self.rows = count * self.heads
        self.strips = self._cut(blocks)
        order = [(block, strip) for block in range(blocks.sets) for strip in self.strips]
        self.buffers = min(blocks.buffers, len(order))
        self.steps = [
            _Step(number, strip, block, buffer)
            for number, ((block, strip), buffer) in enumerate(
                zip(order, in_turn(len(order), self.buffers), strict=True)
            )
        ]
        self.behind = min(2, self.buffers - 1)
        self.lists = 0
        self.at: dict[str, int] = {}
        for name, size in blocks.layout(self.heads, self.groups, self.dim).items():
            self.at[name] = start
            start += size
        self.end = start
        self._accumulators, self._products = self._divide_accumulators()
        self._buffers = cycle(range(blocks.products))

    def _cut(self, blocks: AttentionBlocks) -> list[_Strip]:
        """The heads in strips of at most `blocks.strip`; one strip for all of them if they are few, else each
        of heads of one cache head.  Of many queries a strip has some.
        """
        parts = [self.runs]
        if self.heads > blocks.strip:
            parts = [
                [HeadRun(run.group, run.first + start, heads)]
                for run in self.runs
                for start, heads in spans(run.heads, blocks.strip)
            ]
        strips: list[_Strip] = []
        for runs in parts:
            first, heads = runs[0].first, sum(r.heads for r in runs)
            for query, count in spans(self.count, blocks.strip_queries):
                offset = (first - self.first_head) * self.count + query * heads
                strips.append(_Strip(runs, first, heads, query, count, offset))
        return strips

    def _divide_accumulators(self) -> tuple[Iterator[Slot], Iterator[Slot]]:
        """The parts of the accumulators that take scores, and those that take products with V, in turn."""
        rows = max(r.heads * s.count for s in self.strips for r in s.runs)
        scores, products = self.blocks.accumulators(rows, self.dim, self.lowering.machine)
        self._parts: list[Slot] = []
        for size, count in (scores, products):
            low = self._parts[-1].high if self._parts else 0
            self._parts += [Slot(low + i * size, low + (i + 1) * size, ACC) for i in range(count)]
        return cycle(self._parts[: scores[1]]), cycle(self._parts[scores[1] :])

    def lower(self) -> None:
        emitter = self.lowering.emitter
        queries = [self._queries(number) for number in range(len(self.op.queries))]
        if self.op.temperature is not None:
            place = self.lowering.place(self.op.temperature).at(self.sequence * 4)
            self.lowering.load_bytes(place, self.at["temperature"], 4, queue="ebdma")
        for name, size, value in (
            ("maximum", self.rows, LOWEST),
            ("total", self.rows, 0.0),
            ("sum", self.rows * self.dim, 0.0),
        ):
            emitter.emit(
                edge10.VectorOp,
                function="fill",
                inputs=(),
                outputs=(self.at[name],),
                input_types=ArrayAttr([]),
                output_types=ArrayAttr([f32]),
                rows=1,
                cols=size,
                constant=value,
                writes=[sram_range(self.at[name], size * 4, write=True)],
            )
        if self.op.sparse is not None:
            self.lists = self._brought(self.op.sparse.blocks, "lists")
        for keys in self._ranges():
            self._loop(keys, *queries[keys.query])
        if self.op.sparse is not None:
            self._give_shares(self.op.sparse)
        self._finish()

    def _brought(self, value: Value, name: str) -> int:
        """Where a small tensor lies in SRAM; it is brought there if it does not."""
        place = self.lowering.place(value)
        if place.in_sram:
            return place.offset
        self.lowering.load_bytes(place, self.at[name], tensor_type(value).nbytes)
        return self.at[name]

    def _give_shares(self, op: SparseAttention) -> None:
        """What share of everything the sampled queries of each strip have seen."""
        every, emitter, place = op.choice.every, self.lowering.emitter, self.lowering.place(op.shares)
        asked, row = self._brought(op.totals, "asked"), self.all_heads * 4
        made = place.offset if place.in_sram else self.at["shares"]
        for strip in self.strips:
            token = self.first + strip.query
            sample = -(-token // every)
            count, skipped = -(-(token + strip.count) // every) - sample, sample * every - token
            if count < 1:
                continue
            of_strip = skipped * strip.heads * 4
            sources = [self._kept(name, strip, 4) + of_strip for name in ("maximum", "total")]
            column = sample * row + strip.first * 4
            stride, extent = every * strip.heads * 4, (count - 1) * row + strip.heads * 4
            emitter.emit(
                edge10.VectorOp,
                function="share",
                inputs=(*sources, asked + column),
                outputs=(made + column,),
                rows=count,
                cols=strip.heads,
                input_strides=(stride, stride, row),
                output_strides=(row, 0),
                input_types=ArrayAttr([f32, f32, f32]),
                output_types=ArrayAttr([f32]),
                reads=[
                    *(sram_range(at, (count - 1) * stride + strip.heads * 4) for at in sources),
                    sram_range(asked + column, extent),
                ],
                writes=[sram_range(made + column, extent, write=True)],
            )
            if not place.in_sram:
                self.lowering.store(
                    place.at(column),
                    made + column,
                    (1, count, strip.heads * 4),
                    dram_strides=(0, row),
                    sram_strides=(0, row),
                )

    def _place(self, value: Value) -> Place:
        """Where the sequence's part of a tensor lies."""
        return self.lowering.place(value).at(self.sequence * self._sequence_bytes(value))

    @staticmethod
    def _sequence_bytes(value: Value) -> int:
        return tensor_type(value).nbytes // tensor_type(value).static_shape[0]

    # -- queries and result
    # ---------------------------------------------------------------------------------------
    def _queries(self, number: int) -> tuple[int, tuple[int, int]]:
        """Offset in SRAM of the first query row of a rotation, and the strides [token, head]."""
        place, row = self._place(self.op.queries[number]), self.dim * 2
        start = (self.first * self.all_heads + self.first_head) * row
        if place.in_sram:
            return place.offset + start, (self.all_heads * row, row)
        target = self.at[f"q{number}"]
        self.lowering.load(
            place.at(start),
            target,
            (1, self.count, self.heads * row),
            dram_strides=(0, self.all_heads * row),
        )
        return target, (self.heads * row, row)

    def _finish(self) -> None:
        if self.op.blocks is not None:
            self._finish_part()
            return
        place, row = self._place(self.op.out), self.dim * 2
        start = (self.first * self.all_heads + self.first_head) * row
        target, outer = (
            (place.offset + start, self.all_heads * row)
            if place.in_sram
            else (self.at["out"], self.heads * row)
        )
        for strip in self.strips:
            total, sums, rows = (
                self._kept("total", strip, 4),
                self._kept("sum", strip, self.dim * 4),
                strip.rows,
            )
            out = target + strip.query * outer + (strip.first - self.first_head) * row
            self.lowering.emitter.emit(
                edge10.VectorOp,
                function="divide_rows",
                inputs=(sums, total),
                outputs=(out,),
                rows=rows,
                cols=self.dim,
                group=strip.heads,
                output_strides=(outer, row),
                input_types=ArrayAttr([f32, f32]),
                output_types=ArrayAttr([f16]),
                reads=[sram_range(sums, rows * self.dim * 4), sram_range(total, rows * 4)],
                writes=[sram_range(out, (strip.count - 1) * outer + strip.heads * row, write=True)],
            )
        self._bring_back(place, start, target, row)

    def _finish_part(self) -> None:
        """Rows of the sums, the largest score and the total, in f32."""
        place, row = self._place(self.op.out), (self.dim + 2) * 4
        start, outer = (self.first * self.all_heads + self.first_head) * row, self.all_heads * row
        target = place.offset + start
        if not place.in_sram:
            target, outer = self.at["out"], self.heads * row
        for strip in self.strips:
            out = target + strip.query * outer + (strip.first - self.first_head) * row
            for name, column, columns in (
                ("sum", 0, self.dim),
                ("maximum", self.dim, 1),
                ("total", self.dim + 1, 1),
            ):
                kept, to = self._kept(name, strip, columns * 4), out + column * 4
                extent = (strip.count - 1) * outer + (strip.heads - 1) * row + columns * 4
                self.lowering.emitter.emit(
                    edge10.VectorOp,
                    function="copy",
                    inputs=(kept,),
                    outputs=(to,),
                    rows=strip.rows,
                    cols=columns,
                    group=strip.heads,
                    output_strides=(outer, row),
                    input_types=ArrayAttr([f32]),
                    output_types=ArrayAttr([f32]),
                    reads=[sram_range(kept, strip.rows * columns * 4)],
                    writes=[sram_range(to, extent, write=True)],
                )
        self._bring_back(place, start, target, row)

    def _bring_back(self, place: Place, start: int, made: int, row: int) -> None:
        """Rows of the result, `row` bytes a head, from where they are made to where they belong."""
        if not place.in_sram:
            whole = (1, self.count, self.heads * row)
            self.lowering.store(place.at(start), made, whole, dram_strides=(0, self.all_heads * row))

    def _kept(self, name: str, strip: _Strip, row: int) -> int:
        """Where a strip's rows of what is kept from turn to turn begin."""
        return self.at[name] + strip.offset * row

    # -- the loop
    # -------------------------------------------------------------------------------------------------
    def _ranges(self) -> Iterator[_Keys]:
        """The ranges of keys, in their order."""
        outer, op, turn = self.lowering.emitter, self.op, self.keys * self.blocks.sets
        nothing = outer.affine([], [])
        if op.segment is not None:
            first_key, end_key = op.segment
            turns = -(-(end_key - first_key) // turn)
            until, all_turns = (outer.affine([], [], number) for number in (end_key, turns))
            yield _Keys(0, first_key, until, nothing, all_turns, turns == 1)
            return
        pos = self.lowering.position(self.sequence)
        visible = self._rows_before(pos, self.first + self.count)
        if op.sparse is not None:
            yield from self._some_blocks(op.sparse, visible)
            return
        if op.step:
            own, last = chunk_starts(outer, outer.position(self.sequence), op.step)
            if op.blocks is not None:
                own, last = (self._rows_before(value, 0) for value in (own, last))
            for query, first, high in ((2, nothing, last), (1, last, own), (0, own, visible)):
                end = outer.affine([high, first], [1, -1], turn - 1, divisor=turn)
                yield _Keys(query, first, high, nothing, end, once=False)
            return
        start = outer.affine([pos], [1], self.first - op.window + 1, divisor=turn) if op.window else nothing
        if op.window and op.blocks is not None:
            start = outer.affine([self._rows_before(pos, self.first - op.window + 1)], [1], divisor=turn)
        end = outer.affine([visible], [1], turn - 1, divisor=turn)
        yield _Keys(0, 0, visible, start, end, self.capacity <= turn)

    def _some_blocks(self, op: SparseAttention, visible: Value) -> Iterator[_Keys]:
        """The lists of chosen blocks, and the window."""
        emitter, size, sets = self.lowering.emitter, op.choice.block, self.blocks.sets
        nothing = emitter.affine([], [])
        window = emitter.affine([emitter.position(self.sequence)], [1], -op.choice.window, divisor=size)
        window = emitter.affine([window], [size])
        bounds: list[tuple[Value, Value]] = [(nothing, visible)]
        if op.step is not None:
            own, last = chunk_starts(emitter, emitter.position(self.sequence), op.step)
            bounds = [(own, visible), (last, own), (nothing, last)]
        for query, (low, high) in reversed(list(enumerate(bounds))):
            candidates = emitter.affine([between(emitter, high, window), low], [1, -1], divisor=size)
            count = emitter.affine([candidates], [1], high=op.choice.keep)
            turns = emitter.affine([count], [1], sets - 1, divisor=sets)
            yield _Keys(query, 0, count, nothing, turns, once=False, listed=query)
            low = _larger(emitter, low, window)
            end = emitter.affine([high, low], [1, -1], size * sets - 1, divisor=size * sets)
            yield _Keys(query, low, high, nothing, end, once=False)

    def _rows_before(self, position: Value, after: int) -> Value:
        """How many rows of the cache hold positions up to `after` after this one, that excepted."""
        emitter, blocks = self.lowering.emitter, self.op.blocks
        if blocks is None:
            return emitter.affine([position], [1], after, high=self.capacity)
        return rows_before(emitter, blocks, emitter.affine([position], [1], after), self.capacity)

    def _position_of(self, row: Value) -> Value:
        """The position of a row of the cache."""
        emitter, blocks = self.lowering.emitter, self.op.blocks
        if blocks is None:
            return row
        block = emitter.affine([row], [1], divisor=blocks.size)
        return emitter.affine(
            [row, block], [1, (blocks.count - 1) * blocks.size], blocks.number * blocks.size
        )

    def _loop(self, which: _Keys, q: int, q_strides: tuple[int, int]) -> None:
        outer = self.lowering.emitter
        self._queries_at = q, q_strides
        turns = [self._rows_of(which, which.start, ahead) for ahead in range(1 if which.once else 2)]
        for name, block in ((n, b) for b in range(self.blocks.sets) for n in ("k", "v")):
            self._load_cache(name, block, turns[0][block])
        if which.once:
            for number in range(len(self.steps) + self.behind):
                self._step(number, turns)
            return
        for number in range(self.behind):
            self._step(number, turns)
        body = Emitter.body(len(self._slots()) + 1)
        index, *tokens = body.args
        inner = Tracker(self._slots(), tokens[:-1], tokens[-1], self._caches(outer))
        self.lowering.emitter = emitter = outer.nested(body, inner, self._expected_turns())
        try:
            turns = [self._rows_of(which, index, ahead) for ahead in range(3)]
            for number in range(self.behind, len(self.steps) + self.behind):
                self._step(number, turns)
            carried, rest = inner.finish()
            body.append(edge10.Yield(tokens=tuple(emitter.join(t) for t in (*carried, rest))))
        finally:
            self.lowering.emitter = outer
        outer.loop(which.start, which.end, body, inner)

    def _expected_turns(self) -> int:
        """Of a cache that is half full, or of a segment."""
        rows = self.capacity / 2 if self.op.segment is None else self.op.segment[1] - self.op.segment[0]
        return max(1, round(rows / (self.keys * self.blocks.sets)))

    def _slots(self) -> list[Slot]:
        """What is handed from turn to turn by tokens of its own: each temporary, and each part of the
        accumulators.
        """
        ends = [*list(self.at.values())[1:], self.end]
        own = [Slot(low, high) for low, high in zip(self.at.values(), ends) if low < high]
        return [*own, *self._parts]

    def _rows_of(self, which: _Keys, turn: Value, ahead: int) -> list[_Rows]:
        """The rows of a turn's blocks, or those of `ahead` turns later."""
        emitter, size, sets = self.lowering.emitter, self.keys, self.blocks.sets
        found = []
        for block in range(sets) if which.listed is not None else ():
            place = emitter.affine([turn], [sets], ahead * sets + block, high=self.capacity)
            there = emitter.affine([which.high, place], [1, -1], high=1)
            keys, first = emitter.affine([there], [size], high=size), emitter.affine([], [])
            found.append(_Rows(keys, first, first, place, there, which.listed or 0))
        for block in range(sets) if which.listed is None else ():
            rows = (ahead * sets + block) * size
            if isinstance(which.low, int):
                first = emitter.affine([turn], [sets * size], which.low + rows, high=self.capacity)
            else:
                first = emitter.affine([turn, which.low], [sets * size, 1], rows, high=self.capacity)
            keys = emitter.affine([which.high, first], [1, -1], high=size)
            found.append(_Rows(keys, first, self._position_of(first)))
        return found

    def _caches(self, outer: Emitter) -> dict[Space, Value]:
        """The caches as the loop finds them: their blocks need not wait for the queries."""
        reads: dict[Space, list[Access]] = {}
        for value in (self.op.k, self.op.v, *self.op.scales):
            place = self._place(value)  # a tower's lie in one buffer
            reads.setdefault(place.base, []).extend(place.access(self._sequence_bytes(value), write=False))
        return {space: outer.join(outer.tracker.waits(accesses, None)) for space, accesses in reads.items()}

    def _step(self, number: int, turns: Sequence[Sequence[_Rows]]) -> None:
        """The scores of one strip and the values of the one `behind` it, counted from a turn's beginning;
        `turns` are the rows of this turn's blocks and of the next ones', as far as there are any.  A block
        that was used for the last time makes room for that of the next turn.
        """
        ahead, place = divmod(number, len(self.steps))
        new = self.steps[place] if ahead < len(turns) else None
        old = self.steps[number - self.behind] if number >= self.behind else None
        if new is not None and (old is None or old.buffer != new.buffer or not self.behind):
            self._scored(new, turns, ahead)
            new = None
        if old is not None:
            self._sum_up(old, turns[0][old.set])
            if old.strip is self.strips[-1] and len(turns) > 1:
                self._load_cache("v", old.set, turns[1][old.set])
        if new is not None:  # where the old scores lie
            self._scored(new, turns, ahead)

    def _scored(self, step: _Step, turns: Sequence[Sequence[_Rows]], ahead: int) -> None:
        self._weigh(step, turns[ahead][step.set])
        if step.strip is self.strips[-1] and ahead + 1 < len(turns):
            self._load_cache("k", step.set, turns[ahead + 1][step.set])

    def _weigh(self, step: _Step, rows: _Rows) -> None:
        """A strip's scores and their softmax, which takes their place."""
        strip, size, (q, q_strides) = step.strip, self.keys, self._queries_at
        scores, alpha = self.at[f"scores{step.buffer}"], self.at[f"alpha{step.buffer}"]
        for first, count in spans(size, self.blocks.columns):
            keys = rows.keys
            if count < size:
                keys = self.lowering.emitter.affine([rows.keys], [1], -first, high=count)
            for run in strip.runs:
                lhs = q + strip.query * q_strides[0] + (run.first - self.first_head) * q_strides[1]
                target = scores + (run.first - strip.first) * size * 4 + first * 4
                self._scores(strip, run, lhs, q_strides, step.set, (first, count), keys, target)
        kept = [self._kept(name, strip, 4) for name in ("maximum", "total")]
        heat = self.at["temperature"] if self.op.temperature is not None else None
        by_row = [*kept, alpha]
        self.lowering.emitter.emit(
            edge10.SoftmaxBlock,
            rows.keys,
            rows.position,
            scores=scores,
            score_stride=size * 4,
            probabilities=scores,
            probability_stride=size * 4,
            maximum=kept[0],
            total=kept[1],
            alpha=alpha,
            rows=strip.rows,
            heads=strip.heads,
            first_query=self._first_query(strip),
            window=self.op.window,
            sequence=self.sequence,
            scale=self.op.scale,
            softcap=self.op.softcap,
            temperature=heat,
            reads=[
                sram_range(scores, strip.rows * size * 4),
                *(sram_range(at, strip.rows * 4) for at in kept),
                *([] if heat is None else [sram_range(heat, 4)]),
            ],
            writes=[
                sram_range(scores, strip.rows * size * 4, write=True),
                *(sram_range(at, strip.rows * 4, write=True) for at in by_row),
            ],
        )

    def _first_query(self, strip: _Strip) -> int:
        """The position of the first query after `pos`; after all keys where it sees all of them."""
        if self.op.segment is not None:
            return self.capacity
        return self.lowering.first_token + self.first + strip.query

    def _sum_up(self, step: _Step, rows: _Rows) -> None:
        """A strip's values, added to what it has of the blocks before."""
        strip, size, dim = step.strip, self.keys, self.dim
        scores, alpha = self.at[f"scores{step.buffer}"], self.at[f"alpha{step.buffer}"]
        product = self.at[f"product{next(self._buffers)}"]
        for run in strip.runs:
            head, strides = run.first - strip.first, (strip.heads * size * 4, size * 4)
            rhs, to_key, rhs_bytes = self._rows_in(f"v{step.set}", run, size)
            part, width = next(self._products), align(dim, self.lowering.machine.cube.columns) * 4
            lhs = scores + head * size * 4
            self._product(
                (lhs, strides, size * 2),
                (rhs, to_key, rhs_bytes, False),
                (part.low, width, (strip.count, run.heads)),
                rows.keys,
                (dim, edge10.DYNAMIC),
            )
            self._drain(part.low, width, strip, run, dim, product + head * dim * 4, dim * 4)
        sums, nbytes = self._kept("sum", strip, dim * 4), strip.rows * dim * 4
        self.lowering.emitter.emit(
            edge10.VectorOp,
            function="rescale_add",
            inputs=(sums, alpha, product),
            outputs=(sums,),
            rows=strip.rows,
            cols=dim,
            input_types=ArrayAttr([f32, f32, f32]),
            output_types=ArrayAttr([f32]),
            reads=[sram_range(sums, nbytes), sram_range(alpha, strip.rows * 4), sram_range(product, nbytes)],
            writes=[sram_range(sums, nbytes, write=True)],
        )

    @property
    def _key_major(self) -> bool:
        """Whether a block in SRAM holds all heads of a key, then those of the next."""
        return self.op.layout == "NHD" and not self.op.scales and self.groups == self.cache_heads

    def _load_cache(self, name: str, block: int, rows: _Rows) -> None:
        """A block of the keys ("k") or the values ("v") as f16."""
        at, op, target = self.at, self.op, self.at[f"{name}{block}"]
        cache = self._place(op.k if name == "k" else op.v)
        if not op.scales:
            self._load_rows(cache, target, self.dim * 2, "eidma", rows)
            return
        q, scales = at[f"{name}_q"], at[f"{name}_scales"]
        stored = (op.k, op.scales[0]) if name == "k" else (op.v, op.scales[1])
        self._load_rows(cache, q, row_bytes(stored[0]), "eidma", rows)
        self._load_rows(self._place(stored[1]), scales, row_bytes(stored[1]), "ebdma", rows)
        size = (self.groups, self.keys)
        emit_dequant_rows(self.lowering.emitter, rows.keys, (q, scales, target), stored, size, self.dim)

    def _load_rows(self, cache: Place, sram: int, row: int, queue: str, rows: _Rows) -> None:
        """The block's rows of `row` bytes of the cache heads in use, each head's at its own plane."""
        if rows.place is not None:
            self._gather_rows(cache, sram, row, rows)
            return
        emitter, heads, capacity = self.lowering.emitter, self.cache_heads, self.capacity
        by_head = self.op.layout == "HND"
        to_head, to_key = (capacity * row, row) if by_head else (row, heads * row)
        planes = self.groups
        if self._key_major:  # the heads of a key follow each other in both memories: one run
            planes, row = 1, self.groups * row
        address = emitter.offset(self.lowering.address(cache), rows.first, to_key)
        whole = planes * self.keys * row
        read = (self.first_group + self.groups) * capacity * row if by_head else capacity * to_key
        emitter.emit(
            edge10.Load,
            address,
            rows.keys,
            offset=cache.offset + self.first_group * to_head,
            sram=sram,
            shape=(planes, edge10.DYNAMIC, row),
            dram_strides=(to_head, to_key),
            sram_strides=(self.keys * row, row),
            queue=queue,
            reads=cache.access(read, write=False),
            writes=[sram_range(sram, whole, write=True)],
        )

    def _gather_rows(self, cache: Place, sram: int, row: int, rows: _Rows) -> None:
        """A block of a list, of each cache head in use the one of its own list."""
        sparse = self.op.sparse
        assert sparse is not None and rows.there is not None and rows.place is not None
        whole, keep = self.keys * row, sparse.choice.keep
        for number in range(self.groups):
            group, target = self.first_group + number, sram + number * whole
            ids = self.lists + (group * len(self.op.queries) + rows.listed) * keep * 4
            self.lowering.emitter.emit(
                edge10.Gather,
                self.lowering.address(cache),
                rows.there,
                rows.place,
                index="ids",
                ids=ids,
                sram=target,
                rows=edge10.DYNAMIC,
                row_bytes=whole,
                table_rows=self.capacity // self.keys,
                offset=cache.offset + group * self.capacity * row,
                entry=edge10.DYNAMIC,
                reads=[
                    sram_range(ids, keep * 4),
                    *cache.access((group + 1) * self.capacity * row, write=False),
                ],
                writes=[sram_range(target, whole, write=True)],
            )

    def _rows_in(self, name: str, run: HeadRun, rows: int, first: int = 0) -> tuple[int, int, int]:
        """Of a run's cache head in a block: offset of row `first`, bytes from row to row and of `rows`."""
        row = self.dim * 2
        to_head, to_key = (row, self.groups * row) if self._key_major else (self.keys * row, row)
        start = self.at[name] + (run.group - self.first_group) * to_head + first * to_key
        return start, to_key, (rows - 1) * to_key + row

    def _scores(
        self,
        strip: _Strip,
        run: HeadRun,
        lhs: int,
        strides: tuple[int, int],
        block: int,
        columns: tuple[int, int],
        keys: Value,
        target: int,
    ) -> None:
        """scores = q K^T over columns (first, number) of a block's keys, for one run of a strip's heads."""
        first, count = columns
        rhs, to_key, rhs_bytes = self._rows_in(f"k{block}", run, count, first)
        part, width = next(self._accumulators), align(count, self.lowering.machine.cube.columns) * 4
        self._product(
            (lhs, strides, self.dim * 2),
            (rhs, to_key, rhs_bytes, True),
            (part.low, width, (strip.count, run.heads)),
            keys,
            (edge10.DYNAMIC, self.dim),
        )
        self._drain(part.low, width, strip, run, edge10.DYNAMIC, target, self.keys * 4, count, keys)

    def _product(
        self,
        left: tuple[int, tuple[int, int], int],
        right: tuple[int, int, int, bool],
        sums: tuple[int, int, tuple[int, int]],
        keys: Value,
        sizes: tuple[int, int],
    ) -> None:
        """One product: of `left` offset, strides and bytes of a row; of `right` offset, stride, bytes and
        whether a row is a column; of `sums` offset, stride and rows [tokens, heads]; `sizes` are n and k.
        """
        (lhs, strides, row), (rhs, rhs_stride, rhs_bytes, transposed) = left, right
        acc, width, (tokens, heads) = sums
        self.lowering.emitter.emit(
            edge10.Matmul,
            keys,
            lhs=lhs,
            lhs_strides=strides,
            rhs=rhs,
            rhs_stride=rhs_stride,
            transposed=transposed,
            acc=acc,
            acc_stride=width,
            m=(tokens, heads),
            n=sizes[0],
            k=sizes[1],
            reads=[
                sram_range(lhs, (tokens - 1) * strides[0] + (heads - 1) * strides[1] + row),
                sram_range(rhs, rhs_bytes),
            ],
            writes=[acc_range(acc, tokens * heads * width, write=True)],
        )

    def _drain(
        self,
        acc: int,
        width: int,
        strip: _Strip,
        run: HeadRun,
        n: int,
        target: int,
        target_row: int,
        most: int = 0,
        keys: Value | None = None,
    ) -> None:
        """A run's sums to rows of `target_row` bytes in SRAM; with `keys` these are how many columns, `most`
        at most.
        """
        rows = (strip.count - 1) * strip.heads + run.heads
        extent = (rows - 1) * target_row + (most or n) * 4
        self.lowering.emitter.emit(
            edge10.Drain,
            *([] if keys is None else [keys]),
            acc=acc,
            acc_stride=width,
            m=(strip.count, run.heads),
            n=n,
            sram=target,
            sram_strides=(strip.heads * target_row, target_row),
            element=f32,
            reads=[acc_range(acc, strip.count * run.heads * width)],
            writes=[sram_range(target, extent, write=True)],
        )
