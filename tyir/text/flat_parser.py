"""The fast path of the parser: whole lines of flat ops, in the generic form and in the short one.

One regular expression splits a line into results, name, operands, dictionary and type; the texts of the last
two repeat from layer to layer and are parsed once, their values looked up by text afterwards.  The text of a
part is remembered only after the full parser has consumed exactly that text, so the fast path cannot accept
what the full one does not; whatever it does not understand it leaves at the cursor.
"""

from __future__ import annotations

import re
from typing import Final

from tyir.attributes import DictAttr, SymbolRefAttr
from tyir.diagnostics import SourceText
from tyir.ir import EMPTY_DICT, Op, Value
from tyir.location import UNKNOWN, Location, NameLoc
from tyir.opdef import DeclaredOp
from tyir.registry import op_class, registered_class
from tyir.text.parser_state import Header
from tyir.text.pretty import FULL_NAMES, SHORT_NAME, split_entries
from tyir.text.scope_parser import ScopeParser
from tyir.traits import Terminator
from tyir.types import FunctionType, Type

__all__ = ["FLAT_OP", "FlatParser"]

_BRACED: Final = r'((?:[^"{}\n]++|"[^"\\\n]*+"|\{(?:[^"{}\n]++|"[^"\\\n]*+")*+\})*+)'
FLAT_OP: Final = re.compile(
    r"\s*+(?:(%(?:[0-9]++|[A-Za-z$._-][A-Za-z0-9$._-]*+)) = )?"  # one result
    r'"([^"\\\n]++)"\(([^()"\n]*+)\)'  # name, operands
    rf"(?: <\{{{_BRACED}\}}>)?(?: \{{{_BRACED}\}})?"  # properties, attributes
    r' : ([^\n]*+)\n(?=\s*+["%}^])'  # signature and location; the next line begins an op or ends the block
)
_SYMBOL: Final = r"@[A-Za-z_][A-Za-z0-9_$.]*+"
_VALUES: Final = r"%[A-Za-z0-9$._#-]++(?:, %[A-Za-z0-9$._#-]++)*+"
_SHORT_OP: Final = re.compile(
    r"\s*+(?:(%(?:[0-9]++|[A-Za-z$._-][A-Za-z0-9$._-]*+)) = )?"  # one result
    # name, symbol with operands, operands without
    rf"({SHORT_NAME})(?: ({_SYMBOL}(?:::{_SYMBOL})*+)(?:\(({_VALUES})?\))?)?(?: ({_VALUES}))?"
    rf"(?: \{{{_BRACED}\}})?"  # dictionary
    # type and location; the next line begins an op or ends the block
    r'(| : [^\n]*+| loc\([^\n]*+)\n(?=\s*+["%}^A-Za-z])'
)
_NEXT_VALUE: Final = re.compile(r"\s*%")
_NAME_LOC: Final = re.compile(r'loc\("([^"\\\n]*+)"\)')

_ShortTail = tuple[
    list[Type], tuple[Type, ...], Type | None, Location
]  # types of operands and results, or the one of all; the location


