"""Layers whose keys 4 bits do not hold: a rotary pair is too far above the others of its head.

What `scale-keys` takes from such a pair of keys it gives to that of the queries, and with it the pair's own
rounding.  Of the embedded model what 4-bit keys lose grows with factors of 8 and more, of pairs 16 times as
large as the others (docs/long-context.md); what 8-bit keys lose does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy.typing as npt

from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.ty import Attention, GetGlobal, Global
from tyir.execution.constexpr import expression_ops
from tyir.execution.weights import WeightSource
from tyir.ir import Op, Value
from tyir.pipeline import PassContext

__all__ = ["KEYS_ATTRIBUTE", "keep_spread_keys"]

KEYS_ATTRIBUTE: Final = "tyir.keys"
_MOST: Final = 4.0  # the factor of a pair that 4 bits still hold

Array = npt.NDArray[Any]


def keep_spread_keys(
    op: Op, factors: Sequence[tuple[Attention, Value]], weights: WeightSource, context: PassContext
) -> int:
    """Ask for 8-bit keys where a pair's factor is too large; in how many layers.

    `factors`: the attentions and the factors of their keys' pairs, or of their queries'.  Nothing is asked
    for where the weights are not here: they are missed where artifacts are written.
    """
    found = 0
    for attention, value in factors:
        try:
            sizes = _evaluated(op, value, weights)
        except TyirError:
            return found
        size = float(max(sizes.max(), 1 / sizes.min()))
        if size > _MOST:
            attention.set_attribute(KEYS_ATTRIBUTE, StringAttr("int8"))
            found += 1
            context.remark(
                attention,
                f"a rotary pair of the keys is at least {size ** (4 / 3):.0f} times as large as the pair in"
                " the middle of its head: keys of this layer are stored with 8 bits, values with 4",
                help="compare --kv-dtype int8 and fp16 on prompts of your own",
            )
    return found


def _evaluated(module: Op, value: Value, weights: WeightSource) -> Array:
    """What a weight expression comes to; `TyirError` where its weights cannot be read."""
    known: dict[Value, Array] = {}
    for op in expression_ops(value):
        if isinstance(op, GetGlobal):
            stored = module.lookup(op.symbol.leaf) if isinstance(module, Module) else None
            if not isinstance(stored, Global):
                raise TyirError(f"there is no weight @{op.symbol.leaf}")
            results: Any = weights.read(stored)
        else:
            results = op.evaluate(*(known[v] for v in op.operands))  # type: ignore[attr-defined]
        for result, array in zip(op.results, results if isinstance(results, tuple) else (results,)):
            known[result] = array
    return known[value]
