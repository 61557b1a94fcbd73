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

from collections.abc import Iterator
from dataclasses import KW_ONLY
from typing import Final

from tyir.attributes import ArrayAttr, SymbolRefAttr
from tyir.ir import Op, Region, Value
from tyir.opdef import DeclaredOp, attr, operand, region, result, variadic_operand, variadic_result
from tyir.traits import Collective, Pure, Symbol, Terminator
from tyir.types import OpaqueType, TensorType, Type, i64

__all__ = [
    "ADDRESS",
    "COLLECTIVES",
    "DMA_UNITS",
    "DYNAMIC",
    "TOKEN",
    "UNITS",
    "AddressOf",
    "Affine",
    "AllGather",
    "AllReduce",
    "Buffer",
    "Dequant",
    "DequantRows",
    "Drain",
    "For",
    "Gather",
    "Join",
    "Load",
    "Matmul",
    "Offset",
    "Recv",
    "Register",
    "Send",
    "SoftmaxBlock",
    "Store",
    "TopK",
    "VectorOp",
    "Yield",
    "dynamic_sizes",
    "is_command",
    "unit_of",
    "unit_of_class",
]

TOKEN: Final = OpaqueType("edge10.token")
ADDRESS: Final = OpaqueType("edge10.address")
DYNAMIC: Final = -1
DMA_UNITS: Final = ("ewdma", "eidma", "ebdma", "eodma")
UNITS: Final = (*DMA_UNITS, "dequant", "cube", "drain", "vector", "d2d")
BUFFER_KINDS: Final = ("weight", "kv", "activation", "input", "output")

VECTOR_FUNCTIONS: Final = {
    # function: (inputs, outputs, meaning); all compute in f32 and round once
    "add": (2, 1, "a + b"),
    "mul": (2, 1, "a * b"),
    "scale": (1, 1, "a * constant"),
    "silu": (1, 1, "a * sigmoid(a)"),
    "silu_mul": (2, 1, "silu(a) * b"),
    "cast": (1, 1, "a in the output's element type"),
    "copy": (1, 1, "a"),
    "fill": (0, 1, "constant"),
    "rms_norm": (2, 1, "a / sqrt(mean(a^2) + constant) * w, w [cols]"),
    "rope": (3, 1, "half-split rotary embedding; a [rows, cols], cos and sin [rows / group, cols / 2]"),
    "rescale_add": (3, 1, "a * s[row] + b: the running sum of blockwise attention"),
    "divide_rows": (2, 1, "a / s[row]: the end of blockwise attention"),
    "quantize_rows": (1, 2, "a as i8 and one f16 scale per row, as kv.quantize_rows says"),
}


ELEMENTWISE_FUNCTIONS: Final = ("add", "mul", "scale", "silu", "silu_mul", "cast", "copy")


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
    sequence, one register for each of a batch.
    """

    _: KW_ONLY
    register: str = attr(choices=("pos",))
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


class Load(DeclaredOp, name="edge10.load"):
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self, addresses=1)
        yield from _check_transfer(self.shape, self.dram_strides, self.sram_strides)


class Store(DeclaredOp, name="edge10.store"):
    """SRAM to DRAM, shapes and strides as in `edge10.load`; runs on `eodma`."""

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    offset: int = attr(default=0)
    sram: int = attr()
    shape: tuple[int, ...] = attr()
    dram_strides: tuple[int, ...] = attr()
    sram_strides: tuple[int, ...] = attr()
    done: Value = result()

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self, addresses=1)
        yield from _check_transfer(self.shape, self.dram_strides, self.sram_strides)


class Gather(DeclaredOp, name="edge10.gather"):
    """Rows of a DRAM table to consecutive rows in SRAM.

    index = "ids": row r is table[ids[r] - first], ids i32 in SRAM, zeros when outside the table; index =
    "position": table[min(pos + first + r, last)], `pos` being that of `sequence`.
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
    done: Value = result()

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self, addresses=1)


class Dequant(DeclaredOp, name="edge10.dequant"):
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self)
        if self.k % self.group_size:
            yield f"a tile of {self.k} columns does not hold whole groups of {self.group_size}"


class DequantRows(DeclaredOp, name="edge10.dequant_rows"):
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self)
        if self.rows > self.plane_rows:
            yield f"{self.rows} rows are more than the {self.plane_rows} of a plane"


class Matmul(DeclaredOp, name="edge10.matmul"):
    """acc[m, n] (+)= lhs[m, k] * rhs, f16 operands in SRAM, f32 sums in the accumulators.

    Rows of lhs are numbered [outer, inner] with two strides (tokens by heads); `transposed` says rhs is
    stored [n, k] (a weight), otherwise [k, n].
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self)


class Drain(DeclaredOp, name="edge10.drain"):
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self)


class VectorOp(DeclaredOp, name="edge10.vector"):
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self)
        inputs, outputs, _ = VECTOR_FUNCTIONS[self.function]
        if self.input_strides is not None and (
            self.function not in ELEMENTWISE_FUNCTIONS or len(self.input_strides) != inputs
        ):
            yield f"input_strides are for {', '.join(ELEMENTWISE_FUNCTIONS)}, one for each input"
        if (
            (len(self.inputs), len(self.outputs)) != (inputs, outputs)
            or len(self.input_types) != inputs
            or len(self.output_types) != outputs
        ):
            yield f"'{self.function}' has {inputs} inputs and {outputs} outputs, each with its element type"


class SoftmaxBlock(DeclaredOp, name="edge10.softmax_block"):
    """One block of an online softmax (Milakov and Gimelshein, arXiv:1805.02867) over scores [rows, cols] f32
    of `cols` keys from `first_key` on.

    Row r is query `pos + first_query + r // heads` of `sequence`; keys after it, or `window` or more before
    it, are hidden.  With the running maximum m and sum l of a row: m' = max(m, max(scale * s)), alpha = exp(m
    - m'), p = exp(scale * s - m'), l' = l * alpha + sum(p); p is stored in f16. Scalars: the number of
    columns (size -1), then `first_key`.
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
    done: Value = result()

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self)


