"""Building blocks of the kernels: vector access, loops, horizontal sums and exp, over TVM's TensorIR
builder.

Three rules that all kernels keep (each was measured or seen in the generated code):
- Each accumulator is a `register(...)`: a buffer of scalar dtype and one vector, addressed by a ramp.  LLVM turns it into a register only when it
  is a stack slot, which TVM 0.27 gives to allocations of scope "global" below 1 KiB; one buffer for a whole tile reaches that and is then stored
  to the heap in every step inside a parallel loop (measured: 2.4 times slower).
- LLVM never reorders float additions, so a reduction is written with as many partial sums as there are vector lanes.
- Parameters promise no more alignment than their element size: weights are mapped from files at any offset.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tvm.tirx.script.builder import ir as T

from tyir.artifacts.token_blocks import TokenBlocks
from tyir.ir import Op

__all__ = [
    "DEFAULT_SCHEDULE",
    "WORTH_THREADS",
    "Buffer",
    "Cpu",
    "Emitters",
    "Expr",
    "Schedule",
    "add_to",
    "bind",
    "exact_sums",
    "exp",
    "f32",
    "f32_of",
    "flat",
    "get",
    "hold",
    "horizontal_max",
    "horizontal_sum",
    "lanes_for",
    "load",
    "log",
    "loop",
    "prefetch",
    "put",
    "register",
    "rows_before",
    "span",
    "splat",
    "store",
    "sums_of",
    "together",
    "transposed",
    "vector",
]

Buffer = Any
Expr = Any
Emitters = Mapping[type[Op], Callable[[Any, Sequence[Any], Any], None]]

WORTH_THREADS: Final = 1 << 18  # operations of a loop that several threads share
_QUAD: Final = 4  # 32-bit lanes among which x86 moves within one cycle


@dataclass(frozen=True)
class Schedule:
    """How the products of few tokens read a weight; results are the same bits with any.

    `streams`: rows that a core reads side by side, 0: as many as its registers are for.  `block_bytes`: what
    a core takes at a time (0.5B shape, one thread: 64 KiB take 15 % longer than half a megabyte, 8 MiB 3 %).
    """

    streams: int = 0
    block_bytes: int = 1 << 19

    def __str__(self) -> str:
        return f"streams={self.streams} block-bytes={self.block_bytes}"


DEFAULT_SCHEDULE: Final = Schedule()


@dataclass(frozen=True)
class Cpu:
    """What the kernels ask of a processor: f32 lanes of a vector register, number of registers, a 16-entry
    register lookup, cores, and how 8-bit numbers are multiplied: "vnni", "madd" or "" for not at all.

    `activations`: what 4-bit weights are multiplied with, "fp32", "int16" or "int8"; `tiles`: whether bytes
    are multiplied by tiles (AMX); `schedule`: what is left open beside (`tyir.backends.host.tuning`).
    """

    lanes: int
    registers: int
    lookup: bool
    cores: int
    byte_products: str = ""
    activations: str = "fp32"
    tiles: bool = False
    schedule: Schedule = DEFAULT_SCHEDULE

    @property
    def accumulators(self) -> int:
        """Registers that a tile of partial sums may take; the other half holds weights and activations."""
        return self.registers // 2


def vector(dtype: str, lanes: int) -> str:
    """`float32x16`, or `float32` for one lane."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def span(start: Expr, lanes: int) -> Expr:
    """The index of `lanes` neighbouring elements."""
    return start if lanes == 1 else T.ramp(start, 1, lanes)


def splat(value: Expr, lanes: int) -> Expr:
    """A scalar in every lane."""
    return value if lanes == 1 else T.broadcast(value, lanes)


def f32(value: float, lanes: int = 1) -> Expr:
    """A constant in every lane."""
    return splat(T.float32(value), lanes)


def rows_before(blocks: TokenBlocks | None, position: Expr) -> Expr:
    """How many rows of a cache hold positions below this one, which is not negative; `blocks` of one that is
    cut by tokens.
    """
    if blocks is None:
        return position
    turn = T.int32(blocks.count * blocks.size)
    own = T.floormod(position, turn) - blocks.number * blocks.size
    return T.floordiv(position, turn) * blocks.size + T.min(T.max(own, 0), blocks.size)


def load(buffer: Buffer, index: Sequence[Expr], lanes: int, dtype: str = "float32") -> Expr:
    """`lanes` elements from `index` along the last axis, converted to `dtype`."""
    value = buffer[(*index[:-1], span(index[-1], lanes))]
    return value if buffer.dtype == dtype else T.cast(value, vector(dtype, lanes))


def store(buffer: Buffer, index: Sequence[Expr], value: Expr, lanes: int) -> None:
    """Stores `lanes` f32 (or already fitting) elements, rounded to the buffer's element type."""
    target = vector(buffer.dtype, lanes)
    T.buffer_store(buffer, T.cast(value, target), [*index[:-1], span(index[-1], lanes)])


def bind(value: Expr) -> Expr:
    """A name for a value that is used more than once."""
    return T.Bind(value)


