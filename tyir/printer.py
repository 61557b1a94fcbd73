"""Printing IR as the generic MLIR text that `tyir.parser`, mlir-opt and xDSL read, or in the short form of
`tyir.text.pretty`.

One op per line, two spaces per region level, properties sorted by name, discardable attributes after the
regions.  SSA names are kept (made unique within the nearest isolated op) and numbers are given to the
nameless.  The walk keeps its own stack: nesting is not bounded by Python's recursion limit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from tyir.attributes import ArrayAttr, Attribute, DenseResourceAttr, DictAttr
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.ir import Block, Op, Region, Value
from tyir.location import UNKNOWN
from tyir.opdef import DeclaredOp
from tyir.process.collector import collector_paused
from tyir.text.attribute_printer import ELIDED, AttributeText, attribute_text, symbol_text
from tyir.text.pretty import (
    SHORT_NAMES,
    FunctionHead,
    common_type,
    function_head,
    is_plain_module,
    merged_entries,
)
from tyir.traits import IsolatedFromAbove, Terminator
from tyir.types import FunctionType

__all__ = ["attribute_text", "has_elided_constants", "op_excerpt", "print_op"]

_Step = Iterator[Any]  # yields further steps
_NAME: Final = re.compile(r"[A-Za-z$._-][A-Za-z0-9$._-]*")
_NUMBERED_BLOCK: Final = re.compile(r"bb\d+")
_NUMBER_BEHIND: Final = re.compile(r"_\d+$")


def print_op(
    op: Op,
    locations: bool = True,
    pretty: bool = False,
    elide: int | None = None,
    texts: AttributeText | None = None,
) -> str:
    """The text of an op and everything in it, ending in a newline; a module's resources follow it.

    `locations=False` leaves every `loc(...)` out.  `pretty` writes declared ops in the shorter form that
    people read (`tyir.text.pretty`) instead of the generic one.  `elide=N` leaves out resources and constants
    of more than N elements: such text is to look at, `has_elided_constants` tells it.  `texts` remembers
    those of attributes for whoever prints many ops in the generic form.
    """
    printer = _ShortPrinter(locations, elide) if pretty else _Printer(locations, elide, texts)
    with collector_paused():
        printer.print(op)
    if isinstance(op, Module) and op.resources and elide is None:
        printer.lines.append(_resources_text(op))
    printer.lines.append("")
    return "\n".join(printer.lines)


def op_excerpt(op: Op, width: int = 140) -> str:
    """One short line for messages: the op without its regions, cut to `width` characters."""
    printer = _Printer(False)
    printer.excerpt(op)
    line = printer.lines[0]
    return line if len(line) <= width else line[: width - 1] + "…"


def has_elided_constants(op: Op) -> bool:
    """Whether the text that `op` was read from had constants left out (`tyir-opt --elide-large-constants`):
    it says what the IR looks like, not what it is.
    """
    seen: set[Attribute] = set()
    stack: list[Attribute] = []
    for inner in op.walk():
        for entries in (inner.properties, inner.attributes):
            if entries not in seen:
                stack.append(entries)
        while stack:
            attribute = stack.pop()
            if attribute in seen:
                continue
            seen.add(attribute)
            if isinstance(attribute, DenseResourceAttr) and attribute.key == ELIDED:
                return True
            if isinstance(attribute, DictAttr):
                stack.extend(attribute.values())
            elif isinstance(attribute, ArrayAttr):
                stack.extend(attribute.items)
    return False


def _resources_text(module: Module) -> str:
    entries = [
        f'      {key}: "0x{(alignment.to_bytes(4, "little") + blob).hex().upper()}"'
        for key, (alignment, blob) in module.resources.items()
    ]
    return "\n{-#\n  dialect_resources: {\n    builtin: {\n" + ",\n".join(entries) + "\n    }\n  }\n#-}"


@dataclass(slots=True)
class _Names:
    """SSA names of one isolated op."""

    texts: dict[Value, str] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    suffixes: dict[str, int] = field(default_factory=dict)  # the next number to try behind a name
    next_number: int = 0
    next_arg: int = 0
    has_early_uses: bool = False


class _Printer:
    def __init__(self, locations: bool, elide: int | None = None, texts: AttributeText | None = None) -> None:
        self.locations = locations
        self.lines: list[str] = []
        self.text = AttributeText(elide) if texts is None else texts
        self.names = _Names()
        self.properties, self.attributes = self.text.properties, self.text.attributes
        self.signatures: dict[object, str] = {}
        self.loc_texts: dict[Attribute, str] = {UNKNOWN: ""}
        self.block_labels: dict[Block, str] = {}

    def print(self, root: Op) -> None:
        """Print `root`; a stack of generators stands in for recursion (each yields the nested ops that have
        regions).
        """
        stack = [self._op_with_regions(root, "")]
        while stack:
            nested = next(stack[-1], None)
            if nested is None:
                stack.pop()
            else:
                stack.append(nested)

    def excerpt(self, op: Op) -> None:
        head = self._head(op)
        self.lines.append(f"{head}{' ({...})' if op.regions else ''}{self._tail(op)}")

    def _op_with_regions(self, op: Op, indent: str) -> Iterator[_Step]:
        head = self._head(op)
        if not op.regions:
            self.lines.append(f"{indent}{head}{self._tail(op)}")
            return
        outer = self.names
        isolated = op.has_trait(IsolatedFromAbove)
        lines = self.lines
        lines.append(f"{indent}{head} ({{")
        inner = indent + "  "
        for index, region in enumerate(op.regions):
            if index:
                lines.append(f"{indent}}}, {{")
            if isolated:
                self.names = _Names()
            numbers = self.names.next_number, self.names.next_arg
            self._name_blocks(region)
            for position, block in enumerate(region.blocks):
                self._block_label(block, position, indent)
                yield from self._block(block, inner)
            if not isolated:
                self._forget(region, numbers)
            self.names = outer
        lines.append(f"{indent}}}){self._tail(op)}")

    def _block(self, block: Block, indent: str) -> Iterator[_Step]:
        """Hot loop: flat ops are written here, ops with regions are handed to the driver."""
        lines, properties, attributes, loc_texts = (
            self.lines,
            self.properties,
            self.attributes,
            self.loc_texts,
        )
        signatures, names, texts = self.signatures, self.names, self.names.texts
        locations, append, none = self.locations, lines.append, UNKNOWN
        op = block.first_op
        while op is not None:
            if op.regions or op.successors:
                yield self._op_with_regions(op, indent)
                op = op._next
                continue
            operands, results = op._operands, op.results
            value: Value | None = results[0] if len(results) == 1 else None
            kind: object = value.type if value is not None else (None, *[v.type for v in results])
            count = len(operands)
            try:
                if count == 0:
                    operand_text, key = "", kind
                elif count == 1:
                    first = operands[0]
                    operand_text, key = texts[first], (first.type, kind)
                elif count == 2:
                    first, second = operands
                    operand_text, key = f"{texts[first]}, {texts[second]}", (first.type, second.type, kind)
                else:
                    operand_text, key = (
                        ", ".join([texts[v] for v in operands]),
                        (kind, *[v.type for v in operands]),
                    )
            except KeyError:
                for early in operands:
                    if early not in texts:
                        self._use_early(early)
                continue
            signature = signatures.get(key)
            if signature is None:
                signature = signatures[key] = self._signature(op)
            props = properties.get(op.properties)
            if props is None:
                props = self._properties(op)
            attrs = attributes.get(op.attributes)
            if attrs is None:
                attrs = self._attributes(op)
            loc = op.loc
            place = "" if loc is none or not locations else loc_texts.get(loc) or self._location(loc)
            if value is None:
                append(
                    f'{indent}{self._results(op)}"{op.name}"({operand_text}){props}{attrs}{signature}{place}'
                )
            else:
                if value.name is None and not (names.has_early_uses and value in texts):
                    number = names.next_number
                    names.next_number = number + 1
                    text = texts[value] = f"%{number}"
                else:
                    text = texts.get(value) or texts.setdefault(value, self._define(value))
                append(f'{indent}{text} = "{op.name}"({operand_text}){props}{attrs}{signature}{place}')
            op = op._next

    # -- parts of an op
    # ---------------------------------------------------------------------------------------------
    def _head(self, op: Op) -> str:
        texts = self.names.texts
        operands = ", ".join([texts.get(v) or self._use_early(v) for v in op._operands])
        successors = (
            f"[{', '.join('^' + self.block_labels.get(b, 'unknown') for b in op.successors)}]"
            if op.successors
            else ""
        )
        return f'{self._results(op)}"{op.name}"({operands}){successors}{self._properties(op)}'

    def _tail(self, op: Op) -> str:
        loc = self._location(op.loc) if self.locations else ""
        return f"{self._attributes(op)}{self._signature(op)}{loc}"

    def _properties(self, op: Op) -> str:
        found = self.properties.get(op.properties)
        if found is None:
            found = self.properties[op.properties] = f" <{{{self.text.entries(op.properties)}}}>"
        return found

    def _attributes(self, op: Op) -> str:
        found = self.attributes.get(op.attributes)
        if found is None:
            found = self.attributes[op.attributes] = f" {{{self.text.entries(op.attributes)}}}"
        return found

    def _signature(self, op: Op) -> str:
        text = self.text
        return (
            f" : {text.types([v.type for v in op._operands])} -> {text.results([v.type for v in op.results])}"
        )

    def _location(self, loc: Attribute) -> str:
        found = self.loc_texts.get(loc)
        if found is None:
            found = self.loc_texts[loc] = " " + self.text(loc)
        return found

    # -- names
    # ------------------------------------------------------------------------------------------------------
    def _results(self, op: Op) -> str:
        results = op.results
        if not results:
            return ""
        texts = self.names.texts
        if results[0] not in texts:
            self._name_results(op)
        first = texts[results[0]]
        if first.endswith("#0"):
            return f"{first[:-2]}:{len(results)} = "
        return ", ".join([texts[v] for v in results]) + " = "

    def _name_results(self, op: Op) -> None:
        """`%a` for one result, `%a, %b` for results with names of their own, otherwise `%a#0`, `%a#1`."""
        results, texts = op.results, self.names.texts
        if len(results) == 1 or any(v.name is not None for v in results[1:]):
            for value in results:
                texts[value] = self._define(value)
            return
        base = self._define(results[0])
        for index, value in enumerate(results):
            texts[value] = f"{base}#{index}"

    def _define(self, value: Value) -> str:
        if value.name is not None:
            return self._unique(value.name)
        self.names.next_number += 1
        return f"%{self.names.next_number - 1}"

    def _unique(self, name: str) -> str:
        """`%name`, or with another number behind it when the name is taken: never two numbers, which xDSL
        would mix up.
        """
        names = self.names
        if not _NAME.fullmatch(name):
            name = re.sub(r"[^A-Za-z0-9$._-]", "_", name) or "_"
            if name[0].isdigit():
                name = "_" + name
        if name in names.used:
            base = _NUMBER_BEHIND.sub("", name) or name
            number = names.suffixes.get(base, 0)
            while (name := f"{base}_{number}") in names.used:
                number += 1
            names.suffixes[base] = number + 1
        names.used.add(name)
        return "%" + name

    def _name_arg(self, value: Value) -> str:
        names = self.names
        if value in names.texts:
            return names.texts[value]
        if value.name is not None:
            name = value.name
        else:
            while (name := f"arg{names.next_arg}") in names.used:
                names.next_arg += 1
            names.next_arg += 1
        text = names.texts[value] = self._unique(name)
        return text

    def _use_early(self, value: Value) -> str:
        """The name of an operand met before its definition: defined in a later block, or outside of what is
        printed.
        """
        self.names.has_early_uses = True
        if isinstance(value.owner, Op):
            self._name_results(value.owner)
            return self.names.texts[value]
        return self._name_arg(value)

    def _forget(self, region: Region, numbers: tuple[int, int]) -> None:
        """Names of a region are free again behind it, as MLIR's are."""
        if not self.names.has_early_uses:
            self.names.next_number, self.names.next_arg = numbers
        for block in region.blocks:
            for value in block.args:
                self._release(value)
            for op in block:
                for value in op.results:
                    self._release(value)

    def _release(self, value: Value) -> None:
        text = self.names.texts.pop(value, None)
        if text is not None:
            self.names.used.discard(text[1:].partition("#")[0])

    def _name_blocks(self, region: Region) -> None:
        taken: set[str] = set()
        for index, block in enumerate(region.blocks):
            label = block.label
            if (
                label is None
                or label in taken
                or _NUMBERED_BLOCK.fullmatch(label)
                or not _NAME.fullmatch(label)
            ):
                label = f"bb{index}"
            taken.add(label)
            self.block_labels[block] = label

    def _block_label(self, block: Block, position: int, indent: str) -> None:
        if position == 0 and not block.args and block.first_op is not None and block.label is None:
            return
        args = ""
        if block.args:
            texts = [f"{self._name_arg(v)}: {self.text(v.type)}" for v in block.args]
            if self.locations and block.arg_locs:
                locs = (*block.arg_locs, *[UNKNOWN] * len(texts))  # arguments added later have none
                texts = [f"{text}{self._location(loc)}" for text, loc in zip(texts, locs)]
            args = f"({', '.join(texts)})"
        self.lines.append(f"{indent}^{self.block_labels[block]}{args}:")


