"""A gated activation whose gate and up do not fit SRAM: both products and what joins them tile by tile, so
that neither of the two big tensors ever exists.

    %g = ty.linear(%x, %wg);  %u = ty.linear(%x, %wu);  %y = ty.silu_mul(%g, %u)
    -->
    for each block of rows and channels: gate block -> temp;  up block -> temp;  silu_mul -> y

Small ones (decode) stay three ops: their tensors fit, and one vector command is cheaper than one a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tyir import traits
from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Buffers, Lowering, sram_range
from tyir.backends.edge10.lowering.fused.fusion import Room, ScratchPlace
from tyir.backends.edge10.lowering.ops.linear import InputTiles, Product
from tyir.backends.edge10.lowering.tiling import WIDEST_BLOCK, spans
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects import edge10
from tyir.dialects.ty import Linear, QuantizedLinear, tensor_type
from tyir.edge10.vector_functions import function_of
from tyir.ir import Op, Value
from tyir.types import f16

__all__ = ["Gated", "GatedProducts", "gated_function", "gated_products"]


def gated_function(op: Op | None) -> str | None:
    """The vector function that joins gate and up as `op` does; None when `op` is no gated activation."""
    function = function_of(op) if op is not None and op.has_trait(traits.Gated) else None
    return None if function is None else function.name


@dataclass(frozen=True)
class GatedProducts:
    """out = function(gate, up), both products of one x that nothing else reads."""

    op: Op
    function: str
    gate: Linear | QuantizedLinear
    up: Linear | QuantizedLinear

    @property
    def out(self) -> Value:
        return self.op.results[0]

    def join(
        self, lowering: Lowering, blocks: int, rows: int, columns: int, target: int, stride: int
    ) -> None:
        """The vector command for a block: gate and up lie one after the other at `blocks`, the result goes to
        `target`, rows `stride` bytes apart.
        """
        nbytes = rows * columns * 2
        lowering.emitter.begin(self.op)
        lowering.emitter.emit(
            edge10.VectorOp,
            function=self.function,
            inputs=(blocks, blocks + nbytes),
            outputs=(target,),
            input_types=ArrayAttr([f16, f16]),
            output_types=ArrayAttr([f16]),
            rows=rows,
            cols=columns,
            output_strides=(stride, 0),
            reads=[sram_range(blocks, 2 * nbytes)],
            writes=[sram_range(target, (rows - 1) * stride + columns * 2, write=True)],
        )


def gated_products(op: Op | None) -> GatedProducts | None:
    """A gated activation with its two products of one input, if that is what `op` is."""
    function = gated_function(op)
    if op is None or function is None:
        return None
    gate, up = (value.op for value in op.operands)
    if not isinstance(gate, (Linear, QuantizedLinear)) or not isinstance(up, (Linear, QuantizedLinear)):
        return None
    if gate is up or len(gate.out.uses) != 1 or len(up.out.uses) != 1:
        return None
    same_kind = type(gate) is type(up) and gate.properties is up.properties and gate.x is up.x
    elements = tensor_type(op.results[0]).element, tensor_type(gate.out).element
    return GatedProducts(op, function, gate, up) if same_kind and elements == (f16, f16) else None


@dataclass(frozen=True)
class Gated:
    """A gated activation that is made tile by tile with its products."""

    products: GatedProducts

    @classmethod
    def match(cls, op: Op, room: Room) -> Gated | None:
        products = None if op in room.anchors else gated_products(op)
        return cls(products) if products is not None and _is_worthwhile(products, room.arena) else None

    @property
    def anchor(self) -> Op:
        return self.products.op

    @property
    def others(self) -> Sequence[Op]:
        return self.products.gate, self.products.up

    @property
    def scratch(self) -> Scratch | None:
        return None

    def lower(self, lowering: Lowering, scratch: ScratchPlace | None) -> None:
        gate_op, up_op = self.products.gate, self.products.up
        inputs, out = InputTiles(gate_op.x, lowering), lowering.place(self.products.out)
        area = lowering.results_area(inputs.in_sram)
        # Results on their way to DRAM are gathered in the second half, for runs as long as it holds.
        joined, stored = (area, area) if out.in_sram else area.split(area.nbytes // 2)
        gate, up = (Product(o, lowering, inputs, 2 * 2, joined.nbytes // 2) for o in (gate_op, up_op))
        buffers, results = Buffers(joined, joined.nbytes // 2), Buffers(stored, stored.nbytes // 2)
        row, block = gate.shape.n * 2, gate.tiles.block
        for m0, m in spans(gate.shape.m, gate.tiles.m):
            most = min(stored.nbytes // 2 // (m * 2), max(WIDEST_BLOCK, block)) // block * block
            for g0, g in spans(gate.shape.n, block if out.in_sram else max(most, block)):
                start = out.at(m0 * row + g0 * 2)
                target, stride = (start.offset, row) if out.in_sram else (results.take(), g * 2)
                for n0, n in spans(g, block):
                    size, first = m * n * 2, buffers.take()
                    for number, product in enumerate((gate, up)):
                        product.columns(m0, m, g0 + n0, n, first + number * size, n * 2)
                    self.products.join(lowering, first, m, n, target + n0 * 2, stride)
                if not out.in_sram:
                    lowering.store(start, target, (1, m, g * 2), dram_strides=(0, row))


def _is_worthwhile(products: GatedProducts, arena: int) -> bool:
    """Fused, x and y live at the same time; separately, y may take x's place in SRAM, which the product after
    it reads many times.

    So: not when all three tensors fit anyway, and not when y would only be kept out of SRAM by x.
    """
    x, y = tensor_type(products.gate.x).nbytes, tensor_type(products.out).nbytes
    return 3 * y > arena // 2 and (y > arena or x + y <= arena)
