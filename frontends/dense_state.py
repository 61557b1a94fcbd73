"""A checkpoint's parameters as plain arrays, whatever it is stored as: what a reference implementation is
loaded with.

The arrays are those the imported module computes with: the same weight expressions, evaluated by the
reference interpreter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tyir.dialects.ty import GetGlobal
from tyir.execution.constexpr import expression_ops
from tyir.execution.weights import CheckpointReader
from tyir.frontends.weights import Weights
from tyir.interpreter import evaluate_op
from tyir.ir import Block, Value
from tyir.types import f32

if TYPE_CHECKING:
    from tyir.frontends.plugin import ModelPlugin

__all__ = ["dense_state", "parameter_array"]

Array = npt.NDArray[Any]


def dense_state(
    folder: Path, plugin: ModelPlugin | None = None, base: Path | None = None
) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """(name, array) of each parameter of the model in `folder`, each once, in f32; quantised weights are
    de-quantised (rounded to f16, as the chip does).
    """
    from tyir.frontends.huggingface import open_model

    opened = open_model(folder, "f32", plugin=plugin, base=base)
    reader, seen = CheckpointReader(opened.checkpoint.folder), set[str]()
    for name in opened.meta.state:
        canonical = opened.weights.canonical(name)
        if canonical not in seen and opened.weights.find(name) is not None:
            seen.add(canonical)
            yield name, np.asarray(parameter_array(opened.weights, name, reader), np.float32)


def parameter_array(weights: Weights, name: str, reader: CheckpointReader) -> Array:
    """One parameter's array [the model's shape] in f32, evaluated from its weight expression."""
    value = weights.value(name, f32, Block().append)
    env: dict[Value, Array] = {}
    for op in expression_ops(value):
        if isinstance(op, GetGlobal):
            results: Any = reader.read(weights.globals[op.symbol.leaf])
        else:
            with np.errstate(
                over="ignore", invalid="ignore"
            ):  # whoever asked for the array sees what it holds
                results = evaluate_op(op, [env[v] for v in op.operands])
        env.update(zip(op.results, results if isinstance(results, tuple) else (results,)))
    return env[value]
