"""ty.quantized_linear on 8-bit activations: products of 4-bit and 8-bit numbers are added up as integers.

Each group of a row's activations becomes codes -127..127 and one factor, as wide as a group of the weight.  With s, z
a weight's scale and zero point and f, c an activation's factor and codes, a group gives

    sum_k (q_k - z) s x_k  ~  s f sum_k q_k c_k  -  s z f sum_k c_k

The first sum is exact in int32: bytes of the weight are multiplied as they lie in the file, low nibbles with the codes
of even columns, high nibbles with those of odd ones, `lanes` sums of four at once, by `vpdpbusd` or, where the
processor has none, by `vpmaddubsw` (15 * 127 * 2 fits 16 bits, so that nothing saturates).  It is scaled into f32 sums
of the row.  The second needs no weight: `offsets`, one number for each group, which are multiplied with s z at the end.
A row's lanes are added up once.

Of few tokens a row of the weight is read as it lies, one linear stream a core: a group of 128 is one cache line of one
row.  Many tokens read a block of rows turned (`_Panel`), word by word with a row in each lane, so that a sum of a group
is a vector over rows which scales meet once; turning costs a block what two tokens do, and needs no other file.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.quantize_rows import rounded
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Expr,
    add_to,
    bind,
    f32,
    flat,
    get,
    horizontal_max,
    horizontal_sum,
    lanes_for,
    load,
    loop,
    prefetch,
    put,
    register,
    span,
    splat,
    store,
    vector,
)
from tyir.dialects import ty

__all__ = ["integer_linear", "takes_group"]

_ROWS: Final = 4
_AHEAD: Final = 8  # rows that are asked for ahead of their use, where one row of x meets each weight once
_BLOCK_ROWS: Final = 32  # whose scales are made ready together
_LOW: Final = 0x0F0F0F0F
_WORD: Final = 4  # bytes that one lane of a product adds up
_MANY: Final = 8  # tokens from which a block of rows is turned
_SMALLEST: Final = 16  # bytes of a vector


def takes_group(group: int) -> bool:
    """Whether groups of this size are whole vectors."""
    return group % (2 * _SMALLEST) == 0


@dataclass(frozen=True)
class _Shape:
    """Sizes of a product: a group of a row is `parts` vectors of `lanes` 32-bit words; `padded` groups fill
    vectors of `lanes` numbers.
    """

    m: int
    n: int
    k: int
    group: int
    lanes: int
    parts: int

    @classmethod
    def of(cls, m: int, n: int, k: int, group: int, cpu: Cpu) -> _Shape:
        lanes = math.gcd(4 * cpu.lanes, group // 2) // 4
        return cls(m, n, k, group, lanes, group // 2 // (4 * lanes))

    @property
    def groups(self) -> int:
        return self.k // self.group

    @property
    def padded(self) -> int:
        return -(-self.groups // self.lanes) * self.lanes


@dataclass(frozen=True)
class _Activations:
    """Codes [m, groups, parts, 2, 4 * lanes], even columns of a part and then odd ones (for panels: `lanes`
    is 1, a part is a word); factors and offsets [m, padded].
    """

    codes: Buffer
    factors: Buffer
    offsets: Buffer


def _quantized(x: Buffer, shape: _Shape, cpu: Cpu, half: int) -> _Activations:
    """`half`: how many even columns stand before as many odd ones."""
    made = _Activations(
        T.alloc_buffer((shape.m * shape.k,), "int8"),
        T.alloc_buffer((shape.m * shape.padded,), "float32"),
        T.alloc_buffer((shape.m * shape.padded,), "float32"),
    )
    lanes = lanes_for(cpu.lanes, 4 * shape.lanes)
    with loop(shape.m, cpu, shape.m * shape.k * 8) as row:
        with T.serial(shape.groups, shape.padded) as g:
            T.buffer_store(made.factors, f32(0), [row * shape.padded + g])
            T.buffer_store(made.offsets, f32(0), [row * shape.padded + g])
        with T.serial(0, shape.groups) as g:
            first = bind(g * shape.group)
            largest, total = register(lanes, 0), register(lanes, 0)
            with T.serial(0, shape.group // lanes) as i:
                value = bind(load(x, [row, first + i * lanes], lanes))
                put(largest, T.max(T.max(value, f32(0, lanes) - value), get(largest, lanes)), lanes)
            most = bind(horizontal_max(largest, lanes))
            times = bind(T.Select(most > f32(0), f32(127) / most, f32(0)))
            run = lanes_for(cpu.lanes, half)  # neighbouring codes
            with T.serial(0, shape.group // (2 * half)) as part, T.serial(0, half // run) as i:
                for odd in range(2):
                    column = bind(first + part * 2 * half + 2 * i * run + odd)
                    value = T.cast(x[row, T.ramp(column, 2, run)], vector("float32", run))
                    code = bind(rounded(value * splat(times, run), run))
                    at = row * shape.k + first + (2 * part + odd) * half + i * run
                    T.buffer_store(made.codes, T.cast(code, vector("int8", run)), [span(at, run)])
            with T.serial(0, shape.group // lanes) as i:
                value = load(x, [row, first + i * lanes], lanes)
                code = rounded(value * splat(times, lanes), lanes)
                add_to(total, T.cast(code, vector("float32", lanes)), lanes)
            factor = bind(most / f32(127))
            T.buffer_store(made.factors, factor, [row * shape.padded + g])
            T.buffer_store(made.offsets, factor * horizontal_sum(total, lanes), [row * shape.padded + g])
    return made


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
    """Emits the product of one kernel."""

    def __init__(
        self, shape: _Shape, q: Buffer, x: _Activations, bias: Buffer | None, out: Buffer, cpu: Cpu
    ) -> None:
        self.shape, self.q, self.x, self.bias, self.out, self.cpu = shape, q, x, bias, out, cpu

    def ready(self, scales: Buffer, zeros: Buffer, n0: Expr, count: Expr) -> None:
        """Scales, and scales times zero points, of `count` rows from n0 as f32 [row, padded]."""
        shape = self.shape
        self.scales = T.alloc_buffer((_BLOCK_ROWS * shape.padded,), "float32")
        self.shifts = T.alloc_buffer((_BLOCK_ROWS * shape.padded,), "float32")
        with T.serial(0, count) as r:
            with T.serial(0, shape.groups) as g:
                zero = T.shift_right(zeros[n0 + r, g // 2], T.cast(g % 2 * 4, "uint8")) & T.uint8(15)
                scale = bind(load(scales, [n0 + r, g], 1))
                T.buffer_store(self.scales, scale, [r * shape.padded + g])
                T.buffer_store(
                    self.shifts, scale * T.cast(T.cast(zero, "int32"), "float32"), [r * shape.padded + g]
                )
            with T.serial(shape.groups, shape.padded) as g:
                T.buffer_store(self.shifts, f32(0), [r * shape.padded + g])

    def tile(self, n0: Expr, local: Expr, m0: Expr, rows: int, columns: int) -> None:
        """out[m0.., n0..] of `rows` weight rows, which are `local`.. of those made ready."""
        shape, lanes = self.shape, self.shape.lanes
        sums = [[register(lanes, 0) for _ in range(columns)] for _ in range(rows)]
        with T.serial(0, shape.groups) as g:
            for r in range(rows):
                if columns == 1:
                    prefetch(self.q, [n0 + r + _AHEAD, g * (shape.group // 2)])
                halves = self._halves(n0 + r, g)
                scale = bind(splat(self.scales[(local + r) * shape.padded + g], lanes))
                for c in range(columns):
                    factor = splat(self.x.factors[(m0 + c) * shape.padded + g], lanes)
                    total = T.cast(self._sum(halves, m0 + c, g), vector("float32", lanes))
                    add_to(sums[r][c], total * (scale * factor), lanes)
        for r in range(rows):
            for c in range(columns):
                with T.serial(0, shape.padded // lanes) as i:
                    shift = self.shifts[span((local + r) * shape.padded + i * lanes, lanes)]
                    offset = self.x.offsets[span((m0 + c) * shape.padded + i * lanes, lanes)]
                    put(sums[r][c], get(sums[r][c], lanes) - shift * offset, lanes)
                total = horizontal_sum(sums[r][c], lanes)
                total = total if self.bias is None else total + load(self.bias, [n0 + r], 1)
                store(self.out, [m0 + c, n0 + r], total, 1)

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
        total = splat(T.int32(0), self.shape.lanes)
        for number, half in enumerate(halves):
            total = _dot(total, half, self._codes(row, g, number), self.shape.lanes, self.cpu)
        return bind(total)

    def _codes(self, row: Expr, g: Expr, number: int) -> Expr:
        """The codes that half `number` of a group is multiplied with."""
        shape, width = self.shape, 4 * self.shape.lanes
        first = row * shape.k + g * shape.group
        if shape.m < _MANY:
            return self.x.codes[span(first + number * width, width)]
        words = flat(self.x.codes, shape.m * shape.k // _WORD, _WORD)  # even and odd ones in turn
        at = first // _WORD + number // 2 * 2 * shape.lanes + number % 2
        return T.reinterpret(vector("int8", width), _word_vector(words, at, shape.lanes))


class _Panel:
    """Emits the product of a block of rows that is turned first: [groups, words of a group, vectors, lanes]
    32-bit words, a row in each lane; scales and shifts [groups, vectors, lanes].
    """

    def __init__(
        self, shape: _Shape, q: Buffer, x: _Activations, bias: Buffer | None, out: Buffer, cpu: Cpu
    ) -> None:
        self.shape, self.q, self.x, self.bias, self.out, self.cpu = shape, q, x, bias, out, cpu
        self.lanes = cpu.lanes
        self.vectors = 2 if cpu.registers >= 32 else 1
        self.rows = self.vectors * self.lanes
        self.words = shape.group // 8
        most = (cpu.registers - 4 * self.vectors) // (2 * self.vectors)
        self.columns = -(-shape.m // -(-shape.m // most))

    def emit(self, scales: Buffer, zeros: Buffer, n0: Expr) -> None:
        """out[:, n0 : n0 + rows]."""
        self._turn(scales, zeros, n0)
        m, columns = self.shape.m, self.columns
        with T.serial(0, m // columns) as c:
            self._tile(n0, c * columns, columns)
        if m % columns:
            self._tile(n0, T.int32(m - m % columns), m % columns)

    def _turn(self, scales: Buffer, zeros: Buffer, n0: Expr) -> None:
        shape = self.shape
        self.panel = T.alloc_buffer((shape.k // 8 * self.rows,), "int32")
        self.scales = T.alloc_buffer((shape.groups * self.rows,), "float32")
        self.shifts = T.alloc_buffer((shape.groups * self.rows,), "float32")
        with T.serial(0, shape.k // 8) as word, T.serial(0, self.rows) as r:
            value = T.reinterpret("int32", self.q[n0 + r, span(word * _WORD, _WORD)])
            T.buffer_store(self.panel, value, [word * self.rows + r])
        with T.serial(0, shape.groups) as g, T.serial(0, self.rows) as r:
            zero = T.shift_right(zeros[n0 + r, g // 2], T.cast(g % 2 * 4, "uint8")) & T.uint8(15)
            scale = bind(load(scales, [n0 + r, g], 1))
            T.buffer_store(self.scales, scale, [g * self.rows + r])
            shift = scale * T.cast(T.cast(zero, "int32"), "float32")
            T.buffer_store(self.shifts, shift, [g * self.rows + r])

    def _tile(self, n0: Expr, m0: Expr, columns: int) -> None:
        shape, lanes = self.shape, self.lanes
        codes = flat(self.x.codes, shape.m * shape.k // _WORD, _WORD)
        grid = [(v, c) for v in range(self.vectors) for c in range(columns)]
        sums = {at: register(lanes, 0) for at in grid}
        totals = {at: T.alloc_buffer((lanes,), "int32") for at in grid}
        low = splat(T.int32(_LOW), lanes)
        with T.serial(0, shape.groups) as g:
            for at in grid:
                T.buffer_store(totals[at], splat(T.int32(0), lanes), [span(0, lanes)])
            with T.serial(0, self.words) as w:
                word = bind(g * self.words + w)
                for v in range(self.vectors):
                    both = bind(self.panel[span((word * self.vectors + v) * lanes, lanes)])
                    halves = (both & low, T.shift_right(both, splat(T.int32(4), lanes)) & low)
                    for odd, half in enumerate(map(bind, halves)):
                        for c in range(columns):
                            code = codes[(m0 + c) * (shape.k // _WORD) + 2 * word + odd, span(0, _WORD)]
                            spread = splat(T.reinterpret("int32", code), lanes)
                            total = _dot(
                                totals[v, c][span(0, lanes)],
                                half,
                                T.reinterpret(vector("int8", 4 * lanes), spread),
                                lanes,
                                self.cpu,
                            )
                            T.buffer_store(totals[v, c], total, [span(0, lanes)])
            for v in range(self.vectors):
                at = (g * self.vectors + v) * lanes
                scale, shift = bind(self.scales[span(at, lanes)]), bind(self.shifts[span(at, lanes)])
                for c in range(columns):
                    factor = splat(self.x.factors[(m0 + c) * shape.padded + g], lanes)
                    offset = splat(self.x.offsets[(m0 + c) * shape.padded + g], lanes)
                    total = T.cast(totals[v, c][span(0, lanes)], vector("float32", lanes))
                    add_to(sums[v, c], total * (scale * factor) - shift * offset, lanes)
        for v, c in grid:
            first = n0 + v * lanes
            value = get(sums[v, c], lanes)
            value = value if self.bias is None else value + load(self.bias, [first], lanes)
            store(self.out, [m0 + c, first], value, lanes)


def _word_vector(words: Buffer, first: Expr, lanes: int) -> Expr:
    """Every other word from `first` on."""
    slots = T.alloc_buffer((lanes,), "int32")
    for lane in range(lanes):
        T.buffer_store(slots, T.reinterpret("int32", words[first + 2 * lane, span(0, _WORD)]), [lane])
    return slots[span(0, lanes)]


def _columns(m: int, cpu: Cpu) -> int:
    """Rows of x of a tile: as many as there are registers for, preferring a number that leaves none over."""
    most = min(m, max(1, cpu.accumulators // _ROWS))
    even = max(d for d in range(1, most + 1) if m % d == 0)
    return even if 2 * even > most else -(-m // -(-m // most))


def integer_linear(op: ty.QuantizedLinear, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, q, scales, zeros, *bias, out = buffers
    *lead, k = (int(d) for d in x.shape)
    shape = _Shape.of(math.prod(lead), int(q.shape[0]), k, op.group_size, cpu)
    m, n = shape.m, shape.n
    turned = m >= _MANY
    activations = _quantized(flat(x, m, k), shape, cpu, _WORD if turned else 4 * shape.lanes)
    given = (shape, q, activations, bias[0] if bias else None, flat(out, m, n), cpu)
    whole = 0
    if turned:
        panel = _Panel(*given)
        whole = n - n % panel.rows
        if whole:
            with loop(whole // panel.rows, cpu, m * n * k) as block:
                panel.emit(scales, zeros, bind(block * panel.rows))
    if n > whole:
        _by_rows(_Product(*given), scales, zeros, whole)


def _by_rows(product: _Product, scales: Buffer, zeros: Buffer, first: int) -> None:
    """The rows of the weight from `first` on, as they lie."""
    m, n, k, cpu = product.shape.m, product.shape.n, product.shape.k, product.cpu
    columns = _columns(m, cpu)

    def rows_at(n0: Expr, local: Expr, rows: int, count: Expr) -> None:
        """All columns against `count` tiles of `rows` from n0."""
        with T.serial(0, m // columns) as c, T.serial(0, count) as t:
            product.tile(n0 + t * rows, local + t * rows, c * columns, rows, columns)
        if m % columns:
            with T.serial(0, count) as t:
                product.tile(n0 + t * rows, local + t * rows, m - m % columns, rows, m % columns)

    whole = (n - first) // _ROWS * _ROWS
    if whole:
        with loop(-(-whole // _BLOCK_ROWS), cpu, m * whole * k) as block:
            n0 = bind(block * _BLOCK_ROWS + first)
            left = whole + first - n0
            count = bind(T.min(_BLOCK_ROWS, left)) if whole % _BLOCK_ROWS else T.int32(_BLOCK_ROWS)
            product.ready(scales, zeros, n0, count)
            rows_at(n0, T.int32(0), _ROWS, count // _ROWS)
    if (n - first) % _ROWS:
        last = T.int32(first + whole)
        product.ready(scales, zeros, last, T.int32((n - first) % _ROWS))
        rows_at(last, T.int32(0), (n - first) % _ROWS, T.int32(1))
