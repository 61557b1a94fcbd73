"""Attention over the cache, by blocks of keys with an online softmax (as in FlashAttention, arXiv:2205.14135): nothing of size tokens x keys is kept.

For each piece of the queries (and each cache head, when all heads together do not fit):
    fill m = -1e30, l = 0, o = 0
    for each block of keys, as many as the position asks for:
        load K block;  scores = q K^T (cube, drain);  softmax block -> p, alpha;  load V block;  pv = p V (cube, drain);  o = o * alpha + pv
    out = o / l
An 8-bit cache's blocks are loaded with their scales and de-quantised to f16 first.  The K and V blocks are handed from turn to turn by tokens of their own: the K block of the next turn loads while this turn is at its V block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.allocate import align
from tyir.backends.edge10.context import Lowering, Place, acc_range, sram_range
from tyir.backends.edge10.dependences import Access, Slot, Tracker
from tyir.backends.edge10.emitter import Emitter
from tyir.backends.edge10.lower_cache import require_one_sequence
from tyir.backends.edge10.tiling import AttentionBlocks, attention_blocks, spans
from tyir.dialects import edge10
from tyir.dialects.kv import CachedAttention
from tyir.dialects.ty import tensor_type
from tyir.ir import Value
from tyir.types import f16, f32

__all__ = ["lower_attention"]

_LOWEST = -1.0e30  # the running maximum before the first key: finite, so that differences with it are numbers


@dataclass(frozen=True)
class _Run:
    """Neighbouring query heads that read one cache head."""

    group: int
    first: int
    heads: int


def _runs(kv_heads: Sequence[int]) -> list[_Run]:
    runs: list[_Run] = []
    first = 0
    for group, members in groupby(kv_heads):
        count = len(list(members))
        runs.append(_Run(group, first, count))
        first += count
    return runs


def lower_attention(op: CachedAttention, low: Lowering) -> None:
    """`kv.attention`."""
    require_one_sequence(op)
    _, tokens, heads, dim = tensor_type(op.q).static_shape
    runs = _runs(op.kv_heads)
    groups = tensor_type(op.k).static_shape[1]
    blocks = attention_blocks(tokens, heads, groups, dim, max(r.heads for r in runs), low.machine, low.plan, quantized=bool(op.scales))
    for first, count in spans(tokens, blocks.queries):
        for members in [runs] if blocks.all_heads else [[r] for r in runs]:
            _Block(op, low, blocks, members, first, count).lower()


class _Block:
    """`count` queries from `first` on, for some runs of heads.  Rows are numbered [query, head of these runs]."""

    def __init__(self, op: CachedAttention, low: Lowering, blocks: AttentionBlocks, runs: Sequence[_Run], first: int, count: int) -> None:
        self.op, self.low, self.runs, self.first, self.count = op, low, runs, first, count
        self.keys = blocks.keys
        _, _, self.all_heads, self.dim = tensor_type(op.q).static_shape
        _, groups, self.capacity, _ = tensor_type(op.k).static_shape
        self.first_group, self.groups = (0, groups) if blocks.all_heads else (runs[0].group, 1)
        self.first_head, self.heads = runs[0].first, sum(r.heads for r in runs)
        self.rows = count * self.heads
        self.at: dict[str, int] = {}
        offset = low.plan.temp
        for name, size in blocks.layout(self.heads, self.groups, self.dim).items():
            self.at[name] = offset
            offset += size

    def lower(self) -> None:
        emitter = self.low.emitter
        q, q_strides = self._queries()
        for name, size, value in (("maximum", self.rows, _LOWEST), ("total", self.rows, 0.0), ("sum", self.rows * self.dim, 0.0)):
            emitter.emit(
                edge10.VectorOp, function="fill", inputs=(), outputs=(self.at[name],), input_types=ArrayAttr([]), output_types=ArrayAttr([f32]), rows=1, cols=size,
                constant=value, writes=[sram_range(self.at[name], size * 4, write=True)],
            )  # fmt: skip
        self._loop(q, q_strides)
        self._finish()

    # -- queries and result ---------------------------------------------------------------------------------------
    def _queries(self) -> tuple[int, tuple[int, int]]:
        """Offset of the first query row in SRAM and the strides [token, head]."""
        place, row = self.low.place(self.op.q), self.dim * 2
        start = (self.first * self.all_heads + self.first_head) * row
        if place.in_sram:
            return place.offset + start, (self.all_heads * row, row)
        self.low.load(place.at(start), self.at["q"], (1, self.count, self.heads * row), dram_strides=(0, self.all_heads * row))
        return self.at["q"], (self.heads * row, row)

    def _finish(self) -> None:
        place, row = self.low.place(self.op.out), self.dim * 2
        start = (self.first * self.all_heads + self.first_head) * row
        target, outer = (place.offset + start, self.all_heads * row) if place.in_sram else (self.at["out"], self.heads * row)
        self.low.emitter.emit(
            edge10.VectorOp, function="divide_rows", inputs=(self.at["sum"], self.at["total"]), outputs=(target,), rows=self.rows, cols=self.dim, group=self.heads,
            output_strides=(outer, row), input_types=ArrayAttr([f32, f32]), output_types=ArrayAttr([f16]),
            reads=[sram_range(self.at["sum"], self.rows * self.dim * 4), sram_range(self.at["total"], self.rows * 4)],
            writes=[sram_range(target, (self.count - 1) * outer + self.heads * row, write=True)],
        )  # fmt: skip
        if not place.in_sram:
            self.low.store(place.at(start), target, (1, self.count, self.heads * row), dram_strides=(0, self.all_heads * row))

    # -- the loop -------------------------------------------------------------------------------------------------
    def _loop(self, q: int, q_strides: tuple[int, int]) -> None:
        outer, pos, size = self.low.emitter, self.low.emitter.position(), self.keys
        visible = outer.affine([pos], [1], self.first + self.count, high=self.capacity)
        start = outer.affine([pos], [1], self.first - self.op.window + 1, divisor=size) if self.op.window else outer.affine([], [])
        end = outer.affine([visible], [1], size - 1, divisor=size)
        block = Emitter.body(3)
        index, *tokens = block.args
        slots = (Slot(self.at["k"], self.at["v"]), Slot(self.at["v"], self.at["scores"]))
        inner = Tracker(slots, tokens[:2], tokens[2])
        self.low.emitter = body = Emitter(block, inner, outer)
        try:
            first_key = body.affine([index], [size])
            keys = body.affine([visible, first_key], [1, -1], high=size)
            self._turn(q, q_strides, first_key, keys)
            carried, rest = inner.finish()
            block.append(edge10.Yield(tokens=tuple(body.join(t) for t in (*carried, rest))))
        finally:
            self.low.emitter = outer
        outer.loop(start, end, block, inner)

    def _turn(self, q: int, q_strides: tuple[int, int], first_key: Value, keys: Value) -> None:
        at, size, dim = self.at, self.keys, self.dim
        self._load_cache("k", first_key, keys)
        for run in self.runs:
            head = run.first - self.first_head
            scores = at["scores"] + head * size * 4
            self._product(run, q + head * q_strides[1], q_strides, at["k"], True, keys, scores, size * 4)
        self.low.emitter.emit(
            edge10.SoftmaxBlock, keys, first_key, scores=at["scores"], score_stride=size * 4, probabilities=at["probabilities"], probability_stride=size * 2,
            maximum=at["maximum"], total=at["total"], alpha=at["alpha"], rows=self.rows, heads=self.heads, first_query=self.first, window=self.op.window, scale=self.op.scale,
            reads=[sram_range(at["scores"], self.rows * size * 4), sram_range(at["maximum"], self.rows * 4), sram_range(at["total"], self.rows * 4)],
            writes=[sram_range(at["probabilities"], self.rows * size * 2, write=True), *(sram_range(at[n], self.rows * 4, write=True) for n in ("maximum", "total", "alpha"))],
        )  # fmt: skip
        self._load_cache("v", first_key, keys)
        for run in self.runs:
            head = run.first - self.first_head
            strides = (self.heads * size * 2, size * 2)
            self._product(
                run, at["probabilities"] + head * size * 2, strides, at["v"], False, keys, at["product"] + head * dim * 4, dim * 4
            )
        total = self.rows * dim * 4
        self.low.emitter.emit(
            edge10.VectorOp, function="rescale_add", inputs=(at["sum"], at["alpha"], at["product"]), outputs=(at["sum"],), rows=self.rows, cols=dim,
            input_types=ArrayAttr([f32, f32, f32]), output_types=ArrayAttr([f32]),
            reads=[sram_range(at["sum"], total), sram_range(at["alpha"], self.rows * 4), sram_range(at["product"], total)],
            writes=[sram_range(at["sum"], total, write=True)],
        )  # fmt: skip

    def _load_cache(self, name: str, first_key: Value, keys: Value) -> None:
        """A block of the keys ("k") or the values ("v") as f16."""
        at, op, size = self.at, self.op, self.groups * self.keys
        cache = self.low.place(op.k if name == "k" else op.v)
        if not op.scales:
            self._load_rows(cache, at[name], self.dim * 2, "eidma", first_key, keys)
            return
        q, scales = at[f"{name}_q"], at[f"{name}_scales"]
        self._load_rows(cache, q, self.dim, "eidma", first_key, keys)
        self._load_rows(self.low.place(op.scales[name == "v"]), scales, 2, "ebdma", first_key, keys)
        self.low.emitter.emit(
            edge10.DequantRows, keys, q=q, scales=scales, out=at[name], planes=self.groups, plane_rows=self.keys, rows=edge10.DYNAMIC, k=self.dim,
            reads=[sram_range(q, size * self.dim), sram_range(scales, size * 2)], writes=[sram_range(at[name], size * self.dim * 2, write=True)],
        )  # fmt: skip

    def _load_rows(self, cache: Place, sram: int, row: int, queue: str, first_key: Value, keys: Value) -> None:
        """The block's rows of `row` bytes of the cache heads in use, each head's at its own plane."""
        emitter = self.low.emitter
        address = emitter.offset(self.low.address(cache), first_key, row)
        whole = self.groups * self.keys * row
        emitter.emit(
            edge10.Load, address, keys, offset=cache.offset + self.first_group * self.capacity * row, sram=sram, shape=(self.groups, edge10.DYNAMIC, row),
            dram_strides=(self.capacity * row, row), sram_strides=(self.keys * row, row), queue=queue,
            reads=cache.access((self.first_group + self.groups) * self.capacity * row, write=False), writes=[sram_range(sram, whole, write=True)],
        )  # fmt: skip

    def _product(
        self, run: _Run, lhs: int, strides: tuple[int, int], cache: int, transposed: bool, keys: Value, target: int, target_row: int
    ) -> None:
        """scores = q K^T (`transposed`: the columns are keys) or p V, for one run of heads."""
        low, row = self.low, self.dim * 2
        rhs = cache + (run.group - self.first_group) * self.keys * row
        acc, width = next(low.accumulators), align(self.keys if transposed else self.dim, low.machine.cube.columns) * 4
        n, k = (edge10.DYNAMIC, self.dim) if transposed else (self.dim, edge10.DYNAMIC)
        acc_bytes = self.count * run.heads * width
        lhs_bytes = (self.count - 1) * strides[0] + (run.heads - 1) * strides[1] + (row if transposed else self.keys * 2)
        reads: list[Access] = [sram_range(lhs, lhs_bytes), sram_range(rhs, self.keys * row)]
        low.emitter.emit(
            edge10.Matmul, keys, lhs=lhs, lhs_strides=strides, rhs=rhs, rhs_stride=row, transposed=transposed, acc=acc, acc_stride=width, m=(self.count, run.heads), n=n, k=k,
            reads=reads, writes=[acc_range(acc, acc_bytes, write=True)],
        )  # fmt: skip
        extent = (self.count - 1) * self.heads * target_row + run.heads * target_row
        low.emitter.emit(
            edge10.Drain, *([keys] if transposed else []), acc=acc, acc_stride=width, m=(self.count, run.heads), n=n, sram=target,
            sram_strides=(self.heads * target_row, target_row), element=f32,
            reads=[acc_range(acc, acc_bytes)], writes=[sram_range(target, extent, write=True)],
        )  # fmt: skip
