"""Dialect conversion, listeners, analyses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import pytest

from tyir.analysis import AnalysisManager
from tyir.conversion import Target, convert
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import Add, Cast, Mul, Silu
from tyir.ir import Op, Value
from tyir.parser import parse_module
from tyir.passes.inline import call_graph
from tyir.pipeline import Pass, PassContext, run_pipeline
from tyir.printer import print_op
from tyir.rewrite import Listener, Pattern, Rewriter, pattern, rewrite_greedily
from tyir.type_conversion import ConversionRewriter, TypeConverter
from tyir.types import TensorType, Type, f16, f32
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


# ------------------------------------------------------------------------------------------------ types

CALLS = """
func.func @main(%x: tensor<4xf16>, %n: i32) -> tensor<4xf16> {
  %y = ty.silu %x : tensor<4xf16>
  %z = call @other(%y) : (tensor<4xf16>) -> tensor<4xf16>
  %w = ty.add %z, %y : tensor<4xf16>
  return %w : tensor<4xf16>
}
func.func @other(%x: tensor<4xf16>) -> tensor<4xf16> {
  "x.br"(%x)[^next] : (tensor<4xf16>) -> ()
^next(%y: tensor<4xf16>):
  return %y : tensor<4xf16>
}
func.func private @external(tensor<4xf16>) -> i32
"""


def _wide(kind: Type) -> Type:
    return TensorType(kind.shape, f32) if isinstance(kind, TensorType) and kind.element is f16 else kind


def _cast(value: Value, kind: Type) -> Op:
    assert isinstance(kind, TensorType)
    return Cast(value, element=kind.element)


@pattern(Silu)
def widen_silu(op: Silu, rewriter: ConversionRewriter) -> bool:
    rewriter.replace(op, rewriter.insert(Silu(rewriter.converted(op.x)), before=op).results)
    return True


@pattern(Add)
def widen_add(op: Add, rewriter: ConversionRewriter) -> bool:
    rewriter.replace(op, rewriter.insert(Add(*[rewriter.converted(v) for v in op.operands]), before=op).results)
    return True


def _convert_types(patterns: list[Pattern], types: TypeConverter) -> Module:
    module = parse_module(CALLS)
    target = Target(
        legal_dialects={"builtin", "func", "x"}, legal_if={"ty.silu": types.is_legal, "ty.add": types.is_legal, "ty.cast": lambda op: True}
    )
    convert(module, target, patterns, partial=True, types=types)
    verify(module)
    return module


def test_types_change_in_functions_calls_and_ops() -> None:
    text = print_op(_convert_types([widen_silu, widen_add], TypeConverter(_wide, _cast)), pretty=True)
    assert "func.func @main(%x: tensor<4xf32>, %n: i32) -> tensor<4xf32> {\n    %0 = ty.silu %x : tensor<4xf32>" in text
    assert "call @other(%0) : (tensor<4xf32>) -> tensor<4xf32>" in text.replace("%y", "%0")
    assert "^next(%y: tensor<4xf32>):" in text
    assert "func.func private @external(tensor<4xf32>) -> i32" in text
    assert "unrealized_conversion_cast" not in text
    assert text.count("ty.cast") == 1  # x.br has no pattern: it keeps the old type


def test_casts_that_nobody_makes_are_counted() -> None:
    types = TypeConverter(_wide)
    module = parse_module(
        CALLS.replace('  "x.br"(%x)[^next] : (tensor<4xf16>) -> ()\n^next(%y: tensor<4xf16>):\n  return %y', "  return %x")
    )
    target = Target(legal_dialects={"builtin", "func"}, legal_if={"ty.silu": types.is_legal}, legal_ops={"ty.add"})
    with pytest.raises(TyirError, match=r"2 x from tensor<4xf32> to tensor<4xf16>, 1 x from tensor<4xf16> to tensor<4xf32>"):
        convert(module, target, [widen_silu], types=types)


def test_a_partial_conversion_leaves_casts() -> None:
    text = print_op(_convert_types([widen_silu, widen_add], TypeConverter(_wide)))
    assert '"builtin.unrealized_conversion_cast"(%x) : (tensor<4xf32>) -> tensor<4xf16>' in text
    assert print_op(parse_module(text)) == text
