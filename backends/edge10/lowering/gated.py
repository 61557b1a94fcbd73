"""A gated MLP whose gate and up do not fit SRAM: both products and their silu_mul tile by tile, so that
neither of the two big tensors ever exists.

    %g = ty.linear(%x, %wg);  %u = ty.linear(%x, %wu);  %y = ty.silu_mul(%g, %u)
    -->
    for each block of rows and channels: gate block -> temp;  up block -> temp;  silu_mul -> y

Small ones (decode) stay three ops: their tensors fit, and one vector command is cheaper than one a tile.
"""

from __future__ import annotations

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Buffers, Lowering, sram_range
from tyir.backends.edge10.lowering.linear import InputTiles, Product
from tyir.backends.edge10.lowering.tiling import spans
from tyir.dialects import edge10
from tyir.dialects.func import Func
from tyir.dialects.ty import Linear, QuantizedLinear, tensor_type
from tyir.edge10.vector_functions import function_of
from tyir.ir import Op, Value
from tyir.traits import Gated
from tyir.types import f16

__all__ = ["fused_products", "gated_products", "lower_gated"]


def fused_products(function: Func, arena: int) -> dict[Op, Op]:
    """The linear ops that are computed together with the gated activation they feed, and that activation."""
    found: dict[Op, Op] = {}
    for op in function.body:
        if op.has_trait(Gated) and gated_products(op) is not None and _worthwhile(op, arena):
            found.update({v.op: op for v in op.operands if v.op is not None})
    return found


def _worthwhile(op: Op, arena: int) -> bool:
    """Fused, x and y live at the same time; separately, y may take x's place in SRAM, which the product after
    it reads many times.

    So: not when all three tensors fit anyway, and not when y would only be kept out of SRAM by x.
    """
    gate = _linear(op.operands[0])
    assert gate is not None
    x, y = tensor_type(gate.x).nbytes, tensor_type(op.result).nbytes
    return 3 * y > arena // 2 and (y > arena or x + y <= arena)


def gated_products(op: Op) -> tuple[Linear | QuantizedLinear, Linear | QuantizedLinear] | None:
    """The two products of one input that a gated activation alone reads, if that is what it reads."""
    gate, up = _linear(op.operands[0]), _linear(op.operands[1])
    if gate is None or up is None or gate is up or len(gate.out.uses) != 1 or len(up.out.uses) != 1:
        return None
    same_kind = type(gate) is type(up) and gate.properties is up.properties
    is_gated = (
        same_kind
        and gate.x is up.x
        and tensor_type(op.result).element is f16
        and tensor_type(gate.out).element is f16
    )
    return (gate, up) if is_gated else None


def _linear(value: Value) -> Linear | QuantizedLinear | None:
    return value.op if isinstance(value.op, (Linear, QuantizedLinear)) else None


def lower_gated(op: Op, low: Lowering) -> None:
    """The activation of `fused_products` and its two products."""
    gate_op, up_op = _linear(op.operands[0]), _linear(op.operands[1])
    function = function_of(op)
    assert gate_op is not None and up_op is not None and function is not None
    inputs, out = InputTiles(gate_op.x, low), low.place(op.result)
    area = low.results_area(inputs.in_sram)
    gate, up = (Product(o, low, inputs, 3 * 2, area.nbytes // 2) for o in (gate_op, up_op))
    buffers = Buffers(area, area.nbytes // 2)
    row, types = gate.shape.n * 2, ArrayAttr([f16, f16])
    for m0, m in spans(gate.shape.m, gate.tiles.m):
        for n0, n in spans(gate.shape.n, gate.tiles.block):
            size, first = m * n * 2, buffers.take()
            for number, product in enumerate((gate, up)):
                product.columns(m0, m, n0, n, first + number * size, n * 2)
            low.emitter.begin(op)
            start = out.at(m0 * row + n0 * 2)
            target, stride = (start.offset, row) if out.in_sram else (first + 2 * size, n * 2)
            low.emitter.emit(
                edge10.VectorOp,
                function=function.name,
                inputs=(first, first + size),
                outputs=(target,),
                input_types=types,
                output_types=ArrayAttr([f16]),
                rows=m,
                cols=n,
                output_strides=(stride, 0),
                reads=[sram_range(first, 2 * size)],
                writes=[sram_range(target, (m - 1) * stride + n * 2, write=True)],
            )
            if not out.in_sram:
                low.store(start, target, (1, m, n * 2), dram_strides=(0, row))
