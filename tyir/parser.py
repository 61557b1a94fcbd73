"""Parsing the MLIR text of `tyir/text/grammar.lark` into IR: the generic form, and the short form of declared
ops.

One class, in layers, each in a file: `lexer` (tokens) < `location_parser` < `attribute_parser` <
`scope_parser` (names, regions) < `flat_parser` (the fast path: whole lines by one regular expression) <
`short_parser` < this file: the file, regions and the full path by recursive descent, for everything the fast
path leaves (regions, successors, several results, comments, errors).  Both paths, and `lark_parser`, give the
same IR: tests prove it on every file and on random ones.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tyir.diagnostics import SourceText
from tyir.dialects.builtin import Module
from tyir.ir import EMPTY_DICT, Block, Op, Region
from tyir.location import UNKNOWN
from tyir.process.collector import collector_paused
from tyir.registry import op_class
from tyir.text.parser_state import Header
from tyir.text.resource_parser import parse_metadata
from tyir.text.scope_parser import BLOCK, starts_location
from tyir.text.short_parser import SHORT_NAME_HERE, ShortParser
from tyir.text.source_file import decode_source, read_source
from tyir.traits import IsolatedFromAbove

__all__ = ["Parser", "parse_bytes", "parse_file", "parse_module"]

_COUNT: Final = re.compile(r":\s*([0-9]+)")
_ALIAS: Final = re.compile(r"([#!][A-Za-z_][A-Za-z0-9_$]*)\s*=")


class Parser(ShortParser):
    """Reads one file.  With `positions`, remembers where in the text each op begins."""

    # -- the file
    # ---------------------------------------------------------------------------------------------------
    def parse(self) -> Module:
        """The whole text as one module; what is not one `builtin.module` is wrapped in one."""
        outer = Region()
        self._open_region(None, outer, isolated=True)
        self._aliases()
        self._ops()
        self._aliases()
        resources: dict[str, tuple[int, bytes]] = {}
        if self.text.startswith("{-#", self.skip_space()):
            resources = parse_metadata(self)
        if self.skip_space() != len(self.text):
            self.expected("an operation or the end of the file", help=_FILE)
        self._close_region()
        module = self._as_module(outer)
        module.resources.update(resources)
        return module

    def _as_module(self, outer: Region) -> Module:
        ops = outer.blocks[0].ops
        if len(outer.blocks) == 1 and len(ops) == 1 and isinstance(ops[0], Module):
            return ops[0].detach()
        module = Module.create(regions=[outer])
        if self._positions is not None:
            self._positions[module] = 0
        return module

    def _aliases(self) -> None:
        while (match := _ALIAS.match(self.text, self.skip_space())) is not None:
            name, start = match[1], self.pos
            self.pos = match.end()
            self.define_alias(name, self.type() if name[0] == "!" else self.attribute(), start)

    # -- ops and regions
    # --------------------------------------------------------------------------------------------
    def _ops(self) -> None:
        """Everything up to the end of the file (or its metadata), with all nested regions."""
        while True:
            char, before = self.peek(), self.pos
            self._flat_ops()
            self._flat_short_ops()
            if self.pos != before:
                continue
            if char in ('"', "%"):
                self._op()
            elif char == "^":
                self._block_label()
            elif SHORT_NAME_HERE.match(self.text, self.pos) is not None:
                self._op()
            elif char == "}" and len(self._frames) > 1:
                self.pos += 1
                self._region_end()
            elif len(self._frames) == 1 and (char in ("", "#", "!") or self.text.startswith("{-#", self.pos)):
                return
            elif char == "":
                start = self._frame.header.start if self._frame.header is not None else 0
                self.fail(
                    "region is not closed before the end of the file",
                    start,
                    start + 1,
                    help="a '}' is missing",
                )
            else:
                self.expected(
                    "an operation" if len(self._frames) == 1 else "an operation, a block label or '}'",
                    help=_op_hint(self.text, self.pos),
                )

    def _op(self) -> None:
        """One op up to its end, or up to the opening of its first region."""
        self._frame.entry_is_open = False
        header = self._header()
        if header.bare:
            self._bare_region(header)
        elif self.peek() == "(":
            self.pos += 1
            self._next_region(header)
        else:
            self._finish(header)

    def _header(self) -> Header:
        start = self.skip_space()
        results = self._result_names() if self.text[start] == "%" else []
        if (short := self.match(SHORT_NAME_HERE)) is not None:
            return self._short_header(start, results, short)
        name_at = self.skip_space()
        name = self.string('an operation name such as "func.func"')
        self.check_name(name, name_at, self.pos)
        operands = self.listed("(", ")", self._operand)
        successors = self.listed("[", "]", self._successor) if self.peek() == "[" else []
        properties = EMPTY_DICT
        if self.accept("<"):
            self.expect("{", "'{'")
            properties = self.entries("}")
            self.expect(">", "'>' after the properties")
        return Header(start, name, results, operands, successors, properties)

    def _result_names(self) -> list[tuple[str, int, int]]:
        names = [self._result_name()]
        while self.accept(","):
            names.append(self._result_name())
        self.expect("=", "'=' after the results")
        return names

    def _result_name(self) -> tuple[str, int, int]:
        text, at = self._operand()
        if "#" in text:
            self.fail(
                "a result is defined without '#'",
                at,
                self.pos,
                help=f"{text.partition('#')[0]}:2 defines two results",
            )
        match = self.match(_COUNT)
        count = 1
        if match is not None:
            count = int(match[1]) if len(match[1]) < 7 else 0
            if count < 1:
                self.fail(
                    "the number of results must be at least 1 (and less than a million)",
                    match.start(1),
                    match.end(1),
                )
        return text, count, at

    def _next_region(self, header: Header) -> None:
        if not self.accept("{"):
            is_short = header.attributes is not None and not header.regions
            self.expected(
                "'{' of a region",
                help="dialects' own syntax is not read; mlir-opt --mlir-print-op-generic prints what is"
                if is_short
                else "",
            )
        region = Region()
        header.regions.append(region)
        self._open_region(header, region, IsolatedFromAbove in op_class(header.name).traits)

    def _region_end(self) -> None:
        """Behind the `}` of a region: another region, or the rest of its op."""
        header = self._frame.header
        assert header is not None
        self._end_region(header)
        if header.bare:
            self._finish_bare(header)
        elif self.accept(","):
            self._next_region(header)
        else:
            self.expect(")", "',' or ')' after a region")
            self._finish(header)

    def _end_region(self, header: Header) -> None:
        region, unlabelled = self._frame.region, self._frame.entry_is_open
        self._close_region()
        first = region.blocks[0]
        if unlabelled and first.first_op is None and header.name != Module.name:
            region.blocks.clear()  # `({})` is a region without blocks: the body of an external function
            first.region = None

    def _block_label(self) -> None:
        match = self.match(BLOCK)
        frame = self._frame
        if match is None or frame.header is None:
            self.expected("an operation" if frame.header is None else "a block label such as ^bb0")
        block = self._begin_block(match[1], match.start())
        if self.peek() == "(":
            self.listed("(", ")", lambda: self._block_argument(block))
        self.expect(":", "':' after a block label")

    def _block_argument(self, block: Block) -> None:
        text, at = self._operand()
        self.expect(":", "':' and the type of the block argument")
        kind = self.type()
        loc = self.location() if self.peek() == "l" else UNKNOWN
        self._add_argument(block, text, kind, loc, at)

    def _finish(self, header: Header) -> None:
        """Attributes, type and location; then the op is made and put at the end of the current block."""
        if header.attributes is not None:
            self._finish_short(header, header.attributes)
            return
        attributes = (
            self.dictionary()
            if self.peek() == "{" and not self.text.startswith("{-#", self.pos)
            else EMPTY_DICT
        )
        self.expect(":", "':' and the operation's type")
        types_at = self.skip_space()
        in_types, out_types = self._signature()
        types_end = self.pos
        loc = self.location() if starts_location(self.text, self.skip_space()) else UNKNOWN
        self._make(header, attributes, in_types, out_types, loc, types_at, types_end)


_FILE: Final = "give a file of IR, as tyir-import writes it, or mend this line"


def _op_hint(text: str, pos: int) -> str:
    word = re.compile(r"[A-Za-z_][\w.]*").match(text, pos)
    return (
        f'an op is written "{word[0]}"(...) : (...) -> ..., a declared one also as dialect.name'
        if word
        else _FILE
    )


def parse_module(text: str, name: str = "<string>", positions: dict[Op, int] | None = None) -> Module:
    """The module of an IR text.

    `positions` is filled with the offset of each op.  `TyirError` points at what is wrong.
    """
    with collector_paused():
        return Parser(SourceText(name, text), positions).parse()


def parse_file(path: str | Path) -> Module:
    """The module of an IR file."""
    return parse_module(read_source(path), str(path))


def parse_bytes(data: bytes, name: str) -> Module:
    """The module of an IR text in UTF-8; `name` is for messages."""
    return parse_module(decode_source(data, name), name)
