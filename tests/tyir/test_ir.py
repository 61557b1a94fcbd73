"""The IR's data structures: clones, and attributes that stay unique."""

from __future__ import annotations

import copy
import pickle

import pytest

from tyir.attributes import (
    ArrayAttr,
    Attribute,
    BoolAttr,
    DenseArrayAttr,
    DenseElementsAttr,
    DictAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    UnitAttr,
)
from tyir.ir import EMPTY_DICT, Op
from tyir.location import UNKNOWN, FileLoc, FusedLoc, NameLoc
from tyir.parser import parse_module
from tyir.types import FunctionType, IntegerType, TensorType, f16, f32, i64

BLOCKS = """
%a = "x.make"() : () -> i32
%b = "x.make"() : () -> i32
"x.region"() ({
  "x.use"(%a, %b, %late) : (i32, i32, i32) -> ()
  "x.br"()[^bb1] : () -> ()
^bb1:
  %late = "x.make"() : () -> i32
  "x.inside"() ({
    "x.use"(%b, %a, %late) : (i32, i32, i32) -> ()
  }) : () -> ()
  "x.br"()[^bb1] : () -> ()
}) : () -> ()
"""


def _uses(op: Op) -> list[Op]:
    return [inner for inner in op.walk() if inner.name == "x.use"]


def test_a_clone_that_exchanges_two_values() -> None:
    module = parse_module(BLOCKS)
    first, second, region = module.body.ops
    a, b = first.result, second.result
    clone = region.clone({a: b, b: a})
    outer, inner = _uses(clone)
    (late,) = (op.result for op in clone.walk() if op.name == "x.make")
    assert outer.operands == (b, a, late) and inner.operands == (a, b, late)
    before, _ = _uses(region)
    assert before.operands[:2] == (a, b) and before.operands[2] is not late
    assert sorted(map(id, late.uses)) == sorted(map(id, (outer, inner)))
    assert a.uses.count(outer) == b.uses.count(outer) == 1


@pytest.mark.parametrize(
    "attribute",
    [
        f16,
        UnitAttr(),
        BoolAttr(True),
        IntegerAttr(3, i64),
        FloatAttr(-0.0, f32),
        StringAttr("text"),
        SymbolRefAttr("a", "b"),
        DenseArrayAttr.i64([1, 2]),
        DenseArrayAttr(f32, [0.5, -0.0]),
        DenseElementsAttr(bytes(8), TensorType((2,), f32)),
        TensorType((1, None), IntegerType(4, "u")),
        FunctionType((f16,), (TensorType(None, f32),)),
        DictAttr({"b": f16, "a": ArrayAttr([UnitAttr(), EMPTY_DICT])}),
        EMPTY_DICT,
        UNKNOWN,
        FusedLoc((NameLoc("a", FileLoc("f", 1, 2)), UNKNOWN)),
    ],
    ids=str,
)
def test_attributes_stay_unique(attribute: Attribute) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(attribute, protocol)) is attribute
    assert copy.copy(attribute) is attribute and copy.deepcopy([attribute])[0] is attribute


def test_a_new_attribute_comes_back_before_it_is_made_again() -> None:
    """What another process pickled and this one has never made."""
    data = pickle.dumps(TensorType((12345, 678), f16)).replace(b"\x4d\x39\x30", b"\x4d\x3a\x30")
    loaded = pickle.loads(data)
    assert loaded is TensorType((12346, 678), f16)
