"""A command program as bytes: what `llm_die{i}.edge10` says, in a form that is loaded without parsing
text.

Layout, all integers unsigned LEB128:

    "EDG10" version:u8
    tables of strings, of types and of attributes (locations too): count, then length and UTF-8 text of each; equal ones are stored once
    the module: one op

    op      name, location, operands, results, properties, attributes, regions
    region  blocks, each: arguments, ops

Lists begin with their count.  Names are numbers of strings; an operand is a value's number, values being
numbered as they are defined over the whole module; a result or argument is a type and a name (the empty
string for none); properties and attributes are pairs of a name and an attribute.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tyir.attributes import Attribute, DictAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.ir import Block, Op, Region, Value
from tyir.location import UNKNOWN, Location
from tyir.parser import parse_bytes, parse_file
from tyir.process.collector import collector_paused
from tyir.process.files import open_regular, read_regular
from tyir.registry import op_class
from tyir.text.attribute_parser import parse_attribute_text, parse_type_text
from tyir.text.attribute_printer import attribute_text
from tyir.types import Type

__all__ = ["MAGIC", "decode", "encode", "is_binary", "program_of", "read_program"]

MAGIC: Final = b"EDG10"
VERSION: Final = 1
_MAX_BYTES: Final = 1 << 30  # of a file; a program of 28 layers has 1 MB
_MAX_REGIONS: Final = 100  # nesting, which reading and writing follow; programs loop a few levels deep


def is_binary(path: Path) -> bool:
    """Whether a file holds a command program as bytes; what has another beginning is text."""
    try:
        with open_regular(path) as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError as error:
        raise TyirError(
            f"cannot read {path}: {error.strerror}",
            help="give an .edge10 or .bin file that tyir-compile wrote",
        ) from None


def read_program(path: Path) -> Module:
    """A command program from its file: bytes (`.bin`) or text (`.edge10`), whichever it holds."""
    if not is_binary(path):
        return parse_file(path)
    try:
        return decode(read_regular(path, _MAX_BYTES), str(path))
    except OSError as error:
        raise TyirError(f"cannot read {path}: {error.strerror}") from None


def program_of(data: bytes, name: str) -> Module:
    """A command program from what its file holds, either form; `name` is for messages."""
    return decode(data, name) if data.startswith(MAGIC) else parse_bytes(data, name)


def encode(module: Module) -> bytes:
    """The bytes of a module whose ops stand in order (definitions before uses), as every command program's
    do.

    `TyirError` for what the bytes have no place for: jumps between blocks, labels, resources.
    """
    body = _Writer()
    body.op(module)
    head = bytearray(MAGIC + bytes([VERSION]))
    for table in (body.strings, body.types, body.attributes):
        _put(head, len(table))
        for text in table:
            raw = text.encode()
            _put(head, len(raw))
            head += raw
    return bytes(head + body.out)


def decode(data: bytes, name: str = "<bytes>") -> Module:
    """The module that `encode` made these bytes of; `TyirError` when they are none, are cut off, or are of
    another version.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise TyirError(
            f"{name} is no binary command program: it begins with {data[:5]!r}",
            help="give a .bin file made from an .edge10 file",
        )
    if data[len(MAGIC) : len(MAGIC) + 1] != bytes([VERSION]):
        raise TyirError(
            f"{name} has format version {data[len(MAGIC) : len(MAGIC) + 1].hex() or 'none'}, this program"
            f" reads {VERSION:02}"
        )
    try:
        with collector_paused():
            reader = _Reader(data, len(MAGIC) + 1)
            op = reader.op()
    except (IndexError, KeyError, UnicodeDecodeError, ValueError, TypeError) as error:
        raise TyirError(
            f"{name} is damaged or cut off: {error}", help="write it again from the .edge10 file"
        ) from None
    if not isinstance(op, Module) or reader.position != len(data):
        raise TyirError(f"{name} is damaged: {len(data) - reader.position} bytes follow the module")
    return op


def _put(out: bytearray, number: int) -> None:
    """An unsigned LEB128 number."""
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)


def _unwritable(op: Op, what: str) -> TyirError:
    return TyirError(
        f"'{op.name}' {what}, which the binary form of command programs does not hold",
        where=str(op.loc),
        help="keep the program as text",
    )


