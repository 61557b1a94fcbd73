"""The short form op by op (`tyir.text.pretty` describes it): heads of declared ops, modules and functions as
MLIR writes them.
"""

from __future__ import annotations

import re
from typing import Final, NoReturn

from tyir.attributes import ArrayAttr, Attribute, DictAttr, StringAttr, SymbolRefAttr
from tyir.diagnostics import did_you_mean
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.ir import EMPTY_DICT, Region
from tyir.location import UNKNOWN
from tyir.opdef import DeclaredOp
from tyir.registry import dialect_names, dialect_ops, op_class, registered_class
from tyir.text.flat_parser import FlatParser
from tyir.text.parser_state import Argument, Header
from tyir.text.pretty import FULL_NAMES, SHORT_NAME, VISIBILITIES, split_entries
from tyir.text.scope_parser import starts_location
from tyir.traits import Terminator
from tyir.types import FunctionType, Type

__all__ = ["SHORT_NAME_HERE", "ShortParser"]

SHORT_NAME_HERE: Final = re.compile(SHORT_NAME)
_VISIBILITY: Final = re.compile(rf"(?:{'|'.join(VISIBILITIES)})(?![A-Za-z0-9_$.])")
_ATTRIBUTES: Final = re.compile(r"attributes(?![A-Za-z0-9_$.])")
_OPERANDS_OF_SYMBOL: Final = re.compile(r"\(\s*[%)]")
Results = list[tuple[str, int, int]]


