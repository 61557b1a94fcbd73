"""Dialect conversion, listeners, analyses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest

from tyir.analysis import AnalysisManager
from tyir.conversion import Target, convert
from tyir.diagnostics import TyirError
from tyir.dialects.func import Func
from tyir.dialects.ty import Add, Mul, Silu
from tyir.ir import Op, Value
from tyir.parser import parse_module
from tyir.passes.inline import call_graph
from tyir.pipeline import Pass, PassContext, run_pipeline
from tyir.rewrite import Listener, Rewriter, pattern, rewrite_greedily
from tyir.verify import verify

TEXT = """
func.func @a(%x: tensor<4xf16>) -> tensor<4xf16> {
  %y = ty.silu %x : tensor<4xf16> loc("here")
  %z = ty.silu %y : tensor<4xf16>
  %w = ty.mul %z, %y : tensor<4xf16> loc("there")
  return %w : tensor<4xf16>
}
func.func @b(%x: tensor<4xf16>) -> tensor<4xf16> {
  return %x : tensor<4xf16>
}
"""
KEPT = Target(legal_dialects={"builtin", "func"}, legal_ops={"ty.add"})


@pattern(Silu)
def silu_to_mul(op: Silu, rewriter: Rewriter) -> bool:
    rewriter.replace(op, rewriter.insert(Mul(op.x, op.x), before=op).results)
    return True


@pattern(Mul)
def mul_to_add(op: Mul, rewriter: Rewriter) -> bool:
    rewriter.replace(op, rewriter.insert(Add(op.operands[0], op.operands[1]), before=op).results)
    return True


def test_patterns_make_illegal_ops_legal_in_steps() -> None:
    module = parse_module(TEXT)
    assert convert(module, KEPT, [silu_to_mul, mul_to_add]) == 5
    verify(module)
    adds = list(module.walk_type(Add))
    assert [str(op.loc) for op in adds] == ['loc("here")', "loc(unknown)", 'loc("there")']


def test_what_remains_is_counted() -> None:
    with pytest.raises(TyirError) as caught:
        convert(parse_module(TEXT), KEPT, [mul_to_add])
    assert "here: error: illegal ops remain: 2 x 'ty.silu'; no pattern converts the first one" in caught.value.render()
    module = parse_module(TEXT)
    assert convert(module, Target(illegal_ops={"ty.mul"}), [mul_to_add], partial=True) == 1
    assert (
        convert(
            module, Target(legal_if={"ty.silu": lambda op: len(op.operands) == 1, "ty.add": lambda op: True}, legal_dialects={"func"}), []
        )
        == 0
    )


def test_a_conversion_in_a_circle_ends() -> None:
    @pattern(Mul)
    def again(op: Mul, rewriter: Rewriter) -> bool:
        rewriter.replace(op, rewriter.insert(Mul(op.operands[0], op.operands[1]), before=op).results)
        return True

    with pytest.raises(TyirError, match="the conversion does not come to an end"):
        convert(parse_module(TEXT), KEPT, [silu_to_mul, again])


class Log(Listener):
    def __init__(self) -> None:
        self.said: list[str] = []

    def inserted(self, op: Op) -> None:
        self.said.append(f"+{op.name}")

    def replaced(self, op: Op, values: Sequence[Value]) -> None:
        self.said.append(f"{op.name}->{values[0].op.name if values[0].op else 'argument'}")

    def erased(self, op: Op) -> None:
        self.said.append(f"-{op.name}")


def test_listeners_hear_everything() -> None:
    log = Log()
    rewrite_greedily(parse_module(TEXT), [mul_to_add], listeners=[log])
    assert log.said == ["+ty.add", "ty.mul->ty.add"]
    log = Log()
    rewrite_greedily(parse_module(TEXT.replace("return %w", "return %x")), [], listeners=[log])
    assert log.said == ["-ty.mul", "-ty.silu", "-ty.silu"]


# ------------------------------------------------------------------------------------------------ analyses


def count_ops(op: Op) -> int:
    return sum(1 for _ in op.walk())


def test_analyses_are_kept_until_something_changes() -> None:
    module = parse_module(TEXT)
    a, b = (op for op in module.body if isinstance(op, Func))
    analyses = AnalysisManager()
    sizes = [analyses.get(count_ops, op) for op in (module, a, b, module)]
    assert sizes == [8, 5, 2, 8] and analyses.computed == 3
    analyses.invalidate(a)
    assert [analyses.get(count_ops, op) for op in (b, a, module)] == [2, 5, 8]
    assert analyses.computed == 5, "the other function's analysis was still good"
    analyses.get(call_graph, module)
    analyses.invalidate(module, preserved=[call_graph])
    analyses.get(call_graph, module)
    assert analyses.computed == 6


@dataclass(frozen=True)
class Ask(Pass):
    """Asks for an analysis, perhaps changing something afterwards."""

    anchor: ClassVar[str] = "any"
    change: bool = False
    preserve: bool = False

    @classmethod
    def name(cls) -> str:
        return "ask"

    def run(self, op: Op, context: PassContext) -> None:
        context.analyses.get(count_ops, op)
        if not self.change:
            context.nothing_changed()
        elif self.preserve:
            context.preserve(count_ops)


@pytest.mark.parametrize(
    "pipeline, computed",
    [("ask,ask,ask", 1), ("ask{change},ask", 2), ("ask{change preserve},ask", 1), ("ask,func.func(ask{change}),ask", 4)],
)
def test_passes_share_analyses(pipeline: str, computed: int) -> None:
    context = PassContext()
    context.registry.extra["ask"] = Ask
    run_pipeline(parse_module(TEXT), pipeline, context)
    assert context.analyses.computed == computed
