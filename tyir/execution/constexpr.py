"""Weight expressions: trees of pure ops over weight references and constants.

What is done to a weight (cast, slice for a die, quantize) stays in the IR as such a tree and is evaluated
once, when artifacts are written.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tyir.ir import Block, Op, Value
from tyir.traits import ConstantLike, Pure

__all__ = ["ConstantExpressions", "clone_expression", "expression_ops"]


class ConstantExpressions:
    """Answers, with memory, whether values are weight expressions and which of them are the same."""

    def __init__(self) -> None:
        self._constant: dict[Op | Block, bool] = {}
        self._numbers: dict[Op, int] = {}
        self._numbered: dict[tuple[Any, ...], int] = {}

    def is_constant(self, value: Value) -> bool:
        """Whether the value depends on nothing but the checkpoint."""
        op = value.owner
        known = self._constant.get(op)  # no block is in it
        if known is None:
            if not isinstance(op, Op):
                return False
            pure = op.has_trait(Pure) and (bool(op.operands) or op.has_trait(ConstantLike))
            known = self._constant[op] = pure and all(self.is_constant(v) for v in op.operands)
        return known

    def key(self, value: Value) -> tuple[int, int]:
        """Equal for expressions that compute the same tensor the same way."""
        op = value.op
        assert op is not None
        number = self._numbers.get(op)
        if number is None:
            parts = (op.name, op.properties, *[self.key(v) for v in op.operands])
            number = self._numbers[op] = self._numbered.setdefault(parts, len(self._numbered))
        return value.index, number


def expression_ops(value: Value) -> Iterator[Op]:
    """The ops of an expression, operands first, each once."""
    seen: set[Op] = set()

    def visit(op: Op) -> Iterator[Op]:
        if op not in seen:
            seen.add(op)
            for operand in op.operands:
                if operand.op is not None:
                    yield from visit(operand.op)
            yield op

    if value.op is not None:
        yield from visit(value.op)


def clone_expression(value: Value, block: Block) -> Value:
    """A copy of the expression's ops at the end of `block`; returns the copied value."""
    mapping: dict[Value, Value] = {}
    for op in expression_ops(value):
        block.append(op.clone(mapping))
    return mapping[value]