class _Writer:
    """The ops' bytes, and the tables they refer to in order of first use."""

    def __init__(self) -> None:
        self.out = bytearray()
        self.strings: dict[str, int] = {}
        self.types: dict[str, int] = {}
        self.attributes: dict[str, int] = {}
        self._texts: dict[Attribute, int] = {}
        self._values: dict[Value, int] = {}
        self._depth = 0

    def number(self, value: int) -> None:
        _put(self.out, value)

    def string(self, text: str) -> None:
        self.number(self.strings.setdefault(text, len(self.strings)))

    def attribute(self, value: Attribute) -> None:
        known = self._texts.get(value)
        if known is None:
            known = self._texts[value] = self.attributes.setdefault(
                attribute_text(value), len(self.attributes)
            )
        self.number(known)

    def defined(self, values: Sequence[Value]) -> None:
        self.number(len(values))
        for value in values:
            self._values[value] = len(self._values)
            self.number(self.types.setdefault(str(value.type), len(self.types)))
            self.string(value.name or "")

    def dictionary(self, values: DictAttr) -> None:
        self.number(len(values))
        for key, value in values.items():
            self.string(key)
            self.attribute(value)

    def op(self, op: Op) -> None:
        if op.successors or (isinstance(op, Module) and op.resources):
            raise _unwritable(op, "jumps to another block" if op.successors else "has resources")
        self.string(op.name)
        self.attribute(op.loc)
        self.number(len(op.operands))
        for value in op.operands:
            if value not in self._values:
                raise _unwritable(op, "uses a value before its definition")
            self.number(self._values[value])
        self.defined(op.results)
        self.dictionary(op.properties)
        self.dictionary(op.attributes)
        self.number(len(op.regions))
        self._depth += 1
        if op.regions and self._depth > _MAX_REGIONS:
            raise _unwritable(op, f"nests regions deeper than {_MAX_REGIONS} levels")
        for region in op.regions:
            self.number(len(region.blocks))
            for block in region.blocks:
                if block.label is not None or any(loc is not UNKNOWN for loc in block.arg_locs):
                    what = f"label ^{block.label}" if block.label is not None else "locations of arguments"
                    raise _unwritable(op, f"has a block with the {what}")
                self.defined(block.args)
                ops = list(block)
                self.number(len(ops))
                for inner in ops:
                    self.op(inner)
        self._depth -= 1


class _Reader:
    """What `_Writer` wrote, read back."""

    def __init__(self, data: bytes, position: int) -> None:
        self.data, self.position = data, position
        self._values: list[Value] = []
        self._depth = 0
        self._strings = self._table()
        self._types: list[Type] = [parse_type_text(text) for text in self._table()]
        self._attributes: list[Attribute] = [parse_attribute_text(text) for text in self._table()]

    def _table(self) -> list[str]:
        return [self._text(self.number()) for _ in range(self.number())]

    def _text(self, size: int) -> str:
        raw = self.data[self.position : self.position + size]
        if len(raw) < size:
            raise ValueError("a string is cut off")
        self.position += size
        return raw.decode()

    def number(self) -> int:
        byte = self.data[self.position]
        self.position += 1
        if byte < 0x80:
            return byte
        value, shift = byte & 0x7F, 7
        while shift < 64:
            byte = self.data[self.position]
            self.position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("a number has more than 64 bits")

    def string(self) -> str:
        return self._strings[self.number()]

    def defined(self) -> tuple[list[Type], list[str | None]]:
        types: list[Type] = []
        names: list[str | None] = []
        for _ in range(self.number()):
            types.append(self._types[self.number()])
            names.append(self.string() or None)
        return types, names

    def dictionary(self) -> DictAttr:
        return DictAttr({self.string(): self._attributes[self.number()] for _ in range(self.number())})

    def op(self) -> Op:
        cls = op_class(self.string())
        loc = self._attributes[self.number()]
        if not isinstance(loc, Location):
            raise ValueError(f"'{loc}' is no location")
        operands = [self._values[self.number()] for _ in range(self.number())]
        types, names = self.defined()
        # Results are numbered before what the regions define, as they are written; the op exists only after
        # its regions.
        first = len(self._values)
        self._values.extend([None] * len(types))  # type: ignore[list-item]
        properties, attributes = self.dictionary(), self.dictionary()
        regions = [self.region() for _ in range(self.number())]
        op = cls.create(operands, types, properties, attributes, regions, (), loc, names)
        self._values[first : first + len(types)] = op.results
        return op

    def region(self) -> Region:
        self._depth += 1
        if self._depth > _MAX_REGIONS:
            raise ValueError(f"regions are nested deeper than {_MAX_REGIONS} levels")
        blocks: list[Block] = []
        for _ in range(self.number()):
            types, names = self.defined()
            block = Block(types, names)
            self._values.extend(block.args)
            for _ in range(self.number()):
                block.append(self.op())
            blocks.append(block)
        self._depth -= 1
        return Region(blocks)
