"""`edge10`: the command program of one die, what the backend emits and both simulator engines read.

Memories: DRAM (byte addresses in `edge10.buffer`s), SRAM (byte offsets in the on-chip data memory),
accumulators (byte offsets, f32). A command runs on one unit.  Each unit executes its commands in program
order and completes them in order; commands of different units are ordered only by tokens: every command
yields a `!edge10.token` and waits for the tokens among its operands.

Units: `ewdma` (weights), `eidma` (features), `ebdma` (scales, biases, small vectors) read DRAM; `eodma`
writes it; `dequant`; `cube` (the matrix units together); `drain` (accumulators to SRAM); `vector` (the vector
units together); `d2d` (die to die).

Operands of a command, told apart by type: addresses (`!edge10.address`), then scalars (`i64`) that replace
the sizes given as -1 in the order of the properties, then tokens.  Scalars are the command processor's
registers and cost nothing.  A command with a size of 0 does nothing but wait.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import KW_ONLY
from typing import Final

from tyir.attributes import ArrayAttr, SymbolRefAttr
from tyir.diagnostics import Diagnostic
from tyir.edge10.command import ADDRESS, DMA_UNITS, DYNAMIC, TOKEN, UNITS, Command, Exchange
from tyir.edge10.command_times import NO_TRANSFER, Transfer, Work, transfer_of
from tyir.edge10.vector_functions import ELEMENTWISE_FUNCTIONS, VECTOR_FUNCTIONS, Call
from tyir.ir import Region, Value
from tyir.opdef import DeclaredOp, attr, operand, region, result, variadic_operand, variadic_result
from tyir.traits import Collective, Pure, Symbol, Terminator
from tyir.types import TensorType, Type, bit_width, i64

__all__ = [
    "ADDRESS",
    "DMA_UNITS",
    "DYNAMIC",
    "TOKEN",
    "UNITS",
    "AddressOf",
    "Affine",
    "AllGather",
    "AllReduce",
    "BlockWeights",
    "Buffer",
    "Command",
    "Dequant",
    "DequantRows",
    "Drain",
    "Exchange",
    "For",
    "Gather",
    "Join",
    "Load",
    "Matmul",
    "Offset",
    "Recv",
    "Register",
    "ScoreBlock",
    "Send",
    "SoftmaxBlock",
    "Store",
    "TopK",
    "VectorOp",
    "Yield",
    "byte_width",
]

BUFFER_KINDS: Final = ("weight", "kv", "activation", "input", "output")

# ---------------------------------------------------------------------------------------- storage and scalars


class Buffer(DeclaredOp, name="edge10.buffer", traits=(Symbol,)):
    """`nbytes` of DRAM at `address` holding a tensor.

    `kind` says who writes it: weight and input the host, kv and activation the program.
    """

    _: KW_ONLY
    sym_name: str = attr()
    address: int = attr()
    nbytes: int = attr()
    kind: str = attr(choices=BUFFER_KINDS)
    type: TensorType = attr()

    def verify(self) -> Iterator[str]:
        if not self.type.is_storable:
            yield f"holds {self.type}, whose size is not known"
        elif self.type.nbytes > self.nbytes:
            yield f"{self.type} takes {self.type.nbytes} bytes but the buffer has {self.nbytes}"


class AddressOf(DeclaredOp, name="edge10.address_of", traits=(Pure,)):
    """The DRAM address of a buffer."""

    _: KW_ONLY
    symbol: SymbolRefAttr = attr()
    out: Value = result()

    def infer(self) -> Type:
        return ADDRESS


class Offset(DeclaredOp, name="edge10.offset", traits=(Pure,)):
    """base + index * scale, in bytes."""

    base: Value = operand()
    index: Value = operand()
    _: KW_ONLY
    scale: int = attr()
    out: Value = result()

    def infer(self) -> Type:
        return ADDRESS


class Register(DeclaredOp, name="edge10.register", traits=(Pure,)):
    """A register set by the host before the step; `pos` is the number of tokens already in the cache of a
    sequence, one register for each of a batch; `wanted` is 1, or 0 where no row of the results is wanted.
    """

    _: KW_ONLY
    register: str = attr(choices=("pos", "wanted"))
    sequence: int = attr(default=0)
    out: Value = result()

    def infer(self) -> Type:
        return i64


class Affine(DeclaredOp, name="edge10.affine", traits=(Pure,)):
    """min(max(floor((sum_i coefficients[i] * inputs[i] + constant) / divisor), low), high); without `high`
    there is no upper bound.
    """

    inputs: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    coefficients: tuple[int, ...] = attr()
    constant: int = attr(default=0)
    divisor: int = attr(default=1)
    low: int = attr(default=0)
    high: int | None = attr(default=None)
    out: Value = result()

    def infer(self) -> Type:
        return i64

    def verify(self) -> Iterator[str]:
        if len(self.coefficients) != len(self.operands):
            yield f"{len(self.coefficients)} coefficients for {len(self.operands)} inputs"
        if self.divisor <= 0:
            yield f"divisor must be positive, got {self.divisor}"


class Join(DeclaredOp, name="edge10.join", traits=(Pure,)):
    """A token that is done when all of its operands are; no command, costs nothing."""

    tokens: tuple[Value, ...] = variadic_operand(default=())
    out: Value = result()

    def infer(self) -> Type:
        return TOKEN


class For(DeclaredOp, name="edge10.for"):
    """The body once for each i64 from `bounds[0]` up to, not including, `bounds[1]`; tokens are carried
    from one turn to the next.

    %t = "edge10.for"(%low, %high, %t0) ({^bb0(%i: i64, %carried: !edge10.token): ... "edge10.yield"(%next)}) : (i64, i64, !edge10.token) -> !edge10.token
    """  # noqa: E501

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    body_region: Region = region()
    tokens: tuple[Value, ...] = variadic_result()

    def verify(self) -> Iterator[str]:
        types = [v.type for v in self.operands]
        if not self.body_region.blocks:
            yield "has no body"
        elif types[:2] != [i64, i64] or any(t is not TOKEN for t in types[2:]):
            yield "takes two i64 bounds and then tokens"
        elif [a.type for a in self.body.args] != [i64, *types[2:]] or [r.type for r in self.results] != types[
            2:
        ]:
            yield "body arguments must be an i64 and the carried tokens, the results those tokens"


class Yield(DeclaredOp, name="edge10.yield", traits=(Terminator,)):
    """Ends a loop body with the tokens of the next turn."""

    tokens: tuple[Value, ...] = variadic_operand(default=())


# --------------------------------------------------------------------------------------------------- commands


class Load(Command, name="edge10.load", unit_from="queue", dynamic=("shape",), priced_by=("dram_strides",)):
    """DRAM to SRAM: `shape` is [planes, rows, bytes of a row]; strides are [between planes, between rows] in
    bytes on each side.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    offset: int = attr(default=0)
    sram: int = attr()
    shape: tuple[int, ...] = attr()
    dram_strides: tuple[int, ...] = attr()
    sram_strides: tuple[int, ...] = attr()
    queue: str = attr(choices=("ewdma", "eidma", "ebdma"))
    done: Value = result()

    def address_count(self) -> int:
        return 1

    def cost(self, scalars: Sequence[int]) -> Transfer:
        return transfer_of(self.sizes_with(scalars), self.dram_strides)

    def sram_writes(self) -> list[tuple[int, int]]:
        planes, rows, row = self.shape
        outer, inner = self.sram_strides
        nbytes = (planes - 1) * outer + (rows - 1) * inner + row
        return [(self.sram, self.sram + (planes * outer if DYNAMIC in self.shape else nbytes))]

    def verify(self) -> Iterator[Diagnostic | str]:
        yield from super().verify()
        yield from _check_transfer(self.shape, self.dram_strides, self.sram_strides)