class ShortParser(FlatParser):
    """Flat lines plus the short form's heads."""

    def _short_header(self, start: int, results: Results, match: re.Match[str]) -> Header:
        """The rest of a header in the short form: `@symbol(%operands) {entries}`, or without a symbol
        `%operands [^successors] {entries}`.
        """
        name = FULL_NAMES.get(match[0], match[0])
        cls = registered_class(name)
        if cls is None:
            self._unknown_op(name, match)
        if cls is Func:
            return self._function_header(start, results)
        if cls is Module:
            return self._module_header(start, results)
        at = self.skip_space()
        symbol = self.symbol_reference() if self.peek() == "@" else None
        operands = []
        if symbol is not None and _OPERANDS_OF_SYMBOL.match(self.text, self.pos) is not None:
            operands = self.listed("(", ")", self._operand)
        elif symbol is None and self.peek() == "%":
            operands = [self._operand()]
            while self.accept(","):
                operands.append(self._operand())
        successors = self.listed("[", "]", self._successor) if self.peek() == "[" else []
        has_entries = self.peek() == "{"
        properties, attributes = self.split(cls, symbol, self.dictionary() if has_entries else EMPTY_DICT, at)
        return Header(start, name, results, operands, successors, properties, [], attributes, has_entries)

    def _unknown_op(self, name: str, match: re.Match[str]) -> NoReturn:
        dialect = name.partition(".")[0]
        known = dialect_ops(dialect) if dialect in dialect_names() else ()
        hint = did_you_mean(name, known) or (
            "--load-dialect FILE.py makes ops of your own known (in Python: load_dialect_module of"
            f' tyir.registry); an op that no dialect declares is written "{name}"(...) : (...) -> ...'
        )
        self.fail(f"no dialect declares '{name}'", match.start(), match.end(), help=hint)

    def split(
        self, cls: type[DeclaredOp], symbol: SymbolRefAttr | None, entries: DictAttr, at: int
    ) -> tuple[DictAttr, DictAttr]:
        """Properties and attributes of an op whose symbol stands at `at`."""
        try:
            return split_entries(cls, symbol, entries)
        except ValueError as error:
            self.fail(str(error), at, self.pos)

    def _finish_short(self, header: Header, attributes: DictAttr) -> None:
        """The type of the short form: a signature, one type for all operands and results, operand types
        alone, or nothing where there is neither.
        """
        types_at = self.skip_space()
        in_types: list[Type] = []
        out_types: tuple[Type, ...] = ()
        may_end = header.has_entries or header.regions or Terminator in op_class(header.name).traits
        if self.peek() == ":" or header.operands or header.results or not may_end:
            self.expect(":", "':' and the operation's type")
            types_at = self.skip_space()
            kind = self.type()
            if isinstance(kind, FunctionType):
                in_types, out_types = list(kind.inputs), kind.results
            elif not header.results and self.peek() == ",":
                in_types = [kind]
                while self.accept(","):
                    in_types.append(self.type())
            else:
                header.one_type = True
                in_types, out_types = (
                    [kind] * len(header.operands),
                    (kind,) * sum(n for _, n, _ in header.results),
                )
        types_end = self.pos
        loc = self.location() if starts_location(self.text, self.skip_space()) else UNKNOWN
        self._make(header, attributes, in_types, out_types, loc, types_at, types_end)

    # -- modules and functions
    # ----------------------------------------------------------------------------------------
    def _module_header(self, start: int, results: Results) -> Header:
        """`@name attributes {...}` of a module."""
        at = self.skip_space()
        symbol = SymbolRefAttr(self.symbol_name()) if self.peek() == "@" else None
        properties, attributes = self.split(Module, symbol, self._attributes_word(), at)
        return Header(start, Module.name, results, [], [], properties, attributes=attributes, bare=True)

    def _function_header(self, start: int, results: Results) -> Header:
        """`private @name(%x: type {attributes}, ...) -> (type {attributes}, ...) attributes {...}` of a
        function.
        """
        visibility = self.match(_VISIBILITY)
        at = self.skip_space()
        symbol = self.symbol_name()
        arguments = self.listed("(", ")", self._parameter)
        outputs: list[tuple[Type, DictAttr]] = []
        if self.accept("->"):
            outputs = (
                self.listed("(", ")", self._output) if self.peek() == "(" else [(self.type(), EMPTY_DICT)]
            )
        given = self._attributes_word()
        word = None if visibility is None else visibility[0]
        properties, attributes = self.function_entries(symbol, word, arguments, outputs, given, at)
        return Header(
            start,
            Func.name,
            results,
            [],
            [],
            properties,
            attributes=attributes,
            bare=True,
            arguments=arguments,
        )

    def function_entries(
        self,
        symbol: str,
        visibility: str | None,
        arguments: list[Argument],
        outputs: list[tuple[Type, DictAttr]],
        given: DictAttr,
        at: int,
    ) -> tuple[DictAttr, DictAttr]:
        """Properties and attributes of a function from its head."""
        entries: dict[str, Attribute] = {
            "function_type": FunctionType(
                tuple(x.type for x in arguments), tuple(kind for kind, _ in outputs)
            )
        }
        if visibility is not None:
            entries["sym_visibility"] = StringAttr(visibility)
        for key, dicts in (
            ("arg_attrs", [x.attributes for x in arguments]),
            ("res_attrs", [attributes for _, attributes in outputs]),
        ):
            if any(len(d) for d in dicts):
                entries[key] = ArrayAttr(dicts)
        for key in entries:
            if key in given:
                self.fail(
                    f"'{key}' of the function is given twice: in its head and in its attributes", at, self.pos
                )
        return self.split(Func, SymbolRefAttr(symbol), DictAttr({**dict(given.items()), **entries}), at)

    def _attributes_word(self) -> DictAttr:
        return self.dictionary() if self.match(_ATTRIBUTES) is not None else EMPTY_DICT

    def _parameter(self) -> Argument:
        name, at = "", self.skip_space()
        if self.peek() == "%":
            name, at = self._operand()
            self.expect(":", "':' and the type of the argument")
        kind = self.type()
        attributes = self.dictionary() if self.peek() == "{" else EMPTY_DICT
        loc = self.location() if starts_location(self.text, self.skip_space()) else UNKNOWN
        return Argument(name, at, kind, attributes, loc)

    def _output(self) -> tuple[Type, DictAttr]:
        kind = self.type()
        return kind, self.dictionary() if self.peek() == "{" else EMPTY_DICT

    def _bare_region(self, header: Header) -> None:
        """The body of a module or function; a function without one is only declared."""
        if self.peek() != "{" and header.name == Func.name:
            header.regions.append(Region())
            self._finish_bare(header)
            return
        self.expect("{", "'{' of the body")
        region = Region()
        header.regions.append(region)
        self._open_region(header, region, isolated=True)
        self.add_arguments(header)

    def add_arguments(self, header: Header) -> None:
        """Give the entry block, just opened, the arguments of the function's head."""
        if not header.bare or header.name != Func.name:
            return
        self._frame.entry_is_open = False
        for argument in header.arguments:
            if not argument.name:
                self.fail(
                    "an argument of a function with a body has a name",
                    argument.at,
                    argument.at + 1,
                    help="write %name: type",
                )
            self._add_argument(self._frame.block, argument.name, argument.type, argument.loc, argument.at)

    def _finish_bare(self, header: Header) -> None:
        loc = self.location() if starts_location(self.text, self.skip_space()) else UNKNOWN
        assert header.attributes is not None
        self._make(header, header.attributes, [], (), loc, header.start, header.start + 1)
