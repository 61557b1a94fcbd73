"""Parsing attributes, types and locations by recursive descent: the inverse of `tyir.text.attribute_printer`.

Nesting is limited (`tyir.text.lexer.MAX_DEPTH`), values are checked against their types where they stand,
unknown names get "did you mean".
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Final

from tyir import attributes as a
from tyir import types as t
from tyir.attributes import Attribute, DictAttr
from tyir.diagnostics import SourceText, TyirError, did_you_mean
from tyir.ir import EMPTY_DICT
from tyir.text.dense_literal import DenseLiteral, dense_from_literal, float_from_bits
from tyir.text.lexer import has_too_many_digits
from tyir.text.location_parser import LocationParser

__all__ = ["AttributeParser", "parse_attribute_text", "parse_type_text"]

_WORD: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_$.]*")
_FLOAT: Final = re.compile(r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+]?[0-9]+)?")
_INTEGER: Final = re.compile(r"-?(?:0x[0-9A-Fa-f]+|[0-9]+)")
_INTEGER_TYPE: Final = re.compile(r"([su]?)i([1-9][0-9]*)")
_DIMENSION: Final = re.compile(r"(\?|[0-9]+)x")
_FLAT: Final = r'[^<>"{}()\[\]#!\n]'
# key = value, the value without nesting: "text", 4 : i64, array<i64: 1, 2>, dense_resource<k> : tensor<2xf16>
_FLAT_ENTRY: Final = re.compile(
    r"\s*+([A-Za-z_][A-Za-z0-9_$.]*+)(?: ="
    rf' ("[^"\\\n]*+"|@[A-Za-z_][A-Za-z0-9_$.]*+|[^",{{}}\[\]()<>\n#@!/]++(?:<{_FLAT}*+>)?+(?: :'
    rf" [a-z]++<{_FLAT}*+>)?+))?(, |\}}>?)"
)
_NO_BRACKETS: Final = re.compile(r"[^<>=()\[\]{}\"-]++")
_CLOSERS: Final = {"<": ">", "(": ")", "[": "]", "{": "}"}
_FLOAT_TYPES: Final = {n: t.FloatType(n) for n in ("f16", "bf16", "f32", "f64", "tf32", "f8E4M3FN", "f8E5M2")}
_KNOWN_TYPES: Final = (
    "tensor",
    "vector",
    "memref",
    "tuple",
    "complex",
    "index",
    "none",
    "i1",
    "i8",
    "i32",
    "i64",
    "ui8",
    "si8",
    *_FLOAT_TYPES,
)
_KNOWN_WORDS: Final = (
    "true",
    "false",
    "unit",
    "array",
    "dense",
    "dense_resource",
    "affine_map",
    "affine_set",
    "strided",
    "loc",
)
_UNIT: Final = a.UnitAttr()
_ARRAY_TYPES: Final = {"i1", "i8", "i16", "i32", "i64", "f32", "f64"}


class AttributeParser(LocationParser):
    """Reads attributes, types and locations at the cursor; knows the file's aliases."""

    def __init__(self, source: SourceText) -> None:
        super().__init__(source)
        self._value_texts: dict[str, Attribute] = {}

    # -- attributes
    # -------------------------------------------------------------------------------------------------
    def attribute(self) -> Attribute:
        """Any attribute."""
        self.enter()
        value = self._attribute()
        self.depth -= 1
        return value

    def _attribute(self) -> Attribute:
        first = self.peek()
        if first == '"':
            return a.StringAttr(self.string())
        if first == "[":
            return a.ArrayAttr(self.listed("[", "]", self.attribute))
        if first == "{":
            return self.dictionary()
        if first == "@":
            return self.symbol_reference()
        if first == "#":
            return self._hash()
        if first in ("!", "("):
            return self.type()
        if first.isdigit() or first in ("-", "+"):
            return self._number()
        return self._worded()

    def _worded(self) -> Attribute:
        start = self.skip_space()
        match = _WORD.match(self.text, start)
        word = match[0] if match else ""
        reader = _WORDED.get(word)
        if match is None or (reader is None and not self._starts_type(word)):
            hint = did_you_mean(word, (*_KNOWN_WORDS, *_KNOWN_TYPES)) if word else ""
            self.expected("an attribute", help=hint)
        if reader is None:
            return self.type()
        self.pos = match.end()
        return reader(self)

    def dictionary(self) -> DictAttr:
        """`{key = value, unit_key}`."""
        self.expect("{")
        return self.entries("}")

    def entries(self, closing: str) -> DictAttr:
        """What follows the opening brace, up to and with `closing`."""
        found: dict[str, Attribute] = {}
        if self._flat_entries(found, closing):
            return DictAttr(found)
        if not found and self.accept(closing):
            return EMPTY_DICT
        while True:
            start = self.skip_space()
            match = self.match(_WORD)
            key = match[0] if match else self.string("a key")
            if key in found:
                self.fail(f"key '{key}' appears twice", start, self.pos)
            found[key] = self.attribute() if self.accept("=") else a.UnitAttr()
            if not self.accept(","):
                break
        self.expect(closing, f"',' or '{closing}'")
        return DictAttr(found)

    def _flat_entries(self, found: dict[str, Attribute], closing: str) -> bool:
        """The fast path of `entries`: values without nesting, by one expression each.

        Whether all were of that kind; else the cursor is at the next.
        """
        text, get, values, next_entry = self.text, self._value_texts.get, self._flat_value, _FLAT_ENTRY.match
        while (match := next_entry(text, self.pos)) is not None:
            key, value_text, end = match.groups()
            if key in found:
                return False
            if value_text is None:
                value: Attribute | None = _UNIT
            elif (value := get(value_text)) is not None:
                pass
            elif value_text[0] == '"':
                value = a.StringAttr(value_text[1:-1])
            elif value_text[0] == "@":
                value = a.SymbolRefAttr(value_text[1:])
            else:
                value = values(match)
            if value is None:
                return False
            found[key] = value
            self.pos = match.end()
            if end != ", ":
                if not end.startswith(closing):
                    self.pos = match.start()
                    del found[key]
                    return False
                self.pos += len(closing) - len(end)
                return True
        return False

    def _flat_value(self, match: re.Match[str]) -> Attribute | None:
        """A value met for the first time, by the full parser; None if that does not consume exactly what the
        expression did.
        """
        value_text, before = match[2], self.pos
        if (
            value_text.endswith(" : i64")
            and len(value_text) < 20
            and value_text[:-6].isdecimal()
            and value_text.isascii()
        ):
            return a.IntegerAttr(int(value_text[:-6]), t.i64)
        if value_text.startswith("dense_resource<"):
            key, _, type_text = value_text[15:].partition("> : ")
            kind = self._value_texts.get(type_text)
            if isinstance(kind, t.Type) and _WORD.fullmatch(key):
                return a.DenseResourceAttr(key, kind)
        self.pos = match.start(2)
        value = self.attribute()
        if self.pos != match.end(2):
            self.pos = before
            return None
        self._value_texts[value_text] = value
        if isinstance(value, a.DenseResourceAttr):
            self._value_texts[value_text.partition("> : ")[2]] = value.type
        return value

    def symbol_name(self) -> str:
        """`@name` or `@"quoted"`."""
        self.expect("@", "a symbol such as @main")
        if self.text[self.pos : self.pos + 1] == '"':
            return self.string()
        match = _WORD.match(self.text, self.pos)
        if match is None:
            self.expected("a symbol's name after '@'")
        self.pos = match.end()
        return match[0]

    def symbol_reference(self) -> a.SymbolRefAttr:
        path = [self.symbol_name()]
        while self.accept("::"):
            path.append(self.symbol_name())
        return a.SymbolRefAttr(*path)

    def _number(self) -> Attribute:
        start = self.skip_space()
        match = self.match(_FLOAT)
        if match is not None:
            float_type = self.type() if self.accept(":") else t.f64
            if not isinstance(float_type, t.FloatType):
                self.fail(
                    f"a float literal cannot have type {float_type}",
                    start,
                    self.pos,
                    help="write an integer, or a float type such as f32",
                )
            return a.FloatAttr(float(match[0]), float_type)
        match = self.match(_INTEGER)
        if match is None:
            self.expected("a number")
        kind = self.type() if self.accept(":") else t.i64
        return self._integer(match[0], kind, start)

    def _integer(self, literal: str, kind: Attribute, start: int) -> Attribute:
        if has_too_many_digits(literal):
            self.fail(f"an integer of {len(literal)} digits fits no type", start, start + len(literal))
        value = int(literal, 0) if "x" in literal else int(literal)
        if isinstance(kind, t.FloatType):
            if "x" not in literal or literal[0] == "-":
                self.fail(
                    f"an integer literal cannot have type {kind}",
                    start,
                    self.pos,
                    help=f"write {literal}.0 : {kind}",
                )
            if value >> kind.width:
                self.fail(f"{literal} has more bits than {kind}", start, self.pos)
            return a.FloatAttr(float_from_bits(value, kind.name), kind)
        try:
            if isinstance(kind, (t.IntegerType, t.IndexType)):
                return a.IntegerAttr(value, kind)
        except ValueError as error:
            self.fail(str(error), start, self.pos)
        self.fail(f"an integer literal cannot have type {kind}", start, self.pos)

    def _array(self) -> Attribute:
        self.expect("<")
        start = self.skip_space()
        element = self.array_element(self.type(), start, self.pos)
        values: list[int | float] = []
        if self.accept(":"):
            values.append(self._array_value(element))
            while self.accept(","):
                values.append(self._array_value(element))
        self.expect(">", "',' or '>'")
        return a.DenseArrayAttr(element, values)

    def array_element(self, kind: t.Type, start: int, end: int) -> t.IntegerType | t.FloatType:
        """The type of an `array<>`'s numbers; an error for what it cannot hold."""
        if str(kind) not in _ARRAY_TYPES or not isinstance(kind, (t.IntegerType, t.FloatType)):
            self.fail(
                f"array<> cannot hold {kind}", start, end, help=f"it holds {', '.join(sorted(_ARRAY_TYPES))}"
            )
        return kind

    def _array_value(self, element: t.IntegerType | t.FloatType) -> int | float:
        start = self.skip_space()
        if element is t.i1 and (match := self.match(_WORD)) is not None and match[0] in ("true", "false"):
            return int(match[0] == "true")
        if isinstance(element, t.FloatType) and (match := self.match(_FLOAT)) is not None:
            return float(match[0])
        match = self.match(_INTEGER)
        if match is None:
            self.expected("true or false" if element is t.i1 else f"a number of type {element}")
        value = self._integer(match[0], element, start)
        assert isinstance(value, (a.IntegerAttr, a.FloatAttr))
        return value.value

    def _dense(self) -> Attribute:
        start = self.pos
        self.expect("<")
        literal: DenseLiteral | None = None if self.peek() == ">" else self._dense_literal()
        self.expect(">", "'>'")
        self.expect(":", "':' and the type of the constant")
        shaped = self.type()
        try:
            return dense_from_literal(literal, shaped)
        except ValueError as error:
            self.fail(str(error), start, self.pos)

    def _dense_literal(self) -> DenseLiteral:
        first = self.peek()
        if first == '"':
            return DenseLiteral("hex", self.string())
        if first == "[":
            self.enter()
            items = self.listed("[", "]", self._dense_literal)
            self.leave()
            return DenseLiteral("list", items)
        if (match := self.match(_FLOAT)) is not None:
            return DenseLiteral("float", match[0])
        if (match := self.match(_INTEGER)) is not None:
            return DenseLiteral("integer", match[0])
        if (match := self.match(_WORD)) is not None and match[0] in ("true", "false"):
            return DenseLiteral("bool", match[0])
        self.expected("a number, true, false, a nested list or a hex string")

    def _dense_resource(self) -> Attribute:
        self.expect("<")
        match = self.match(_WORD)
        if match is None:
            self.expected("a resource key")
        self.expect(">")
        self.expect(":")
        return a.DenseResourceAttr(match[0], self.type())

    def _affine(self, kind: str) -> Attribute:
        body = self._balanced(operators=("->", ">=", "<="))
        return a.AffineAttr(kind, body[1:-1])

    # -- dialect attributes and types
    # ---------------------------------------------------------------------------------
    def _hash(self) -> Attribute:
        start = self.pos
        self.pos += 1
        match = _WORD.match(self.text, self.pos)
        if match is None:
            self.expected("an attribute's name after '#'")
        self.pos = match.end()
        name = match[0]
        has_body = self.text[self.pos : self.pos + 1] == "<"
        if "." in name or has_body:
            return a.OpaqueAttr(name, self._balanced() if has_body else "")
        return self._alias("#" + name, start)

    def _balanced(self, operators: tuple[str, ...] = ("->",)) -> str:
        """`<...>` with balanced brackets and strings, verbatim but for aliases, which are replaced by what
        they stand for.
        """
        start = self.skip_space()
        self.expect("<")
        open_brackets = [">"]
        text = self.text
        while open_brackets:
            if (plain := _NO_BRACKETS.match(text, self.pos)) is not None:
                self.pos = plain.end()
            char = text[self.pos : self.pos + 1]
            if char == "":
                self.fail("'<' is never closed", start, start + 1)
            if char == '"':
                self.string()
                continue
            if text.startswith(operators, self.pos):
                self.pos += 2
                continue
            if char in _CLOSERS:
                open_brackets.append(_CLOSERS[char])
            elif char in ">)]}":
                if char != open_brackets[-1]:
                    self.fail(f"expected '{open_brackets[-1]}' before '{char}'", self.pos, self.pos + 1)
                open_brackets.pop()
            self.pos += 1
        return self.expand_aliases(text[start : self.pos], start)

    # -- types
    # ------------------------------------------------------------------------------------------------------
    def _starts_type(self, word: str) -> bool:
        return word in _TYPE_READERS or word in _FLOAT_TYPES or _INTEGER_TYPE.fullmatch(word) is not None

    def type(self) -> t.Type:
        """Any type."""
        self.enter()
        value = self._type()
        self.depth -= 1
        return value

    def _type(self) -> t.Type:
        first = self.peek()
        if first == "(":
            inputs = self.types()
            self.expect("->", "'->'")
            return t.FunctionType(tuple(inputs), tuple(self.result_types()))
        if first == "!":
            return self._bang()
        start = self.pos
        match = _WORD.match(self.text, start)
        word = match[0] if match else ""
        if word in _FLOAT_TYPES:
            self.pos += len(word)
            return _FLOAT_TYPES[word]
        if (integer := _INTEGER_TYPE.fullmatch(word)) is not None:
            self.pos += len(word)
            return self._integer_type(integer, start)
        reader = _TYPE_READERS.get(word)
        if reader is None:
            self.expected("a type", help=did_you_mean(word, _KNOWN_TYPES) if word else "")
        self.pos += len(word)
        return reader(self)

    def _integer_type(self, match: re.Match[str], start: int) -> t.Type:
        if len(match[2]) > 8:
            self.fail(f"integer width {match[2][:20]} is not in 1..16777215", start, self.pos)
        try:
            return t.IntegerType(int(match[2]), match[1])  # type: ignore[arg-type]  # the pattern allows only "", "s" and "u"
        except ValueError as error:
            self.fail(str(error), start, self.pos)

    def types(self) -> list[t.Type]:
        """`(a, b)`."""
        return self.listed("(", ")", self.type)

    def result_types(self) -> list[t.Type]:
        """What follows `->`."""
        return self.types() if self.peek() == "(" else [self.type()]

    def _bang(self) -> t.Type:
        start = self.pos
        self.pos += 1
        match = _WORD.match(self.text, self.pos)
        if match is None:
            self.expected("a type's name after '!'")
        self.pos = match.end()
        name = match[0]
        has_body = self.text[self.pos : self.pos + 1] == "<"
        if "." in name or has_body:
            return t.OpaqueType(name, self._balanced() if has_body else "")
        value = self._alias("!" + name, start)
        assert isinstance(value, t.Type)
        return value

    def _tensor(self) -> t.Type:
        self.expect("<")
        start = self.skip_space()
        shape: list[int | None] | None = []
        if self.text.startswith("*x", self.pos):
            self.pos += 2
            shape = None
        else:
            assert shape is not None
            while (match := _DIMENSION.match(self.text, self.pos)) is not None:
                if len(match[1]) > 19 or (match[1] != "?" and int(match[1]) >= 1 << 63):
                    self.fail("dimension does not fit in 63 bits", self.pos, match.end())
                shape.append(None if match[1] == "?" else int(match[1]))
                self.pos = match.end()
            if math.prod(d for d in shape if d is not None) >= 1 << 63:
                self.fail(
                    "the tensor has more elements than 63 bits can count",
                    start,
                    self.pos,
                    help="make a dimension smaller, or write ? where it is not known",
                )
        element = self.type()
        encoding = self.attribute() if self.accept(",") else None
        self.expect(">", "',' or '>'")
        return t.TensorType(None if shape is None else tuple(shape), element, encoding)

    def _complex(self) -> t.Type:
        self.expect("<")
        element = self.type()
        self.expect(">")
        return t.ComplexType(element)

    def _tuple(self) -> t.Type:
        return t.TupleType(tuple(self.listed("<", ">", self.type)))


