"""Commands of the cube, of what feeds and empties it, and of the vector units."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY

from tyir.attributes import ArrayAttr
from tyir.diagnostics import Diagnostic
from tyir.dialects.edge10.program import byte_width
from tyir.edge10.command import DYNAMIC, Command
from tyir.edge10.command_times import Work
from tyir.edge10.vector_functions import ELEMENTWISE_FUNCTIONS, VECTOR_FUNCTIONS, Call
from tyir.ir import Value
from tyir.opdef import attr, result, variadic_operand
from tyir.types import Type

__all__ = ["Dequant", "DequantRows", "Drain", "Matmul", "VectorOp"]


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

    Planes of q (i8), scales (f16) and out (f16) hold `plane_rows` rows each, without gaps.  With `groups`
    rows are of 4 bits: `k` / 2 bytes, and that many words of 16 bits for scales, as `kv.quantize_groups`
    makes both.
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
    groups: int = attr(default=0, least=0)
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
        if self.groups and self.k % (2 * self.groups):
            yield f"rows of {self.k} are not {self.groups} groups of pairs"


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
