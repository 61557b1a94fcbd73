"""Where the columns of a product go, block by block as they are computed: stored, added to the residual
stream, or gathered from all dies.

    %o = linear(%x, %w)                                   for each block of columns:
    %r = dist.all_reduce(%o)                 -->              product -> buffer;  all_reduce the buffer;  %h block + buffer -> %y block
    %y = add(%h, %r)

A collective of one block runs while the next block is computed (as in FlashOverlap, arXiv:2504.19519, and
TokenWeave, arXiv:2505.11329): only that of the last is waited for.  All dies cut their blocks alike,
whatever else differs between their programs: `collective_block` depends on the machine and the rows alone.
"""  # noqa: E501

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

from tyir.attributes import ArrayAttr
from tyir.backends.edge10.lowering.context import Area, Buffers, Lowering, element_bytes, sram_range
from tyir.backends.edge10.lowering.tiling import spans
from tyir.backends.edge10.memory.allocate import sram_plan
from tyir.dialects import edge10
from tyir.dialects.dist import AllGather, AllReduce
from tyir.dialects.func import Func
from tyir.dialects.ty import Add, Linear, QuantizedLinear, tensor_type
from tyir.ir import Op, Value
from tyir.targets.machine import Machine
from tyir.types import bit_width, f16

__all__ = [
    "MOST_ROWS",
    "Columns",
    "GatheredColumns",
    "Gathering",
    "StoredColumns",
    "SummedColumns",
    "Summing",
    "collective_block",
    "gatherings",
    "lower_nothing_to_sum",
    "summings",
]

MOST_ROWS = 128  # above, blocks would be so narrow that their latency counts
_WIDEST = 256


class Columns(Protocol):
    """Takes the blocks of a product.

    `piece_bytes`, `piece_limit` and `block` are as in `tiling.MatmulShape`.
    """

    piece_bytes: int
    piece_limit: int
    block: int

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        """Where out[m0 : m0 + m, n0 : n0 + n] shall be drained to: the offset in SRAM, bytes from row to
        row.
        """

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        """Bring the block, now at `offset`, to where it belongs."""


