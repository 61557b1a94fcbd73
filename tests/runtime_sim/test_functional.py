"""The command program computes what the interpreter computes, and breaks loudly when it is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

SMALL = {"sram.capacity_bytes": 48 * 1024}


@pytest.mark.parametrize("dies", [1, 2])
@pytest.mark.parametrize("group", [0, 16])
@pytest.mark.parametrize(("tokens", "pos"), [(1, 0), (1, 13), (8, 0), (8, 13)])
def test_program_equals_interpreter(make_model: Callable[..., Any], dies: int, group: int, tokens: int, pos: int) -> None:
    model = make_model(dies=dies, group=group, tokens=tokens)
    engines = model.functional()
    model.fill_caches(engines, pos)
    ids = np.arange(tokens, dtype=np.int32)[None] * 7 % 80
    for step in range(2):
        expected = model.interpret(ids, pos + step * tokens)
        got = model.step(engines, ids, pos + step * tokens)
        np.testing.assert_allclose(got, expected, atol=2e-2 * np.abs(expected).max(), rtol=0)