def register(lanes: int, initial: float | None = None) -> Buffer:
    """One f32 vector in a register, set to `initial` in every lane when given."""
    buffer = T.alloc_buffer((lanes,), "float32")
    if initial is not None:
        put(buffer, f32(initial, lanes), lanes)
    return buffer


def get(register: Buffer, lanes: int) -> Expr:
    """The value of a register."""
    return register[span(0, lanes)]


def put(register: Buffer, value: Expr, lanes: int) -> None:
    """Sets a register."""
    T.buffer_store(register, value, [span(0, lanes)])


def add_to(register: Buffer, value: Expr, lanes: int) -> None:
    """register += value."""
    put(register, get(register, lanes) + value, lanes)


def hold(value: Expr, lanes: int) -> Expr:
    """An f32 value kept in a register: `bind` for values converted from integers, whose ranges TVM 0.27's
    analyzer fails to follow through the cast.
    """
    slot = register(lanes)
    put(slot, value, lanes)
    return get(slot, lanes)


def prefetch(buffer: Buffer, index: Sequence[Expr]) -> None:
    """Asks for a cache line ahead of its use, into the second-level cache; an address past the buffer's end
    is harmless.
    """
    read, second_level, data = T.int32(0), T.int32(2), T.int32(1)
    T.evaluate(
        T.call_llvm_intrin(
            "void", "llvm.prefetch", T.address_of(buffer[tuple(index)]), read, second_level, data
        )
    )


def flat(buffer: Buffer, *shape: int) -> Buffer:
    """The same memory under another shape."""
    return T.decl_buffer(shape, buffer.dtype, data=buffer.data, align=buffer.data_alignment)


