"""A gated MLP of many tokens, a part of its inner channels at a time: the tensor between the products
never goes to DRAM.

    %g = linear(%x, %wg);  %u = linear(%x, %wu);  %y = silu_mul(%g, %u);  %d = linear(%y, %wd)
    -->
    for each part of the inner channels:                                as few as fit SRAM, one if possible
        for each block of the part: gate block -> temp;  up block -> temp;  silu_mul -> part of y in SRAM
        for each block of the outputs: the part's share of the sum;  plus that of the parts before (f32, in DRAM);  -> DRAM, the last one -> d

Otherwise the last product would read y again from DRAM for each tile of its outputs, which takes longer
than its weights.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.columns import Columns, StoredColumns
from tyir.backends.edge10.lowering.context import Area, Buffers, Lowering, Place, sram_range
from tyir.backends.edge10.lowering.fused.fusion import Room, ScratchPlace
from tyir.backends.edge10.lowering.fused.gated import GatedProducts, gated_products
from tyir.backends.edge10.lowering.ops.linear import InputPart, InputTiles, Product, lower_product
from tyir.backends.edge10.lowering.tiling import spans
from tyir.backends.edge10.memory.allocate import align
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects import edge10
from tyir.dialects.ty import Linear, QuantizedLinear, tensor_type
from tyir.ir import Op
from tyir.types import bit_width, f16, f32

__all__ = ["Mlp"]

_MOST_PARTS = 12
_SHARE_BYTES = 8  # of one element of a partial sum: this part's share and what the parts before make, f32


def _sum_bytes(rows: int) -> int:
    """A block of partial sums: narrow, since the arena is worth more to y."""
    return align(rows * _SHARE_BYTES * 48)


@dataclass(frozen=True)
class Mlp:
    """The ops of one gated MLP and how its inner channels are divided: `part` of them at a time."""

    gated: GatedProducts
    down: Linear | QuantizedLinear
    rows: int
    part: int

    @classmethod
    def match(cls, op: Op, room: Room) -> Mlp | None:
        """Small ones (decode) stay four ops: their tensors fit, and one vector command is cheaper than one a
        tile.
        """
        if not isinstance(op, (Linear, QuantizedLinear)) or tensor_type(op.out).element is not f16:
            return None
        gated = gated_products(op.x.op)
        if gated is None or len(op.x.uses) != 1:
            return None
        *outer, inner = tensor_type(op.x).static_shape
        rows = math.prod(outer)
        part = _part(gated, op, rows, inner, room)
        return cls(gated, op, rows, part) if part and _single_pass(rows, room) else None

    @property
    def anchor(self) -> Op:
        return self.down

    @property
    def others(self) -> Sequence[Op]:
        return self.gated.gate, self.gated.up, self.gated.op

    @property
    def ops(self) -> Sequence[Op]:
        return *self.others, self.down

    @property
    def inner(self) -> int:
        return tensor_type(self.gated.out).static_shape[-1]

    @property
    def parts(self) -> int:
        return -(-self.inner // self.part)

    @property
    def scratch(self) -> Scratch:
        """A part of y in SRAM, with two blocks of partial sums behind it; the sum so far in DRAM."""
        width = tensor_type(self.down.out).static_shape[-1]
        if self.parts == 1:
            return Scratch(self.rows * self.part * 2, 0)
        return Scratch(align(self.rows * self.part * 2) + 2 * _sum_bytes(self.rows), self.rows * width * 4)

    def lower(self, lowering: Lowering, scratch: ScratchPlace | None) -> None:
        """The whole MLP, its result to a tensor of its own."""
        self.lower_into(
            lowering, scratch, StoredColumns(self.down.out, lowering, self.results_area(lowering))
        )

    def results_area(self, lowering: Lowering) -> Area:
        return lowering.results_area(x_in_sram=True)  # y, the x of the last product, is made there

    def lower_into(self, lowering: Lowering, scratch: ScratchPlace | None, results: Columns) -> None:
        assert scratch is not None, "an MLP asks for scratch, so it has been given a place"
        offset, sums = scratch
        inputs = InputTiles(self.gated.gate.x, lowering)
        area = lowering.results_area(inputs.in_sram)
        gate, up = (
            Product(op, lowering, inputs, 4, area.nbytes // 2) for op in (self.gated.gate, self.gated.up)
        )
        buffers = Buffers(area, area.nbytes // 2)
        shares = Area(offset + align(self.rows * self.part * 2), 2 * _sum_bytes(self.rows))
        for first, size in spans(self.inner, self.part):
            self._inner_part(lowering, gate, up, first, size, offset, buffers)
            y = InputPart(offset, size * 2, first)
            if self.parts == 1:
                lower_product(self.down, lowering, y, results)
            else:
                _PartialSums(self, lowering, y, (first, size), sums, shares).lower(results)

    def _inner_part(
        self,
        lowering: Lowering,
        gate: Product,
        up: Product,
        first: int,
        size: int,
        scratch: int,
        buffers: Buffers,
    ) -> None:
        """The gated activation of inner channels [first, first + size), dense in SRAM."""
        for n0, n in spans(size, gate.tiles.block):
            nbytes, temp = self.rows * n * 2, buffers.take()
            for number, product in enumerate((gate, up)):
                product.columns(0, self.rows, first + n0, n, temp + number * nbytes, n * 2)
            self.gated.join(lowering, temp, self.rows, n, scratch + n0 * 2, size * 2)


def _part(gated: GatedProducts, down: Linear | QuantizedLinear, rows: int, inner: int, room: Room) -> int:
    """How many inner channels are computed at a time: as many as the arena takes beside x; 0 when too many
    parts would be needed, or when there is room for everything without.
    """
    x = 0 if gated.gate.x in room.held else tensor_type(gated.gate.x).nbytes
    if 3 * tensor_type(gated.out).nbytes <= room.arena // 2:
        return 0
    unit = math.lcm(down.group_size if isinstance(down, QuantizedLinear) else 16, 16)
    for parts in range(1, _MOST_PARTS + 1):
        part = min(align(-(-inner // parts), unit), inner)
        sums = 2 * _sum_bytes(rows) if part < inner else 0
        if align(x) + align(rows * part * 2) + sums <= room.arena:
            return part if part == inner or down.bias is None else 0
    return 0


def _single_pass(rows: int, room: Room) -> bool:
    """Whether accumulators and temporaries hold all rows of a reasonably wide tile at once, so that every
    weight is read once.
    """
    columns = 4 * room.machine.cube.columns
    return (
        align(rows, room.machine.cube.rows) * columns * 4 <= room.machine.accumulator_bytes // 2
        and rows * columns * 5 <= room.plan.temp_bytes // 4
    )


class _PartialSums:
    """One part's share of the outputs, added to that of the parts before it: f32 in DRAM, block by block, and
    after the last part handed on.
    """

    def __init__(
        self, mlp: Mlp, lowering: Lowering, y: InputPart, part: tuple[int, int], sums: Place, shares: Area
    ) -> None:
        self.mlp, self.lowering, self.part, self.sums = mlp, lowering, part, sums
        self.is_last = part[0] + part[1] == mlp.inner
        self.down = Product(mlp.down, lowering, y, _SHARE_BYTES, shares.nbytes // 2)
        pieces = -(-part[1] // self.down.tiles.k)
        self.down.tiles = replace(
            self.down.tiles, k=align(-(-part[1] // pieces), self.down.shape.group_size or 1)
        )
        self._buffers = Buffers(shares, shares.nbytes // 2)

    def lower(self, results: Columns) -> None:
        m, columns, width = (
            self.mlp.rows,
            self.down.shape.n,
            bit_width(tensor_type(self.mlp.down.out).element) // 8,
        )
        block = results.block or min(
            columns, results.piece_limit // (m * results.piece_bytes) if results.piece_bytes else columns
        )
        for b0, b in spans(columns, block if self.is_last else columns):
            target, stride = results.target(0, m, b0, b) if self.is_last else (0, 0)
            for n0, n in spans(b, self.down.tiles.block):
                self._share(b0 + n0, n, target + n0 * width, stride)
            if self.is_last:
                results.deliver(target, 0, m, b0, b)

    def _share(self, n0: int, n: int, target: int, stride: int) -> None:
        """The share of out[:, n0 : n0 + n] and what is known of the rest of the sum: to DRAM, or after the
        last part to `target`, rows `stride` bytes apart.
        """
        lowering, m, share = self.lowering, self.mlp.rows, self._buffers.take()
        kept, before, nbytes = self.sums.at(m * n0 * 4), share + m * n * 4, m * n * 4
        lowering.emitter.begin(self.mlp.down)
        if self.part[0]:
            lowering.load_bytes(kept, before, nbytes)
        self.down.columns(0, m, n0, n, share, n * 4, self.part, f32)
        if self.part[0]:
            element, out, row = (f16, target, stride) if self.is_last else (f32, share, n * 4)
            lowering.emitter.emit(
                edge10.VectorOp,
                function="add",
                inputs=(share, before),
                outputs=(out,),
                input_types=ArrayAttr([f32, f32]),
                output_types=ArrayAttr([element]),
                rows=m,
                cols=n,
                output_strides=(row, 0),
                reads=[sram_range(share, 2 * nbytes)],
                writes=[sram_range(out, (m - 1) * row + n * (2 if self.is_last else 4), write=True)],
            )
        if not self.is_last:
            lowering.store_bytes(kept, share, nbytes)
