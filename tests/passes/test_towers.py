"""Towers through the passes: what dies compute together is what the graph computes, for any number of them,
and what is split is chosen for all patches of a picture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.llm import ArrayWeights
from tyir.attributes import StringAttr
from tyir.dialects.builtin import Module
from tyir.dialects.ty import Global
from tyir.interpreter import Interpreter, run_function, run_lockstep
from tyir.parser import parse_file
from tyir.passes.pipelines import tower_pipeline
from tyir.pipeline import run_pipeline

NAME, PATCHES = "visual_12x4", 12


def tower() -> tuple[Module, ArrayWeights]:
    module = parse_file(Path(__file__).parent / "tower.ir")
    run_pipeline(module, f"extract-graph{{graph={NAME}}}")
    rng = np.random.default_rng(0)
    weights = ArrayWeights()
    for op in module.body:
        if isinstance(op, Global):
            shape = op.type.static_shape
            weights[str(op.sym_name)] = rng.standard_normal(shape).astype(np.float16) / np.float16(
                shape[-1] ** 0.5
            )
    return module, weights


def patches() -> Any:
    return np.random.default_rng(1).standard_normal((PATCHES, 12)).astype(np.float16)


@pytest.mark.parametrize("pin", ["split", "replicated"])
@pytest.mark.parametrize("dies", [1, 2, 3, 4])
def test_every_number_of_dies(dies: int, pin: str) -> None:
    module, weights = tower()
    (wanted,) = run_function(module, NAME, [patches()], weights)
    for op in module.walk():
        if op.name == "ty.linear":
            op.set_attribute("tyir.pin", StringAttr(pin))
    run_pipeline(module, tower_pipeline("ty", PATCHES, dies))
    modules = [m for m in module.body if isinstance(m, Module)]
    assert len(modules) == dies
    runs = [Interpreter(m, weights).run(NAME, [patches()]) for m in modules]
    for (found,) in run_lockstep(runs):
        np.testing.assert_allclose(found.astype(np.float32), wanted.astype(np.float32), atol=4e-3)


def test_the_choice_says_why_and_counts_all_patches() -> None:
    module, _ = tower()
    run_pipeline(module, "static-step,annotate-sharding{dies=2}")
    reasons = {str(op.attributes["tyir.choice"]) for op in module.walk() if "tyir.choice" in op.attributes}
    assert len(reasons) == 1 and "us split against" in reasons.pop()


def test_segments_do_not_see_each_other() -> None:
    module, weights = tower()
    (whole,) = run_function(module, NAME, [patches()], weights)
    changed = patches()
    changed[8:] += 1
    (other,) = run_function(module, NAME, [changed], weights)
    assert np.array_equal(whole[:2], other[:2]) and not np.array_equal(whole[2:], other[2:])