@dataclass(frozen=True, slots=True)
class _Middle:
    """What stands between an op's results and its types, but for the operands."""

    name: str  # with the symbol
    has_symbol: bool  # operands stand in parentheses
    is_call: bool  # a symbol, and operands are declared: parentheses and the signature are always there
    entries: str


class _ShortPrinter(_Printer):
    """The short form for ops whose declaration allows it."""

    def __init__(self, locations: bool, elide: int | None = None) -> None:
        super().__init__(locations, elide)
        self.text = AttributeText(elide, short=True)
        self.middles: dict[tuple[type[Op], Attribute, Attribute], _Middle | None] = {}

    def _op_with_regions(self, op: Op, indent: str) -> Iterator[_Step]:
        if is_plain_module(op):
            return self._module(op, indent)
        head = function_head(op)
        return super()._op_with_regions(op, indent) if head is None else self._function(op, head, indent)

    def _block(self, block: Block, indent: str) -> Iterator[_Step]:
        for op in block:
            if op.regions:
                yield self._op_with_regions(op, indent)
            else:
                self.lines.append(f"{indent}{self._head(op)}{self._tail(op)}")

    # -- modules and functions
    # --------------------------------------------------------------------------------------
    def _module(self, op: Op, indent: str) -> Iterator[_Step]:
        merged = merged_entries(type(op), op.properties, op.attributes)
        assert merged is not None
        symbol, entries = merged
        name = "" if symbol is None else f" {self.text(symbol)}"
        self.lines.append(
            f"{indent}module{name}{' attributes' if len(entries) else ''}{self._braces(entries)} {{"
        )
        yield from self._body(op, indent)

    def _function(self, op: Op, head: FunctionHead, indent: str) -> Iterator[_Step]:
        region = op.regions[0]
        outer, self.names = self.names, _Names()
        entry = region.blocks[0] if region.blocks else None
        names = (
            [f"{self._name_arg(v)}: " for v in entry.args]
            if entry is not None
            else [""] * len(head.type.inputs)
        )
        locs = [self._location(loc) for loc in entry.arg_locs] if entry is not None and self.locations else []
        locs += [""] * (len(names) - len(locs))
        arguments = [
            f"{n}{self.text(t)}{self._braces(d)}{loc}"
            for n, t, d, loc in zip(names, head.type.inputs, head.arg_attrs, locs, strict=True)
        ]
        attributes = f" attributes{self._braces(head.attributes)}" if len(head.attributes) else ""
        visibility = f"{head.visibility} " if head.visibility else ""
        line = (
            f"{indent}func.func"
            f" {visibility}{symbol_text(head.symbol)}({', '.join(arguments)}){self._outputs(head)}{attributes}"  # noqa: E501
        )
        if entry is None:
            self.lines.append(line + (self._location(op.loc) if self.locations else ""))
        else:
            self.lines.append(line + " {")
            yield from self._body(op, indent)
        self.names = outer

    def _outputs(self, head: FunctionHead) -> str:
        texts = [
            f"{self.text(kind)}{self._braces(d)}"
            for kind, d in zip(head.type.results, head.res_attrs, strict=True)
        ]
        if not texts:
            return ""
        bare = (
            len(texts) == 1
            and not len(head.res_attrs[0])
            and not isinstance(head.type.results[0], FunctionType)
        )
        return f" -> {texts[0]}" if bare else f" -> ({', '.join(texts)})"

    def _braces(self, entries: DictAttr) -> str:
        return f" {{{self.text.entries(entries)}}}" if len(entries) else ""

    def _body(self, op: Op, indent: str) -> Iterator[_Step]:
        """The blocks of an isolated op's region and the closing brace; the entry block's arguments have been
        printed.
        """
        outer = self.names
        if isinstance(op, Module):
            self.names = _Names()
        region = op.regions[0]
        self._name_blocks(region)
        for position, block in enumerate(region.blocks):
            if position:
                self._block_label(block, position, indent)
            yield from self._block(block, indent + "  ")
        self.names = outer
        self.lines.append(f"{indent}}}{self._location(op.loc) if self.locations else ''}")

    # -- parts of an op
    # ---------------------------------------------------------------------------------------------
    def _head(self, op: Op) -> str:
        middle = self._middle(op)
        if middle is None:
            return super()._head(op)
        texts = self.names.texts
        operands = ", ".join([texts.get(v) or self._use_early(v) for v in op._operands])
        if operands or middle.is_call:
            operands = f"({operands})" if middle.has_symbol else f" {operands}"
        successors = (
            f" [{', '.join('^' + self.block_labels.get(b, 'unknown') for b in op.successors)}]"
            if op.successors
            else ""
        )
        return f"{self._results(op)}{middle.name}{operands}{successors}{middle.entries}"

    def _tail(self, op: Op) -> str:
        middle = self._middle(op)
        if middle is None:
            return super()._tail(op)
        types = [v.type for v in (*op._operands, *op.results)]
        common = None if middle.is_call else common_type(types)
        if (
            not op.results
            and len(types) > 1
            and not middle.is_call
            and not isinstance(types[0], FunctionType)
        ):
            signature = f" : {', '.join([self.text(t) for t in types])}"
        elif common is not None:
            signature = f" : {self.text(common)}"
        elif types or not (middle.entries or op.regions or (Terminator in op.traits and op._next is None)):
            signature = self._signature(op)
        else:
            signature = ""
        return signature + (self._location(op.loc) if self.locations else "")

    def _middle(self, op: Op) -> _Middle | None:
        """The texts of name, symbol and dictionary; None for an op to be written in the generic form."""
        key = (type(op), op.properties, op.attributes)
        if key not in self.middles:
            merged = merged_entries(*key)
            self.middles[key] = None
            if merged is not None and isinstance(op, DeclaredOp) and not isinstance(op, (Func, Module)):
                symbol, entries = merged
                name = SHORT_NAMES.get(op.name, op.name) + (
                    f" {self.text(symbol)}" if symbol is not None else ""
                )
                has_symbol = symbol is not None
                self.middles[key] = _Middle(
                    name, has_symbol, has_symbol and bool(op.operand_fields), self._braces(entries)
                )
        return self.middles[key]
