"""Matrix products: the weight streams from DRAM once, tile by tile, through the slots; 4-bit tiles are
dequantised on the way.

For each tile of rows m0 and each block of output channels n0:
    for each tile of the block and each k0:
        load scales, zeros (ebdma -> side slot), once for as many tiles as a slot holds
        load the weight tile (ewdma -> packed slot, or wide slot if f16);  dequant (packed -> wide);  matmul += (wide, x -> accumulators)
    drain the block (accumulators + bias -> SRAM), and hand it to where it goes (`columns`)
The accumulators' halves, the slots and the temporaries alternate, so every unit works on a tile or block of its own.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from tyir.backends.edge10.lowering.columns import MOST_ROWS, Columns, StoredColumns
from tyir.backends.edge10.lowering.context import Area, Lowering, acc_range, element_bytes, sram_range
from tyir.backends.edge10.lowering.tiling import (
    WIDEST_BLOCK,
    MatmulShape,
    Tiles,
    choose_tiles,
    side_columns,
    spans,
)
from tyir.backends.edge10.memory.allocate import ALIGNMENT, SramPlan, align
from tyir.backends.edge10.memory.places import Scratch, root
from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.ty import Linear, QuantizedLinear, tensor_type
from tyir.ir import Op, Value
from tyir.targets.machine import Machine
from tyir.types import Type, bit_width

__all__ = [
    "InputPart",
    "InputTiles",
    "Product",
    "lower_linear",
    "lower_product",
    "lower_rows",
    "product_scratch",
]


@dataclass(frozen=True)
class _Side:
    """Where the scales and zeros of a tile's rows lie in SRAM."""

    scales: int
    zeros: int


def lower_linear(op: Linear | QuantizedLinear, lowering: Lowering, rows: Area | None = None) -> None:
    """`ty.linear` and `ty.quantized_linear`; `TyirError` when an operand is not what the matrix units take.

    `rows` is room for some rows of an x of very many: the weight is then read once for each time it is
    filled.
    """
    wrong = [str(v.type) for v in op.operands if str(tensor_type(v).element) not in ("f16", "ui4")]
    if wrong:
        raise TyirError(
            f"'{op.name}' has operands {', '.join(wrong)}; the matrix units take f16, and 4-bit weights",
            help="cast them to f16 (ty.cast) before lower-edge10",
        )
    in_sram = lowering.place(op.x).in_sram or rows is not None
    lower_rows(op, lowering, StoredColumns(op.out, lowering, lowering.results_area(in_sram)), rows)


