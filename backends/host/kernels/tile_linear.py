"""Products of rounded activations by tiles (AMX): 16 tokens by 16 rows of the weight, 64 columns an instruction.

A block of 32 rows is turned once: `panel` [2 tiles of rows][steps of 64 columns] of 16 by 64 bytes, row j of a tile
holding four columns of each of its 16 rows, low nibbles of a word and then the high ones, as the codes lie.  Against it
pass 32 tokens at a time: of a group two tiles of tokens by two of rows are summed in registers, stored, and scaled into
f32 sums, [tokens][rows], which stay in the first-level cache.  A stored tile can be read when it has reached the cache:
the next group is multiplied before one is scaled.

    for each block of 32 rows (on all cores):  turn it
      for 32 tokens:
        for each group:  4 tiles of integer sums, for each byte of the codes;  sums += scale * factor * them - shift * offset
        add the bias, round, store

Linux gives a process these registers when it asks (`arch_prctl(ARCH_REQ_XCOMP_PERM)`): a kernel does, once a call.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.rounded_activations import (
    Activations,
    Shape,
    scales_of_block,
    whole_sum,
    with_group,
)
from tyir.backends.host.kernels.tir import (
    Buffer,
    Cpu,
    Expr,
    bind,
    f32,
    flat,
    load,
    loop,
    prefetch,
    span,
    splat,
    store,
    transposed,
    vector,
)

__all__ = ["room_for", "takes_tiles", "tile_linear"]

_SIDE: Final = 16  # rows of a tile, and 32-bit lanes of its rows
_BYTES: Final = 64  # of a row of a tile
_TILE: Final = _SIDE * _SIDE  # 32-bit words of a tile
_ROWS: Final = 2 * _SIDE  # of a block
_COLUMNS: Final = 128  # whose words of a row fill a vector
_LOW: Final = 0x0F0F0F0F
_TOKENS, _WEIGHTS = 4, 6  # first tile registers; sums have 0..3

# Without the permission the first such instruction ends the process: 158 is arch_prctl, 0x1023
# ARCH_REQ_XCOMP_PERM, 18 the tiles' data (Linux, Documentation/arch/x86/xstate.rst).
_HELPERS: Final = """
define i32 @tyir_ask_for_tiles() alwaysinline {
  %long = call i64 asm sideeffect "syscall", "={rax},{rax},{rdi},{rsi},~{rcx},~{r11},~{memory}"(i64 158, i64 4131, i64 18)
  %code = trunc i64 %long to i32
  ret i32 %code
}
"""  # noqa: E501


def takes_tiles(shape: Shape) -> bool:
    """Whether tiles divide a product's groups, and it has a block of rows."""
    return shape.group % _COLUMNS == 0 and shape.n >= _ROWS


def _token_tiles(shape: Shape) -> int:
    return 1 if shape.m <= _SIDE else 2


def room_for(shape: Shape) -> int:
    """Rows of codes that whole tiles of tokens read."""
    step = _token_tiles(shape) * _SIDE
    return -(-shape.m // step) * step


def _tile_op(name: str, *operands: Any) -> None:
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *operands))


def _register(number: int) -> Any:
    return T.int8(number)


@contextmanager
def _configured() -> Iterator[None]:
    """All tile registers have 16 rows of 64 bytes inside (layout: Intel's manual, LDTILECFG)."""
    layout = T.alloc_buffer((_BYTES,), "uint8")
    T.buffer_store(layout, splat(T.uint8(0), _BYTES), [span(0, _BYTES)])
    T.buffer_store(layout, T.uint8(1), [0])
    for number in range(8):
        T.buffer_store(layout, T.uint8(_BYTES), [16 + 2 * number])
        T.buffer_store(layout, T.uint8(_SIDE), [48 + number])
    _tile_op("ldtilecfg", T.address_of(layout[0]))
    yield
    _tile_op("tilerelease")