def f32_of(values: Buffer, first: Expr, count: Expr, most: int, cpu: Cpu) -> Buffer:
    """`count` elements of a tensor, of all its elements in a row those from `first` on, converted to f32.

    `most`: what is room for; a vector of zeros follows.
    """
    size = math.prod(int(d) for d in values.shape)
    source, made = flat(values, size), T.alloc_buffer((most + cpu.lanes,), "float32")
    whole = bind(count // cpu.lanes)
    with T.serial(0, whole) as i:
        store(made, [i * cpu.lanes], load(source, [first + i * cpu.lanes], cpu.lanes), cpu.lanes)
    with T.serial(whole * cpu.lanes, count) as i:
        store(made, [i], load(source, [first + i], 1), 1)
    store(made, [count], f32(0, cpu.lanes), cpu.lanes)
    return made


def lanes_for(limit: int, *sizes: int) -> int:
    """The widest power of two up to `limit` that divides every size."""
    return math.gcd(limit, *sizes)


def loop(extent: Expr, cpu: Cpu, work: int = 0) -> Any:
    """A loop over cores when the whole of it does enough `work` (operations), else a plain one.

    Waking the worker threads takes some microseconds, about what one core needs for so many multiply-adds.
    """
    return T.parallel(0, extent) if cpu.cores > 1 and work >= WORTH_THREADS else T.serial(0, extent)


def horizontal_sum(register: Buffer, lanes: int) -> Expr:
    """The sum of a register's lanes, halving it until one is left."""
    return _halve(register, lanes, lambda low, high: low + high)


def horizontal_max(register: Buffer, lanes: int) -> Expr:
    """The largest of a register's lanes."""
    return _halve(register, lanes, T.max)


def sums_of(registers: Sequence[Buffer], lanes: int) -> Expr:
    """The sums of `lanes` registers, in their order, as one vector: bit for bit what `horizontal_sum` gives,
    in a third of the time.
    """
    values = [get(r, lanes) for r in registers]
    part = lanes
    while len(values) > 1:
        half, part = len(values) // 2, part // 2
        # lower halves of parts come from the first of a pair, upper ones from the second
        upper = [lane // part % 2 for lane in range(lanes)]
        stay = [T.int32(lane + lanes * up) for lane, up in enumerate(upper)]
        cross = [T.int32(lane + (lanes - part if up else part)) for lane, up in enumerate(upper)]
        values = [
            bind(T.Shuffle([a, b], stay) + T.Shuffle([a, b], cross))
            for a, b in zip(values[:half], values[half:], strict=True)
        ]
    return values[0]


def exact_sums(values: Sequence[Expr], lanes: int) -> Expr:
    """The sums of the lanes of integer vectors, in their order, as one vector; how many there are is a power
    of two.  They are added up in the order that takes the fewest instructions: four neighbours first.
    """
    if len(values) < _QUAD:
        return _halved(values, lanes, 1)
    for _ in range(2):  # which leaves quads of sums, one of each of four vectors
        even = [at + i for first in range(0, lanes, _QUAD) for at in (first, first + lanes) for i in (0, 2)]
        values = _added(values, even, 1)
    return _halved(values, lanes, _QUAD)


def _halved(values: Sequence[Expr], lanes: int, least: int) -> Expr:
    """Vectors whose halves are added until `least` lanes of each are left, one after the other."""
    part = lanes  # lanes of a vector now that one of the given ones has left
    while part > least:
        width = lanes * min(2, len(values))
        low = [first + i for first in range(0, width, part) for i in range(part // 2)]
        values = _added(values, low, part // 2)
        part //= 2
        lanes = len(low)
    return together(values, lanes)


def _added(values: Sequence[Expr], lanes: Sequence[int], distance: int) -> list[Expr]:
    """Of each pair of vectors, `lanes` and those `distance` after them, added; one vector is a pair."""
    orders = [[T.int32(lane + d) for lane in lanes] for d in (0, distance)]
    pairs = [list(values[i : i + 2]) for i in range(0, len(values), 2)]
    return [bind(T.Shuffle(pair, orders[0]) + T.Shuffle(pair, orders[1])) for pair in pairs]


def transposed(rows: Sequence[Expr], distance: int | None = None) -> list[Expr]:
    """Columns of a square whose rows are vectors: halves change places, then quarters, ..; from exchanges
    over `distance` on, where those over more are done.
    """
    rows = list(rows)
    side = len(rows)
    distance = distance or side // 2
    while distance:
        first = [T.int32(lane if not lane & distance else side + (lane ^ distance)) for lane in range(side)]
        second = [T.int32(lane ^ distance if not lane & distance else side + lane) for lane in range(side)]
        for i in (i for i in range(side) if not i & distance):
            pair = [rows[i], rows[i | distance]]
            rows[i], rows[i | distance] = bind(T.Shuffle(pair, first)), bind(T.Shuffle(pair, second))
        distance //= 2
    return rows


def together(values: Sequence[Expr], lanes: int = 1) -> Expr:
    """Vectors, or numbers, one after the other as one vector."""
    if len(values) == 1:
        return values[0]
    return T.Shuffle(list(values), [T.int32(i) for i in range(len(values) * lanes)])


def _halve(register: Buffer, lanes: int, combine: Callable[[Expr, Expr], Expr]) -> Expr:
    while lanes > 1:
        lanes //= 2
        put(register, combine(register[span(0, lanes)], register[span(lanes, lanes)]), lanes)
    return register[0]


# Cephes expf (Moshier): x = n ln 2 + r with |r| <= ln 2 / 2, a polynomial of degree 5 for (exp(r) - 1 - r) /
# r^2, relative error below 2e-7.
_LOG2E = 1.44269504088896341
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_EXP_COEFFICIENTS = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
_EXP_LOW, _EXP_HIGH = -87.0, 88.0


def exp(x: Expr, lanes: int) -> Expr:
    """e^x in f32 for every lane; x is clamped to -87..88, where neither end leaves the range of normal
    numbers.  NaN stays NaN: of two operands that do not compare, minimum and maximum take the second.

    Own code rather than libm's: vectors stay vectors and every machine computes the same bits.
    """
    x = bind(T.max(f32(_EXP_LOW, lanes), T.min(f32(_EXP_HIGH, lanes), x)))
    n = bind(T.floor(x * f32(_LOG2E, lanes) + f32(0.5, lanes)))
    r = bind(x - n * f32(_LN2_HIGH, lanes) - n * f32(_LN2_LOW, lanes))
    poly = f32(_EXP_COEFFICIENTS[0], lanes)
    for c in _EXP_COEFFICIENTS[1:]:
        poly = poly * r + f32(c, lanes)
    exponent = T.shift_left(
        T.cast(n, vector("int32", lanes)) + splat(T.int32(127), lanes), splat(T.int32(23), lanes)
    )
    return bind((poly * r * r + r + f32(1, lanes)) * T.reinterpret(vector("float32", lanes), exponent))


# Cephes logf (Moshier): x = 2^n (1 + m) with 1 + m in sqrt(1/2)..sqrt(2), a polynomial of degree 8 for (log(1
# + m) - m + m^2 / 2) / m^3, relative error below 8e-8.
_LOG_COEFFICIENTS = (
    7.0376836292e-2,
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)
_SQRT_HALF = 0.70710678118654752


def log(x: Expr) -> Expr:
    """The natural logarithm of one positive, normal f32."""
    bits = bind(T.reinterpret("int32", x))
    mantissa = T.bitwise_or(T.bitwise_and(bits, T.int32(0x007FFFFF)), T.int32(0x3F000000))
    half = bind(T.reinterpret("float32", mantissa))  # in 0.5..1
    small = bind(half < f32(_SQRT_HALF))
    exponent = T.shift_right(bits, T.int32(23)) - T.int32(126) - T.Select(small, T.int32(1), T.int32(0))
    n = hold(T.cast(exponent, "float32"), 1)
    m = bind(T.Select(small, half + half, half) - f32(1))
    square = bind(m * m)
    poly = f32(_LOG_COEFFICIENTS[0])
    for c in _LOG_COEFFICIENTS[1:]:
        poly = poly * m + f32(c)
    small_part = poly * m * square + n * f32(_LN2_LOW) - f32(0.5) * square
    return bind(m + small_part + n * f32(_LN2_HIGH))
