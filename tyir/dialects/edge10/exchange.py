"""Commands with which dies meet."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import KW_ONLY

from tyir.diagnostics import Diagnostic
from tyir.edge10.command import Exchange
from tyir.ir import Value
from tyir.opdef import attr, result, variadic_operand
from tyir.traits import Collective
from tyir.types import Type

__all__ = ["AllGather", "AllReduce", "Recv", "Send"]


class AllReduce(
    Exchange,
    name="edge10.all_reduce",
    priced_by=("source_memory", "destination_memory", "nbytes"),
    traits=(Collective,),
):
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

    def given_bytes(self) -> int:
        return self.nbytes

    def taken_bytes(self) -> int:
        return self.nbytes

    def source_in(self) -> str:
        return self.source_memory

    def destination_in(self) -> str:
        return self.destination_memory

    def sram_writes(self) -> list[tuple[int, int]]:
        in_sram = self.destination_memory == "sram"
        return [(self.destination, self.destination + self.nbytes)] if in_sram else []


class Send(Exchange, name="edge10.send", priced_by=("source_memory", "nbytes"), traits=(Collective,)):
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

    def given_bytes(self) -> int:
        return self.nbytes

    def taken_bytes(self) -> int:
        return 0

    def source_in(self) -> str:
        return self.source_memory

    def destination_in(self) -> str:
        return "none"

    def sram_writes(self) -> tuple[()]:
        return ()


class Recv(Exchange, name="edge10.recv", priced_by=("destination_memory", "nbytes"), traits=(Collective,)):
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

    def given_bytes(self) -> int:
        return 0

    def taken_bytes(self) -> int:
        return self.nbytes

    def source_in(self) -> str:
        return "none"

    def destination_in(self) -> str:
        return self.destination_memory

    def sram_writes(self) -> list[tuple[int, int]]:
        in_sram = self.destination_memory == "sram"
        return [(self.destination, self.destination + self.nbytes)] if in_sram else []


class AllGather(
    Exchange,
    name="edge10.all_gather",
    priced_by=("source_memory", "destination_memory", "rows", "sizes", "die"),
    traits=(Collective,),
):
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

    def given_bytes(self) -> int:
        return self.rows * self.sizes[self.die]

    def taken_bytes(self) -> int:
        return self.rows * sum(self.sizes)

    def taken_runs(self) -> int:
        return self.rows * len(self.sizes)

    def source_in(self) -> str:
        return self.source_memory

    def destination_in(self) -> str:
        return self.destination_memory

    def sram_writes(self) -> list[tuple[int, int]]:
        if self.destination_memory != "sram":
            return []
        if self.displacements is None:
            return [(self.destination, self.destination + self.taken_bytes())]
        last_row = self.destination + (self.rows - 1) * self.stride
        return [
            (self.destination + start, last_row + start + size)
            for start, size in zip(self.displacements, self.sizes)
        ]

    def signature(self) -> Hashable:
        """The die's own number does not matter, the size of its piece does."""
        mine = self.sizes[self.die]
        memories = (self.source_memory, self.destination_memory)
        return (self.rows, self.sizes, mine, *memories, self.displacements, self.stride, self.dies)

    def verify(self) -> Iterator[Diagnostic | str]:
        yield from super().verify()
        if not 0 <= self.die < len(self.sizes):
            yield f"die {self.die} is not among the {len(self.sizes)} sizes"
        if self.displacements is not None and len(self.displacements) != len(self.sizes):
            yield f"{len(self.displacements)} displacements for {len(self.sizes)} dies"