_WORDED: Final[dict[str, Callable[[AttributeParser], Attribute]]] = {
    "true": lambda p: a.BoolAttr(True),
    "false": lambda p: a.BoolAttr(False),
    "unit": lambda p: a.UnitAttr(),
    "array": AttributeParser._array,
    "dense": AttributeParser._dense,
    "dense_resource": AttributeParser._dense_resource,
    "affine_map": lambda p: p._affine("affine_map"),
    "affine_set": lambda p: p._affine("affine_set"),
    "strided": lambda p: p._affine("strided"),
    "loc": AttributeParser._location_in_parentheses,
}

_TYPE_READERS: Final[dict[str, Callable[[AttributeParser], t.Type]]] = {
    "index": lambda p: t.index,
    "none": lambda p: t.NoneType(),
    "tensor": AttributeParser._tensor,
    "vector": lambda p: t.VectorType(p._balanced()[1:-1]),
    "memref": lambda p: t.MemRefType(p._balanced()[1:-1]),
    "complex": AttributeParser._complex,
    "tuple": AttributeParser._tuple,
}


def _whole(parser: AttributeParser, value: Attribute) -> Attribute:
    if parser.skip_space() != len(parser.text):
        parser.expected("the end of the text")
    return value


def parse_attribute_text(text: str) -> Attribute:
    """One attribute; `TyirError` when `text` is none."""
    parser = AttributeParser(SourceText("<attribute>", text))
    return _whole(parser, parser.attribute())


def parse_type_text(text: str) -> t.Type:
    """One type; `TyirError` when `text` is none."""
    parser = AttributeParser(SourceText("<type>", text))
    value = _whole(parser, parser.type())
    if not isinstance(value, t.Type):
        raise TyirError(f"'{text}' is not a type")
    return value
