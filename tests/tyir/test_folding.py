"""Folders: an op that says what it always equals is replaced by that value, or by a constant made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from tyir.attributes import Attribute, DenseElementsAttr
from tyir.dialects.ty import Constant
from tyir.ir import Op, Value
from tyir.opdef import DeclaredOp, operand, result
from tyir.parser import parse_module
from tyir.passes.canonicalize import PATTERNS
from tyir.pipeline import PassContext, run_pipeline
from tyir.printer import print_op
from tyir.registry import load_dialect_module, unload_dialect
from tyir.rewrite import rewrite_greedily
from tyir.traits import Pure
from tyir.types import Type

TEXT = """
func.func @f() -> tensor<2xf32> {
  %a = ty.constant {value = dense<[1.0, 2.0]> : tensor<2xf32>} : tensor<2xf32>
  %b = folding.twice %a : tensor<2xf32> loc("first")
  %c = folding.twice %b : tensor<2xf32> loc("second")
  return %c : tensor<2xf32>
}
"""


class Twice(DeclaredOp, name="folding.twice", traits=(Pure,)):
    """x + x"""

    x: Value = operand()
    out: Value = result()

    def infer(self) -> Type:
        return self.x.type

    def fold(self) -> Sequence[Value | Attribute] | None:
        source = self.x.op
        return (
            [DenseElementsAttr.from_numpy(source.value.to_numpy() * 2)]
            if isinstance(source, Constant)
            else None
        )


class Wrong(DeclaredOp, name="folding.wrong", traits=(Pure,)):
    """A folder that gives another type."""

    x: Value = operand()
    out: Value = result()

    def fold(self) -> Sequence[Value | Attribute] | None:
        return [DenseElementsAttr.from_numpy(np.zeros(3, np.float32))]


@pytest.fixture(autouse=True)
def dialect() -> Iterator[None]:
    import sys

    load_dialect_module(sys.modules[__name__])
    yield
    unload_dialect("folding")


def _constants(op: Op) -> list[tuple[list[float], str]]:
    return [(c.value.to_numpy().tolist(), str(c.loc)) for c in op.walk_type(Constant)]


@pytest.mark.parametrize("driver", ["pass", "function"])
def test_chains_fold_to_one_constant_that_keeps_the_place(driver: str) -> None:
    module = parse_module(TEXT)
    if driver == "pass":
        run_pipeline(module, "canonicalize", PassContext())
    else:
        rewrite_greedily(module, PATTERNS)
    assert _constants(module) == [([4.0, 8.0], 'loc("second")')]
    assert "folding" not in print_op(module)


def test_folding_can_be_left_out() -> None:
    module = parse_module(TEXT)
    assert rewrite_greedily(module, [], fold=False) == 0


def test_a_folder_must_keep_the_type() -> None:
    module = parse_module(TEXT.replace("folding.twice", "folding.wrong"))
    with pytest.raises(ValueError, match=r"folding\.wrong\.fold\(\) gives a value of another type"):
        rewrite_greedily(module, [])