def collective_block(rows: int, width: int, machine: Machine) -> int:
    """Columns of `width` bytes that one collective brings at a time; 0 when it shall bring the whole
    tensor.
    """
    cube, plan = machine.cube, sram_plan(machine)
    if not cube.rows < rows <= MOST_ROWS:
        return 0
    sums = machine.accumulator_bytes // 2 // 4 // (-(-rows // cube.rows) * cube.rows)
    return min(sums, plan.temp_bytes // 2 // (2 * rows * width), _WIDEST) // cube.columns * cube.columns


# ---------------------------------------------------------------------------------------------- to one tensor


class StoredColumns:
    """A tensor of its own: drained in place when it lies in SRAM, else by way of a buffer."""

    def __init__(self, out: Value, low: Lowering, area: Area) -> None:
        self.low, self.place, self.width = low, low.place(out), element_bytes(out)
        self.row = tensor_type(out).static_shape[-1] * self.width
        self.piece_bytes, self.piece_limit, self.block = (
            0 if self.place.in_sram else self.width,
            area.nbytes // 2,
            0,
        )
        self._buffers = Buffers(area, self.piece_limit)

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        if self.place.in_sram:
            return self.place.offset + m0 * self.row + n0 * self.width, self.row
        return self._buffers.take(), n * self.width

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        if not self.place.in_sram:
            self.low.store(
                self.place.at(m0 * self.row + n0 * self.width),
                offset,
                (1, m, n * self.width),
                dram_strides=(0, self.row),
            )


# ------------------------------------------------------------------------------------------- added to another


@dataclass(frozen=True)
class Summing:
    """add.out = residual + all_reduce(product); no `reduce` on one die, no `product` on a die that has none
    of its heads.
    """

    product: Linear | QuantizedLinear | None
    reduce: AllReduce | None
    add: Add
    residual: Value

    @property
    def ops(self) -> list[Op]:
        """What is computed together with the sum."""
        return [op for op in (self.product, self.reduce) if op is not None]


def summings(function: Func, machine: Machine) -> dict[Op, Summing]:
    """The sums of many tokens that are made block by block, by their `add`."""
    found: dict[Op, Summing] = {}
    for op in function.body:
        if isinstance(op, Add) and tensor_type(op.out).element is f16 and _block_of(op.out, machine):
            for value, residual in ((op.rhs, op.lhs), (op.lhs, op.rhs)):
                if (
                    residual is not value
                    and residual.type is value.type
                    and (match := _summing(op, value, residual)) is not None
                ):
                    found[op] = match
                    break
    return found


def _block_of(value: Value, machine: Machine) -> int:
    *outer, _ = tensor_type(value).static_shape
    return collective_block(math.prod(outer), element_bytes(value), machine)


def _summing(add: Add, value: Value, residual: Value) -> Summing | None:
    reduce = value.op if isinstance(value.op, AllReduce) else None
    if reduce is not None and len(value.uses) != 1:
        return None
    source = value if reduce is None else reduce.x
    if source is None:
        return Summing(None, reduce, add, residual)
    is_product = isinstance(source.op, (Linear, QuantizedLinear)) and len(source.uses) == 1
    return Summing(source.op, reduce, add, residual) if is_product else None  # type: ignore[arg-type]


class SummedColumns:
    """The blocks of a product, reduced over the dies and added to the residual stream."""

    def __init__(self, summing: Summing, low: Lowering, area: Area) -> None:
        self.summing, self.low = summing, low
        self.residual, self.out = low.place(summing.residual), low.place(summing.add.out)
        self.read_copy, self.written_copy = low.copies.get(summing.residual), low.copies.get(summing.add.out)
        *outer, self.columns = tensor_type(summing.add.out).static_shape
        self.rows = math.prod(outer)
        in_sram = self.residual.in_sram and self.read_copy is None
        self.piece_bytes = 2 if in_sram else 4  # the block, and that of the residual stream
        whole_rows = summing.reduce is not None or self.read_copy is not None or self.written_copy is not None
        self.block = collective_block(self.rows, 2, low.machine) if whole_rows else 0
        self.piece_limit = area.nbytes // (1 if self.block else 2)
        self._buffers = Buffers(area, self.rows * self.block * self.piece_bytes or self.piece_limit, most=3)

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        return self._buffers.take(), n * 2

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        if self.summing.reduce is not None:
            self._reduce(offset, m * n * 2)
        self._add(offset, m0, m, n0, n)

    def _reduce(self, offset: int, nbytes: int) -> None:
        emitter = self.low.emitter
        assert self.summing.reduce is not None
        emitter.begin(self.summing.reduce, self.summing.product)
        given = self.summing.product is not None
        emitter.emit(
            edge10.AllReduce,
            source=offset if given else 0,
            source_memory="sram" if given else "none",
            destination=offset,
            nbytes=nbytes,
            element=f16,
            dies=self.summing.reduce.dies,
            group=self.summing.reduce.group,
            reads=[sram_range(offset, nbytes)] if given else [],
            writes=[sram_range(offset, nbytes, write=True)],
        )

    def _add(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        low, row = self.low, self.columns * 2
        low.emitter.begin(self.summing.add, self.summing.product)
        start, nbytes = m0 * row + n0 * 2, m * n * 2
        before, before_row = self._residual(offset + nbytes, m0, m, n0, n)
        target, target_row = (self.out.offset + start, row) if self.out.in_sram else (offset, n * 2)
        written = sram_range(target, (m - 1) * target_row + n * 2, write=True)
        low.emitter.emit(
            edge10.VectorOp,
            function="add",
            inputs=(before, offset),
            outputs=(target,),
            input_types=ArrayAttr([f16, f16]),
            output_types=ArrayAttr([f16]),
            rows=m,
            cols=n,
            input_strides=(before_row, n * 2),
            output_strides=(target_row, 0),
            reads=[sram_range(before, (m - 1) * before_row + n * 2), sram_range(offset, nbytes)],
            writes=[written],
        )
        if not self.out.in_sram:
            low.store(self.out.at(start), offset, (1, m, n * 2), dram_strides=(0, row))
        elif self.written_copy is not None:
            low.emitter.emit(
                edge10.VectorOp,
                function="copy",
                inputs=(target,),
                outputs=(offset,),
                input_types=ArrayAttr([f16]),
                output_types=ArrayAttr([f16]),
                rows=m,
                cols=n,
                input_strides=(row,),
                reads=[replace(written, write=False)],
                writes=[sram_range(offset, nbytes, write=True)],
            )
            low.store_bytes(self.written_copy.at(n0), offset, nbytes)

    def _residual(self, buffer: int, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        """Where the block of the residual stream lies, and its rows' distance; `buffer` is for one that comes
        from DRAM.
        """
        row = self.columns * 2
        start = m0 * row + n0 * 2
        if self.read_copy is not None:
            self.low.load_bytes(self.read_copy.at(n0), buffer, m * n * 2)
        elif self.residual.in_sram:
            return self.residual.offset + start, row
        else:
            self.low.load(self.residual.at(start), buffer, (1, m, n * 2), dram_strides=(0, row))
        return buffer, n * 2


def lower_nothing_to_sum(results: SummedColumns) -> None:
    """A die without a share of the product meets the others' blocks all the same."""
    for n0, n in spans(results.columns, results.block):
        offset, _ = results.target(0, results.rows, n0, n)
        results.deliver(offset, 0, results.rows, n0, n)


# --------------------------------------------------------------------------------------------------- gathered


@dataclass(frozen=True)
class Gathering:
    """gather.out = all_gather(product) along the columns."""

    product: Linear | QuantizedLinear
    gather: AllGather


def gatherings(function: Func, machine: Machine) -> dict[Op, Gathering]:
    """The products of many tokens whose columns are gathered block by block, by their `all_gather`."""
    found: dict[Op, Gathering] = {}
    for op in function.body:
        if (
            isinstance(op, AllGather)
            and op.dies is None
            and op.x is not None
            and op.axis == len(tensor_type(op.out).dims) - 1
            and min(op.sizes) > 0
        ):
            product = op.x.op
            if (
                isinstance(product, (Linear, QuantizedLinear))
                and len(op.x.uses) == 1
                and _block_of(op.out, machine)
            ):
                found[op] = Gathering(product, op)
    return found


class GatheredColumns:
    """The blocks of a product, gathered from all dies; the n-th block of each die at once, so that a die
    whose share is smaller ends with empty ones.
    """

    def __init__(self, gathering: Gathering, low: Lowering, area: Area) -> None:
        self.gather, self.low = gathering.gather, low
        self.place, self.element = low.place(gathering.gather.out), tensor_type(gathering.gather.out).element
        width = bit_width(self.element) // 8
        *outer, self.columns = tensor_type(gathering.gather.out).static_shape
        rows = math.prod(outer)
        self.width = self.piece_bytes = width
        self.block = collective_block(rows, width, low.machine)
        self.piece_limit = area.nbytes
        self.rows = rows
        self._buffers = Buffers(area, rows * self.block * width, most=3)

    def target(self, m0: int, m: int, n0: int, n: int) -> tuple[int, int]:
        return self._buffers.take(), n * self.width

    def deliver(self, offset: int, m0: int, m: int, n0: int, n: int) -> None:
        gather, width, place = self.gather, self.width, self.place
        sizes = tuple(max(0, min(self.block, size - n0)) * width for size in gather.sizes)
        displacements = tuple((sum(gather.sizes[:die]) + n0) * width for die in range(len(sizes)))
        self.low.emitter.begin(gather)
        self.low.emitter.emit(
            edge10.AllGather,
            *([] if place.in_sram else [self.low.address(place)]),
            source=offset,
            source_memory="sram" if n else "none",
            destination=place.offset,
            destination_memory=place.memory,
            rows=self.rows,
            sizes=sizes,
            displacements=displacements,
            stride=self.columns * width,
            die=self.low.die,
            reads=[sram_range(offset, m * n * width)] if n else [],
            writes=place.access(self.rows * self.columns * width, write=True),
        )

    def finish(self) -> None:
        """The blocks that only other dies have."""
        for n0 in range(
            -(-self.gather.sizes[self.low.die] // self.block) * self.block, max(self.gather.sizes), self.block
        ):
            self.deliver(0, 0, self.rows, n0, 0)