class _Block:
    """Emits a block of rows."""

    def __init__(
        self,
        shape: Shape,
        weight: tuple[Buffer, Buffer, Buffer],
        x: Activations,
        bias: Buffer | None,
        out: Buffer,
    ) -> None:
        self.shape, self.x, self.bias, self.out = shape, x, bias, out
        self.q, self.scales, self.zeros = weight
        self.steps = shape.k // _BYTES
        self.tokens = _token_tiles(shape) * _SIDE

    def emit(self, n0: Expr) -> None:
        """out[:, n0 : n0 + 32]."""
        self._turn(n0)
        tokens = self.tokens
        self.found = [T.alloc_buffer((2 * tokens * _ROWS,), "int32") for _ in self.x.codes]
        self.sums = T.alloc_buffer((tokens * _ROWS,), "float32")
        with _configured(), T.serial(0, -(-self.shape.m // tokens)) as part:
            m0 = bind(part * tokens)
            count = bind(T.min(tokens, self.shape.m - m0)) if self.shape.m % tokens else T.int32(tokens)
            self._multiply(n0, m0, count)

    def _turn(self, n0: Expr) -> None:
        self.panel = T.alloc_buffer((2 * self.steps * _TILE,), "int32")
        low = splat(T.int32(_LOW), _SIDE)
        flat_q = flat(self.q, self.shape.n * self.shape.k // 2)
        with T.serial(0, 2) as tile, T.serial(0, self.shape.k // _COLUMNS) as part:
            words = [
                bind(
                    T.reinterpret(
                        vector("int32", _SIDE), self.q[n0 + tile * _SIDE + r, span(part * _BYTES, _BYTES)]
                    )
                )
                for r in range(_SIDE)
            ]
            for r in range(_SIDE):  # for the next block, while this one is multiplied
                prefetch(flat_q, [(n0 + _ROWS + tile * _SIDE + r) * (self.shape.k // 2) + part * _BYTES])
            for number, word in enumerate(transposed(words)):
                row = (tile * self.steps + 2 * part + number // 8) * _SIDE + 2 * (number % 8)
                high = T.shift_right(word, splat(T.int32(4), _SIDE)) & low
                T.buffer_store(self.panel, word & low, [span(row * _SIDE, _SIDE)])
                T.buffer_store(self.panel, high, [span((row + 1) * _SIDE, _SIDE)])
        groups = self.shape.groups
        self.made_scales, self.shifts = scales_of_block(self.scales, self.zeros, n0, _ROWS, groups)

    def _multiply(self, n0: Expr, m0: Expr, count: Expr) -> None:
        """out[m0 : m0 + count, n0 : n0 + 32]."""
        shape = self.shape
        with T.serial(0, 2 * self.tokens) as i:
            T.buffer_store(self.sums, f32(0, _SIDE), [span(i * _SIDE, _SIDE)])
        self._group(m0, T.int32(0))
        with T.serial(0, shape.groups - 1) as g:
            self._group(m0, g + 1)
            self._scale(m0, g, count)
        self._scale(m0, T.int32(shape.groups - 1), count)
        with T.serial(0, count) as t:
            for v in range(2):
                value = self.sums[span(t * _ROWS + v * _SIDE, _SIDE)]
                first = n0 + v * _SIDE
                value = value if self.bias is None else value + load(self.bias, [first], _SIDE)
                store(self.out, [m0 + t, first], value, _SIDE)

    def _found(self, g: Expr) -> Expr:
        """Where the integer sums of a group lie: those of the one before are still being scaled."""
        return bind(g % 2 * (self.tokens * _ROWS))

    def _scale(self, m0: Expr, g: Expr, count: Expr) -> None:
        """sums += what a group's integer sums stand for."""
        shape, first = self.shape, self._found(g)
        columns = [span(g * _ROWS + v * _SIDE, _SIDE) for v in range(2)]
        scales = [bind(self.made_scales[c]) for c in columns]
        shifts = [bind(self.shifts[c]) for c in columns]
        with T.serial(0, count) as t:
            at = bind((m0 + t) * shape.groups + g)
            factor, offset = bind(self.x.factors[at]), bind(self.x.offsets[at])
            for v in range(2):
                place = span(t * _ROWS + v * _SIDE, _SIDE)
                total = bind(
                    whole_sum(
                        [found[span(first + t * _ROWS + v * _SIDE, _SIDE)] for found in self.found], _SIDE
                    )
                )
                value = with_group(self.sums[place], total, scales[v], shifts[v], factor, offset, _SIDE)
                T.buffer_store(self.sums, value, [place])

    def _group(self, m0: Expr, g: Expr) -> None:
        """found = the integer sums of a group, [tokens][rows], for each byte of the codes."""
        first = self._found(g)
        for codes, found in zip(self.x.codes, self.found, strict=True):
            self._tiles(codes, found, first, m0, g)

    def _tiles(self, codes: Buffer, found: Buffer, first: Expr, m0: Expr, g: Expr) -> None:
        grid = [(t, v) for t in range(self.tokens // _SIDE) for v in range(2)]
        per_group = self.shape.group // _BYTES
        for t, v in grid:
            _tile_op("tilezero", _register(2 * t + v))
        with T.serial(0, per_group) as s:
            step = bind(g * per_group + s)
            for t in range(self.tokens // _SIDE):
                place = T.address_of(codes[(m0 + t * _SIDE) * self.shape.k + step * _BYTES])
                _tile_op("tileloadd64", _register(_TOKENS + t), place, T.int64(self.shape.k))
            for v in range(2):
                place = T.address_of(self.panel[(v * self.steps + step) * _TILE])
                _tile_op("tileloadd64", _register(_WEIGHTS + v), place, T.int64(_BYTES))
            for t, v in grid:
                _tile_op("tdpbsud", _register(2 * t + v), _register(_TOKENS + t), _register(_WEIGHTS + v))
        for t, v in grid:
            place = T.address_of(found[first + t * _SIDE * _ROWS + v * _SIDE])
            _tile_op("tilestored64", _register(2 * t + v), place, T.int64(4 * _ROWS))


def tile_linear(
    shape: Shape,
    weight: tuple[Buffer, Buffer, Buffer],
    x: Activations,
    bias: Buffer | None,
    out: Buffer,
    cpu: Cpu,
) -> int:
    """Emits the product of the first rows of the weight, as many as blocks hold; returns their number."""
    blocks = shape.n // _ROWS
    with T.attr(T.int32(0), "pragma_import_llvm", _HELPERS):
        T.evaluate(T.call_extern("int32", "tyir_ask_for_tiles"))
    with loop(blocks, cpu, shape.m * shape.n * shape.k) as block:
        _Block(shape, weight, x, bias, out).emit(bind(block * _ROWS))
    return blocks * _ROWS
