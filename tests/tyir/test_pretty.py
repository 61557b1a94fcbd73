"""The short form: every declared op comes back from it as it was, and a terminal gets it by default."""

from __future__ import annotations

import inspect
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.grammar_parser import parse_with_grammar
from tyir.attributes import (
    ArrayAttr,
    BoolAttr,
    DenseArrayAttr,
    DenseElementsAttr,
    DictAttr,
    FloatAttr,
    IntegerAttr,
    StringAttr,
    SymbolRefAttr,
    UnitAttr,
)  # fmt: skip
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.ir import Block, Op, Region, unregistered_op
from tyir.location import NameLoc
from tyir.opdef import DeclaredOp
from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.registry import dialect_names, dialect_ops
from tyir.tools.bench.ir import decoder_text
from tyir.tools.tyir_opt import main
from tyir.types import FunctionType, TensorType, Type, f16, f32, f64, i32, i64

TENSOR = TensorType((4,), f16)
VALUES: dict[str, Any] = {
    "int": IntegerAttr(-3, i64),
    "float": FloatAttr(float("inf"), f64),
    "str": StringAttr('odd "name"'),
    "bool": BoolAttr(True),
    "tuple[int, ...]": DenseArrayAttr.i64([1, -1]),
    "Type": i32,
    "TensorType": TENSOR,
    "FunctionType": FunctionType((TENSOR,), (i32, TENSOR)),
    "FloatType": f32,
    "SymbolRefAttr": SymbolRefAttr("a b", "c"),
    "DictAttr": DictAttr({"x y": FloatAttr(0.1, f64), "z": UnitAttr()}),
    "ArrayAttr": ArrayAttr([IntegerAttr(7, i32), FloatAttr(2.0, f32)]),
    "DenseElementsAttr": DenseElementsAttr(b"\0\0", TENSOR),
    "UnitAttr": UnitAttr(),
    "Attribute": IntegerAttr(1, i32),
}
DECLARED = [cls for dialect in dialect_names() for cls in dialect_ops(dialect).values()]


def _variants(cls: type[DeclaredOp]) -> Iterator[Module]:
    """Modules with one op of the class: all fields or only the needed ones, equal or different types."""
    for full in (True, False):
        for types in ([TENSOR], [TENSOR, i32, FunctionType((), ())], [FunctionType((), ())]):
            yield _module(cls, full, types)


def _module(cls: type[DeclaredOp], full: bool, types: list[Type]) -> Module:
    def count(fields: Any) -> int:
        return sum({"one": 1, "optional": int(full), "variadic": 2 * full}[f.arity] for f in fields)

    module = Module.empty()
    sources = [
        unregistered_op("x.value").create((), [types[i % len(types)]])
        for i in range(count(cls.operand_fields))
    ]
    properties = {f.name: VALUES[_kind(cls, f.name)] for f in cls.attr_fields if full or not f.optional}
    regions = [Region([Block([TENSOR] if full else [])]) for _ in cls.region_fields]
    op = cls.create(
        [s.result for s in sources],
        [types[(i + 1) % len(types)] for i in range(count(cls.result_fields))],
        DictAttr(properties),
        DictAttr({"tyir.die": IntegerAttr(1, i64)} if full else {}),
        regions,
        loc=NameLoc("here"),
    )
    for inner in [*sources, op]:
        module.body.append(inner)
    return module


def _kind(cls: type[DeclaredOp], name: str) -> str:
    found = next(str(own[name]) for c in cls.__mro__ if name in (own := inspect.get_annotations(c)))
    return found.removesuffix("| None").strip()


@pytest.mark.parametrize("cls", DECLARED, ids=lambda cls: cls.name)
def test_every_declared_op_round_trips(cls: type[DeclaredOp]) -> None:
    for module in _variants(cls):
        text, generic = print_op(module, pretty=True), print_op(module)
        assert f'"{cls.name}"' not in text or cls in (Func, Module), (
            "not in the short form"
        )  # which have a form of their own: pretty.ir
        assert print_op(parse_module(text)) == generic
        assert print_op(parse_with_grammar(text)) == generic


def test_what_the_short_form_cannot_say_is_generic() -> None:
    op: Op = parse_module('"ty.yield"() <{unknown = 1 : i64}> : () -> ()').body.terminator
    assert print_op(op, pretty=True).startswith('"ty.yield"() <{unknown')
    assert print_op(parse_module(print_op(op, pretty=True))) == print_op(parse_module(print_op(op)))


def test_a_model_round_trips() -> None:
    module = parse_module(decoder_text(300))
    text = print_op(module, pretty=True)
    assert print_op(parse_module(text)) == print_op(module)
    assert "= ty.linear %" in text


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_the_short_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "in.ir", tmp_path / "out.ir"
    source.write_text('ty.global @w {file = "f", key = "k", nbytes = 4, offset = 0, type = tensor<2xf16>}\n')
    for flags, short in (([], True), (["--print-op-generic"], False)):
        monkeypatch.setattr(sys, "stdout", terminal := _Terminal())
        assert main([str(source), *flags]) == 0
        assert ("ty.global @w" in terminal.getvalue()) is short
    for flags, short in (([], False), (["--pretty"], True)):
        assert main([str(source), *flags, "-o", str(out)]) == 0
        assert ("ty.global @w" in out.read_text()) is short


@pytest.mark.parametrize(
    ("op", "hint"),
    [
        ("%r = ty.linear %x, %w : tensor<2x4xf16>", "(tensor<2x8xf16>, tensor<4x8xf16>) -> tensor<2x4xf16>"),
        ("%r = ty.linear %x, %w : tensor<2x8xf16>", "(tensor<2x8xf16>, tensor<4x8xf16>) -> tensor<2x8xf16>"),
        ('%r = ty.linear %x, %w {a = "b"} : f16', "(tensor<2x8xf16>, tensor<4x8xf16>) -> f16"),
    ],
)
def test_one_type_for_operands_of_several_is_answered_with_all_of_them(op: str, hint: str) -> None:
    text = f"func.func @f(%x: tensor<2x8xf16>, %w: tensor<4x8xf16>) {{\n  {op}\n  return\n}}"
    with pytest.raises(TyirError) as caught:
        parse_module(text)
    assert f"one type stands for all operands and results; where they differ: {hint}" in str(caught.value)


def test_a_wrong_type_in_a_signature_has_no_such_hint() -> None:
    with pytest.raises(TyirError) as caught:
        parse_module("func.func @f(%x: f16) {\n  %r = ty.silu %x : (f32) -> f32\n  return\n}")
    assert "one type stands" not in caught.value.render()