class Store(Command, name="edge10.store", unit="eodma", dynamic=("shape",), priced_by=("dram_strides",)):
    """SRAM to DRAM, shapes and strides as in `edge10.load`; runs on `eodma`."""

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    offset: int = attr(default=0)
    sram: int = attr()
    shape: tuple[int, ...] = attr()
    dram_strides: tuple[int, ...] = attr()
    sram_strides: tuple[int, ...] = attr()
    done: Value = result()

    def address_count(self) -> int:
        return 1

    def cost(self, scalars: Sequence[int]) -> Transfer:
        return transfer_of(self.sizes_with(scalars), self.dram_strides)

    def sram_writes(self) -> tuple[()]:
        return ()

    def verify(self) -> Iterator[Diagnostic | str]:
        yield from super().verify()
        yield from _check_transfer(self.shape, self.dram_strides, self.sram_strides)


class Gather(
    Command,
    name="edge10.gather",
    unit="eidma",
    dynamic=("rows", "entry"),
    priced_by=("index", "row_bytes"),
):
    """Rows of a DRAM table to consecutive rows in SRAM.

    index = "ids": row r is table[ids[entry + r] - first], ids i32 in SRAM, zeros when outside the table; a
    number of rows that a register gives is 0 or 1, and `entry` may be one too.  index =
    "position": table[min(pos + first + r, last)], `pos` being that of `sequence`; with `modulo`
    table[min((pos + first + r) mod modulo + shift, last)].
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    index: str = attr(choices=("ids", "position"))
    ids: int = attr(default=0)
    first: int = attr(default=0)
    sram: int = attr()
    rows: int = attr()
    row_bytes: int = attr()
    table_rows: int = attr()
    offset: int = attr(default=0)
    sequence: int = attr(default=0)
    entry: int = attr(default=0)
    modulo: int | None = attr(default=None, least=1)
    shift: int | None = attr(default=None, least=0)
    done: Value = result()

    def address_count(self) -> int:
        return 1

    def cost(self, scalars: Sequence[int]) -> Transfer:
        """Rows by id are one run each; rows by position follow each other."""
        rows, _ = self.sizes_with(scalars)
        if rows == 0:
            return NO_TRANSFER
        return Transfer(rows * self.row_bytes, rows if self.index == "ids" else 1)

    def sram_writes(self) -> list[tuple[int, int]]:
        rows = 1 if self.rows == DYNAMIC else self.rows
        return [(self.sram, self.sram + rows * self.row_bytes)]

    def signature(self) -> Hashable:
        """Which rows of the table a die holds does not matter."""
        if self.index == "ids":
            return (self.rows, self.row_bytes, self.sram, self.offset)
        return self.properties


class Dequant(Command, name="edge10.dequant", unit="dequant", priced_by=("n", "k")):
    """4-bit weights to f16 in SRAM: out[i, j] = f16((q[i, j] - zero) * scale) by groups of columns, out [n,
    k] contiguous.

    q has rows of `q_stride` bytes; scales (f16) and zeros (ui4 pairs) hold whole rows of the weight, the tile
    begins at group `first_group`.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    q: int = attr()
    q_stride: int = attr()
    scales: int = attr()
    scale_stride: int = attr()
    zeros: int = attr()
    zero_stride: int = attr()
    first_group: int = attr(default=0)
    group_size: int = attr(least=1)
    out: int = attr()
    n: int = attr()
    k: int = attr()
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        return Work("dequant", (self.n, self.k))

    def sram_writes(self) -> list[tuple[int, int]]:
        return [(self.out, self.out + self.n * self.k * 2)]

    def verify(self) -> Iterator[Diagnostic | str]:
        yield from super().verify()
        if self.group_size < 1:
            yield f"group_size must be positive, got {self.group_size}"
        elif self.k % self.group_size:
            yield f"a tile of {self.k} columns does not hold whole groups of {self.group_size}"


