"""Commands that move between DRAM and SRAM."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import KW_ONLY

from tyir.diagnostics import Diagnostic
from tyir.edge10.command import DYNAMIC, Command
from tyir.edge10.command_times import NO_TRANSFER, Transfer, transfer_of
from tyir.ir import Value
from tyir.opdef import attr, result, variadic_operand

__all__ = ["Gather", "Load", "Store"]


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


def _check_transfer(
    shape: tuple[int, ...], dram_strides: tuple[int, ...], sram_strides: tuple[int, ...]
) -> Iterator[str]:
    if (len(shape), len(dram_strides), len(sram_strides)) != (3, 2, 2):
        yield "a transfer has a shape of three sizes [planes, rows, row bytes] and two strides on each side"
