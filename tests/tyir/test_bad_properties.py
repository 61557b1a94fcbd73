"""No declared op can be brought to raise anything but a diagnostic: whatever its properties and operands are,
the verifier, the constructor and the text forms accept the op or say what is wrong with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tyir.attributes import (
    ArrayAttr,
    Attribute,
    BoolAttr,
    DenseArrayAttr,
    DenseElementsAttr,
    DictAttr,
    FloatAttr,
    IntegerAttr,
    OpaqueAttr,
    StringAttr,
    SymbolRefAttr,
    UnitAttr,
)
from tyir.diagnostics import TyirError
from tyir.dialects import edge10, kv, quant, ty
from tyir.dialects.builtin import Module
from tyir.ir import Block, Op, Region, Value, unregistered_op
from tyir.opdef import AttrField, DeclaredOp
from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.registry import dialect_names, dialect_ops
from tyir.types import (
    FloatType,
    FunctionType,
    IntegerType,
    NoneType,
    TensorType,
    TupleType,
    Type,
    VectorType,
    f16,
    f32,
    i1,
    i8,
    i32,
    i64,
    index,
    ui4,
    ui8,
)
from tyir.verifier import verify

OPS = [op for dialect in dialect_names() for op in dialect_ops(dialect).values()]

OTHER_TYPES = [
    TensorType(None, f16),
    TupleType((f16,)),
    VectorType("4xf32"),
    edge10.TOKEN,
    edge10.ADDRESS,
]
SIZES = st.sampled_from([0, 1, -1, 2, 3, 4, 8, 18, 32, -2, 128, 2**31, 2**62, 2**63 - 1, -(2**63)])
ELEMENTS = st.sampled_from([f16, f32, i8, i32, i64, i1, ui4, ui8, FloatType("bf16"), index, NoneType()])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 4, 8, 18, 32, None]), max_size=5)
TENSORS = st.builds(TensorType, SHAPES.map(tuple), ELEMENTS)
TYPES: st.SearchStrategy[Type] = st.one_of(
    TENSORS,
    TENSORS,
    ELEMENTS,
    st.sampled_from(OTHER_TYPES),
    st.builds(
        lambda a, b: FunctionType(tuple(a), tuple(b)), st.lists(TENSORS, max_size=2), st.lists(TENSORS)
    ),
)
INTEGER_ARRAYS = st.lists(SIZES, max_size=5).map(DenseArrayAttr.i64)
DENSE = st.builds(
    lambda shape, element: (
        DenseElementsAttr(bytes(8), TensorType(shape, element))
        if element is i64
        else DenseElementsAttr(bytes(4), TensorType(shape, element))
    ),
    st.sampled_from([(), (1,), (3,), (2, 2)]),
    st.sampled_from([f32, i32, i64]),
)
_NAMES = ["add", "rope", "fill", "Q4_0", "Q8_0"]
_PLACES = ["HND", "sram", "dram", "none", "ids", "ewdma", "weight", "pos"]
WORDS = st.sampled_from(["", "x", *_PLACES, *_NAMES])
MESHES = st.sampled_from(
    [
        "",
        '<["die"=4]>',
        '<["die"=4], device_ids=[1 2]>',
        '<["die"=2], device_ids=[,,]>',
        f'<["die"={"9" * 5000}]>',
    ]
)
SCALARS: st.SearchStrategy[Attribute] = st.one_of(
    SIZES.map(lambda v: IntegerAttr(v, i64)),
    st.sampled_from([IntegerAttr(1, IntegerType(200)), IntegerAttr(0, index), BoolAttr(True), UnitAttr()]),
    st.floats(width=32).map(lambda v: FloatAttr(v, f32)),
    WORDS.map(StringAttr),
    WORDS.map(SymbolRefAttr),
    INTEGER_ARRAYS,
    st.just(DenseArrayAttr(f32, [1.0])),
    DENSE,
    TYPES,
    MESHES.map(lambda body: OpaqueAttr("sdy.mesh", body)),
)
ATTRIBUTES = st.one_of(
    SCALARS,
    st.lists(SCALARS, max_size=3).map(ArrayAttr),
    st.dictionaries(WORDS, SCALARS, max_size=2).map(DictAttr),
    st.lists(st.dictionaries(WORDS, SCALARS, max_size=2).map(DictAttr), max_size=3).map(ArrayAttr),
)
BY_KIND: dict[str, st.SearchStrategy[Attribute]] = {
    "integer": SIZES.map(lambda v: IntegerAttr(v, i64)),
    "float": st.floats(width=32).map(lambda v: FloatAttr(v, f32)),
    "string": WORDS.map(StringAttr),
    "boolean": st.booleans().map(BoolAttr),
    "integer array": INTEGER_ARRAYS,
    "type": TYPES,
    "tensor type": TENSORS,
    "float type": st.sampled_from([f16, f32]),
    "symbol": WORDS.map(SymbolRefAttr),
    "dense elements": DENSE,
}


@st.composite
def _property(draw: st.DrawFn, field: AttrField) -> Attribute | None:
    """A value of the declared kind mostly, of any kind or none at all sometimes."""
    choice = draw(st.integers(0, 9))
    if choice == 0:
        return None
    if choice == 1:
        return draw(ATTRIBUTES)
    if field.choices and choice < 8:
        return StringAttr(draw(st.sampled_from(field.choices)))
    return draw(BY_KIND.get(field.codec.kind, ATTRIBUTES))


@st.composite
def _op(draw: st.DrawFn, cls: type[DeclaredOp]) -> tuple[Module, Op]:
    """An op of random operands, results, properties and regions, in a module that defines the operands."""
    module = Module.empty()
    least, most = cls.operand_counts
    kinds = draw(st.lists(TYPES, min_size=least, max_size=least + 3 if most is None else most))
    if draw(st.booleans()) and kinds:
        kinds = [kinds[0]] * len(kinds)
    source = unregistered_op("x.source").create((), kinds)
    module.body.append(source)
    low, high = cls.result_counts
    results = draw(st.lists(TYPES, min_size=low, max_size=low + 2 if high is None else high))
    found = {field.key: draw(_property(field)) for field in cls.attr_fields}
    regions = []
    for _ in cls.region_fields:
        blocks = [Block(draw(st.lists(TYPES, max_size=2))) for _ in range(draw(st.integers(0, 2)))]
        regions.append(Region(blocks))
    op = cls.create(
        source.results,
        results,
        properties=DictAttr({k: v for k, v in found.items() if v is not None}),
        regions=regions,
    )
    module.body.append(op)
    return module, op


def _only_diagnostics(what: Callable[[], object]) -> None:
    try:
        what()
    except TyirError as error:
        assert all(d.message and "cannot be checked" not in d.message for d in error.diagnostics), str(error)


def _construct(op: Op) -> None:
    """The same op through its constructor, which infers the result types."""
    assert isinstance(op, DeclaredOp)
    cls = type(op)
    arguments: dict[str, Any] = {f.name: f.__get__(op) for f in cls.operand_fields}
    arguments |= {f.name: f.__get__(op) for f in cls.attr_fields if f.check(op) is None}
    needed = [f for f in cls.attr_fields if not f.optional and not f.has_default]
    missing = [f for f in needed if arguments.get(f.name) is None]
    if not missing and cls.infer is not DeclaredOp.infer:
        cls(**arguments)


@pytest.mark.parametrize("cls", OPS, ids=lambda op: op.name)
@settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
@given(data=st.data())
def test_any_properties(cls: type[DeclaredOp], data: st.DataObject) -> None:
    module, op = data.draw(_op(cls))
    _only_diagnostics(lambda: verify(module))
    _only_diagnostics(lambda: _construct(op))
    _only_diagnostics(lambda: verify(parse_module(print_op(module))))
    _only_diagnostics(lambda: verify(parse_module(print_op(module, pretty=True))))


def _value(*shape: int | None, element: Type = f16) -> Value:
    return Value(TensorType(shape, element), Block(), 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ty.Reshape(_value(2, 3), shape=(-1, 0)), "cannot be reshaped to [-1, 0]"),
        (lambda: ty.Reshape(_value(2, 3), shape=(-2, -3)), "must be at least -1"),
        (lambda: ty.QuantizeGroups(_value(4, 8), group_size=0), "'group_size' must be at least 1, got 0"),
        (lambda: ty.Slice(_value(4), axis=0, offset=0, size=-1), "'size' must be at least 0, got -1"),
        (lambda: ty.Transpose(_value(4, 4), perm=(0, 7)), "perm [0, 7] is not a permutation of 0..1"),
        (lambda: ty.Take(_value(4, 4), axis=5, indices=(0,)), "axis 5 is not in 0..1"),
        (lambda: ty.Repeat(_value(4, 4), axis=-1, times=2), "axis -1 is not in 0..1"),
        (lambda: ty.TopK(_value(), k=1), "needs a tensor of at least 1 dimension, got tensor<f16>"),
        (lambda: ty.Linear(_value(2, 8), _value(4)), "needs a tensor of 2 dimensions, got tensor<4xf16>"),
        (lambda: quant.GgmlQ40(_value(None, 18, element=ui8)), "needs static dimensions"),
    ],
)
def test_the_constructor_says_what_is_wrong(make: Any, message: str) -> None:
    with pytest.raises(TyirError) as error:
        make()
    assert message in str(error.value), str(error.value)


@pytest.mark.parametrize("layout", kv.LAYOUTS)
def test_rows_beyond_a_full_cache_are_dropped(layout: str) -> None:
    capacity, axis = 3, kv.position_axis(layout)
    cache_type = TensorType(kv.cache_shape(layout, 1, 2, capacity, 4), f16)
    op = kv.Append(Value(cache_type, Block(), 0), _value(1, 2, 2, 4), _value(1, element=i32), layout=layout)
    rows = np.arange(16, dtype=np.float16).reshape(1, 2, 2, 4) + 1
    for pos in (0, 2, 3, 4, 9):
        cache = op.evaluate(np.zeros(cache_type.static_shape, np.float16), rows, np.array([pos], np.int32))
        filled = np.flatnonzero(cache.any(axis=tuple(i for i in range(4) if i != axis)))
        assert filled.tolist() == [p for p in (pos, pos + 1) if p < capacity]
