"""The loop that all attention runs: some queries of a sequence over their keys, by blocks of keys with an
online softmax (as in FlashAttention, arXiv:2205.14135): nothing of size tokens x keys is kept.

    fill m = -1e30, l = 0, o = 0
    for each range of keys, and each block of it:
        load K and V blocks;  for each strip of heads:  scores = q K^T (cube, drain);  softmax block -> p, alpha;  pv = p V (cube, drain);  o = o * alpha + pv
    out = o / l
The strips of a turn are two steps apart: the cube is at one strip's scores while another's are drained and a third's softmax runs.  An 8-bit cache's blocks are
loaded with their scales and de-quantised to f16 first.  The K and V blocks are handed from turn to turn by tokens of their own: the K block of the next turn loads
while this turn is at its last products with V.

There is one range, of the keys up to the queries or of the queries' segment; with dual chunk attention there are three, each with a rotation of the queries of
its own.  m, l and o pass through all of them, so that nothing is merged, and a range without keys costs no command.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, groupby

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Lowering, Place, acc_range, sram_range
from tyir.backends.edge10.lowering.dependences import Access, Slot, Space, Tracker
from tyir.backends.edge10.lowering.emitter import Emitter
from tyir.backends.edge10.lowering.tiling import AttentionBlocks, accumulator_bytes, spans
from tyir.backends.edge10.memory.allocate import align
from tyir.dialects import edge10
from tyir.dialects.ty import tensor_type
from tyir.ir import Value
from tyir.types import f16, f32

__all__ = ["Attending", "AttentionBlock", "HeadRun", "head_runs"]

_LOWEST = -1.0e30  # the running maximum before the first key: finite, so that differences with it are numbers


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
    """A range of keys: turns `start` to `end` over blocks that are counted from row `low` and end at row
    `high`, and the number of the rotation of the queries that meets them.
    """

    query: int
    low: Value | int
    high: Value
    start: Value
    end: Value


@dataclass(frozen=True)
class _Strip:
    """Some heads of a block for `count` of its queries from `query` on, rows numbered [query, head]: `offset`
    rows after the block's first in what is kept from turn to turn, `buffer` the set of temporaries.
    """

    runs: Sequence[HeadRun]
    first: int
    heads: int
    query: int
    count: int
    offset: int
    buffer: int

    @property
    def rows(self) -> int:
        return self.count * self.heads


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
        self.keys = blocks.keys
        _, _, self.all_heads, self.dim = tensor_type(op.out).static_shape
        self.cache_heads, self.capacity = op.cache_heads, op.capacity
        self.first_group, self.groups = (0, op.cache_heads) if blocks.all_heads else (runs[0].group, 1)
        self.first_head, self.heads = runs[0].first, sum(r.heads for r in runs)
        self.rows = count * self.heads
        self.strips = self._cut(blocks)
        self.at: dict[str, int] = {}
        for name, size in blocks.layout(self.heads, self.groups, self.dim).items():
            self.at[name] = start
            start += size
        self._accumulators = self._accumulator_offsets()

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
                strips.append(_Strip(runs, first, heads, query, count, offset, len(strips) % 3))
        return strips

    def _accumulator_offsets(self) -> Iterator[int]:
        most = max(r.heads * s.count for s in self.strips for r in s.runs)
        machine = self.lowering.machine
        part = machine.accumulator_bytes // (
            4
            if accumulator_bytes(most, max(self.keys, self.dim), machine) * 4 <= machine.accumulator_bytes
            else 2
        )
        return cycle(range(0, part * (machine.accumulator_bytes // part), part))

    def lower(self) -> None:
        emitter = self.lowering.emitter
        queries = [self._queries(number) for number in range(len(self.op.queries))]
        if self.op.temperature is not None:
            place = self.lowering.place(self.op.temperature).at(self.sequence * 4)
            self.lowering.load_bytes(place, self.at["temperature"], 4, queue="ebdma")
        for name, size, value in (
            ("maximum", self.rows, _LOWEST),
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
        for keys in self._ranges():
            self._loop(keys, *queries[keys.query])
        self._finish()

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
        if not place.in_sram:
            self.lowering.store(
                place.at(start),
                target,
                (1, self.count, self.heads * row),
                dram_strides=(0, self.all_heads * row),
            )

    def _kept(self, name: str, strip: _Strip, row: int) -> int:
        """Where a strip's rows of what is kept from turn to turn begin."""
        return self.at[name] + strip.offset * row

    # -- the loop
    # -------------------------------------------------------------------------------------------------
    def _ranges(self) -> Iterator[_Keys]:
        """The ranges of keys, in their order."""
        outer, size, op = self.lowering.emitter, self.keys, self.op
        if op.segment is not None:
            low, high = op.segment
            visible = outer.affine([], [], high)
            start, end = outer.affine([], []), outer.affine([], [], -(-(high - low) // size))
            yield _Keys(0, low, visible, start, end)
            return
        pos = self.lowering.position(self.sequence)
        visible = outer.affine([pos], [1], self.first + self.count, high=self.capacity)
        if op.step:
            chunk = outer.affine([outer.position(self.sequence)], [1], divisor=op.step)
            own, last = (outer.affine([chunk], [op.step], -back) for back in (0, op.step))
            nothing = outer.affine([], [])
            for query, first, high in ((2, nothing, last), (1, last, own), (0, own, visible)):
                end = outer.affine([high, first], [1, -1], size - 1, divisor=size)
                yield _Keys(query, first, high, nothing, end)
            return
        start = (
            outer.affine([pos], [1], self.first - op.window + 1, divisor=size)
            if op.window
            else outer.affine([], [])
        )
        yield _Keys(0, 0, visible, start, outer.affine([visible], [1], size - 1, divisor=size))

    def _loop(self, which: _Keys, q: int, q_strides: tuple[int, int]) -> None:
        outer, size = self.lowering.emitter, self.keys
        block = Emitter.body(3)
        index, *tokens = block.args
        slots = (Slot(self.at["k"], self.at["v"]), Slot(self.at["v"], self.at["scores0"]))
        inner = Tracker(slots, tokens[:2], tokens[2], self._caches(outer))
        self.lowering.emitter = body = outer.nested(block, inner)
        try:
            if isinstance(which.low, int):
                first_key = body.affine([index], [size], which.low)
            else:
                first_key = body.affine([index, which.low], [size, 1])
            keys = body.affine([which.high, first_key], [1, -1], high=size)
            self._turn(q, q_strides, first_key, keys)
            carried, rest = inner.finish()
            block.append(edge10.Yield(tokens=tuple(body.join(t) for t in (*carried, rest))))
        finally:
            self.lowering.emitter = outer
        outer.loop(which.start, which.end, block, inner)

    def _caches(self, outer: Emitter) -> dict[Space, Value]:
        """The caches as the loop finds them: their blocks need not wait for the queries."""
        reads: dict[Space, list[Access]] = {}
        for value in (self.op.k, self.op.v, *self.op.scales):
            place = self._place(value)  # a tower's lie in one buffer
            reads.setdefault(place.base, []).extend(place.access(self._sequence_bytes(value), write=False))
        return {space: outer.join(outer.tracker.waits(accesses, None)) for space, accesses in reads.items()}

    def _turn(self, q: int, q_strides: tuple[int, int], first_key: Value, keys: Value) -> None:
        self._load_cache("k", first_key, keys)
        self._load_cache("v", first_key, keys)
        behind = min(2, len(self.strips) - 1)
        for number in range(len(self.strips) + behind):
            if number < len(self.strips):
                self._weigh(self.strips[number], q, q_strides, first_key, keys)
            if number >= behind:
                self._sum_up(self.strips[number - behind], keys)

    def _weigh(
        self, strip: _Strip, q: int, q_strides: tuple[int, int], first_key: Value, keys: Value
    ) -> None:
        """A strip's scores and their softmax."""
        size, rows = self.keys, strip.rows
        scores, probabilities, alpha = (
            self.at[f"{name}{strip.buffer}"] for name in ("scores", "probabilities", "alpha")
        )
        maximum, total = self._kept("maximum", strip, 4), self._kept("total", strip, 4)
        heat = self.at["temperature"] if self.op.temperature is not None else None
        for run in strip.runs:
            lhs = q + strip.query * q_strides[0] + (run.first - self.first_head) * q_strides[1]
            target = scores + (run.first - strip.first) * size * 4
            self._product(strip, run, lhs, q_strides, self.at["k"], True, keys, target, size * 4)
        self.lowering.emitter.emit(
            edge10.SoftmaxBlock,
            keys,
            first_key,
            scores=scores,
            score_stride=size * 4,
            probabilities=probabilities,
            probability_stride=size * 2,
            maximum=maximum,
            total=total,
            alpha=alpha,
            rows=rows,
            heads=strip.heads,
            first_query=self._first_query(strip),
            window=self.op.window,
            sequence=self.sequence,
            scale=self.op.scale,
            softcap=self.op.softcap,
            temperature=heat,
            reads=[
                sram_range(scores, rows * size * 4),
                sram_range(maximum, rows * 4),
                sram_range(total, rows * 4),
                *([] if heat is None else [sram_range(heat, 4)]),
            ],
            writes=[
                sram_range(probabilities, rows * size * 2, write=True),
                *(sram_range(at, rows * 4, write=True) for at in (maximum, total, alpha)),
            ],
        )

    def _first_query(self, strip: _Strip) -> int:
        """The position of the first query after `pos`; after all keys where it sees all of them."""
        if self.op.segment is not None:
            return self.capacity
        return self.lowering.first_token + self.first + strip.query

    def _sum_up(self, strip: _Strip, keys: Value) -> None:
        """A strip's values, added to what it has of the blocks before."""
        size, dim, rows = self.keys, self.dim, strip.rows
        product, probabilities, alpha = (
            self.at[f"{name}{strip.buffer}"] for name in ("scores", "probabilities", "alpha")
        )
        for run in strip.runs:
            head = run.first - strip.first
            strides = (strip.heads * size * 2, size * 2)
            self._product(
                strip,
                run,
                probabilities + head * size * 2,
                strides,
                self.at["v"],
                False,
                keys,
                product + head * dim * 4,
                dim * 4,
            )
        sums, nbytes = self._kept("sum", strip, dim * 4), rows * dim * 4
        self.lowering.emitter.emit(
            edge10.VectorOp,
            function="rescale_add",
            inputs=(sums, alpha, product),
            outputs=(sums,),
            rows=rows,
            cols=dim,
            input_types=ArrayAttr([f32, f32, f32]),
            output_types=ArrayAttr([f32]),
            reads=[sram_range(sums, nbytes), sram_range(alpha, rows * 4), sram_range(product, nbytes)],
            writes=[sram_range(sums, nbytes, write=True)],
        )

    @property
    def _key_major(self) -> bool:
        """Whether a block in SRAM holds all heads of a key, then those of the next."""
        return self.op.layout == "NHD" and not self.op.scales and self.groups == self.cache_heads

    def _load_cache(self, name: str, first_key: Value, keys: Value) -> None:
        """A block of the keys ("k") or the values ("v") as f16."""
        at, op, size = self.at, self.op, self.groups * self.keys
        cache = self._place(op.k if name == "k" else op.v)
        if not op.scales:
            self._load_rows(cache, at[name], self.dim * 2, "eidma", first_key, keys)
            return
        q, scales = at[f"{name}_q"], at[f"{name}_scales"]
        self._load_rows(cache, q, self.dim, "eidma", first_key, keys)
        self._load_rows(self._place(op.scales[name == "v"]), scales, 2, "ebdma", first_key, keys)
        self.lowering.emitter.emit(
            edge10.DequantRows,
            keys,
            q=q,
            scales=scales,
            out=at[name],
            planes=self.groups,
            plane_rows=self.keys,
            rows=edge10.DYNAMIC,
            k=self.dim,
            reads=[sram_range(q, size * self.dim), sram_range(scales, size * 2)],
            writes=[sram_range(at[name], size * self.dim * 2, write=True)],
        )

    def _load_rows(
        self, cache: Place, sram: int, row: int, queue: str, first_key: Value, keys: Value
    ) -> None:
        """The block's rows of `row` bytes of the cache heads in use, each head's at its own plane."""
        emitter, heads, capacity = self.lowering.emitter, self.cache_heads, self.capacity
        by_head = self.op.layout == "HND"
        to_head, to_key = (capacity * row, row) if by_head else (row, heads * row)
        planes = self.groups
        if self._key_major:  # the heads of a key follow each other in both memories: one run
            planes, row = 1, self.groups * row
        address = emitter.offset(self.lowering.address(cache), first_key, to_key)
        whole = planes * self.keys * row
        read = (self.first_group + self.groups) * capacity * row if by_head else capacity * to_key
        emitter.emit(
            edge10.Load,
            address,
            keys,
            offset=cache.offset + self.first_group * to_head,
            sram=sram,
            shape=(planes, edge10.DYNAMIC, row),
            dram_strides=(to_head, to_key),
            sram_strides=(self.keys * row, row),
            queue=queue,
            reads=cache.access(read, write=False),
            writes=[sram_range(sram, whole, write=True)],
        )

    def _product(
        self,
        strip: _Strip,
        run: HeadRun,
        lhs: int,
        strides: tuple[int, int],
        cache: int,
        transposed: bool,
        keys: Value,
        target: int,
        target_row: int,
    ) -> None:
        """scores = q K^T (`transposed`: the columns are keys) or p V, for one run of a strip's heads."""
        lowering, row = self.lowering, self.dim * 2
        to_head, to_key = (row, self.groups * row) if self._key_major else (self.keys * row, row)
        rhs = cache + (run.group - self.first_group) * to_head
        acc, width = (
            next(self._accumulators),
            align(self.keys if transposed else self.dim, lowering.machine.cube.columns) * 4,
        )
        n, k = (edge10.DYNAMIC, self.dim) if transposed else (self.dim, edge10.DYNAMIC)
        acc_bytes = strip.count * run.heads * width
        lhs_bytes = (
            (strip.count - 1) * strides[0]
            + (run.heads - 1) * strides[1]
            + (row if transposed else self.keys * 2)
        )
        rhs_bytes = (self.keys - 1) * to_key + row
        reads: list[Access] = [sram_range(lhs, lhs_bytes), sram_range(rhs, rhs_bytes)]
        lowering.emitter.emit(
            edge10.Matmul,
            keys,
            lhs=lhs,
            lhs_strides=strides,
            rhs=rhs,
            rhs_stride=to_key,
            transposed=transposed,
            acc=acc,
            acc_stride=width,
            m=(strip.count, run.heads),
            n=n,
            k=k,
            reads=reads,
            writes=[acc_range(acc, acc_bytes, write=True)],
        )
        extent = (strip.count - 1) * strip.heads * target_row + run.heads * target_row
        lowering.emitter.emit(
            edge10.Drain,
            *([keys] if transposed else []),
            acc=acc,
            acc_stride=width,
            m=(strip.count, run.heads),
            n=n,
            sram=target,
            sram_strides=(strip.heads * target_row, target_row),
            element=f32,
            reads=[acc_range(acc, acc_bytes)],
            writes=[sram_range(target, extent, write=True)],
        )
