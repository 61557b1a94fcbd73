"""Declarations: annotations of every spelling, ops that derive others, constructors that refuse."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import KW_ONLY
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tyir.attributes import DenseArrayAttr, DictAttr, FloatAttr, IntegerAttr, StringAttr
from tyir.dialects import ty
from tyir.ir import Block, Value
from tyir.opdef import DeclaredOp, attr, operand, result, variadic_operand
from tyir.traits import Pure
from tyir.types import TensorType, Type, f16, f64, i32, i64

PLAIN = '''
"""A dialect whose module keeps annotations as they are."""
from typing import Optional

from tyir.ir import Value
from tyir.opdef import DeclaredOp, attr, operand, result
from tyir.types import TensorType, Type


class Plain(DeclaredOp, name="plainly.op"):
    """An op with a property of each kind of annotation."""

    x: Value = operand()
    factor: float = attr()
    sizes: tuple[int, ...] = attr(default=(1,))
    word: str | None = attr(default=None)
    old: Optional[int] = attr(default=None)
    kind: Optional[TensorType] = attr(default=None)
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type
'''


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[ModuleType]:
    path = tmp_path / "plainly.py"
    path.write_text(PLAIN)
    spec = importlib.util.spec_from_file_location("plainly", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["plainly"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["plainly"]


class Base(DeclaredOp, name="deriving.base", traits=(Pure,)):
    """An op that others derive."""

    x: Value = operand()
    _: KW_ONLY
    factor: float = attr()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type


class Derived(Base, name="deriving.derived"):
    """One more operand and property."""

    rest: tuple[Value, ...] = variadic_operand(default=())
    _: KW_ONLY
    size: int = attr(default=3)


def _value() -> Value:
    return Value(TensorType((4,), f16), Block(), 0)


def test_annotations_that_are_not_texts(plain: ModuleType) -> None:
    op = plain.Plain(_value(), factor=2.0, word="w", kind=TensorType((2,), f16))
    assert op.properties is DictAttr(
        {
            "factor": FloatAttr(2.0, f64),
            "sizes": DenseArrayAttr.i64([1]),
            "word": StringAttr("w"),
            "kind": TensorType((2,), f16),
        }
    )
    assert op.sizes == (1,) and op.old is None and list(op.check_declaration()) == []


def test_a_derived_op_has_the_fields_of_its_base() -> None:
    x, y = _value(), _value()
    op = Derived(x, (y, y), factor=0.5, size=7)
    assert (op.x, op.rest, op.factor, op.size, op.out.type) == (x, (y, y), 0.5, 7, x.type)
    assert [f.name for f in Derived.operand_fields] == ["x", "rest"] and Derived.has_trait(Pure)
    assert list(op.check_declaration()) == []
    assert Base.property_names == {"factor"} and Base(x, factor=1.0).operands == (x,)
    with pytest.raises(TypeError, match="'factor' is missing"):
        Derived(x)  # type: ignore[call-arg]


def test_an_operand_given_twice() -> None:
    x = _value()
    with pytest.raises(TypeError, match=r"ty\.add: operand 'lhs' is given twice"):
        ty.Add(x, x, lhs=x)  # type: ignore[misc]
    assert x.uses == []


def test_a_refused_op_uses_nothing() -> None:
    x = _value()
    with pytest.raises(Exception, match="perm"):
        ty.Transpose(x, perm=(3,))
    assert x.uses == []


def test_a_dictionary_is_the_same_however_it_is_made() -> None:
    one, two = IntegerAttr(1, i64), IntegerAttr(2, i64)
    assert DictAttr.of({"b": two, "a": one}) is DictAttr({"a": one, "b": two})
    assert DictAttr([("c", one), ("a", two)]) is DictAttr.of({"a": two, "c": one})
    assert list(DictAttr.of({"z": one, "y": two})) == ["y", "z"]


@pytest.mark.parametrize("value", [3, True, np.int64(3), IntegerAttr(3, i32)])
def test_integers_are_encoded_as_they_are_made(value: Any) -> None:
    """Also after an equal number of another kind has been."""
    field = {f.name: f for f in ty.Slice.attr_fields}["axis"]
    for _ in range(2):
        expected = value if isinstance(value, IntegerAttr) else IntegerAttr(int(value), i64)
        assert field.codec.encode(value) is expected
        field.codec.encode(int(getattr(value, "value", value)))


def test_arrays_of_integers_are_encoded_as_they_are_made() -> None:
    field = {f.name: f for f in ty.Reshape.attr_fields}["shape"]
    expected = DenseArrayAttr.i64([1, 8])
    assert all(field.codec.encode(v) is expected for v in ((1, 8), [1, 8], (True, 8.0), np.array([1, 8])))