class TopK(DeclaredOp, name="edge10.top_k"):
    """Offers `cols` candidates of each row to the row's list of the `k` best, on the vector units.

    Candidate c of row r is the value (`element`) at SRAM offset `values` + r * `stride` + c elements; its id
    is `first` + c, or the i32 at the same place from `ids` on.  The lists are k f32 values at `best[0]` + r *
    `best_strides[0]` and k i32 ids at `best[1]` + r * `best_strides[1]`, largest first, of equal values the
    lower id first.  `fresh` begins with empty lists, whose free places hold -inf; -inf and NaN count as the
    lowest finite number.
    """

    args: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    values: int = attr()
    ids: int | None = attr(default=None)
    stride: int = attr()
    element: Type = attr()
    first: int = attr(default=0)
    rows: int = attr()
    cols: int = attr()
    best: tuple[int, ...] = attr()
    best_strides: tuple[int, ...] = attr()
    k: int = attr()
    fresh: bool = attr(default=True)
    done: Value = result()

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self)
        if (len(self.best), len(self.best_strides)) != (2, 2):
            yield "lists are values and ids: two offsets and two strides"
        if min(self.k, self.rows, self.cols) < 1:
            yield f"k = {self.k}, rows = {self.rows} and cols = {self.cols} must be positive"


class AllReduce(DeclaredOp, name="edge10.all_reduce", traits=(Collective,)):
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(
            self, addresses=(self.source_memory == "dram") + (self.destination_memory == "dram")
        )


class Send(DeclaredOp, name="edge10.send", traits=(Collective,)):
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self, addresses=int(self.source_memory == "dram"))


class Recv(DeclaredOp, name="edge10.recv", traits=(Collective,)):
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(self, addresses=int(self.destination_memory == "dram"))


class AllGather(DeclaredOp, name="edge10.all_gather", traits=(Collective,)):
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

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[str]:
        yield from _check_operands(
            self, addresses=(self.source_memory == "dram") + (self.destination_memory == "dram")
        )
        if not 0 <= self.die < len(self.sizes):
            yield f"die {self.die} is not among the {len(self.sizes)} sizes"
        if self.displacements is not None and len(self.displacements) != len(self.sizes):
            yield f"{len(self.displacements)} displacements for {len(self.sizes)} dies"


_UNIT: Final[dict[type[Op], str]] = {
    Store: "eodma",
    Gather: "eidma",
    Dequant: "dequant",
    DequantRows: "dequant",
    Matmul: "cube",
    Drain: "drain",
    VectorOp: "vector",
    SoftmaxBlock: "vector",
    TopK: "vector",
    AllReduce: "d2d",
    AllGather: "d2d",
    Send: "d2d",
    Recv: "d2d",
}


COLLECTIVES: Final = (AllReduce, AllGather, Send, Recv)


def is_command(op: Op) -> bool:
    """Whether an op runs on a unit (and is not a scalar, a token or control)."""
    return isinstance(op, Load) or type(op) in _UNIT


def unit_of(op: Op) -> str:
    """The unit a command runs on."""
    return op.queue if isinstance(op, Load) else _UNIT[type(op)]


def unit_of_class(command: type[Op], queue: str | None = None) -> str:
    """The unit of a command that is still to be made; a load's is its queue."""
    return _UNIT[command] if queue is None else queue


def dynamic_sizes(op: Op) -> int:
    """How many of a command's sizes come from scalar operands."""
    sizes: tuple[int, ...] = ()
    if isinstance(op, (Load, Store)):
        sizes = op.shape
    elif isinstance(op, Matmul):
        sizes = (op.n, op.k)
    elif isinstance(op, Drain):
        sizes = (op.n,)
    elif isinstance(op, SoftmaxBlock):
        sizes = (op.cols, op.first_key)
    elif isinstance(op, DequantRows):
        sizes = (op.rows,)
    return sizes.count(DYNAMIC)


def _check_operands(op: Op, addresses: int = 0) -> Iterator[str]:
    kinds = [v.type for v in op.operands]
    scalars = dynamic_sizes(op)
    wanted = [ADDRESS] * addresses + [i64] * scalars
    if kinds[: len(wanted)] != wanted or any(k is not TOKEN for k in kinds[len(wanted) :]):
        yield (
            f"takes {addresses} addresses, {scalars} scalars and then tokens, got"
            f" ({', '.join(map(str, kinds))})"
        )


def _check_transfer(
    shape: tuple[int, ...], dram_strides: tuple[int, ...], sram_strides: tuple[int, ...]
) -> Iterator[str]:
    if (len(shape), len(dram_strides), len(sram_strides)) != (3, 2, 2):
        yield "a transfer has a shape of three sizes [planes, rows, row bytes] and two strides on each side"
