"""Products of rounded activations by tiles (AMX): 16 tokens by 16 rows of the weight, 64 columns an instruction.

A block of 32 rows is turned once: `panel` [2 tiles of rows][steps of 64 columns] of 16 by 64 bytes, row j of a tile
holding four columns of each of its 16 rows less the row's zero point: a step has the low nibbles of 128 columns and
the next the high ones, as the codes lie.  A group of it, four tiles, stays in registers while up to 128 tokens pass,
16 at a time: their codes are tiles that lie one after the other and are read from the second-level cache once for a
block, their f32 sums, [tokens][rows], stay in the first-level cache.

    for each block of 32 rows (on all cores):  turn it
      for up to 128 tokens:
        for each group:  its 4 tiles of the weight
          for 16 tokens, for each byte of the codes:  2 tiles of integer sums, stored
            between these instructions, of the 16 tokens before:  sums += scale * factor * integer sums
        add the bias, round, store

A stored tile can be read when it has reached the cache, and the tiles' unit works beside the vectors' as far as the
processor sees ahead (512 instructions): so what is scaled was stored by the step before, and stands between the
tiles' instructions a few tokens at a time.

Linux gives a process these registers when it asks (`arch_prctl(ARCH_REQ_XCOMP_PERM)`): a kernel does, once a call.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

from tvm.tirx.script.builder import ir as T

from tyir.backends.host.kernels.group_scales import scales_of_block
from tyir.backends.host.kernels.rounded_activations import (
    TILE_BYTES,
    TILE_ROWS,
    Activations,
    Shape,
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
    together,
    transposed,
    vector,
)

__all__ = ["room_for", "takes_tiles", "tile_linear"]

_SIDE: Final = TILE_ROWS  # and 32-bit lanes of these rows
_BYTES: Final = TILE_BYTES
_TILE: Final = _SIDE * _SIDE  # 32-bit words of a tile
_ROWS: Final = 2 * _SIDE  # of a block
_COLUMNS: Final = 128  # whose words of a row fill a vector: two steps
_LOW: Final = 0x0F0F0F0F
_EACH: Final = 0x01010101  # times a number below 256: that in each byte of a word
_MOST: Final = 8  # tiles of tokens whose sums the first-level cache keeps, 2 KiB each
_AT_ONCE: Final = 8  # blocks that follow each other on a core
_TOKENS, _WEIGHTS = 2, 4  # first tile registers; sums have 0 and 1

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


def _token_tiles(shape: Shape) -> tuple[int, int]:
    """Parts of the tokens, and tiles of each: as many in all of them."""
    tiles = -(-shape.m // _SIDE)
    parts = -(-tiles // _MOST)
    return parts, -(-tiles // parts)


def room_for(shape: Shape) -> int:
    """Rows of codes that whole tiles of tokens read."""
    parts, tiles = _token_tiles(shape)
    return parts * tiles * _SIDE


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
        self.parts, self.tiles = _token_tiles(shape)
        self.stay = shape.group == _COLUMNS  # a group of the weight in four registers

    def emit(self, first: Expr, count: int) -> None:
        """out[:, first : first + 32 * count], a block after the other."""
        self.panel = T.alloc_buffer((2 * self.steps * _TILE,), "int32")
        self.found = [T.alloc_buffer((2 * 2 * _TILE,), "int32") for _ in self.x.codes]
        self.sums = T.alloc_buffer((self.tiles * _SIDE * _ROWS,), "float32")
        with _configured(), T.serial(0, count) as block:
            n0 = bind(first + block * _ROWS)
            self._turn(n0)
            with T.serial(0, self.parts) as part:
                self._multiply(n0, bind(part * (self.tiles * _SIDE)))

    def _turn(self, n0: Expr) -> None:
        low = splat(T.int32(_LOW), _SIDE)
        flat_q = flat(self.q, self.shape.n * self.shape.k // 2)
        self.scales_of, zeros = scales_of_block(self.scales, self.zeros, n0, _ROWS, self.shape.groups)
        with T.serial(0, 2) as tile, T.serial(0, self.shape.k // _COLUMNS) as part:
            words = [bind(self._quads(n0 + tile * _SIDE + r % 4, part, r // 4)) for r in range(_SIDE)]
            for r in range(_SIDE):  # for the next block, while this one is multiplied
                prefetch(flat_q, [(n0 + _ROWS + tile * _SIDE + r) * (self.shape.k // 2) + part * _BYTES])
            g = part * _COLUMNS // self.shape.group
            zero = bind(zeros[span(g * _ROWS + tile * _SIDE, _SIDE)] * splat(T.int32(_EACH), _SIDE))
            for number, word in enumerate(transposed(words, 2)):
                high = T.shift_right(word, splat(T.int32(4), _SIDE)) & low
                for odd, half in enumerate((word & low, high)):
                    row = (tile * self.steps + 2 * part + odd) * _SIDE + number
                    T.buffer_store(self.panel, _less(half, zero), [span(row * _SIDE, _SIDE)])

    def _quads(self, row: Expr, part: Expr, quad: int) -> Expr:
        """Four words of each fourth row from this one on: what turning would have made of whole rows with its
        first two exchanges, which loads do beside the one port that moves lanes."""
        at = span(part * _BYTES + quad * 16, 16)
        found = [T.reinterpret(vector("int32", 4), self.q[row + 4 * i, at]) for i in range(4)]
        return together(found, 4)

    def _multiply(self, n0: Expr, m0: Expr) -> None:
        """out[m0 .., n0 : n0 + 32] of a part of the tokens.

        Steps are numbered through all groups, each with the tiles of tokens one after the other.
        """
        tiles, tokens = self.tiles, self.tiles * _SIDE
        with T.serial(0, 2 * tokens) as i:
            T.buffer_store(self.sums, f32(0, _SIDE), [span(i * _SIDE, _SIDE)])
        if self.stay:
            self._load_weights(T.int32(0))
        self._step(m0, T.int32(0), None)
        with T.serial(0, self.shape.groups * tiles - 1) as before:
            step = bind(before + 1)
            if self.stay:
                with T.If(step % tiles == 0), T.Then():
                    self._load_weights(step // tiles * 2)
            self._step(m0, step, self._scaling(m0, before))
        self._scaling(m0, T.int32(self.shape.groups * tiles - 1))(range(_SIDE))
        count = T.min(tokens, self.shape.m - m0) if self.parts * tokens > self.shape.m else T.int32(tokens)
        with T.serial(0, count) as t:
            for v in range(2):
                value = self.sums[span(t * _ROWS + v * _SIDE, _SIDE)]
                first = n0 + v * _SIDE
                value = value if self.bias is None else value + load(self.bias, [first], _SIDE)
                store(self.out, [m0 + t, first], value, _SIDE)

    def _found(self, step: Expr) -> Expr:
        """Where the integer sums of a step lie: those of the one before are still being scaled."""
        return bind(step % 2 * (2 * _TILE))

    def _scaling(self, m0: Expr, step: Expr) -> Callable[[range], None]:
        """Adds what a step's integer sums stand for to the sums of some of its 16 tokens."""
        g, tile = bind(step // self.tiles), bind(step % self.tiles)
        scales = [bind(self.scales_of[span(g * _ROWS + v * _SIDE, _SIDE)]) for v in range(2)]
        factors, sums = bind(self.x.group(m0 + tile * _SIDE, g)), bind(tile * (_SIDE * _ROWS))
        first = self._found(step)

        def scale(tokens: range) -> None:
            for t in tokens:
                factor = bind(self.x.factors[factors + t])
                for v in range(2):
                    place = span(sums + t * _ROWS + v * _SIDE, _SIDE)
                    stored = [found[span(first + (v * _SIDE + t) * _SIDE, _SIDE)] for found in self.found]
                    total = bind(whole_sum(stored, _SIDE))
                    value = with_group(self.sums[place], total, scales[v], factor, _SIDE)
                    T.buffer_store(self.sums, value, [place])

        return scale

    def _step(self, m0: Expr, step: Expr, scale: Callable[[range], None] | None) -> None:
        """found = the integer sums of a group of 16 tokens, [rows / 16][tokens][16 rows], for each byte of
        the codes; between them `scale` works on the step before."""
        g, first = bind(step // self.tiles), self._found(step)
        codes_at = bind(self.x.code(m0 + step % self.tiles * _SIDE, g * self.shape.group))
        done = 0
        pairs = self.shape.group // _COLUMNS
        for codes, found in zip(self.x.codes, self.found, strict=True):
            for v in range(2):
                _tile_op("tilezero", _register(v))
            with T.serial(0, pairs) as pair:
                if not self.stay:
                    self._load_weights(g * (2 * pairs) + 2 * pair)
                for s in range(2):
                    place = T.address_of(codes[codes_at + (2 * pair + s) * (4 * _TILE)])
                    _tile_op("tileloadd64", _register(_TOKENS + s), place, T.int64(_BYTES))
                    for v in range(2):
                        operands = (v, _TOKENS + s, _WEIGHTS + 2 * v + s)
                        _tile_op("tdpbssd", *map(_register, operands))
                    if scale is not None and self.stay:
                        count = _SIDE // (2 * len(self.found))
                        scale(range(done, done + count))
                        done += count
            for v in range(2):
                place = T.address_of(found[first + v * _TILE])
                _tile_op("tilestored64", _register(v), place, T.int64(4 * _SIDE))
        if scale is not None and not self.stay:
            scale(range(_SIDE))

    def _load_weights(self, step: Expr) -> None:
        """Two steps of 64 columns of both tiles of rows."""
        for v in range(2):
            for s in range(2):
                place = T.address_of(self.panel[(v * self.steps + step + s) * _TILE])
                _tile_op("tileloadd64", _register(_WEIGHTS + 2 * v + s), place, T.int64(_BYTES))


def _less(words: Expr, numbers: Expr) -> Expr:
    """Words of bytes less others, byte by byte."""
    a, b = (T.reinterpret(vector("int8", 4 * _SIDE), w) for w in (words, numbers))
    return T.reinterpret(vector("int32", _SIDE), a - b)


def _blocks_each(blocks: int, cpu: Cpu) -> int:
    """Blocks that a core takes at once, having set up its tiles: a divisor that leaves each as many."""
    few = [d for d in range(1, _AT_ONCE + 1) if blocks % d == 0]
    return max((d for d in few if blocks // d % cpu.cores == 0), default=1)


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
    each = _blocks_each(blocks, cpu)
    with loop(blocks // each, cpu, shape.m * shape.n * shape.k) as part:
        _Block(shape, weight, x, bias, out).emit(bind(part * (each * _ROWS)), each)
    return blocks * _ROWS
