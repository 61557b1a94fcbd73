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
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.columns import Columns
from tyir.backends.edge10.lowering.context import Area, Buffers, Lowering, Place, sram_range
from tyir.backends.edge10.lowering.gated import gated_products
from tyir.backends.edge10.lowering.linear import InputPart, InputTiles, Product, lower_product
from tyir.backends.edge10.lowering.tiling import spans
from tyir.backends.edge10.memory.allocate import SramPlan, align
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects import edge10
from tyir.dialects.func import Func
from tyir.dialects.ty import Linear, QuantizedLinear, tensor_type
from tyir.edge10.vector_functions import function_of
from tyir.ir import Op, Value
from tyir.targets.machine import Machine
from tyir.traits import Gated
from tyir.types import bit_width, f16, f32

__all__ = ["Mlp", "fused_mlps", "fused_ops", "lower_mlp"]

_MOST_PARTS = 12
_SHARE_BYTES = 8  # of one element of a partial sum: this part's share and what the parts before make, f32
_Product = Linear | QuantizedLinear


def _sum_bytes(rows: int) -> int:
    """A block of partial sums: narrow, since the arena is worth more to y."""
    return align(rows * _SHARE_BYTES * 48)


@dataclass(frozen=True)
class Mlp:
    """The ops of one gated MLP and how its inner channels are divided."""

    gate: _Product
    up: _Product
    silu: Op
    down: _Product
    rows: int
    part: int

    @property
    def inner(self) -> int:
        return tensor_type(self.silu.result).static_shape[-1]

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


def fused_mlps(
    function: Func, arena: int, machine: Machine, plan: SramPlan, held: Collection[Value] = ()
) -> dict[Op, Mlp]:
    """The MLPs to be computed part by part, by their last product; `arena` is what a function may use of SRAM
    for activations beside those `held` there.

    Small ones (decode) stay four ops: their tensors fit, and one vector command is cheaper than one a tile.
    """
    found: dict[Op, Mlp] = {}
    for op in function.body:
        if (
            op.has_trait(Gated)
            and (mlp := _match(op, arena, held)) is not None
            and _single_pass(mlp, machine, plan)
        ):
            found[mlp.down] = mlp
    return found


def _match(op: Op, arena: int, held: Collection[Value]) -> Mlp | None:
    products = gated_products(op)
    if products is None or len(op.result.uses) != 1:
        return None
    gate, up = products
    down = next(iter(op.result.uses))
    if (
        not isinstance(down, (Linear, QuantizedLinear))
        or down.x is not op.result
        or tensor_type(down.out).element is not f16
    ):
        return None
    *outer, inner = tensor_type(op.result).static_shape
    rows, x, y = (
        math.prod(outer),
        0 if gate.x in held else tensor_type(gate.x).nbytes,
        tensor_type(op.result).nbytes,
    )
    unit = math.lcm(down.group_size if isinstance(down, QuantizedLinear) else 16, 16)
    if 3 * y <= arena // 2:
        return None
    for parts in range(1, _MOST_PARTS + 1):
        part = min(align(-(-inner // parts), unit), inner)
        sums = 2 * _sum_bytes(rows) if part < inner else 0
        if align(x) + align(rows * part * 2) + sums <= arena:
            return Mlp(gate, up, op, down, rows, part) if part == inner or down.bias is None else None
    return None


def _single_pass(mlp: Mlp, machine: Machine, plan: SramPlan) -> bool:
    """Whether accumulators and temporaries hold all rows of a reasonably wide tile at once, so that every
    weight is read once.
    """
    columns = 4 * machine.cube.columns
    rows = align(mlp.rows, machine.cube.rows)
    return (
        rows * columns * 4 <= machine.accumulator_bytes // 2
        and mlp.rows * columns * 5 <= plan.temp_bytes // 4
    )


def fused_ops(mlps: Mapping[Op, Mlp]) -> dict[Op, Op]:
    """Every op that is computed together with a later one, and that one."""
    return {op: mlp.down for mlp in mlps.values() for op in (mlp.gate, mlp.up, mlp.silu)}


def lower_mlp(mlp: Mlp, low: Lowering, scratch: tuple[int, Place], results: Columns) -> None:
    """The four ops of an MLP, the columns of the last handed to `results`; `scratch` is where `Mlp.scratch`
    lies.
    """
    offset, sums = scratch
    inputs = InputTiles(mlp.gate.x, low)
    area = low.results_area(inputs.in_sram)
    gate, up = (Product(op, low, inputs, 4, area.nbytes // 2) for op in (mlp.gate, mlp.up))
    buffers = Buffers(area, area.nbytes // 2)
    shares = Area(offset + align(mlp.rows * mlp.part * 2), 2 * _sum_bytes(mlp.rows))
    for first, size in spans(mlp.inner, mlp.part):
        _inner_part(mlp, low, gate, up, first, size, offset, buffers)
        y = InputPart(offset, size * 2, first)
        if mlp.parts == 1:
            lower_product(mlp.down, low, y, results)
        else:
            _PartialSums(mlp, low, y, (first, size), sums, shares).lower(results)


def _inner_part(
    mlp: Mlp, low: Lowering, gate: Product, up: Product, first: int, size: int, scratch: int, buffers: Buffers
) -> None:
    """silu(gate) * up for inner channels [first, first + size), dense in SRAM."""
    m, row, types = mlp.rows, size * 2, ArrayAttr([f16, f16])
    function = function_of(mlp.silu)
    assert function is not None
    for n0, n in spans(size, gate.tiles.block):
        nbytes, temp = m * n * 2, buffers.take()
        for index, product in enumerate((gate, up)):
            product.columns(0, m, first + n0, n, temp + index * nbytes, n * 2)
        low.emitter.begin(mlp.silu)
        target = scratch + n0 * 2
        low.emitter.emit(
            edge10.VectorOp,
            function=function.name,
            inputs=(temp, temp + nbytes),
            outputs=(target,),
            input_types=types,
            output_types=ArrayAttr([f16]),
            rows=m,
            cols=n,
            output_strides=(row, 0),
            reads=[sram_range(temp, 2 * nbytes)],
            writes=[sram_range(target, (m - 1) * row + n * 2, write=True)],
        )


class _PartialSums:
    """One part's share of the outputs, added to that of the parts before it: f32 in DRAM, block by block, and
    after the last part handed on.
    """

    def __init__(
        self, mlp: Mlp, low: Lowering, y: InputPart, part: tuple[int, int], sums: Place, shares: Area
    ) -> None:
        self.mlp, self.low, self.part, self.sums = mlp, low, part, sums
        self.is_last = part[0] + part[1] == mlp.inner
        self.down = Product(mlp.down, low, y, _SHARE_BYTES, shares.nbytes // 2)
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
        low, m, share = self.low, self.mlp.rows, self._buffers.take()
        kept, before, nbytes = self.sums.at(m * n0 * 4), share + m * n * 4, m * n * 4
        low.emitter.begin(self.mlp.down)
        if self.part[0]:
            low.load_bytes(kept, before, nbytes)
        self.down.columns(0, m, n0, n, share, n * 4, self.part, f32)
        if self.part[0]:
            element, out, row = (f16, target, stride) if self.is_last else (f32, share, n * 4)
            low.emitter.emit(
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
            low.store_bytes(kept, share, nbytes)
