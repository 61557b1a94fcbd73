"""The reference parser: lark on the normative grammar `tyir/text/grammar.lark`, its tree turned into IR.

Slow and recursive; it exists so that the grammar is executable and the fast parser can be held against it.
Scopes, types and definitions are checked by the code the fast parser uses; everything the grammar describes
is read from lark's tree.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import resources
from typing import Any, Final

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput

from tyir import attributes as a
from tyir import location as l
from tyir import types as t
from tyir.attributes import Attribute, DictAttr
from tyir.diagnostics import SourceText
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.ir import EMPTY_DICT, Region
from tyir.parser import Parser
from tyir.process.collector import collector_paused
from tyir.registry import op_class, registered_class
from tyir.text.dense_literal import DenseLiteral, dense_from_literal
from tyir.text.lexer import unescape
from tyir.text.parser_state import Argument, Header
from tyir.text.pretty import FULL_NAMES
from tyir.text.resource_parser import check_dialect, check_new, read_blob
from tyir.traits import IsolatedFromAbove, Terminator

__all__ = ["parse_with_grammar"]

Node = Any  # lark's trees are untyped: Tree, Token or None


@cache
def _lark() -> Lark:
    grammar = resources.files("tyir.text").joinpath("grammar.lark").read_text(encoding="utf-8")
    return Lark(
        grammar,
        start="file",
        parser="lalr",
        lexer="contextual",
        propagate_positions=True,
        maybe_placeholders=True,
    )


def parse_with_grammar(text: str, name: str = "<string>") -> Module:
    """The module of an IR text, read by the normative grammar.

    Same result and same errors' kind as `tyir.parser.parse_module`.
    """
    source = SourceText(name, text)
    builder = _Builder(source)
    try:
        tree = _lark().parse(text)
    except UnexpectedInput as error:
        position = getattr(error, "pos_in_stream", None)
        builder.fail(
            "the text does not follow the grammar", position if isinstance(position, int) else len(text)
        )
    with collector_paused():
        return builder.file(tree)


def _items(node: Node) -> list[Node]:
    """Children that are present."""
    return [] if node is None else [c for c in node.children if c is not None]


class _Builder(Parser):
    """Turns lark's tree into IR."""

    def file(self, tree: Node) -> Module:
        outer = Region()
        self._open_region(None, outer, isolated=True)
        blobs: dict[str, tuple[int, bytes]] = {}
        for child in _items(tree):
            if child.data in ("attribute_alias", "type_alias"):
                self.define_alias(str(child.children[0]), self.value(child.children[1]), child.meta.start_pos)
            elif child.data == "metadata":
                blobs = self._metadata(child)
            else:
                self._read_op(child)
        self._close_region()
        module = self._as_module(outer)
        module.resources.update(blobs)
        return module

    def _metadata(self, tree: Node) -> dict[str, tuple[int, bytes]]:
        blobs: dict[str, tuple[int, bytes]] = {}
        for section in _items(tree):
            if section.data != "dialect_section":
                continue
            for dialect, *blobs_of_dialect in (d.children for d in _items(section)):
                check_dialect(self, str(dialect), dialect.start_pos)
                for key, value in (
                    resource.children for resource in blobs_of_dialect if resource is not None
                ):
                    check_new(self, str(key), blobs, key.start_pos)
                    blobs[str(key)] = read_blob(self, str(key), self._string(value), key.start_pos)
        return blobs

    # -- operations
    # -------------------------------------------------------------------------------------------------
    def _read_op(self, tree: Node) -> None:
        if tree.data in _SHORT_FORMS:
            self._frame.entry_is_open = False
            _SHORT_FORMS[tree.data](self, tree)
            return
        results, name, operands, successors, properties, regions, attributes, signature, location = (
            tree.children
        )
        self._frame.entry_is_open = False
        header = Header(
            start=tree.meta.start_pos,
            name=self._op_name(name),
            results=[
                (str(v), 1 if n is None else int(n), v.start_pos)
                for v, n in (r.children for r in _items(results))
            ],
            operands=[(str(v), v.start_pos) for v in _items(operands)],
            successors=[self._block_named(label) for label in _items(successors)],
            properties=EMPTY_DICT if properties is None else self._dictionary(properties.children[0]),
        )
        for region in _items(regions):
            self._read_region(header, region)
        function_type = self.value(signature)
        assert isinstance(function_type, t.FunctionType)
        loc = l.UNKNOWN if location is None else self._location(location)
        found = EMPTY_DICT if attributes is None else self._dictionary(attributes.children[0])
        self._make(
            header, found, list(function_type.inputs), function_type.results, loc, header.start, header.start
        )

    def _op_name(self, token: Token) -> str:
        name = self._string(token)
        self.check_name(name, token.start_pos or 0, token.end_pos or 0)
        return name

    def _read_short_op(self, tree: Node) -> None:
        symbol = tree.children.pop(2) if tree.data == "symbol_op" else None
        results, short_name, operands, successors, rest, location = tree.children
        name = short_name.children[0]
        full_name = FULL_NAMES.get(str(name), str(name))
        cls = registered_class(full_name)
        if cls is None:
            self.fail(f"no dialect declares '{full_name}'", name.start_pos, name.end_pos)
        places = {"short_dictionary": (0, 1, 2), "short_regions": (None, 0, 1), "short_type": (None, None, 0)}
        parts = (None, None, None) if rest is None else places[rest.data]
        entries, regions, kind = (None if i is None else rest.children[i] for i in parts)
        reference = None if symbol is None else self.value(symbol)
        assert reference is None or isinstance(reference, a.SymbolRefAttr)
        properties, attributes = self.split(
            cls, reference, EMPTY_DICT if entries is None else self._dictionary(entries), tree.meta.start_pos
        )
        header = Header(
            start=tree.meta.start_pos,
            name=full_name,
            results=[
                (str(v), 1 if n is None else int(n), v.start_pos)
                for v, n in (r.children for r in _items(results))
            ],
            operands=[(str(v), v.start_pos) for v in _items(operands)],
            successors=[self._block_named(label) for label in _items(successors)],
            properties=properties,
        )
        for region in _items(regions):
            self._read_region(header, region)
        count = sum(n for _, n, _ in header.results)
        if kind is None and (header.operands or count or (rest is None and Terminator not in cls.traits)):
            self.fail("expected ':' and the operation's type", tree.meta.end_pos)
        kinds = [] if kind is None else [self._kind(child) for child in kind.children]
        if len(kinds) > 1 and (count or isinstance(kinds[0], t.FunctionType)):
            self.fail("one type stands for all operands and results", tree.meta.end_pos)
        found = kinds[0] if kinds else None
        if found is None or isinstance(found, t.FunctionType):
            in_types, out_types = ([], ()) if found is None else (list(found.inputs), found.results)
        elif len(kinds) > 1:
            in_types, out_types = kinds, ()
        else:
            in_types, out_types = [found] * len(header.operands), (found,) * count
        loc = l.UNKNOWN if location is None else self._location(location)
        self._make(header, attributes, in_types, out_types, loc, header.start, header.start)

    def _read_module(self, tree: Node) -> None:
        symbol, entries, region, location = tree.children
        at = tree.meta.start_pos
        reference = None if symbol is None else a.SymbolRefAttr(self._symbol(symbol))
        properties, attributes = self.split(
            Module, reference, EMPTY_DICT if entries is None else self._dictionary(entries), at
        )
        self._read_bare(
            Header(at, Module.name, [], [], [], properties, attributes=attributes, bare=True),
            region,
            location,
        )

    def _read_function(self, tree: Node) -> None:
        visibility, symbol, parameters, outputs, entries, region, location = tree.children
        at = tree.meta.start_pos
        arguments = [self._parameter_of(p) for p in _items(parameters)]
        if outputs is not None and outputs.data == "one_output":
            results = [(self._kind(outputs.children[0]), EMPTY_DICT)]
        else:
            results = [
                (self._kind(kind), EMPTY_DICT if d is None else self._dictionary(d))
                for kind, d in (o.children for o in _items(outputs))
            ]
        given = EMPTY_DICT if entries is None else self._dictionary(entries)
        word = None if visibility is None else str(visibility)
        properties, attributes = self.function_entries(
            self._symbol(symbol), word, arguments, results, given, at
        )
        header = Header(
            at, Func.name, [], [], [], properties, attributes=attributes, bare=True, arguments=arguments
        )
        self._read_bare(header, region, location)

    def _parameter_of(self, tree: Node) -> Argument:
        name, kind, entries, location = tree.children
        return Argument(
            "" if name is None else str(name),
            tree.meta.start_pos,
            self._kind(kind),
            EMPTY_DICT if entries is None else self._dictionary(entries),
            l.UNKNOWN if location is None else self._location(location),
        )

    def _read_bare(self, header: Header, region: Node, location: Node) -> None:
        if region is None:
            header.regions.append(Region())
        else:
            self._read_region(header, region)
        loc = l.UNKNOWN if location is None else self._location(location)
        self._make(header, header.attributes or EMPTY_DICT, [], (), loc, header.start, header.start)

    def _symbol(self, token: Token) -> str:
        return self._string(token, 2) if token[1] == '"' else str(token[1:])

    def _read_region(self, header: Header, tree: Node) -> None:
        region = Region()
        header.regions.append(region)
        self._open_region(header, region, IsolatedFromAbove in op_class(header.name).traits)
        self.add_arguments(header)
        for child in tree.children:
            if child.data in ("op", *_SHORT_FORMS):
                self._read_op(child)
                continue
            label, arguments, *ops = child.children
            block = self._begin_block(str(label)[1:], label.start_pos)
            for argument in _items(arguments):
                value, kind, location = argument.children
                loc = l.UNKNOWN if location is None else self._location(location)
                self._add_argument(block, str(value), self._kind(kind), loc, value.start_pos)
            for op in ops:
                self._read_op(op)
        self._end_region(header)

    def _block_named(self, label: Token) -> Any:
        return self._forward_block(str(label)[1:], label.start_pos or 0)

    def _string(self, token: Token, quote: int = 1) -> str:
        """The value of a string token; `quote` characters stand before its text."""
        try:
            return unescape(token[quote:-1])
        except ValueError as error:
            self.fail(str(error), token.start_pos, token.end_pos)

    # -- attributes
    # -------------------------------------------------------------------------------------------------
    def value(self, node: Node) -> Attribute:
        """The attribute, type or location of a tree."""
        method = getattr(self, "_at_" + node.data)
        result: Attribute = method(node)
        return result

    def _kind(self, node: Node) -> t.Type:
        value = self.value(node)
        assert isinstance(value, t.Type)
        return value

    def _dictionary(self, node: Node) -> DictAttr:
        entries: dict[str, Attribute] = {}
        for key, value in (entry.children for entry in _items(node)):
            name = self._string(key) if key.type == "STRING" else str(key)
            if name in entries:
                self.fail(f"key '{name}' appears twice", key.start_pos, key.end_pos)
            entries[name] = a.UnitAttr() if value is None else self.value(value)
        return DictAttr(entries)

    def _text(self, node: Node) -> str:
        return self.text[node.meta.start_pos : node.meta.end_pos]

    def _at_true(self, node: Node) -> Attribute:
        return a.BoolAttr(True)

    def _at_false(self, node: Node) -> Attribute:
        return a.BoolAttr(False)

    def _at_unit(self, node: Node) -> Attribute:
        return a.UnitAttr()

    def _at_integer(self, node: Node) -> Attribute:
        literal, kind = node.children
        return self._integer(str(literal), t.i64 if kind is None else self._kind(kind), literal.start_pos)

    def _at_float(self, node: Node) -> Attribute:
        literal, kind = node.children
        float_type = t.f64 if kind is None else self._kind(kind)
        if not isinstance(float_type, t.FloatType):
            self.fail(f"a float literal cannot have type {float_type}", literal.start_pos, literal.end_pos)
        return a.FloatAttr(float(literal), float_type)

    def _at_string(self, node: Node) -> Attribute:
        return a.StringAttr(self._string(node.children[0]))

    def _at_array(self, node: Node) -> Attribute:
        return a.ArrayAttr(self.value(child) for child in _items(node))

    def _at_dictionary(self, node: Node) -> Attribute:
        return self._dictionary(node)

    def _at_symbol(self, node: Node) -> Attribute:
        return a.SymbolRefAttr(*[self._symbol(s) for s in node.children])

    def _at_dense_array(self, node: Node) -> Attribute:
        kind, items = node.children
        element = self.array_element(self._kind(kind), node.meta.start_pos, node.meta.end_pos)
        return a.DenseArrayAttr(
            element, [self._array_item(item.children[0], element) for item in _items(items)]
        )

    def _array_item(self, token: Token, element: t.IntegerType | t.FloatType) -> int | float:
        if token.type in ("TRUE", "FALSE"):
            return int(token.type == "TRUE")
        if token.type == "FLOAT":
            return float(token)
        value = self._integer(str(token), element, token.start_pos or 0)
        assert isinstance(value, (a.IntegerAttr, a.FloatAttr))
        return value.value

    def _at_dense_elements(self, node: Node) -> Attribute:
        literal, kind = node.children
        try:
            return dense_from_literal(None if literal is None else self._dense_of(literal), self._kind(kind))
        except ValueError as error:
            self.fail(str(error), node.meta.start_pos, node.meta.end_pos)

    def _dense_of(self, node: Tree[Token]) -> DenseLiteral:
        kind = str(node.data).removeprefix("dense_")
        if kind == "list":
            return DenseLiteral("list", [self._dense_of(c) for c in _items(node)])
        if kind in ("true", "false"):
            return DenseLiteral("bool", kind)
        token = node.children[0]
        assert isinstance(token, Token)
        if kind == "hex":
            return DenseLiteral("hex", self._string(token))
        return DenseLiteral("float" if kind == "float" else "integer", str(token))

    def _at_dense_resource(self, node: Node) -> Attribute:
        return a.DenseResourceAttr(str(node.children[0]), self._kind(node.children[1]))

    def _at_affine_map(self, node: Node) -> Attribute:
        return a.AffineAttr("affine_map", self._body(node.children[0])[1:-1])

    def _at_affine_set(self, node: Node) -> Attribute:
        return a.AffineAttr("affine_set", self._body(node.children[0])[1:-1])

    def _at_strided(self, node: Node) -> Attribute:
        return a.AffineAttr("strided", self._body(node.children[0])[1:-1])

    def _at_hash_attribute(self, node: Node) -> Attribute:
        name, body = node.children
        if body is None and "." not in name:
            return self._alias(str(name), name.start_pos)
        return a.OpaqueAttr(str(name)[1:], "" if body is None else self._body(body))

    def _body(self, node: Node) -> str:
        return self.expand_aliases(self._text(node), 0)

    # -- types
    # ------------------------------------------------------------------------------------------------------
    def _at_integer_type(self, node: Node) -> Attribute:
        word = str(node.children[0])
        signedness = word[0] if word[0] in "su" else ""
        return t.IntegerType(int(word.lstrip("sui")), signedness)  # type: ignore[arg-type]

    def _at_float_type(self, node: Node) -> Attribute:
        return t.FloatType(str(node.children[0]))

    def _at_index_type(self, node: Node) -> Attribute:
        return t.index

    def _at_none_type(self, node: Node) -> Attribute:
        return t.NoneType()

    def _at_tensor_type(self, node: Node) -> Attribute:
        *dims, element, encoding = node.children
        shape = tuple(None if d[0] == "?" else int(d[:-1]) for d in dims)
        return t.TensorType(shape, self._kind(element), None if encoding is None else self.value(encoding))

    def _at_unranked_tensor_type(self, node: Node) -> Attribute:
        element, encoding = node.children
        return t.TensorType(None, self._kind(element), None if encoding is None else self.value(encoding))

    def _at_complex_type(self, node: Node) -> Attribute:
        return t.ComplexType(self._kind(node.children[0]))

    def _at_tuple_type(self, node: Node) -> Attribute:
        return t.TupleType(tuple(self._kind(c) for c in _items(node)))

    def _at_vector_type(self, node: Node) -> Attribute:
        return t.VectorType(self._body(node.children[0])[1:-1])

    def _at_memref_type(self, node: Node) -> Attribute:
        return t.MemRefType(self._body(node.children[0])[1:-1])

    def _at_bang_type(self, node: Node) -> Attribute:
        name, body = node.children
        if body is None and "." not in name:
            return self._alias(str(name), name.start_pos)
        return t.OpaqueType(str(name)[1:], "" if body is None else self._body(body))

    def _at_function_type(self, node: Node) -> Attribute:
        inputs, results = node.children
        found = _items(results)
        kinds = _items(found[0]) if found and found[0].data == "types" else found
        return t.FunctionType(
            tuple(self._kind(c) for c in _items(inputs)), tuple(self._kind(c) for c in kinds)
        )

    # -- locations
    # --------------------------------------------------------------------------------------------------
    def _location(self, node: Node) -> l.Location:
        value = self.value(node)
        assert isinstance(value, l.Location)
        return value

    def _at_trailing_location(self, node: Node) -> Attribute:
        return self.value(node.children[0])

    def _at_unknown_location(self, node: Node) -> Attribute:
        return l.UNKNOWN

    def _at_file_location(self, node: Node) -> Attribute:
        file, line, col = node.children
        return l.FileLoc(self._string(file), int(line), int(col))

    def _at_name_location(self, node: Node) -> Attribute:
        name, child = node.children
        return l.NameLoc(self._string(name), None if child is None else self._location(child))

    def _at_fused_location(self, node: Node) -> Attribute:
        return l.FusedLoc(tuple(self._location(c) for c in _items(node)))

    def _at_callsite_location(self, node: Node) -> Attribute:
        return l.CallSiteLoc(self._location(node.children[0]), self._location(node.children[1]))

    def _at_alias_location(self, node: Node) -> Attribute:
        return self._alias(str(node.children[0]), node.meta.start_pos)


_SHORT_FORMS: Final[dict[str, Callable[[_Builder, Node], None]]] = {
    "short_op": _Builder._read_short_op,
    "symbol_op": _Builder._read_short_op,
    "module_op": _Builder._read_module,
    "function_op": _Builder._read_function,
}