def lower_rows(op: Linear | QuantizedLinear, lowering: Lowering, results: Columns, rows: Area | None) -> None:
    """A product whose x is where it is, or brought to `rows`, as many rows at a time as fit there."""
    inputs = InputTiles(op.x, lowering)
    if rows is None or inputs.in_sram:
        lower_product(op, lowering, inputs, results)
        return
    count = tensor_type(op.x).nbytes // inputs.row
    for first, size in spans(count, rows.nbytes // inputs.row):
        lowering.load_bytes(inputs.place.at(first * inputs.row), rows.offset, size * inputs.row)
        part = InputPart(rows.offset - first * inputs.row, inputs.row, 0)
        lower_product(op, lowering, part, results, (first, size))


def product_scratch(
    op: Op, arena: int, machine: Machine, plan: SramPlan, held: Collection[Value] = ()
) -> Scratch | None:
    """Room for rows of x, for products of more rows than are worked on at once whose x will not lie in SRAM:
    as many as the arena takes, in parts of nearly equal size.
    """
    if not isinstance(op, (Linear, QuantizedLinear)):
        return None
    *outer, k = tensor_type(op.x).static_shape
    rows, most = math.prod(outer), arena // (k * 2) // machine.cube.rows * machine.cube.rows
    if rows <= MOST_ROWS or most < machine.cube.rows:
        return None
    source = root(op.x)
    if source in held or (source.op is not None and tensor_type(op.x).nbytes <= arena):
        return None
    return Scratch(align(-(-rows // -(-rows // most)), machine.cube.rows) * k * 2, 0)


def lower_product(
    op: Linear | QuantizedLinear,
    lowering: Lowering,
    inputs: InputTiles | InputPart,
    results: Columns,
    part: tuple[int, int] | None = None,
) -> None:
    """A whole product, or `part` (first, count) of its rows, its columns handed to `results`."""
    product = Product(
        op,
        lowering,
        inputs,
        results.piece_bytes,
        results.piece_limit,
        results.block,
        None if part is None else part[1],
    )
    first, rows = part or (0, product.shape.m)
    width = element_bytes(op.out)
    for r0, r in ((first + r0, r) for r0, r in spans(rows, rows if results.block else product.tiles.m)):
        for g0, g in spans(product.shape.n, _delivered(product, results, r)):
            target, stride = results.target(r0, r, g0, g)
            for n0, n in spans(g, product.tiles.block):
                for m0, m in spans(r, product.tiles.m):
                    first_row = target + m0 * stride + n0 * width
                    product.columns(r0 + m0, m, g0 + n0, n, first_row, stride)
            results.deliver(target, r0, r, g0, g)


def _delivered(product: Product, results: Columns, rows: int) -> int:
    """How many columns of `rows` rows are handed on together: a block, or as many as the taker has room for,
    since the accumulators hold few columns of many rows, and short runs of results waste bursts of DRAM.
    """
    block, unit = product.tiles.block, results.unit
    if results.block or not results.piece_bytes:
        return block
    most = min(results.piece_limit // (rows * results.piece_bytes), max(WIDEST_BLOCK, block))
    unit = product.tiles.n if unit == 1 else unit
    return max(most // unit, 1) * unit


class InputTiles:
    """Tiles of x in SRAM: where it lies, or loaded piece by piece when it lives in DRAM."""

    def __init__(self, x: Value, lowering: Lowering) -> None:
        self.place, self.lowering = lowering.place(x), lowering
        self.row = tensor_type(x).static_shape[-1] * 2
        self._loaded: dict[int, tuple[int, int]] = {}
        self._count = 0

    @property
    def in_sram(self) -> bool:
        return self.place.in_sram

    def tile(self, m0: int, m: int, k0: int, k: int) -> tuple[int, int]:
        """Offset and row stride of x[m0:, k0:]."""
        start = self.place.at(m0 * self.row + k0 * 2)
        if self.place.in_sram:
            return start.offset, self.row
        for offset, key in self._loaded.items():
            if key == (m0, k0):
                return offset, k * 2
        offset = self.lowering.plan.temp + self._count % 2 * (
            self.lowering.plan.temp_bytes // 4 // ALIGNMENT * ALIGNMENT
        )
        self._count += 1
        self._loaded[offset] = (m0, k0)
        self.lowering.load(start, offset, (1, m, k * 2), dram_strides=(0, self.row))
        return offset, k * 2


@dataclass(frozen=True)
class InputPart:
    """Columns of x from `first` on that lie in SRAM at `offset`, rows `row` bytes apart."""

    offset: int
    row: int
    first: int
    in_sram: bool = True

    def tile(self, m0: int, m: int, k0: int, k: int) -> tuple[int, int]:
        """Offset and row stride of x[m0:, k0:]."""
        return self.offset + m0 * self.row + (k0 - self.first) * 2, self.row


class Product:
    """One linear op: its tiles, and the commands of a block of columns."""

    def __init__(
        self,
        op: Linear | QuantizedLinear,
        lowering: Lowering,
        inputs: InputTiles | InputPart,
        piece_bytes: int,
        piece_limit: int = 0,
        block: int = 0,
        rows: int | None = None,
    ) -> None:
        self.op, self.lowering, self.inputs = op, lowering, inputs
        *outer, k = tensor_type(op.x).static_shape
        n = tensor_type(op.out).static_shape[-1]
        group = op.group_size if isinstance(op, QuantizedLinear) else 0
        self.shape = MatmulShape(
            rows or math.prod(outer), n, k, group, inputs.in_sram, piece_bytes, piece_limit, block
        )
        self.tiles: Tiles = choose_tiles(self.shape, lowering.machine, lowering.plan)
        self.weight = lowering.place(op.q if isinstance(op, QuantizedLinear) else op.weight)
        self._begins_with_half = lowering.begins_with_half(op)
        self._side_columns = side_columns(self.shape, lowering.plan) // self.tiles.n * self.tiles.n

    def columns(
        self,
        m0: int,
        m: int,
        n0: int,
        n: int,
        target: int,
        stride: int,
        part: tuple[int, int] | None = None,
        element: Type | None = None,
    ) -> None:
        """Compute out[m0:, n0:] into SRAM, rows `stride` bytes apart; `part` (first, size) of the sum only,
        without the bias, stored as `element`.
        """
        self.lowering.emitter.begin(self.op)

        def write() -> None:
            self._columns(m0, m, n0, n, target, stride, part, element)

        if self.inputs.in_sram and not self._begins_with_half:
            self.lowering.emitter.repeated((self, m, n, part, element), write)
        else:  # what comes before decides which tiles of x are there
            write()

    def _columns(
        self,
        m0: int,
        m: int,
        n0: int,
        n: int,
        target: int,
        stride: int,
        part: tuple[int, int] | None,
        element: Type | None,
    ) -> None:
        acc, acc_stride = next(self.lowering.accumulators), align(n, self.lowering.machine.cube.columns) * 4
        for s0, size in spans(n, self._side_columns):
            side = self._load_side(n0 + s0, size)
            for t0, tile in spans(size, self.tiles.n):
                rows = _Side(
                    side.scales + t0 * self.shape.scale_row_bytes, side.zeros + t0 * self.shape.zero_row_bytes
                )
                self._tile(
                    m0,
                    m,
                    n0 + s0 + t0,
                    tile,
                    acc + (s0 + t0) * 4,
                    acc_stride,
                    part or (0, self.shape.k),
                    rows,
                )
        bias = self._load_bias(n0, n) if part is None else None
        self._drain(acc, acc_stride, m, n, bias, target, stride, element or tensor_type(self.op.out).element)

    def _tile(
        self, m0: int, m: int, n0: int, n: int, acc: int, acc_stride: int, part: tuple[int, int], side: _Side
    ) -> None:
        """The sums of a tile's columns: out[m0:, n0:] over x's columns `part` (first, size)."""
        first, size = part
        for offset, k in spans(size, self.tiles.k):
            k0 = first + offset
            weight = self._load_weight(n0, n, k0, k, side)
            for r0, rows in spans(m, self._rows_at_once(m)):
                x, x_stride = self.inputs.tile(m0 + r0, rows, k0, k)
                sums, extent = acc + r0 * acc_stride, (rows - 1) * acc_stride + n * 4
                self.lowering.emitter.emit(
                    edge10.Matmul,
                    lhs=x,
                    lhs_strides=(x_stride, 0),
                    rhs=weight,
                    rhs_stride=k * 2,
                    acc=sums,
                    acc_stride=acc_stride,
                    m=(rows, 1),
                    n=n,
                    k=k,
                    accumulate=offset > 0,
                    reads=[
                        sram_range(x, (rows - 1) * x_stride + k * 2),
                        sram_range(weight, n * k * 2),
                        *([acc_range(sums, extent)] if offset else []),
                    ],
                    writes=[acc_range(sums, extent, write=True)],
                )

    def _rows_at_once(self, m: int) -> int:
        """All rows, but half of them in the first tile if x is being made in halves."""
        if not self._begins_with_half:
            return m
        self._begins_with_half = False
        return self.lowering.half_rows(m)

    def _load_side(self, n0: int, n: int) -> _Side:
        """Whole rows of scales and zeros (short rows would waste bursts)."""
        if not isinstance(self.op, QuantizedLinear):
            return _Side(0, 0)
        scale_bytes, zero_bytes = n * self.shape.scale_row_bytes, n * self.shape.zero_row_bytes
        scales = self.lowering.side.take(align(scale_bytes) + align(zero_bytes))
        zeros = scales + align(scale_bytes)
        self.lowering.load_bytes(
            self.lowering.place(self.op.scales).at(n0 * self.shape.scale_row_bytes),
            scales,
            scale_bytes,
            queue="ebdma",
        )
        self.lowering.load_bytes(
            self.lowering.place(self.op.zeros).at(n0 * self.shape.zero_row_bytes),
            zeros,
            zero_bytes,
            queue="ebdma",
        )
        return _Side(scales, zeros)

    def _load_bias(self, n0: int, n: int) -> int | None:
        if self.op.bias is None:
            return None
        bias = self.lowering.side.take(n * 2)
        self.lowering.load_bytes(self.lowering.place(self.op.bias).at(n0 * 2), bias, n * 2, queue="ebdma")
        return bias

    def _load_weight(self, n0: int, n: int, k0: int, k: int, side: _Side) -> int:
        """Bring tile [n, k] of the weight to SRAM as f16; returns its offset.

        `side` is of the tile's rows.
        """
        lowering, group = self.lowering, self.shape.group_size
        row = self.shape.weight_row_bytes
        if not group:
            wide = lowering.wide.take(n * k * 2)
            self._load_tile(wide, n0 * row + k0 * 2, n, k * 2, row)
            return wide
        packed, wide = lowering.packed.take(n * ((k + 1) // 2)), lowering.wide.take(n * k * 2)
        self._load_tile(packed, n0 * row + k0 // 2, n, (k + 1) // 2, row)
        lowering.emitter.emit(
            edge10.Dequant,
            q=packed,
            q_stride=(k + 1) // 2,
            scales=side.scales,
            scale_stride=self.shape.scale_row_bytes,
            zeros=side.zeros,
            zero_stride=self.shape.zero_row_bytes,
            first_group=k0 // group,
            group_size=group,
            out=wide,
            n=n,
            k=k,
            reads=[
                sram_range(packed, n * ((k + 1) // 2)),
                sram_range(side.scales, n * self.shape.scale_row_bytes),
                sram_range(side.zeros, n * self.shape.zero_row_bytes),
            ],
            writes=[sram_range(wide, n * k * 2, write=True)],
        )
        return wide

    def _load_tile(self, sram: int, offset: int, rows: int, row_bytes: int, dram_row: int) -> None:
        self.lowering.load(
            self.weight.at(offset), sram, (1, rows, row_bytes), dram_strides=(0, dram_row), queue="ewdma"
        )

    def _drain(
        self,
        acc: int,
        acc_stride: int,
        m: int,
        n: int,
        bias: int | None,
        target: int,
        stride: int,
        element: Type,
    ) -> None:
        self.lowering.emitter.emit(
            edge10.Drain,
            acc=acc,
            acc_stride=acc_stride,
            m=(m, 1),
            n=n,
            sram=target,
            sram_strides=(stride, 0),
            element=element,
            bias=bias,
            reads=[acc_range(acc, m * acc_stride), *([sram_range(bias, n * 2)] if bias is not None else [])],
            writes=[sram_range(target, (m - 1) * stride + n * bit_width(element) // 8, write=True)],
        )
