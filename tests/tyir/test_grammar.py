"""The fast parser and the normative grammar read the same IR from every IR file of the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tyir.diagnostics import TyirError
from tyir.lark_parser import parse_with_grammar
from tyir.parser import parse_module
from tyir.printer import print_op

TESTS = Path(__file__).resolve().parents[1]
PARTS = [
    pytest.param(part, id=f"{path.name}-{number}")
    for path in sorted(TESTS.rglob("*.ir"))
    for number, part in enumerate(path.read_text(encoding="utf-8").split("// -----"))
]


@pytest.mark.parametrize("text", PARTS)
def test_same_ir_or_both_refuse(text: str) -> None:
    try:
        fast = print_op(parse_module(text))
    except TyirError:
        with pytest.raises(TyirError):
            parse_with_grammar(text)
        return
    assert print_op(parse_with_grammar(text)) == fast


def test_grammar_reads_what_is_printed() -> None:
    text = print_op(parse_module((TESTS / "tyir/generic.ir").read_text(encoding="utf-8")))
    assert print_op(parse_with_grammar(text)) == text
