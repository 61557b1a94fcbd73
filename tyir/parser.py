"""Parsing the generic MLIR text of `tyir/grammar.lark` into IR.

Two ways to read an op give the same IR (a test proves it on every file):

* the fast path: one regular expression splits a flat op line into results, name, operands, properties, attributes and type; the texts of the last
  three repeat from layer to layer and are parsed once, their values looked up by text afterwards;
* the full path: recursive descent for everything the expression does not match (regions, successors, several results, comments, errors).

The text of a part is remembered only after the full parser has consumed exactly that text, so the fast path cannot accept what the full one does
not.  Regions are parsed with a stack of our own: nesting is not bounded by Python's recursion limit.

Both read the short form of declared ops too (`tyir.pretty`), the full path op by op.

Values may be used before their definition within one isolated op; what stays undefined is reported at its end, and order is the verifier's business.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from tyir.attribute_parser import AttributeParser
from tyir.attributes import DictAttr
from tyir.collector import collector_paused
from tyir.diagnostics import Diagnostic, SourceText, TyirError, did_you_mean
from tyir.dialects.builtin import Module
from tyir.ir import EMPTY_DICT, Block, Op, Region, Value
from tyir.location import UNKNOWN, Location, NameLoc
from tyir.opdef import DeclaredOp
from tyir.parser_state import Frame, Header, Scope
from tyir.pretty import SHORT_NAME, split_entries
from tyir.registry import dialect_names, dialect_ops, op_class, registered_class
from tyir.resource_parser import parse_metadata
from tyir.source_file import read_source
from tyir.traits import IsolatedFromAbove
from tyir.types import FunctionType, NoneType, Type

__all__ = ["Parser", "parse_file", "parse_module"]

_BRACED: Final = r'((?:[^"{}\n]++|"[^"\\\n]*+"|\{(?:[^"{}\n]++|"[^"\\\n]*+")*+\})*+)'
_FLAT_OP: Final = re.compile(
    r"\s*+(?:(%(?:[0-9]++|[A-Za-z$._-][A-Za-z0-9$._-]*+)) = )?"  # one result
    r'"([^"\\\n]++)"\(([^()"\n]*+)\)'  # name, operands
    rf"(?: <\{{{_BRACED}\}}>)?(?: \{{{_BRACED}\}})?"  # properties, attributes
    r' : ([^\n]*+)\n(?=\s*+["%}^])'  # signature and location; the next line begins an op or ends the block
)
_VALUE: Final = re.compile(r"%(?:[0-9]+|[A-Za-z$._-][A-Za-z0-9$._-]*)(?:#[0-9]+)?")
_COUNT: Final = re.compile(r":\s*([0-9]+)")
_BLOCK: Final = re.compile(r"\^([A-Za-z0-9$._-]+)")
_NUMBERED_BLOCK: Final = re.compile(r"bb\d+")
_ALIAS: Final = re.compile(r"([#!][A-Za-z_][A-Za-z0-9_$]*)\s*=")
_NAME_LOC: Final = re.compile(r'loc\("([^"\\\n]*+)"\)')
_SHORT_NAME: Final = re.compile(SHORT_NAME)
_UNSET: Final = NoneType()  # type of a value used before its definition, until a signature tells
MAX_PROBLEMS: Final = 20


class Parser(AttributeParser):
    """Reads one file.  With `positions`, remembers where in the text each op begins."""

    def __init__(self, source: SourceText, positions: dict[Op, int] | None = None) -> None:
        super().__init__(source)
        self._positions = positions
        self._frames: list[Frame] = []
        self._frame: Frame
        self._scope = Scope()
        self._classes: dict[str, type[Op]] = {}
        self._property_texts: dict[str | None, DictAttr] = {None: EMPTY_DICT}
        self._attribute_texts: dict[str | None, DictAttr] = {None: EMPTY_DICT}
        self._tails: dict[str, tuple[list[Type], tuple[Type, ...], Location]] = {}
        self._signatures: dict[str, tuple[list[Type], tuple[Type, ...]]] = {}
        self._locations: dict[str, Location] = {}
        self._adopted: dict[tuple[type[Op], DictAttr, DictAttr], tuple[DictAttr, DictAttr]] = {}

    # -- the file ---------------------------------------------------------------------------------------------------
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
            self.expected("an operation or the end of the file")
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

    # -- regions ----------------------------------------------------------------------------------------------------
    def _open_region(self, header: Header | None, region: Region, isolated: bool) -> None:
        scope = Scope() if isolated else self._scope
        block = Block()
        region.append(block)
        frame = Frame(header, region, block, scope, len(scope.values))
        self._frames.append(frame)
        self._frame = frame
        self._scope = scope

    def _close_region(self) -> None:
        """Leave the innermost region: its names go out of scope, its labels and values must all be defined."""
        frame = self._frames.pop()
        missing = [self.diagnostic(f"block ^{label} is not defined", at, at + len(label) + 1) for label, at in frame.forward.values()]
        outer = self._frames[-1].scope if self._frames else None
        if outer is not frame.scope:
            missing += [self._undefined(name, at, frame.scope) for name, (_, at) in frame.scope.pending.items()]
        else:
            values = frame.scope.values
            for name in list(values)[frame.visible :]:
                del values[name]
        if missing:
            raise TyirError(missing[:MAX_PROBLEMS])
        if outer is not None:
            self._frame = self._frames[-1]
            self._scope = outer

    def _undefined(self, name: str, at: int, scope: Scope) -> Diagnostic:
        return self.diagnostic(f"use of undefined value {name}", at, at + len(name), help=did_you_mean(name, scope.values))

    def _ops(self) -> None:
        """Everything up to the end of the file (or its metadata), with all nested regions."""
        while True:
            self._flat_ops()
            char = self.peek()
            if char in ('"', "%"):
                if _FLAT_OP.match(self.text, self.pos) is not None and self._flat_op_here():
                    continue
                self._op()
            elif char == "^":
                self._block_label()
            elif _SHORT_NAME.match(self.text, self.pos) is not None:
                self._op()
            elif char == "}" and len(self._frames) > 1:
                self.pos += 1
                self._region_end()
            elif len(self._frames) == 1 and (char in ("", "#", "!") or self.text.startswith("{-#", self.pos)):
                return
            elif char == "":
                start = self._frame.header.start if self._frame.header is not None else 0
                self.fail("region is not closed before the end of the file", start, start + 1, help="a '}' is missing")
            else:
                self.expected(
                    "an operation" if len(self._frames) == 1 else "an operation, a block label or '}'", help=_op_hint(self.text, self.pos)
                )

    def _flat_op_here(self) -> bool:
        before = self.pos
        self._flat_ops()
        return self.pos != before

    def _flat_ops(self) -> None:
        """The fast path: as many flat op lines as match; stops at the first one that needs the full parser."""
        text, values, block = self.text, self._scope.values, self._frame.block
        pending, positions = self._scope.pending, self._positions
        classes, tails, props_memo, attrs_memo = self._classes, self._tails, self._property_texts, self._attribute_texts
        adopted = self._adopted
        tails_get, props_get, attrs_get = tails.get, props_memo.get, attrs_memo.get
        match_op, new_op, new_value = _FLAT_OP.match, object.__new__, object.__new__
        no_names: tuple[Value, ...] = ()
        last = block.last_op
        pos = started = self.pos
        while (m := match_op(text, pos)) is not None:
            result, name, operand_text, props_text, attrs_text, tail = m.groups()
            types = tails_get(tail) or self._tail(m)
            properties = props_get(props_text) or self._memo_dict(m, 4, props_memo, "}>")
            attributes = attrs_get(attrs_text) or self._memo_dict(m, 5, attrs_memo, "}")
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

    def _memo_dict(self, m: re.Match[str], group: int, memo: dict[str | None, DictAttr], closing: str) -> DictAttr | None:
        """Parse a dictionary the fast path has not met; None if it does not end where the expression thinks."""
        if m[group] is None or m[group].isspace() or not m[group]:
            return EMPTY_DICT
        self.pos = m.start(group)
        entries = self.entries(closing)
        if self.pos != m.end(group) + len(closing):
            return None
        memo[m[group]] = entries
        return entries

    def _tail(self, m: re.Match[str]) -> tuple[list[Type], tuple[Type, ...], Location] | None:
        """Parse `(..) -> .. loc(..)`; None if it is not all of the line."""
        tail: str = m[6]
        split = tail.find(" loc(")
        signature_text = tail if split < 0 else tail[:split]
        loc_text = "" if split < 0 else tail[split + 1 :]
        signature = self._signatures.get(signature_text)
        if signature is None:
            self.pos = m.start(6)
            signature = self._signature()
            if self.pos != m.start(6) + len(signature_text):
                return None
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
            self._locations[loc_text] = loc
        result = (*signature, loc)
        if not loc_text:
            self._tails[tail] = result
        return result

    # -- the full path ----------------------------------------------------------------------------------------------
    def _op(self) -> None:
        """One op up to its end, or up to the opening of its first region."""
        self._frame.entry_is_open = False
        header = self._header()
        if self.peek() == "(":
            self.pos += 1
            self._next_region(header)
        else:
            self._finish(header)

    def _header(self) -> Header:
        start = self.skip_space()
        results = self._result_names() if self.text[start] == "%" else []
        if (short := self.match(_SHORT_NAME)) is not None:
            return self._short_header(start, results, short)
        name_at = self.skip_space()
        name = self.string('an operation name such as "func.func"')
        if not name or any(c.isspace() for c in name):
            self.fail(f"'{name}' is not an operation name", name_at, self.pos)
        operands = self.listed("(", ")", self._operand)
        successors = self.listed("[", "]", self._successor) if self.peek() == "[" else []
        properties = EMPTY_DICT
        if self.accept("<"):
            self.expect("{", "'{'")
            properties = self.entries("}")
            self.expect(">", "'>' after the properties")
        return Header(start, name, results, operands, successors, properties)

    def _short_header(self, start: int, results: list[tuple[str, int, int]], name: re.Match[str]) -> Header:
        """The rest of a header in the short form: `@symbol %operands [^successors] {entries}`."""
        cls = registered_class(name[0])
        if cls is None:
            dialect = name[0].partition(".")[0]
            known = dialect_ops(dialect) if dialect in dialect_names() else ()
            hint = (
                did_you_mean(name[0], known)
                or f'ops that no dialect declares are written in the generic form: "{name[0]}"(...) : (...) -> ...'
            )
            self.fail(f"no dialect declares '{name[0]}'", name.start(), name.end(), help=hint)
        symbol = self.symbol_name() if self.peek() == "@" else None
        operands = [self._operand()] if self.peek() == "%" else []
        while operands and self.accept(","):
            operands.append(self._operand())
        successors = self.listed("[", "]", self._successor) if self.peek() == "[" else []
        has_entries = self.peek() == "{"
        properties, attributes = split_entries(cls, symbol, self.dictionary() if has_entries else EMPTY_DICT)
        return Header(start, name[0], results, operands, successors, properties, [], attributes, has_entries)

    def _result_names(self) -> list[tuple[str, int, int]]:
        names = [self._result_name()]
        while self.accept(","):
            names.append(self._result_name())
        self.expect("=", "'=' after the results")
        return names

    def _result_name(self) -> tuple[str, int, int]:
        text, at = self._operand()
        if "#" in text:
            self.fail("a result is defined without '#'", at, self.pos, help=f"{text.partition('#')[0]}:2 defines two results")
        match = self.match(_COUNT)
        count = 1
        if match is not None:
            count = int(match[1]) if len(match[1]) < 7 else 0
            if count < 1:
                self.fail("the number of results must be at least 1 (and less than a million)", match.start(1), match.end(1))
        return text, count, at

    def _operand(self) -> tuple[str, int]:
        match = self.match(_VALUE)
        if match is None:
            self.expected("a value such as %0")
        return match[0], match.start()

    def _successor(self) -> Block:
        match = self.match(_BLOCK)
        if match is None:
            self.expected("a block such as ^bb1")
        return self._forward_block(match[1], match.start())

    def _forward_block(self, label: str, at: int) -> Block:
        """The block of a label in the current region, which may come later."""
        frame = self._frame
        block = frame.labels.get(label)
        if block is None:
            block = frame.labels[label] = Block()
            frame.forward[block] = (label, at)
        return block

    def _next_region(self, header: Header) -> None:
        if not self.accept("{"):
            is_short = header.attributes is not None and not header.regions
            self.expected(
                "'{' of a region",
                help="dialects' own syntax is not read; mlir-opt --mlir-print-op-generic prints what is" if is_short else "",
            )
        region = Region()
        header.regions.append(region)
        self._open_region(header, region, IsolatedFromAbove in op_class(header.name).traits)

    def _region_end(self) -> None:
        """Behind the `}` of a region: another region, or the rest of its op."""
        header = self._frame.header
        assert header is not None
        self._end_region(header)
        if self.accept(","):
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
        match = self.match(_BLOCK)
        frame = self._frame
        if match is None or frame.header is None:
            self.expected("an operation" if frame.header is None else "a block label such as ^bb0")
        block = self._begin_block(match[1], match.start())
        if self.peek() == "(":
            self.listed("(", ")", lambda: self._block_argument(block))
        self.expect(":", "':' after a block label")

    def _begin_block(self, label: str, at: int) -> Block:
        """Make the block of a label the current one."""
        frame = self._frame
        block = frame.labels.get(label)
        if block is not None and block not in frame.forward:
            self.fail(f"block ^{label} is defined twice", at, at + len(label) + 1)
        if block is not None:
            del frame.forward[block]
        if frame.entry_is_open:
            block = frame.block
        else:
            block = frame.region.append(block or Block())
        frame.entry_is_open = False
        frame.labels[label] = frame.block = block
        block.label = None if _NUMBERED_BLOCK.fullmatch(label) else label
        return block

    def _block_argument(self, block: Block) -> None:
        text, at = self._operand()
        self.expect(":", "':' and the type of the block argument")
        kind = self.type()
        loc = self.location() if self.peek() == "l" else UNKNOWN
        self._add_argument(block, text, kind, loc, at)

    def _add_argument(self, block: Block, text: str, kind: Type, loc: Location, at: int) -> None:
        value = block.add_arg(kind, None if text[1].isdigit() else text[1:])
        if loc is not UNKNOWN or block.arg_locs:
            known = len(block.arg_locs)
            block.arg_locs = (*block.arg_locs, *[UNKNOWN] * (value.index - known), loc)
        self._define(text, value, at)

    def _signature(self) -> tuple[list[Type], tuple[Type, ...]]:
        start = self.skip_space()
        signature = self.type() if self.peek() in ("(", "!") else self.expected("the operation's type '(...) -> ...'")
        if not isinstance(signature, FunctionType):
            self.fail("an operation's type is written '(operand types) -> result types'", start, self.pos)
        return list(signature.inputs), signature.results

    def _finish(self, header: Header) -> None:
        """Attributes, type and location; then the op is made and put at the end of the current block."""
        if header.attributes is not None:
            self._finish_short(header, header.attributes)
            return
        attributes = self.dictionary() if self.peek() == "{" and not self.text.startswith("{-#", self.pos) else EMPTY_DICT
        self.expect(":", "':' and the operation's type")
        types_at = self.skip_space()
        in_types, out_types = self._signature()
        types_end = self.pos
        loc = self.location() if _starts_location(self.text, self.skip_space()) else UNKNOWN
        self._make(header, attributes, in_types, out_types, loc, types_at, types_end)

    def _finish_short(self, header: Header, attributes: DictAttr) -> None:
        """The type of the short form: a signature, or one type for all operands and results, or nothing where there is neither."""
        types_at = self.skip_space()
        in_types: list[Type] = []
        out_types: tuple[Type, ...] = ()
        if self.peek() == ":" or header.operands or header.results or not (header.has_entries or header.regions):
            self.expect(":", "':' and the operation's type")
            types_at = self.skip_space()
            kind = self.type()
            if isinstance(kind, FunctionType):
                in_types, out_types = list(kind.inputs), kind.results
            else:
                in_types, out_types = [kind] * len(header.operands), (kind,) * sum(n for _, n, _ in header.results)
        types_end = self.pos
        loc = self.location() if _starts_location(self.text, self.skip_space()) else UNKNOWN
        self._make(header, attributes, in_types, out_types, loc, types_at, types_end)

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
        """The op of a header, put at the end of the current block; `types_at` and `types_end` are the place of its signature."""
        if len(in_types) != len(header.operands):
            self.fail(f"'{header.name}' has {len(header.operands)} operands but its type lists {len(in_types)}", types_at, types_end)
        operands = [self._use(text, wanted, at) for (text, at), wanted in zip(header.operands, in_types)]
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

    def _define_results(self, header: Header, op: Op) -> None:
        values = iter(op.results)
        for text, count, at in header.results:
            name = None if text[1].isdigit() else text[1:]
            for index in range(count):
                value = next(values)
                if count == 1 or index == 0:
                    value.name = name
                    self._define(text, value, at)
                if count > 1:
                    self._define(f"{text}#{index}", value, at)

    def _adopt(self, cls: type[Op], properties: DictAttr, attributes: DictAttr, at: int) -> tuple[DictAttr, DictAttr]:
        """Move discardable attributes that are declared properties of the op to the properties, as MLIR does."""
        if attributes is EMPTY_DICT or not issubclass(cls, DeclaredOp):
            return properties, attributes
        found = self._adopted.get((cls, properties, attributes))
        if found is None:
            moved = [f.key for f in cls.attr_fields if f.key in attributes]
            for key in moved:
                if key in properties:
                    self.fail(f"'{key}' of '{cls.name}' is given twice: as a property and as an attribute", at, at + 1)
            found = properties, attributes
            if moved:
                found = DictAttr({**dict(properties.items()), **{k: attributes[k] for k in moved}}), attributes.without(*moved)
            self._adopted[cls, properties, attributes] = found
        return found

    # -- values -----------------------------------------------------------------------------------------------------
    def _use(self, text: str, wanted: Type, at: int) -> Value:
        scope = self._scope
        value = scope.values.get(text)
        if value is None and text.endswith("#0"):  # %a#0 is %a
            value = scope.values.get(text[:-2])
        if value is None:
            pending = scope.pending.get(text)
            if pending is None:
                value = Value(_UNSET, Block(), 0)
                scope.pending[text] = value, at
            else:
                value = pending[0]
            if value.type is _UNSET:
                value.type = wanted
        if value.type is not wanted:
            self.fail(f"{text} has type {value.type} but is used as {wanted}", at, at + len(text))
        return value

    def _define(self, text: str, value: Value, at: int) -> None:
        scope = self._scope
        if text in scope.values:
            self.fail(f"{text} is defined twice", at, at + len(text))
        scope.values[text] = value
        if scope.pending:
            self._resolve(text, value, scope)
            if "#" not in text:
                self._resolve(f"{text}#0", value, scope)

    def _resolve(self, text: str, value: Value, scope: Scope) -> None:
        pending = scope.pending.pop(text, None)
        if pending is None:
            return
        placeholder, at = pending
        if placeholder.type is not value.type:
            self.fail(f"{text} has type {value.type} but is used as {placeholder.type}", at, at + len(text))
        placeholder.replace_all_uses_with(value)


def _starts_location(text: str, pos: int) -> bool:
    return text.startswith("loc", pos) and text[pos + 3 : pos + 23].lstrip()[:1] == "("


def _op_hint(text: str, pos: int) -> str:
    word = re.compile(r"[A-Za-z_][\w.]*").match(text, pos)
    return f'an op is written "{word[0]}"(...) : (...) -> ..., a declared one also as dialect.name' if word else ""


def parse_module(text: str, name: str = "<string>", positions: dict[Op, int] | None = None) -> Module:
    """The module of an IR text.  `positions` is filled with the offset of each op.  `TyirError` points at what is wrong."""
    with collector_paused():
        return Parser(SourceText(name, text), positions).parse()


def parse_file(path: str | Path) -> Module:
    """The module of an IR file."""
    return parse_module(read_source(path), str(path))
