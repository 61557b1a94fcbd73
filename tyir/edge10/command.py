"""What every command of the dialect `edge10` says of itself: its unit, the sizes that registers may give it,
what its time depends on, and the SRAM that it writes.

Whoever needs one of these facts (lowering, memory plan, search, engines, reports) asks the command; nobody
keeps a table by op.  A command that does not answer is refused when its class is made.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Final

from tyir.diagnostics import Diagnostic
from tyir.edge10.command_times import NO_TRANSFER, Transfer, Work
from tyir.opdef import DeclaredOp
from tyir.traits import Trait
from tyir.types import OpaqueType, Type, i64

__all__ = ["ADDRESS", "DMA_UNITS", "DYNAMIC", "TOKEN", "UNITS", "Command", "Exchange"]

TOKEN: Final = OpaqueType("edge10.token")
ADDRESS: Final = OpaqueType("edge10.address")
DYNAMIC: Final = -1
DMA_UNITS: Final = ("ewdma", "eidma", "ebdma", "eodma")
UNITS: Final = (*DMA_UNITS, "dequant", "cube", "drain", "vector", "d2d")


class Command(DeclaredOp, name="edge10.command"):
    """Base of all commands.  Where a class is declared it says

    unit        the unit that it runs on, or `unit_from`, the property that names it
    dynamic     the properties that hold sizes; one of -1 is the next scalar operand, in this order
    priced_by   the other properties that its time depends on (`cost` reads no more than these and the sizes)

    and it defines `cost` and `sram_writes`.
    """

    fixed_unit: ClassVar[str] = ""
    unit_property: ClassVar[str] = ""
    dynamic: ClassVar[tuple[str, ...]] = ()
    priced_by: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(
        cls,
        *,
        name: str,
        unit: str = "",
        unit_from: str = "",
        dynamic: tuple[str, ...] = (),
        priced_by: tuple[str, ...] = (),
        abstract: bool = False,
        traits: tuple[type[Trait], ...] = (),
        **kwargs: Any,
    ) -> None:
        super().__init_subclass__(name=name, traits=traits, **kwargs)
        cls.fixed_unit, cls.unit_property = unit or cls.fixed_unit, unit_from
        cls.dynamic, cls.priced_by = dynamic, priced_by
        if abstract:
            return
        if (cls.fixed_unit in UNITS) == (unit_from in cls.property_names):
            raise TypeError(f"{name}: a command says its unit, one of {', '.join(UNITS)}, or unit_from")
        if unknown := [p for p in (*dynamic, *priced_by) if p not in cls.property_names]:
            raise TypeError(f"{name} has no property {', '.join(unknown)}")
        if missing := [n for n in dir(cls) if getattr(getattr(cls, n), "__isabstractmethod__", False)]:
            raise TypeError(f"{name}: a command defines {', '.join(missing)}")

    @property
    def unit(self) -> str:
        """The unit it runs on."""
        return self.fixed_unit or str(getattr(self, self.unit_property))

    @classmethod
    def unit_with(cls, properties: Mapping[str, Any]) -> str:
        """The unit of a command that is still to be made, with these properties."""
        return cls.fixed_unit or str(properties[cls.unit_property])

    def sizes_with(self, scalars: Sequence[int]) -> tuple[int, ...]:
        """The sizes of the properties named by `dynamic`; one of -1 is the next of `scalars`."""
        given = iter(scalars)
        return tuple([next(given) if size == DYNAMIC else size for size in self.sizes_given()])

    def sizes_given(self) -> tuple[int, ...]:
        """The sizes as the properties have them."""
        sizes: list[int] = []
        for name in self.dynamic:
            value = getattr(self, name)
            sizes += value if isinstance(value, tuple) else (value,)
        return tuple(sizes)

    @abstractmethod
    def cost(self, scalars: Sequence[int]) -> Transfer | Work:
        """What its time depends on: bytes and runs of what it moves in DRAM (a collective on its own die's
        side), or its work on a unit.
        """

    @abstractmethod
    def sram_writes(self) -> Sequence[tuple[int, int]]:
        """The SRAM that it may write, as [first byte, end).  A size that a register gives counts as what is
        set aside for it: the stride to the next plane or row.
        """

    def macs(self, scalars: Sequence[int]) -> int:
        """Multiply-accumulates that it asks for, padding not counted."""
        return 0

    def address_count(self) -> int:
        """How many DRAM addresses it takes."""
        return 0

    def signature(self) -> Hashable:
        """What two dies' commands have in common if both run alike: the properties, but for those that say
        which part of the data is this die's.
        """
        return self.properties

    def infer(self) -> Type:
        return TOKEN

    def verify(self) -> Iterator[Diagnostic | str]:
        kinds = [v.type for v in self.operands]
        addresses, scalars = self.address_count(), self.sizes_given().count(DYNAMIC)
        wanted = [ADDRESS] * addresses + [i64] * scalars
        if kinds[: len(wanted)] != wanted or any(k is not TOKEN for k in kinds[len(wanted) :]):
            yield (
                f"takes {addresses} addresses, {scalars} scalars and then tokens, got"
                f" ({', '.join(map(str, kinds))})"
            )


class Exchange(Command, name="edge10.exchange", abstract=True, unit="d2d"):
    """Base of the commands that dies meet in.  Each gives `given_bytes` from its `source` and takes
    `taken_bytes` to its `destination`, in SRAM or DRAM.
    """

    @abstractmethod
    def given_bytes(self) -> int:
        """What the die gives the others."""

    @abstractmethod
    def taken_bytes(self) -> int:
        """What it is given."""

    @abstractmethod
    def source_in(self) -> str:
        """The memory of what it gives; "none" when it gives nothing."""

    @abstractmethod
    def destination_in(self) -> str:
        """The memory of what it takes; "none" when it takes nothing."""

    def taken_runs(self) -> int:
        """In how many runs of addresses what it takes is written."""
        return 1

    def address_count(self) -> int:
        return (self.source_in() == "dram") + (self.destination_in() == "dram")

    def cost(self, scalars: Sequence[int]) -> Transfer:
        cost = NO_TRANSFER
        if self.source_in() == "dram":
            cost = Transfer(self.given_bytes(), 1)
        if self.destination_in() == "dram":
            cost = Transfer(cost.nbytes + self.taken_bytes(), cost.runs + self.taken_runs())
        return cost
