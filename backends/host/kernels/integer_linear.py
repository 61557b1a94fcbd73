"""ty.quantized_linear on activations that are rounded to whole numbers: products are added up as integers.

Each group of a row's activations becomes codes and one factor, as wide as a group of the weight: 8 bits are codes
-127..127, 16 bits codes of two such bytes, 128 times the first and the second in -64..63, whose sums are added up
apart.  With s, z a weight's scale and zero point and f, c an activation's factor and codes, a group gives

    sum_k (q_k - z) s x_k  ~  s f (sum_k q_k c_k  -  z sum_k c_k)

The first sum is exact in int32: bytes of the weight are multiplied as they lie in the file, low nibbles with the codes
of even columns, high nibbles with those of odd ones, `lanes` sums of four at once, by `vpdpbusd` or, where the
processor has none, by `vpmaddubsw` (15 * 127 * 2 fits 16 bits, so that nothing saturates).  The second needs no weight,
and is as exact: their difference is rounded to f32 once.  A row's groups are added up one after the other, by
`with_group`, whatever the way: a token's numbers are the same bits alone and in any company.

Of few tokens the rows of the weight are read as they lie, several at once (`streams.py`): a group of 128 is one cache
line of one row.  Many tokens read a block of rows turned (`_Panel`), word by word with a row in each lane, so that a sum
of a group is a vector over rows which scales meet once; turning costs a block what two tokens do, and needs no other
file.  A processor that multiplies tiles of bytes reads such blocks in its own order (`tile_linear.py`).
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.group_scales import by_group, scales_of_block, unpacked
from tyir.backends.host.kernels.rounded_activations import (
    Activations,
    Shape,
    centred,
    rounded_activations,
    whole_sum,
    with_group,
)
from tyir.backends.host.kernels.streams import ask_ahead, in_streams, streams_of
from tyir.backends.host.kernels.tile_linear import room_for, takes_tiles, tile_linear
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Expr,
    bind,
    exact_sums,
    flat,
    get,
    load,
    loop,
    put,
    register,
    span,
    splat,
    store,
    vector,
)
from tyir.dialects import ty

__all__ = ["MANY_TOKENS", "WHOLE_GROUP", "integer_linear", "takes_group"]

_LOW: Final = 0x0F0F0F0F
_WORD: Final = 4  # bytes that one lane of a product adds up
MANY_TOKENS: Final = 8  # tokens from which a block of rows is turned
WHOLE_GROUP: Final = 2 * 16  # two vectors of bytes: what a group is made of


def takes_group(group: int) -> bool:
    """Whether groups of this size are whole vectors."""
    return group % WHOLE_GROUP == 0


def _dot(total: Expr, weights: Expr, codes: Expr, lanes: int, cpu: Cpu) -> Expr:
    """total + the sums of four products each; `weights` are words of unsigned bytes, `codes` signed ones."""
    unsigned = T.reinterpret(vector("uint8", 4 * lanes), weights)
    words, halves = vector("int32", lanes), vector("int16", 2 * lanes)
    if cpu.byte_products == "vnni":
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        return T.call_llvm_pure_intrin(words, name, total, unsigned, codes)
    pairs, words_of = {
        8: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
        4: ("llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.sse2.pmadd.wd"),
    }[lanes]
    products = T.call_llvm_pure_intrin(halves, pairs, unsigned, codes)
    return total + T.call_llvm_pure_intrin(words, words_of, products, T.broadcast(T.int16(1), 2 * lanes))


class _Product:
    """Emits the product of one kernel, rows of the weight as they lie."""

    def __init__(
        self,
        shape: Shape,
        weight: tuple[Buffer, Buffer, Buffer],
        x: Activations,
        bias: Buffer | None,
        out: Buffer,
        cpu: Cpu,
    ) -> None:
        self.shape, self.x, self.bias, self.out, self.cpu = shape, x, bias, out, cpu
        self.q, self.scales, self.zeros = weight
        self.rows = streams_of(cpu)

    def columns(self) -> int:
        """Rows of x of a tile: as many as there are registers for, preferably a number that leaves none."""
        most = min(self.shape.m, max(1, self.cpu.accumulators // self.rows))
        even = max(d for d in range(1, most + 1) if self.shape.m % d == 0)
        return even if 2 * even > most else -(-self.shape.m // -(-self.shape.m // most))

    def ready(self, first: Expr, count: Expr, most: int) -> None:
        """Scales and zero points of `count` rows from `first` on."""
        self.first = first
        self.made = unpacked(self.scales, self.zeros, first, count, most, self.shape.groups, self.cpu)

    def tile(self, rows: Sequence[Expr], m0: Expr, columns: int) -> None:
        """out[m0.., rows]: a group of each row in turn.  `rows` count from those made ready."""
        shape, width = self.shape, len(rows)
        sums = [register(width, 0) for _ in range(columns)]
        scales, zeros = (by_group(made, rows, shape.groups) for made in self.made)
        with T.serial(0, shape.groups) as g:
            found: list[list[Expr]] = [[] for _ in range(columns)]
            for row in rows:
                if columns == 1:
                    ask_ahead(self.q, self.first + row, g * (shape.group // 2))
                halves = self._halves(self.first + row, g)
                for c in range(columns):
                    found[c].append(self._sum(halves, m0 + c, g))
            scale, zero = (bind(made[span(g * width, width)]) for made in (scales, zeros))
            for c in range(columns):
                at = bind(self.x.group(m0 + c, g))
                total = bind(centred(exact_sums(found[c], shape.lanes), zero, self.x.sums[at], width))
                put(sums[c], with_group(get(sums[c], width), total, scale, self.x.factors[at], width), width)
        for c in range(columns):
            for r, row in enumerate(rows):
                total = sums[c][r]
                total = total if self.bias is None else total + load(self.bias, [self.first + row], 1)
                store(self.out, [m0 + c, self.first + row], total, 1)

    def _halves(self, row: Expr, g: Expr) -> list[Expr]:
        """Of each part of a group the low nibbles and the high ones, as words of bytes."""
        lanes, width = self.shape.lanes, 4 * self.shape.lanes
        low = splat(T.int32(_LOW), lanes)
        found = []
        for part in range(self.shape.parts):
            raw = self.q[row, span(g * (self.shape.group // 2) + part * width, width)]
            word = bind(T.reinterpret(vector("int32", lanes), raw))
            found += [bind(word & low), bind(T.shift_right(word, splat(T.int32(4), lanes)) & low)]
        return found

    def _sum(self, halves: Sequence[Expr], row: Expr, g: Expr) -> Expr:
        """The sum of a group, which is that of all lanes."""
        sums = []
        for codes in self.x.codes:
            total = splat(T.int32(0), self.shape.lanes)
            for number, half in enumerate(halves):
                total = _dot(total, half, self._codes(codes, row, g, number), self.shape.lanes, self.cpu)
            sums.append(bind(total))
        return bind(whole_sum(sums, self.shape.lanes))

    def _codes(self, codes: Buffer, row: Expr, g: Expr, number: int) -> Expr:
        """The bytes that half `number` of a group is multiplied with."""
        width = 4 * self.shape.lanes
        return codes[span(self.x.code(row, g * self.shape.group + number * width), width)]


class _Panel:
    """Emits the product of a block of rows that is turned first: [groups, words of a group, vectors, lanes]
    32-bit words, a row in each lane; scales and zero points [groups, vectors, lanes].
    """

    def __init__(
        self,
        shape: Shape,
        weight: tuple[Buffer, Buffer, Buffer],
        x: Activations,
        bias: Buffer | None,
        out: Buffer,
        cpu: Cpu,
    ) -> None:
        self.shape, self.weight, self.x, self.bias, self.out, self.cpu = shape, weight, x, bias, out, cpu
        self.lanes = cpu.lanes
        self.vectors = 2 if cpu.registers >= 32 else 1
        self.rows = self.vectors * self.lanes
        self.words = shape.group // 8
        most = max(1, (cpu.registers - 4 * self.vectors) // ((1 + shape.bytes) * self.vectors))
        self.columns = -(-shape.m // -(-shape.m // most))

    def emit(self, n0: Expr) -> None:
        """out[:, n0 : n0 + rows]."""
        self._turn(n0)
        m, columns = self.shape.m, self.columns
        with T.serial(0, m // columns) as c:
            self._tile(n0, c * columns, columns)
        if m % columns:
            self._tile(n0, T.int32(m - m % columns), m % columns)

    def _turn(self, n0: Expr) -> None:
        shape = self.shape
        q, scales, zeros = self.weight
        self.panel = T.alloc_buffer((shape.k // 8 * self.rows,), "int32")
        with T.serial(0, shape.k // 8) as word, T.serial(0, self.rows) as r:
            value = T.reinterpret("int32", q[n0 + r, span(word * _WORD, _WORD)])
            T.buffer_store(self.panel, value, [word * self.rows + r])
        self.scales, self.zeros = scales_of_block(scales, zeros, n0, self.rows, shape.groups)

    def _words_before(self, word: Expr, odd: int) -> Expr:
        """How many words of codes lie before those that half `odd` of a word of the weight meets."""
        lanes = self.shape.lanes
        return (word // lanes * 2 + odd) * lanes + word % lanes

    def _tile(self, n0: Expr, m0: Expr, columns: int) -> None:
        shape, lanes = self.shape, self.lanes
        codes = [flat(c, shape.m * shape.k // _WORD, _WORD) for c in self.x.codes]
        grid = [(v, c) for v in range(self.vectors) for c in range(columns)]
        sums = {at: register(lanes, 0) for at in grid}
        totals = {at: [T.alloc_buffer((lanes,), "int32") for _ in codes] for at in grid}
        low = splat(T.int32(_LOW), lanes)
        with T.serial(0, shape.groups) as g:
            for total in (total for at in grid for total in totals[at]):
                T.buffer_store(total, splat(T.int32(0), lanes), [span(0, lanes)])
            with T.serial(0, self.words) as w:
                word = bind(g * self.words + w)
                for v in range(self.vectors):
                    both = bind(self.panel[span((word * self.vectors + v) * lanes, lanes)])
                    halves = (both & low, T.shift_right(both, splat(T.int32(4), lanes)) & low)
                    for odd, half in enumerate(map(bind, halves)):
                        for c in range(columns):
                            at = (m0 + c) * (shape.k // _WORD) + self._words_before(word, odd)
                            for number, total in enumerate(totals[v, c]):
                                code = T.reinterpret("int32", codes[number][at, span(0, _WORD)])
                                spread = T.reinterpret(vector("int8", 4 * lanes), splat(code, lanes))
                                value = _dot(total[span(0, lanes)], half, spread, lanes, self.cpu)
                                T.buffer_store(total, value, [span(0, lanes)])
            for v in range(self.vectors):
                at = (g * self.vectors + v) * lanes
                scale, zero = bind(self.scales[span(at, lanes)]), bind(self.zeros[span(at, lanes)])
                for c in range(columns):
                    at = bind(self.x.group(m0 + c, g))
                    whole = whole_sum([t[span(0, lanes)] for t in totals[v, c]], lanes)
                    total = bind(centred(whole, zero, self.x.sums[at], lanes))
                    sum = get(sums[v, c], lanes)
                    put(sums[v, c], with_group(sum, total, scale, self.x.factors[at], lanes), lanes)
        for v, c in grid:
            first = n0 + v * lanes
            value = get(sums[v, c], lanes)
            value = value if self.bias is None else value + load(self.bias, [first], lanes)
            store(self.out, [m0 + c, first], value, lanes)


def integer_linear(op: ty.QuantizedLinear, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, q, scales, zeros, *bias, out = buffers
    *lead, k = (int(d) for d in x.shape)
    shape = Shape.of(math.prod(lead), int(q.shape[0]), k, op.group_size, cpu)
    m, n = shape.m, shape.n
    turned = m >= MANY_TOKENS
    tiled = turned and cpu.tiles and takes_tiles(shape)
    rows = room_for(shape) if tiled else m
    activations = rounded_activations(flat(x, m, k), shape, cpu, rows, tiled)
    given = (shape, (q, scales, zeros), activations, bias[0] if bias else None, flat(out, m, n), cpu)
    whole = 0
    if tiled:
        whole = tile_linear(*given)
    elif turned:
        panel = _Panel(*given)
        whole = n - n % panel.rows
        if whole:
            with loop(whole // panel.rows, cpu, m * n * k) as block:
                panel.emit(bind(block * panel.rows))
    if n > whole:
        _by_rows(_Product(*given), whole)


def _by_rows(product: _Product, first: int) -> None:
    """The rows of the weight from `first` on, as they lie, in streams."""
    m, n, k, cpu = product.shape.m, product.shape.n, product.shape.k, product.cpu
    rows, columns = product.rows, product.columns()

    def all_columns(at: Sequence[Expr]) -> None:
        with T.serial(0, m // columns) as c:
            product.tile(at, c * columns, columns)
        if m % columns:
            product.tile(at, T.int32(m - m % columns), m % columns)

    in_streams(range(first, n), rows, k // 2, cpu, m * (n - first) * k, product.ready, all_columns)