class FlatParser(ScopeParser):
    """Scopes plus lines of flat ops."""

    def __init__(self, source: SourceText, positions: dict[Op, int] | None = None) -> None:
        super().__init__(source, positions)
        self._classes: dict[str, type[Op]] = {}
        self._property_texts: dict[str | None, DictAttr] = {None: EMPTY_DICT}
        self._attribute_texts: dict[str | None, DictAttr] = {None: EMPTY_DICT}
        self._tails: dict[str, tuple[list[Type], tuple[Type, ...], Location]] = {}
        self._signatures: dict[str, tuple[list[Type], tuple[Type, ...]]] = {}
        self._locations: dict[str, Location] = {}
        self._adopted: dict[tuple[type[Op], DictAttr, DictAttr], tuple[DictAttr, DictAttr]] = {}
        self._short_classes: dict[str, type[DeclaredOp] | None] = {}
        self._short_entries: dict[
            tuple[type[DeclaredOp], str | None, str | None], tuple[DictAttr, DictAttr]
        ] = {}
        self._short_tails: dict[str, _ShortTail] = {}

    def _flat_ops(self) -> None:
        """The fast path: as many flat op lines as match; stops at the first one that needs the full
        parser.
        """
        text, values, block = self.text, self._scope.values, self._frame.block
        pending, positions = self._scope.pending, self._positions
        classes, tails, props_memo, attrs_memo = (
            self._classes,
            self._tails,
            self._property_texts,
            self._attribute_texts,
        )
        adopted = self._adopted
        tails_get, props_get, attrs_get = tails.get, props_memo.get, attrs_memo.get
        match_op, new_op, new_value = FLAT_OP.match, object.__new__, object.__new__
        no_names: tuple[Value, ...] = ()
        last = block.last_op
        pos = started = self.pos
        while (m := match_op(text, pos)) is not None:
            result, name, operand_text, props_text, attrs_text, tail = m.groups()
            types = tails_get(tail) or self._tail(m)
            properties, attributes = props_get(props_text), attrs_get(attrs_text)
            if properties is None:  # not `or`: an empty dictionary is false
                properties = self._memo_dict(m, 4, props_memo, "}>")
            if attributes is None:
                attributes = self._memo_dict(m, 5, attrs_memo, "}")
            cls = classes.get(name) or self._flat_class(name)
            if types is None or properties is None or attributes is None or cls is None:
                break
            in_types, out_types, loc = types
            if operand_text:
                try:
                    operands = tuple([values[o] for o in operand_text.split(", ")])
                except KeyError:
                    break
                if [v.type for v in operands] != in_types:
                    break
            else:
                operands = no_names
                if in_types:
                    break
            if attributes is not EMPTY_DICT and cls.registered:
                key = (cls, properties, attributes)
                pair = adopted.get(key)
                if pair is None:
                    self.pos = m.start(2) - 1
                    pair = self._adopt(cls, properties, attributes, self.pos)
                properties, attributes = pair
            op = new_op(cls)
            if result is None:
                if out_types:
                    break
                op.results = no_names
            else:
                if len(out_types) != 1 or result in values or (pending and result in pending):
                    break
                char = result[1]
                value = new_value(Value)  # not through its constructor: this is the hot loop
                value.type, value.owner, value.index, value.uses = out_types[0], op, 0, []
                value.name = None if "0" <= char <= "9" else result[1:]
                op.results = (value,)
                values[result] = value
            for v in operands:
                v.uses.append(op)
            op._operands = operands
            op.properties = properties
            op.attributes = attributes
            op.regions = op.successors = ()
            op.loc = loc
            op.block = block
            op._prev = last
            op._next = None
            if last is None:
                block.first_op = op
            else:
                last._next = op
            last = op
            if positions is not None:
                positions[op] = m.start(2) - 1 if result is None else m.start(1)
            pos = m.end()
        block.last_op = last
        self.pos = pos
        if pos != started:
            self._frame.entry_is_open = False

    def _flat_class(self, name: str) -> type[Op] | None:
        """The class of ops that can be made without running a constructor; None for the others."""
        cls = op_class(name)
        if cls.__new__ not in (object.__new__, DeclaredOp.__new__):
            return None
        self._classes[name] = cls
        return cls

    def _memo_dict(
        self, m: re.Match[str], group: int, memo: dict[str | None, DictAttr], closing: str
    ) -> DictAttr | None:
        """Parse a dictionary the fast path has not met; None if it does not end where the expression
        thinks.
        """
        if m[group] is None or m[group].isspace() or not m[group]:
            return EMPTY_DICT
        self.pos = m.start(group)
        before = self._expansion.total
        entries = self.entries(closing)
        if self.pos != m.end(group) + len(closing):
            return None
        if self._expansion.is_small_since(before, len(m[group])):
            memo[m[group]] = entries
        return entries

    def _tail(self, m: re.Match[str]) -> tuple[list[Type], tuple[Type, ...], Location] | None:
        """Parse `(..) -> .. loc(..)`; None if it is not all of the line."""
        tail: str = m[6]
        split = tail.find(" loc(")
        signature_text = tail if split < 0 else tail[:split]
        loc_text = "" if split < 0 else tail[split + 1 :]
        signature = self._signatures.get(signature_text)
        before = self._expansion.total
        if signature is None:
            self.pos = m.start(6)
            signature = self._signature()
            if self.pos != m.start(6) + len(signature_text):
                return None
            if self._expansion.is_small_since(before, len(signature_text)):
                self._signatures[signature_text] = signature
        loc = self._locations.get(loc_text) if loc_text else UNKNOWN
        if loc is None:
            if (plain := _NAME_LOC.fullmatch(loc_text)) is not None:
                loc = NameLoc(plain[1])
            else:
                self.pos = m.start(6) + split + 1
                loc = self.location()
                if self.pos != m.end(6):
                    return None
            if self._expansion.is_small_since(before, len(tail)):
                self._locations[loc_text] = loc
        result = (*signature, loc)
        if not loc_text and self._expansion.is_small_since(before, len(tail)):
            self._tails[tail] = result
        return result

    def _signature(self) -> tuple[list[Type], tuple[Type, ...]]:
        start = self.skip_space()
        signature = (
            self.type() if self.peek() in ("(", "!") else self.expected("the operation's type '(...) -> ...'")
        )
        if not isinstance(signature, FunctionType):
            self.fail("an operation's type is written '(operand types) -> result types'", start, self.pos)
        return list(signature.inputs), signature.results

    def _adopt(
        self, cls: type[Op], properties: DictAttr, attributes: DictAttr, at: int
    ) -> tuple[DictAttr, DictAttr]:
        """Move discardable attributes that are declared properties of the op to the properties, as MLIR
        does.
        """
        if attributes is EMPTY_DICT or not issubclass(cls, DeclaredOp):
            return properties, attributes
        found = self._adopted.get((cls, properties, attributes))
        if found is None:
            moved = [f.key for f in cls.attr_fields if f.key in attributes]
            for key in moved:
                if key in properties:
                    self.fail(
                        f"'{key}' of '{cls.name}' is given twice: as a property and as an attribute",
                        at,
                        at + 1,
                    )
            found = properties, attributes
            if moved:
                found = (
                    DictAttr({**dict(properties.items()), **{k: attributes[k] for k in moved}}),
                    attributes.without(*moved),
                )
            self._adopted[cls, properties, attributes] = found
        return found

    # -- the short form
    # ---------------------------------------------------------------------------------------------
    def _flat_short_ops(self) -> None:
        """As `_flat_ops`, for lines of the short form."""
        text, values, pending = self.text, self._scope.values, self._scope.pending
        classes, entries, tails = self._short_classes, self._short_entries, self._short_tails
        while (m := _SHORT_OP.match(text, self.pos)) is not None:
            start = self.pos
            result, name, symbol, in_brackets, bare, entries_text, tail_text = m.groups()
            cls = classes[name] if name in classes else self._short_class(name)
            if cls is None:
                return
            found = entries.get((cls, symbol, entries_text)) or self._short_dictionary(
                m, cls, symbol, entries_text
            )
            tail = tails.get(tail_text) or self._short_tail(m, tail_text)
            self.pos = start
            operand_text = in_brackets or bare
            try:
                operands = [values[o] for o in operand_text.split(", ")] if operand_text else []
            except KeyError:
                return
            if (
                found is None
                or tail is None
                or (result is not None and (result in values or (pending and result in pending)))
            ):
                return
            in_types, out_types, common, loc = tail
            if common is not None:
                in_types, out_types = [common] * len(operands), (common,) * (result is not None)
            elif not tail_text.startswith(" : ") and (
                operands or result or not self._may_lack_type(cls, entries_text, tail_text, m.end())
            ):
                return
            if [v.type for v in operands] != in_types or len(out_types) != (result is not None):
                return
            op = cls.create(operands, out_types, found[0], found[1], (), (), loc)
            if result is not None:
                op.results[0].name = None if result[1].isdigit() else result[1:]
                values[result] = op.results[0]
            self._frame.block.append(op)
            if self._positions is not None:
                self._positions[op] = m.start(2) if result is None else m.start(1)
            self._frame.entry_is_open = False
            self.pos = m.end()

    def _may_lack_type(self, cls: type[Op], entries_text: str | None, tail_text: str, end: int) -> bool:
        """Whether an op without operands and results needs no type: it has a dictionary, or ends its block
        and no `%` follows, which would be an operand.
        """
        if entries_text is not None:
            return True
        return Terminator in cls.traits and (tail_text != "" or _NEXT_VALUE.match(self.text, end) is None)

    def _short_class(self, name: str) -> type[DeclaredOp] | None:
        """The class of a short line's op; None for those whose form is not that of a line."""
        cls = registered_class(FULL_NAMES.get(name, name))
        self._short_classes[name] = found = cls if cls is not None and not cls.region_fields else None
        return found

    def _short_dictionary(
        self, m: re.Match[str], cls: type[DeclaredOp], symbol: str | None, text: str | None
    ) -> tuple[DictAttr, DictAttr] | None:
        """Properties and attributes; None if the full parser does not read exactly what the expression did,
        or has a complaint.
        """
        given = EMPTY_DICT
        before = self._expansion.total
        if text:
            self.pos = m.start(6)
            given = self.entries("}")
            if self.pos != m.end(6) + 1:
                return None
        try:
            found = split_entries(
                cls, None if symbol is None else SymbolRefAttr(*symbol[1:].split("::@")), given
            )
        except ValueError:
            return None
        if text is None or self._expansion.is_small_since(before, len(text)):
            self._short_entries[cls, symbol, text] = found
        return found

    def _short_tail(self, m: re.Match[str], text: str) -> _ShortTail | None:
        """The type and the location at the end of a line; None when that is not all of it."""
        in_types: list[Type] = []
        out_types: tuple[Type, ...] = ()
        common: Type | None = None
        before = self._expansion.total
        self.pos = m.start(7)
        if text.startswith(" : "):
            self.pos += 3
            kind = self.type()
            if isinstance(kind, FunctionType):
                in_types, out_types = list(kind.inputs), kind.results
            elif self.text.startswith(", ", self.pos):
                return None  # a list of types: the full parser's
            else:
                common = kind
        loc = self.location() if self.text.startswith(" loc(", self.pos) else UNKNOWN
        if self.pos != m.end(7):
            return None
        tail = in_types, out_types, common, loc
        if loc is UNKNOWN and self._expansion.is_small_since(before, len(text)):
            self._short_tails[text] = tail
        return tail

    def check_name(self, name: str, start: int, end: int) -> None:
        """Refuse what cannot be the name of an op."""
        if not name or any(c.isspace() for c in name):
            self.fail(
                f"'{name}' is not an operation name",
                start,
                end,
                help="give a file of IR, as tyir-import writes it, or mend this line",
            )

    # -- one op
    # -----------------------------------------------------------------------------------------------------
    def _make(
        self,
        header: Header,
        attributes: DictAttr,
        in_types: list[Type],
        out_types: tuple[Type, ...],
        loc: Location,
        types_at: int,
        types_end: int,
    ) -> None:
        """The op of a header, put at the end of the current block; `types_at` and `types_end` are the place
        of its signature.
        """
        if len(in_types) != len(header.operands):
            self.fail(
                f"'{header.name}' has {len(header.operands)} operands but its type lists {len(in_types)}",
                types_at,
                types_end,
            )
        hint = self._signature_hint(header, out_types) if header.one_type else ""
        operands = [
            self._use(text, wanted, at, hint) for (text, at), wanted in zip(header.operands, in_types)
        ]
        count = sum(n for _, n, _ in header.results)
        if header.results and count != len(out_types):
            named = f"{count} {'is' if count == 1 else 'are'} named"
            self.fail(f"'{header.name}' has {len(out_types)} results but {named}", types_at, types_end)
        cls = op_class(header.name)
        properties, attributes = self._adopt(cls, header.properties, attributes, header.start)
        op = cls.create(operands, out_types, properties, attributes, header.regions, header.successors, loc)
        if self._positions is not None:
            self._positions[op] = header.start
        self._define_results(header, op)
        self._frame.block.append(op)

    def _signature_hint(self, header: Header, out_types: tuple[Type, ...]) -> str:
        """What to write in place of one type when the operands that are known have others."""
        known = [self._scope.values.get(text.removesuffix("#0")) for text, _ in header.operands]
        if all(value is None or value.type in out_types for value in known):
            return ""
        inputs = ", ".join(str(value.type) if value is not None else "..." for value in known)
        outputs = ", ".join(map(str, out_types))
        outputs = outputs if len(out_types) == 1 else f"({outputs})"
        return f"one type stands for all operands and results; where they differ: ({inputs}) -> {outputs}"

    def _define_results(self, header: Header, op: Op) -> None:
        values = iter(op.results)
        for text, count, at in header.results:
            name = None if text[1].isdigit() else text[1:]
            for index in range(count):
                value = next(values)
                if index == 0:
                    value.name = name
                self._define(f"{text}#{index}" if index else text, value, at)
            if count > 1:
                self._scope.values[f"{text}#0"] = op.results[value.index - count + 1]  # for the fast path
