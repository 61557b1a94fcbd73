"""What the parser knows while it reads: the values in scope, the op whose regions are being read, the region
itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tyir.attributes import DictAttr
from tyir.ir import Block, Region, Value
from tyir.location import Location
from tyir.types import Type

__all__ = ["Argument", "Frame", "Header", "Scope"]


@dataclass(slots=True)
class Scope:
    """The values visible in one isolated op, and those used but not defined yet (with the place of first
    use).
    """

    values: dict[str, Value] = field(default_factory=dict)
    pending: dict[str, tuple[Value, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Argument:
    """A parameter in the head of a function; without a name where the function is only declared."""

    name: str
    at: int
    type: Type
    attributes: DictAttr
    loc: Location


@dataclass(slots=True)
class Header:
    """An op of which everything before its regions has been read."""

    start: int
    name: str
    results: list[tuple[str, int, int]]  # text, count, position
    operands: list[tuple[str, int]]  # text, position
    successors: list[Block]
    properties: DictAttr
    regions: list[Region] = field(default_factory=list)
    attributes: DictAttr | None = None  # of the short form, where they stand before the regions
    has_entries: bool = False  # the short form had a dictionary
    bare: bool = False  # a module or function of the short form: one region without parentheses, no types
    arguments: list[Argument] = field(default_factory=list)  # of a function's body
    one_type: bool = False  # one type was written for all operands and results


@dataclass(slots=True)
class Frame:
    """A region being read: the op it belongs to and where the parser was."""

    header: Header | None
    region: Region
    block: Block
    scope: Scope
    visible: int  # values defined before the region
    labels: dict[str, Block] = field(default_factory=dict)
    forward: dict[Block, tuple[str, int]] = field(default_factory=dict)
    entry_is_open: bool = True  # the entry block may still get a label
