"""ty.quantized_linear: 4-bit weights [N, K/2] bytes (low nibble first), one scale and zero point per group of
columns.

Nibbles are never shuffled into order.  A block of the row is read as `lanes` little-endian words of p
nibbles; nibble j of lane l is column l p + j, so shifting the whole vector right by 4 j gives the weights of
columns j, p + j, 2 p + j, ...  The activations are packed in that order, and the sum over k does not care.

A weight is one of 16 values per group: f16((i - zero) * scale).  With a 16-entry register lookup (AVX-512
`vpermps`, which reads only the low four bits of an index) the table is computed once per row and group;
otherwise each weight is computed from its nibble.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.integer_linear import integer_linear, takes_group
from tyir.backends.host.kernels.product import Tile, tiled_product
from tyir.backends.host.kernels.streams import ask_ahead
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Emitters,
    Expr,
    bind,
    f32_of,
    flat,
    hold,
    span,
    splat,
    vector,
)
from tyir.diagnostics import TyirError
from tyir.dialects import ty

__all__ = ["EMITTERS"]

_LOOKUP = "llvm.x86.avx512.permvar.sf.512"


def block_shape(group: int, cpu: Cpu) -> tuple[int, int]:
    """Lanes, and nibbles per lane, of the widest block that divides a group of columns."""
    if group % 2:
        raise TyirError(
            f"group_size {group} is odd: a byte would hold weights of two groups",
            help=f"use an even group size, {group + 1} for example",
        )
    lanes = math.gcd(cpu.lanes, group // 2)
    return lanes, math.gcd(8, group // lanes)


def _words(q: Buffer, row: Expr, column: Expr, lanes: int, nibbles: int) -> Expr:
    """`lanes` words of `nibbles` 4-bit weights from an even column, zero extended to 32 bits."""
    width = nibbles // 2
    raw = q[row, span(column // 2, lanes * width)]
    word = raw if width == 1 else T.reinterpret(vector(f"uint{8 * width}", lanes), raw)
    return word if width == 4 else T.cast(word, vector("uint32", lanes))


def _dequantized(nibble: Expr, zero: Expr, scale: Expr, lanes: int) -> Expr:
    """f16((nibble - zero) * scale) as f32; the difference and the product are exact in f32."""
    exact = (T.cast(nibble, vector("float32", lanes)) - splat(zero, lanes)) * splat(scale, lanes)
    return T.cast(T.cast(exact, vector("float16", lanes)), vector("float32", lanes))


class _Weights:
    """The weight operand of one kernel."""

    unpacks: Final = True

    def __init__(
        self, q: Buffer, scales: Buffer, zeros: Buffer, shape: tuple[int, int, int], group: int, cpu: Cpu
    ) -> None:
        """`shape`: m, n, k."""
        self.q, self.scales, self.zeros, self.cpu = q, scales, zeros, cpu
        self.m, self.n, self.k = shape
        self.row_bytes = self.k // 2
        self.groups = self.k // group
        self.lanes, self.nibbles = block_shape(group, cpu)
        self.per_group = group // (self.lanes * self.nibbles)
        self.lookup = cpu.lookup and self.lanes == 16
        self.first: Expr = None
        self.made = scales  # by `ready`
        self.numbers = T.alloc_buffer((16,), "float32")  # a zero point as f32, without a conversion
        with T.serial(0, 16) as i:
            T.buffer_store(self.numbers, T.cast(i, "float32"), [i])

    def ready(self, first: Expr, count: Expr, most: int) -> None:
        self.first = first
        self.made = f32_of(
            self.scales, first * self.groups, count * self.groups, most * self.groups, self.cpu
        )

    def group(self, row: Expr, group: Expr) -> Any:
        """What is known of one row's group: its table, or its zero point and scale."""
        nibble = T.shift_right(self.zeros[self.first + row, group // 2], T.cast(group % 2 * 4, "uint8"))
        zero = bind(self.numbers[T.cast(nibble & T.uint8(15), "int32")])
        scale = bind(self.made[row * self.groups + group])
        if self.lookup:
            return hold(_dequantized(T.ramp(T.int32(0), 1, 16), zero, scale, 16), 16)
        return zero, scale

    def values(self, known: Any, words: Expr, j: int) -> Expr:
        """Nibble j of every word, dequantised."""
        shifted = words if j == 0 else T.shift_right(words, splat(T.uint32(4 * j), self.lanes))
        if self.lookup:
            return T.call_llvm_pure_intrin("float32x16", _LOOKUP, known, T.reinterpret("int32x16", shifted))
        zero, scale = known
        return _dequantized(shifted & splat(T.uint32(15), self.lanes), zero, scale, self.lanes)

    def unpack(self, row: Expr, to: Buffer, place: Expr) -> None:
        with T.serial(0, self.groups) as g:
            known = self.group(row, g)
            with T.serial(0, self.per_group) as p:
                block = bind(g * self.per_group + p)
                word = self._words(row, block)
                for j in range(self.nibbles):
                    at = place * self.k + (block * self.nibbles + j) * self.lanes
                    T.buffer_store(to, self.values(known, word, j), [span(at, self.lanes)])

    def accumulate(self, tile: Tile) -> None:
        with T.serial(0, self.groups) as g:
            known = [self.group(row, g) for row in tile.rows]
            with T.serial(0, self.per_group) as p:
                block = bind(g * self.per_group + p)
                for row in tile.rows:
                    ask_ahead(self.q, self.first + row, block * (self.lanes * self.nibbles) // 2)
                steps = [(r, j) for j in range(self.nibbles) for r in range(len(tile.rows))]
                if (
                    tile.columns == 1
                ):  # x is read from the cache again for each row: registers hold the tables
                    steps.sort()
                words: dict[int, Expr] = {}
                for r, j in steps:
                    if r not in words:
                        words[r] = self._words(tile.rows[r], block)
                    value = hold(self.values(known[r], words[r], j), self.lanes)
                    tile.multiply(block * self.nibbles + j, r, value)

    def order(self, step: Expr) -> Expr:
        start = step // self.nibbles * (self.lanes * self.nibbles) + step % self.nibbles
        return start if self.lanes == 1 else T.ramp(start, self.nibbles, self.lanes)

    def _words(self, row: Expr, block: Expr) -> Expr:
        column = block * (self.lanes * self.nibbles)
        return bind(_words(self.q, self.first + row, column, self.lanes, self.nibbles))


def quantized_linear(op: ty.QuantizedLinear, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    if cpu.activations != "fp32" and takes_group(op.group_size):
        integer_linear(op, buffers, cpu)
    else:
        float_linear(op, buffers, cpu)


def float_linear(op: ty.QuantizedLinear, buffers: Sequence[Buffer], cpu: Cpu) -> None:
    x, q, scales, zeros, *bias, out = buffers
    *lead, k = (int(d) for d in x.shape)
    m, n = math.prod(lead), int(q.shape[0])
    weight = _Weights(q, scales, zeros, (m, n, k), op.group_size, cpu)
    given = bias[0] if bias else None
    tiled_product(flat(x, m, k), n, weight.lanes, weight.order, given, flat(out, m, n), cpu, weight)


EMITTERS: Final[Emitters] = {
    ty.QuantizedLinear: quantized_linear,
}
