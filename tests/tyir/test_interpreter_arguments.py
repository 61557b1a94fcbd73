"""What a function is given by `run_function`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tyir import TyirError, parse_module, run_function
from tyir.interpreter import SymbolIndex, lookup_symbol

MODULE = parse_module("""
func.func @f(%x: tensor<2x?xf16>) -> tensor<2x?xf16> {
  %y = ty.silu %x : tensor<2x?xf16>
  return %y : tensor<2x?xf16>
}
""")


@pytest.mark.parametrize(
    "given", [[[0, 1], [2, 3]], ((0.0, 1.0), (2, 3)), np.arange(4, dtype=np.float16).reshape(2, 2)]
)
def test_lists_become_arrays_of_the_declared_type(given: Any) -> None:
    (found,) = run_function(MODULE, "f", [given])
    assert (
        found.dtype == np.float16
        and found.round(2).tolist() == np.float16([[0, 0.73], [1.76, 2.86]]).tolist()
    )


@pytest.mark.parametrize("given", [[0, 1], [[0, 1]], np.zeros((3, 2)), np.zeros((2, 2, 1)), 1.0])
def test_another_shape_is_refused(given: Any) -> None:
    with pytest.raises(TyirError, match=r"argument 0 of @f is tensor<2x\?xf16>, an array of shape") as caught:
        run_function(MODULE, "f", [given])
    assert caught.value.diagnostics[0].help


@pytest.mark.parametrize("given", [[], [np.zeros((2, 1)), np.zeros((2, 1))]])
def test_another_number_of_arguments_is_refused(given: list[Any]) -> None:
    with pytest.raises(TyirError, match="@f takes 1 arguments"):
        run_function(MODULE, "f", given)


def test_an_index_finds_what_a_search_finds() -> None:
    """Innermost first; a parameter is made of the checkpoint's tensors, not of one of its own name."""
    module = parse_module("""
      ty.global @a {file = "x", key = "a", nbytes = 4, offset = 0, type = tensor<2xf16>}
      ty.global @b {file = "x", key = "b", nbytes = 4, offset = 4, type = tensor<2xf16>}
      module @die0 {
        ty.param @a {type = tensor<2xf16>} ({
          %0 = ty.get_global @a : tensor<2xf16>
          ty.yield %0 : tensor<2xf16>
        })
        func.func @f() -> tensor<2xf16> {
          %0 = ty.get_global @a : tensor<2xf16>
          return %0 : tensor<2xf16>
        }
      }
    """)
    index, found = SymbolIndex(), []
    for op in module.walk():
        for name in ("a", "b", "f", "nothing"):
            found.append(index.lookup(op, name))
            assert found[-1] is lookup_symbol(op, name), (op.name, name)
    assert len({id(op) for op in found}) == 5  # two of a, b, f, and none