class DequantRows(
    Command, name="edge10.dequant_rows", unit="dequant", dynamic=("rows",), priced_by=("planes", "k")
):
    """8-bit rows to f16 in SRAM: out[p, r, j] = f16(q[p, r, j] * scale[p, r]), for `rows` rows of `k`
    elements of each plane.

    Planes of q (i8), scales (f16) and out (f16) hold `plane_rows` rows each, without gaps.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    q: int = attr()
    scales: int = attr()
    out: int = attr()
    planes: int = attr()
    plane_rows: int = attr()
    rows: int = attr(default=DYNAMIC)
    k: int = attr()
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        (rows,) = self.sizes_with(scalars)
        return Work("dequant", (self.planes * rows, self.k))

    def sram_writes(self) -> list[tuple[int, int]]:
        return [(self.out, self.out + self.planes * self.plane_rows * self.k * 2)]

    def verify(self) -> Iterator[Diagnostic | str]:
        yield from super().verify()
        if self.rows > self.plane_rows:
            yield f"{self.rows} rows are more than the {self.plane_rows} of a plane"


class Matmul(Command, name="edge10.matmul", unit="cube", dynamic=("n", "k"), priced_by=("m",)):
    """acc[m, n] (+)= lhs[m, k] * rhs, f16 operands in SRAM, f32 sums in the accumulators.

    Rows of lhs are numbered [outer, inner] with two strides (tokens by heads); `transposed` says rhs is
    stored [n, k] (a weight), otherwise [k, n].  A sum over no k is zero.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    lhs: int = attr()
    lhs_strides: tuple[int, ...] = attr()
    rhs: int = attr()
    rhs_stride: int = attr()
    transposed: bool = attr(default=True)
    acc: int = attr()
    acc_stride: int = attr()
    m: tuple[int, ...] = attr()
    n: int = attr()
    k: int = attr()
    accumulate: bool = attr(default=False)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        return Work("matmul", (math.prod(self.m), *self.sizes_with(scalars)))

    def sram_writes(self) -> tuple[()]:
        return ()

    def macs(self, scalars: Sequence[int]) -> int:
        return math.prod((*self.m, *self.sizes_with(scalars)))


