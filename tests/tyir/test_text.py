"""Round trips of random IR, and limits of the text form."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.grammar_parser import parse_with_grammar
from tyir import attributes as a
from tyir import location as l
from tyir import types as t
from tyir.attributes import Attribute, DictAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.ir import Block, Op, Region, Value, unregistered_op
from tyir.parser import parse_file, parse_module
from tyir.printer import attribute_text, print_op
from tyir.text.attribute_parser import parse_attribute_text, parse_type_text
from tyir.text.attribute_printer import AttributeText
from tyir.verifier import verify

GENERIC = (Path(__file__).parent / "generic.ir").read_text(encoding="utf-8")
SMALL = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# ------------------------------------------------------------------------------------------------ strategies

names = st.from_regex(r"[A-Za-z_][A-Za-z0-9_$.]{0,6}", fullmatch=True)
texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
float_types = st.sampled_from(
    [t.FloatType(n) for n in ("f16", "bf16", "f32", "f64", "tf32", "f8E4M3FN", "f8E5M2")]
)
integer_types = st.builds(t.IntegerType, st.integers(1, 64), st.sampled_from(["", "s", "u"]))
scalar_types = st.one_of(float_types, integer_types, st.just(t.index))


def _types(inner: st.SearchStrategy[t.Type]) -> st.SearchStrategy[t.Type]:
    dims = st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=3).map(tuple))
    lists = st.lists(inner, max_size=2).map(tuple)
    return st.one_of(
        st.builds(t.TensorType, dims, scalar_types),
        st.builds(t.FunctionType, lists, lists),
        st.builds(t.TupleType, lists),
        st.builds(t.ComplexType, float_types),
        names.map(lambda n: t.OpaqueType("x." + n, '<a -> [1, "b>"]>')),
    )


types = st.recursive(scalar_types, _types, max_leaves=4)


@st.composite
def integers(draw: st.DrawFn) -> Attribute:
    kind = draw(integer_types)
    low = 0 if kind.signedness == "u" else -(1 << (kind.width - 1))
    high = (1 << kind.width) - 1 if kind.signedness != "s" else (1 << (kind.width - 1)) - 1
    return a.IntegerAttr(draw(st.integers(low, high)), kind)


@st.composite
def floats(draw: st.DrawFn) -> Attribute:
    kind = draw(float_types.filter(lambda k: not k.name.startswith("f8")))
    return a.FloatAttr(draw(st.floats(allow_nan=False)), kind)


@st.composite
def dense(draw: st.DrawFn) -> Attribute:
    element = draw(st.one_of(scalar_types, st.just(t.i1)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    dtype = t.storage_dtype(element)
    count = 1
    for d in shape:
        count *= d
    rng = random.Random(draw(st.integers(0, 1000)))
    if isinstance(element, t.FloatType):
        data = b"".join(rng.choice([b"\x00" * dtype.itemsize, _one(element)]) for _ in range(count))
    else:
        data = b"".join(rng.choice([0, 1]).to_bytes(dtype.itemsize, "little") for _ in range(count))
    return a.DenseElementsAttr(data, t.TensorType(shape, element))


def _one(element: t.FloatType) -> bytes:
    value = parse_attribute_text(f"dense<1.0> : tensor<1x{element}>")
    assert isinstance(value, a.DenseElementsAttr)
    return value.data


locations = st.recursive(
    st.one_of(
        st.just(l.UNKNOWN),
        st.builds(l.FileLoc, texts, st.integers(0, 999), st.integers(0, 99)),
        st.builds(l.NameLoc, texts),
    ),
    lambda inner: st.one_of(
        st.builds(l.NameLoc, texts, inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda p: l.FusedLoc(tuple(p))),
        st.builds(l.CallSiteLoc, inner, inner),
    ),
    max_leaves=4,
)
leaves = st.one_of(
    st.booleans().map(a.BoolAttr),
    st.just(a.UnitAttr()),
    integers(),
    floats(),
    texts.map(a.StringAttr),
    types,
    dense(),
    locations,
    st.lists(st.one_of(names, texts), min_size=1, max_size=3).map(lambda p: a.SymbolRefAttr(*p)),
    st.lists(st.integers(-5, 5), max_size=3).map(a.DenseArrayAttr.i64),
    st.lists(st.floats(width=32, allow_nan=False), max_size=3).map(
        lambda v: a.DenseArrayAttr(t.FloatType("f32"), v)
    ),
    names.map(lambda n: a.OpaqueAttr("x." + n, "<{a} : [b]>")),
    st.builds(a.DenseResourceAttr, names, types),
)
keys = st.one_of(names, texts).filter(lambda key: not key.startswith("tyir."))  # those have meanings
attributes = st.recursive(
    leaves,
    lambda i: st.one_of(
        st.lists(i, max_size=3).map(a.ArrayAttr), st.dictionaries(keys, i, max_size=3).map(DictAttr)
    ),
    max_leaves=6,
)
dictionaries = st.dictionaries(keys, attributes, max_size=3).map(DictAttr)


@st.composite
def modules(draw: st.DrawFn) -> Module:
    """A function of unregistered ops, some with regions, over values in scope."""
    entry = Block(draw(st.lists(types, max_size=2)), draw(st.lists(st.one_of(st.none(), names), max_size=2)))
    _fill(draw, entry, list(entry.args), 2)
    entry.append(Return.create())
    function = Func.create(
        properties=DictAttr(
            {
                "sym_name": a.StringAttr("f"),
                "function_type": t.FunctionType(tuple(v.type for v in entry.args), ()),
            }
        ),
        regions=[Region([entry])],
    )
    module = Module.empty()
    module.body.append(function)
    return module


def _fill(draw: st.DrawFn, block: Block, visible: list[Value], depth: int) -> None:
    for _ in range(draw(st.integers(0, 4))):
        regions = []
        for _ in range(draw(st.integers(0, 2)) if depth else 0):
            inner = Block(draw(st.lists(types, max_size=2)))
            _fill(draw, inner, [*visible, *inner.args], depth - 1)
            regions.append(Region([inner]))
        op = unregistered_op("x." + draw(names)).create(
            draw(st.lists(st.sampled_from(visible), max_size=2)) if visible else (),
            draw(st.lists(types, max_size=2)),
            draw(dictionaries),
            draw(dictionaries),
            regions,
            (),
            draw(locations),
            draw(st.lists(st.one_of(st.none(), st.sampled_from(["a", "b", "arg0", "a_0"])), max_size=2)),
        )
        block.append(op)
        visible = [*visible, *op.results]


# ------------------------------------------------------------------------------------------------ round trips


@SMALL
@given(attributes)
def test_attribute_round_trip(attribute: Attribute) -> None:
    assert parse_attribute_text(attribute_text(attribute)) is attribute


@SMALL
@given(types)
def test_type_round_trip(type: t.Type) -> None:
    assert parse_type_text(str(type)) is type


def _facts(op: Op) -> list[tuple[object, ...]]:
    """Structure: classes, properties, attributes, locations, types and region counts, op by op."""
    return [
        (
            o.name,
            o.properties,
            o.attributes,
            o.loc,
            [v.type for v in o.operands],
            [v.type for v in o.results],
            len(o.regions),
        )
        for o in op.walk()
    ]


@settings(SMALL, max_examples=25)
@given(modules())
def test_module_round_trip(module: Module) -> None:
    verify(module)
    text = print_op(module)
    again = parse_module(text)
    assert _facts(module) == _facts(again)
    assert print_op(again) == text
    assert print_op(module.clone()) == text
    _both_parsers_read(module, text)


def _both_parsers_read(module: Module, generic: str) -> None:
    for text in (generic, print_op(module, pretty=True)):
        assert print_op(parse_module(text)) == generic
        assert print_op(parse_with_grammar(text)) == generic


@pytest.mark.parametrize("name", ["f16", "bf16", "f32", "f8E4M3FN", "f8E5M2", "tf32"])
def test_floats_of_every_width(name: str) -> None:
    kind = t.FloatType(name)
    rng = random.Random(0)
    for bits in [rng.getrandbits(kind.width) for _ in range(500)] + list(
        range(256 if kind.width == 8 else 0)
    ):
        attribute = parse_attribute_text(f"0x{bits:X} : {name}")
        assert parse_attribute_text(str(attribute)) is attribute, hex(bits)


def test_overflow_is_infinity() -> None:
    assert str(parse_attribute_text("65520.0 : f16")) == "0x7C00 : f16"


# ------------------------------------------------------------------------------------------------ limits


def test_empty_input_is_an_empty_module() -> None:
    module = parse_module("")
    verify(module)
    assert print_op(module) == '"builtin.module"() ({\n^bb0:\n}) : () -> ()\n'


@pytest.mark.parametrize("isolated", [False, True])
def test_thousand_nested_regions(isolated: bool) -> None:
    name = "builtin.module" if isolated else "x.nest"
    text = f'"{name}"() ({{\n' * 1000 + '%0 = "x.leaf"() : () -> i32\n' + "}) : () -> ()\n" * 1000
    module = parse_module(text)
    verify(module)
    printed = print_op(module)
    assert print_op(parse_module(printed)) == printed
    copy = module.clone()
    assert print_op(copy) == printed
    copy.drop_references()


def test_nesting_of_attributes_is_limited() -> None:
    with pytest.raises(TyirError, match="nested deeper than 100 levels"):
        parse_attribute_text("[" * 5000 + "]" * 5000)


@pytest.mark.parametrize("text", ["{} : i64", "array<i64: {}>", "dense<{}> : tensor<2xi64>"])
def test_huge_integers_are_refused(text: str) -> None:
    with pytest.raises(TyirError, match="an integer of 6000 digits fits no type"):
        parse_attribute_text(text.format("1" * 6000))


def test_second_parse_keeps_resources() -> None:
    first, second = parse_module(GENERIC), parse_module(GENERIC)
    assert first.resources == second.resources == {"blob": (2, bytes.fromhex("003C0040"))}
    assert first.clone().resources == first.resources


def test_wrong_utf8_has_a_position(tmp_path: Path) -> None:
    path = tmp_path / "wrong.ir"
    path.write_bytes(b'"x.op"() : () -> ()\n// \xff\n')
    with pytest.raises(TyirError, match=r"wrong\.ir:2:4: error: byte 0xFF is not UTF-8"):
        parse_file(path)


def test_printing_after_arguments_were_added() -> None:
    module = parse_module('"x.op"() ({\n^bb0(%a: i32 loc("a")):\n}) : () -> ()')
    block = next(o for o in module.walk() if o.name == "x.op").body
    block.add_arg(t.i64, "b")
    assert '^bb0(%a: i32 loc("a"), %b: i64):' in print_op(module)
    block.erase_arg(0)
    assert "^bb0(%b: i64):" in print_op(module)


def test_texts_that_several_ops_share_are_those_of_each() -> None:
    """One memory of texts for many ops: nothing of one gets into another."""
    shared = AttributeText()
    for text in (GENERIC, GENERIC.replace("true", "false"), GENERIC):
        module = parse_module(text)
        assert print_op(module, texts=shared) == print_op(module)
