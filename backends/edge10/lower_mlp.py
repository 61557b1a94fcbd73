"""A gated MLP of many tokens, a part of its inner channels at a time: the tensor between the products never goes to DRAM.

    %g = linear(%x, %wg);  %u = linear(%x, %wu);  %y = silu_mul(%g, %u);  %d = linear(%y, %wd)
    -->
    for each part of the inner channels:                                as few as fit SRAM, one if possible
        for each tile of the part: gate tile -> temp;  up tile -> temp;  silu_mul -> part of y in SRAM
        for each tile of the outputs: the part's share of the sum;  plus that of the parts before (f32, in DRAM);  -> DRAM, the last one -> d

Otherwise the last product would read y again from DRAM for each tile of its outputs, which takes longer than its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.allocate import SramPlan, align
from tyir.backends.edge10.context import Lowering, Place, sram_range
from tyir.backends.edge10.lower_gated import gated_products
from tyir.backends.edge10.lower_linear import InputPart, InputTiles, Product, temp_quarter
from tyir.backends.edge10.places import Scratch
from tyir.backends.edge10.tiling import spans
from tyir.dialects import edge10
from tyir.dialects.func import Func
from tyir.dialects.ty import Linear, QuantizedLinear, SiluMul, tensor_type
from tyir.ir import Op
from tyir.targets.machine import Machine
from tyir.types import f16, f32

__all__ = ["Mlp", "fused_mlps", "fused_ops", "lower_mlp"]

_MOST_PARTS = 12
_Product = Linear | QuantizedLinear


@dataclass(frozen=True)
class Mlp:
    """The ops of one gated MLP and how its inner channels are divided."""

    gate: _Product
    up: _Product
    silu: SiluMul
    down: _Product
    rows: int
    part: int

    @property
    def inner(self) -> int:
        return tensor_type(self.silu.out).static_shape[-1]

    @property
    def parts(self) -> int:
        return -(-self.inner // self.part)

    @property
    def scratch(self) -> Scratch:
        """A part of y in SRAM; the sum so far in DRAM."""
        width = tensor_type(self.down.out).static_shape[-1]
        return Scratch(self.rows * self.part * 2, self.rows * width * 4 if self.parts > 1 else 0)


def fused_mlps(function: Func, arena: int, machine: Machine, plan: SramPlan) -> dict[Op, Mlp]:
    """The MLPs to be computed part by part, by their last product; `arena` is what a function may use of SRAM for activations.

    Small ones (decode) stay four ops: their tensors fit, and one vector command is cheaper than one a tile.
    """
    found: dict[Op, Mlp] = {}
    for op in function.body:
        if isinstance(op, SiluMul) and (mlp := _match(op, arena)) is not None and _single_pass(mlp, machine, plan):
            found[mlp.down] = mlp
    return found


def _match(op: SiluMul, arena: int) -> Mlp | None:
    products = gated_products(op)
    if products is None or len(op.out.uses) != 1:
        return None
    gate, up = products
    down = next(iter(op.out.uses))
    if not isinstance(down, (Linear, QuantizedLinear)) or down.x is not op.out or tensor_type(down.out).element is not f16:
        return None
    *outer, inner = tensor_type(op.out).static_shape
    rows, x, y = math.prod(outer), tensor_type(gate.x).nbytes, tensor_type(op.out).nbytes
    unit = math.lcm(down.group_size if isinstance(down, QuantizedLinear) else 16, 16)
    if 3 * y <= arena // 2:
        return None
    for parts in range(1, _MOST_PARTS + 1):
        part = min(align(-(-inner // parts), unit), inner)
        if align(x) + align(rows * part * 2) <= arena:
            return Mlp(gate, up, op, down, rows, part) if part == inner or down.bias is None else None
    return None


def _single_pass(mlp: Mlp, machine: Machine, plan: SramPlan) -> bool:
    """Whether accumulators and temporaries hold all rows of a reasonably wide tile at once, so that every weight is read once."""
    columns = 4 * machine.cube.columns
    rows = align(mlp.rows, machine.cube.rows)
    return rows * columns * 4 <= machine.accumulator_bytes // 2 and mlp.rows * columns * 5 <= plan.temp_bytes // 4


def fused_ops(mlps: Mapping[Op, Mlp]) -> dict[Op, Op]:
    """Every op that is computed together with a later one, and that one."""
    return {op: mlp.down for mlp in mlps.values() for op in (mlp.gate, mlp.up, mlp.silu)}


def lower_mlp(mlp: Mlp, low: Lowering, scratch: tuple[int, Place]) -> None:
    """The four ops of an MLP; `scratch` is where `Mlp.scratch` lies."""
    offset, sums = scratch
    inputs = InputTiles(mlp.gate.x, low)
    gate, up = (Product(op, low, inputs, 4) for op in (mlp.gate, mlp.up))
    direct = mlp.parts == 1
    in_sram = low.place(mlp.down.out).in_sram
    down = Product(mlp.down, low, InputPart(offset, mlp.part * 2, 0), (0 if in_sram else 2) if direct else 5)
    for first, size in spans(mlp.inner, mlp.part):
        _inner_part(mlp, low, gate, up, first, size, offset)
        low.emitter.begin(mlp.down)
        down.inputs = InputPart(offset, size * 2, first)
        if direct:
            _outputs(mlp, low, down)
        else:
            pieces = -(-size // down.tiles.k)
            down.tiles = replace(down.tiles, k=align(-(-size // pieces), down.shape.group_size or 1))
            _partial_sums(mlp, low, down, (first, size), sums)


def _inner_part(mlp: Mlp, low: Lowering, gate: Product, up: Product, first: int, size: int, scratch: int) -> None:
    """silu(gate) * up for inner channels [first, first + size), dense in SRAM."""
    m, row, types = mlp.rows, size * 2, ArrayAttr([f16, f16])
    for number, (n0, n) in enumerate(spans(size, gate.tiles.n)):
        nbytes, temp = m * n * 2, temp_quarter(low, 2 + number % 2)
        for index, product in enumerate((gate, up)):
            low.emitter.begin(product.op)
            product.tile(0, m, first + n0, n, temp + index * nbytes, n * 2)
        low.emitter.begin(mlp.silu)
        target = scratch + n0 * 2
        low.emitter.emit(
            edge10.VectorOp, function="silu_mul", inputs=(temp, temp + nbytes), outputs=(target,), input_types=types, output_types=ArrayAttr([f16]), rows=m, cols=n,
            output_strides=(row, 0), reads=[sram_range(temp, 2 * nbytes)], writes=[sram_range(target, (m - 1) * row + n * 2, write=True)],
        )  # fmt: skip


def _outputs(mlp: Mlp, low: Lowering, down: Product) -> None:
    """All of y is in SRAM: the last product as any other."""
    out, row = low.place(mlp.down.out), down.shape.n * 2
    for number, (n0, n) in enumerate(spans(down.shape.n, down.tiles.n)):
        start = out.at(n0 * 2)
        if out.in_sram:
            down.tile(0, mlp.rows, n0, n, start.offset, row)
            continue
        target = temp_quarter(low, number % 2)
        down.tile(0, mlp.rows, n0, n, target, n * 2)
        low.store(start, target, (1, mlp.rows, n * 2), dram_strides=(0, row))


def _partial_sums(mlp: Mlp, low: Lowering, down: Product, part: tuple[int, int], sums: Place) -> None:
    """A part's share of the outputs, added to that of the parts before it."""
    m, out, row = mlp.rows, low.place(mlp.down.out), down.shape.n * 2
    last = part[0] + part[1] == mlp.inner
    for number, (n0, n) in enumerate(spans(down.shape.n, down.tiles.n)):
        share, kept = temp_quarter(low, 2 * (number % 2)), sums.at(m * n0 * 4)
        before, result, nbytes = share + m * n * 4, share + m * n * 8, m * n * 4
        if part[0]:
            low.load_bytes(kept, before, nbytes)
        down.tile(0, m, n0, n, share, n * 4, part, f32)
        if not part[0]:
            low.store_bytes(kept, share, nbytes)
            continue
        start = out.at(n0 * 2)
        target, stride = (start.offset, row) if out.in_sram else (result, n * 2)
        if not last:
            target, stride = share, n * 4
        element = f16 if last else f32
        low.emitter.emit(
            edge10.VectorOp, function="add", inputs=(share, before), outputs=(target,), input_types=ArrayAttr([f32, f32]), output_types=ArrayAttr([element]),
            rows=m, cols=n, output_strides=(stride, 0), reads=[sram_range(share, 2 * nbytes)],
            writes=[sram_range(target, (m - 1) * stride + n * (2 if last else 4), write=True)],
        )  # fmt: skip
        if not last:
            low.store_bytes(kept, share, nbytes)
        elif not out.in_sram:
            low.store(start, target, (1, m, n * 2), dram_strides=(0, row))