class Drain(Command, name="edge10.drain", unit="drain", dynamic=("n",), priced_by=("m",)):
    """Accumulators [m, n] to SRAM as f16 or f32, plus a bias row (f16 at `bias`, -1 for none); rows numbered
    [outer, inner] as in `edge10.matmul`.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    acc: int = attr()
    acc_stride: int = attr()
    m: tuple[int, ...] = attr()
    n: int = attr()
    sram: int = attr()
    sram_strides: tuple[int, ...] = attr()
    element: Type = attr()
    bias: int | None = attr(default=None)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        return Work("drain", (math.prod(self.m), *self.sizes_with(scalars)))

    def sram_writes(self) -> list[tuple[int, int]]:
        row = max(self.sram_strides) if self.n == DYNAMIC else self.n * byte_width(self.element)
        (outer, inner), (outer_step, inner_step) = self.m, self.sram_strides
        return [(self.sram, self.sram + (outer - 1) * outer_step + (inner - 1) * inner_step + row)]


class VectorOp(Command, name="edge10.vector", unit="vector", priced_by=("function", "rows", "cols")):
    """A function of rows x cols elements on the vector units (`VECTOR_FUNCTIONS`); inputs and outputs are
    SRAM offsets, contiguous.

    With `output_strides` [outer, inner] in bytes, row r of the output lies at r // group * outer + r % group
    * inner.  `input_strides` gives, for each input of an elementwise function, the bytes from one row to the
    next.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    function: str = attr(choices=tuple(VECTOR_FUNCTIONS))
    inputs: tuple[int, ...] = attr()
    outputs: tuple[int, ...] = attr()
    input_types: ArrayAttr = attr()
    output_types: ArrayAttr = attr()
    rows: int = attr()
    cols: int = attr()
    group: int = attr(default=1, least=1)
    constant: float = attr(default=0.0)
    input_strides: tuple[int, ...] | None = attr(default=None)
    output_strides: tuple[int, ...] | None = attr(default=None)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        return Work(self.function, (self.rows * self.cols,))

    def sram_writes(self) -> list[tuple[int, int]]:
        found = []
        for offset, element, shape in zip(
            self.outputs, self.output_types, VECTOR_FUNCTIONS[self.function].outputs
        ):
            assert isinstance(element, Type)
            nbytes = math.prod(shape(self.call)) * byte_width(element)
            if self.output_strides is not None:
                outer, inner = self.output_strides
                last_row = (self.rows // self.group - 1) * outer + (self.group - 1) * inner
                nbytes = last_row + self.cols * byte_width(element)
            found.append((offset, offset + nbytes))
        return found

    @property
    def call(self) -> Call:
        """What its function is called with."""
        return Call(self.rows, self.cols, self.group, self.constant)

    def verify(self) -> Iterator[Diagnostic | str]:
        yield from super().verify()
        row = VECTOR_FUNCTIONS[self.function]
        inputs, outputs = len(row.inputs), len(row.outputs)
        if self.input_strides is not None and (not row.elementwise or len(self.input_strides) != inputs):
            yield f"input_strides are for {', '.join(ELEMENTWISE_FUNCTIONS)}, one for each input"
        if (
            (len(self.inputs), len(self.outputs)) != (inputs, outputs)
            or len(self.input_types) != inputs
            or len(self.output_types) != outputs
        ):
            yield f"'{self.function}' has {inputs} inputs and {outputs} outputs, each with its element type"


class SoftmaxBlock(
    Command,
    name="edge10.softmax_block",
    unit="vector",
    dynamic=("cols", "first_key"),
    priced_by=("rows", "softcap"),
):
    """One block of an online softmax (Milakov and Gimelshein, arXiv:1805.02867) over scores [rows, cols] f32
    of `cols` keys from `first_key` on.

    Row r is query `pos + first_query + r // heads` of `sequence`; keys after it, or `window` or more before
    it, are hidden.  With the running maximum m and sum l of a row: m' = max(m, max(scale * s)), alpha = exp(m
    - m'), p = exp(scale * s - m'), l' = l * alpha + sum(p); p is stored in f16, where a
    row may take the place of the first half of its scores.  Without columns m and l stay, alpha is 1.  With a
    `softcap` c, c * tanh(scale * s / c) stands for scale * s, and with a `temperature`, the offset of an f32
    in SRAM, scale is multiplied by it.  Scalars: the number of columns (size -1), then
    `first_key`.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    scores: int = attr()
    score_stride: int = attr()
    probabilities: int = attr()
    probability_stride: int = attr()
    maximum: int = attr()
    total: int = attr()
    alpha: int = attr()
    rows: int = attr()
    cols: int = attr(default=DYNAMIC)
    first_key: int = attr(default=DYNAMIC)
    heads: int = attr(least=1)
    first_query: int = attr(default=0)
    window: int = attr(default=0)
    sequence: int = attr(default=0)
    scale: float = attr()
    softcap: float | None = attr(default=None)
    temperature: int | None = attr(default=None)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        cols, _ = self.sizes_with(scalars)
        return Work("softmax" if self.softcap is None else "softmax_capped", (self.rows * cols,))

    def sram_writes(self) -> list[tuple[int, int]]:
        by_row = [(start, start + self.rows * 4) for start in (self.maximum, self.total, self.alpha)]
        return [(self.probabilities, self.probabilities + self.rows * self.probability_stride), *by_row]


class ScoreBlock(
    Command,
    name="edge10.score_block",
    unit="vector",
    dynamic=("cols", "first_key"),
    priced_by=("rows", "softcap"),
):
    """What queries see in a block of keys: of scores [rows, cols] f32 of `cols` keys from `first_key` on, for
    each row the logarithm of the sum of e^(scale * s) over the keys that it sees, -1e30 where it sees none.

    Row r is query `pos + first_query + r // heads * every` of `sequence`; keys after it are hidden.  The
    result goes to `out`, and is added to `total` of the row: total' = log(e^total + e^result).  Without
    columns the result is -1e30.  `softcap`, `temperature` and the scalars are as in `edge10.softmax_block`.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    scores: int = attr()
    score_stride: int = attr()
    out: int = attr()
    total: int = attr()
    rows: int = attr()
    cols: int = attr(default=DYNAMIC)
    first_key: int = attr(default=DYNAMIC)
    heads: int = attr(least=1)
    first_query: int = attr(default=0)
    every: int = attr(default=1, least=1)
    sequence: int = attr(default=0)
    scale: float = attr()
    softcap: float | None = attr(default=None)
    temperature: int | None = attr(default=None)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        """The passes of a softmax, whose weights would be stored where here they are added up."""
        cols, _ = self.sizes_with(scalars)
        return Work("softmax" if self.softcap is None else "softmax_capped", (self.rows * cols,))

    def sram_writes(self) -> list[tuple[int, int]]:
        return [(start, start + self.rows * 4) for start in (self.out, self.total)]


class BlockWeights(
    Command,
    name="edge10.block_weights",
    unit="vector",
    dynamic=("seen", "low", "high", "measures"),
    priced_by=("samples", "heads"),
):
    """How much of their attention samples give each of `rows` blocks: of the logarithms x [rows, samples,
    heads] f32 and totals [samples, heads] f32, rows `total_stride` bytes apart, the sums of e^(x - total)
    over heads and the samples that choose (`kv.pick_blocks`), f32 [rows] at `out`.

    With `measures` 1 not all choose.  Row r is block `first` + r; block 0 has weight 1e30, one that is not
    from `low` up to `high` -1.  Rows from `seen` on are no candidates and are not read.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    x: int = attr()
    totals: int = attr()
    total_stride: int = attr()
    out: int = attr()
    rows: int = attr()
    samples: int = attr()
    heads: int = attr()
    first: int = attr(default=0)
    seen: int = attr(default=DYNAMIC)
    low: int = attr(default=DYNAMIC)
    high: int = attr(default=DYNAMIC)
    measures: int = attr(default=DYNAMIC)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        seen, *_ = self.sizes_with(scalars)
        return Work("softmax", (seen * self.samples * self.heads,))

    def sram_writes(self) -> list[tuple[int, int]]:
        return [(self.out, self.out + self.rows * 4)]


class TopK(
    Command,
    name="edge10.top_k",
    unit="vector",
    priced_by=("rows", "cols", "k", "partial", "softcap"),
):
    """Offers `cols` candidates of each row to the row's list of the `k` best, on the vector units, and adds
    their exponentials to the row's sum.

    Candidate c of row r is the value (`element`) at SRAM offset `values` + r * `stride` + c elements; its id
    is `first` + c, or the i32 at the same place from `ids` on.  The lists are k f32 values at `best[0]` + r *
    `best_strides[0]` and k i32 ids at `best[1]` + r * `best_strides[1]`, largest first, of equal values the
    lower id first; the f32 at `best[2]` + r * `best_strides[2]` is the sum of exp(x - the first value) over
    all candidates so far, scaled as the first value grows.  With `partial`, an SRAM offset, the candidates of
    row r are a list of this kind whose sum is the f32 at `partial` + r * `stride`, which is added in place of
    theirs.  `fresh` begins with empty lists, whose free places hold -inf; -inf and NaN count as the lowest
    finite number.

    A `softcap` c has c * tanh(x / c) summed for x.  `ends` gives the results in place of what is added to:
    values are capped, and the sum becomes its logarithm plus the first value.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    values: int = attr()
    ids: int | None = attr(default=None)
    partial: int | None = attr(default=None)
    stride: int = attr()
    element: Type = attr()
    first: int = attr(default=0)
    rows: int = attr()
    cols: int = attr()
    best: tuple[int, ...] = attr()
    best_strides: tuple[int, ...] = attr()
    k: int = attr()
    softcap: float | None = attr(default=None)
    fresh: bool = attr(default=True)
    ends: bool = attr(default=False)
    done: Value = result()

    def cost(self, scalars: Sequence[int]) -> Work:
        summed = self.cols if self.partial is None else 1
        what = "top_k" if self.softcap is None else "top_k_capped"
        return Work(what, (self.rows, self.cols, self.k, self.rows * summed))

    def sram_writes(self) -> list[tuple[int, int]]:
        return [
            (offset, offset + (self.rows - 1) * stride + size)
            for offset, stride, size in zip(self.best, self.best_strides, (self.k * 4, self.k * 4, 4))
        ]

    def verify(self) -> Iterator[Diagnostic | str]:
        yield from super().verify()
        if (len(self.best), len(self.best_strides)) != (3, 3):
            yield "lists are values and ids, and there is a sum: three offsets and three strides"
        if min(self.k, self.rows, self.cols) < 1:
            yield f"k = {self.k}, rows = {self.rows} and cols = {self.cols} must be positive"
        if self.partial is not None and self.ids is None:
            yield "a list with a sum has ids"


class AllReduce(
    Exchange,
    name="edge10.all_reduce",
    priced_by=("source_memory", "destination_memory", "nbytes"),
    traits=(Collective,),
):
    """The sum over all dies (or those named by `dies`) of `nbytes` of elements, added in f32 in die order, on
    each of them.

    A side in DRAM takes its address from an operand; a die with nothing to give has source memory "none".
    `group` is how many neighbouring dies are added first, where there are two levels (without it: those of a
    package).
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    source: int = attr()
    source_memory: str = attr(default="sram", choices=("sram", "dram", "none"))
    destination: int = attr()
    destination_memory: str = attr(default="sram", choices=("sram", "dram"))
    nbytes: int = attr()
    element: Type = attr()
    dies: tuple[int, ...] | None = attr(default=None)
    group: int | None = attr(default=None)
    done: Value = result()

    def given_bytes(self) -> int:
        return self.nbytes

    def taken_bytes(self) -> int:
        return self.nbytes

    def source_in(self) -> str:
        return self.source_memory

    def destination_in(self) -> str:
        return self.destination_memory

    def sram_writes(self) -> list[tuple[int, int]]:
        in_sram = self.destination_memory == "sram"
        return [(self.destination, self.destination + self.nbytes)] if in_sram else []


class Send(Exchange, name="edge10.send", priced_by=("source_memory", "nbytes"), traits=(Collective,)):
    """Hands `nbytes` to each die of `targets`, which takes them with an `edge10.recv` of the same `tag`: the
    step from one pipeline stage to the next.

    A source in DRAM takes its address from an operand.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    source: int = attr()
    source_memory: str = attr(default="sram", choices=("sram", "dram"))
    nbytes: int = attr()
    targets: tuple[int, ...] = attr()
    tag: int = attr(default=0)
    done: Value = result()

    def given_bytes(self) -> int:
        return self.nbytes

    def taken_bytes(self) -> int:
        return 0

    def source_in(self) -> str:
        return self.source_memory

    def destination_in(self) -> str:
        return "none"

    def sram_writes(self) -> tuple[()]:
        return ()


class Recv(Exchange, name="edge10.recv", priced_by=("destination_memory", "nbytes"), traits=(Collective,)):
    """Takes the `nbytes` that die `peer` sends with this `tag`.

    A destination in DRAM takes its address from an operand.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    destination: int = attr()
    destination_memory: str = attr(default="sram", choices=("sram", "dram"))
    nbytes: int = attr()
    peer: int = attr()
    tag: int = attr(default=0)
    done: Value = result()

    def given_bytes(self) -> int:
        return 0

    def taken_bytes(self) -> int:
        return self.nbytes

    def source_in(self) -> str:
        return "none"

    def destination_in(self) -> str:
        return self.destination_memory

    def sram_writes(self) -> list[tuple[int, int]]:
        in_sram = self.destination_memory == "sram"
        return [(self.destination, self.destination + self.nbytes)] if in_sram else []


class AllGather(
    Exchange,
    name="edge10.all_gather",
    priced_by=("source_memory", "destination_memory", "rows", "sizes", "die"),
    traits=(Collective,),
):
    """Every die's [rows, sizes[die]] bytes joined along the row, in die order, on every die; with `dies` of
    those named, `die` being the number among them.

    With `displacements` (MPI_Allgatherv's: where each die's piece begins in a row of the result) and `stride`
    (bytes between those rows), the result is a part of a larger tensor: a head's logits are gathered while
    the next are computed.  A side in DRAM takes its address from an operand; a die with nothing to give has
    source memory "none".
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    source: int = attr()
    source_memory: str = attr(default="sram", choices=("sram", "dram", "none"))
    destination: int = attr()
    destination_memory: str = attr(default="sram", choices=("sram", "dram"))
    rows: int = attr()
    sizes: tuple[int, ...] = attr()
    displacements: tuple[int, ...] | None = attr(default=None)
    stride: int = attr(default=0)
    die: int = attr()
    dies: tuple[int, ...] | None = attr(default=None)
    done: Value = result()

    def given_bytes(self) -> int:
        return self.rows * self.sizes[self.die]

    def taken_bytes(self) -> int:
        return self.rows * sum(self.sizes)

    def taken_runs(self) -> int:
        return self.rows * len(self.sizes)

    def source_in(self) -> str:
        return self.source_memory

    def destination_in(self) -> str:
        return self.destination_memory

    def sram_writes(self) -> list[tuple[int, int]]:
        if self.destination_memory != "sram":
            return []
        if self.displacements is None:
            return [(self.destination, self.destination + self.taken_bytes())]
        last_row = self.destination + (self.rows - 1) * self.stride
        return [
            (self.destination + start, last_row + start + size)
            for start, size in zip(self.displacements, self.sizes)
        ]

    def signature(self) -> Hashable:
        """The die's own number does not matter, the size of its piece does."""
        mine = self.sizes[self.die]
        memories = (self.source_memory, self.destination_memory)
        return (self.rows, self.sizes, mine, *memories, self.displacements, self.stride, self.dies)

    def verify(self) -> Iterator[Diagnostic | str]:
        yield from super().verify()
        if not 0 <= self.die < len(self.sizes):
            yield f"die {self.die} is not among the {len(self.sizes)} sizes"
        if self.displacements is not None and len(self.displacements) != len(self.sizes):
            yield f"{len(self.displacements)} displacements for {len(self.sizes)} dies"


def byte_width(element: Type) -> int:
    """Bytes of an element."""
    return bit_width(element) // 8


def _check_transfer(
    shape: tuple[int, ...], dram_strides: tuple[int, ...], sram_strides: tuple[int, ...]
) -> Iterator[str]:
    if (len(shape), len(dram_strides), len(sram_strides)) != (3, 2, 2):
        yield "a transfer has a shape of three sizes [planes, rows, row bytes] and two strides on each side"
