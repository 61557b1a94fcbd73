"""The binary form of a command program: round trips, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tyir.diagnostics import TyirError
from tyir.edge10.binary import decode, encode
from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.verifier import verify


@pytest.mark.parametrize("sizes", [{}, {"tokens": 8, "group": 16, "dies": 2}, {"window": 5, "capacity": 300}])
def test_round_trip(make_model: Callable[..., Any], sizes: dict[str, int]) -> None:
    model = make_model(**sizes)
    for module in model.lowered:
        data = encode(module)
        again = decode(data)
        verify(again)
        text = print_op(module)
        assert print_op(again) == text
        assert encode(again) == data
        assert len(data) < len(text) // 3
    programs = [EdgeProgram(decode(encode(m))) for m in model.lowered]
    assert (
        simulate(programs, model.machine, 3).total_ns == simulate(model.programs, model.machine, 3).total_ns
    )


def test_what_is_refused(make_model: Callable[..., Any]) -> None:
    data = encode(make_model().lowered[0])
    with pytest.raises(TyirError, match="no binary command program"):
        decode(b'"builtin.module"')
    with pytest.raises(TyirError, match="version 63"):
        decode(data[:5] + b"c" + data[6:])
    for cut in range(6, len(data), max(1, len(data) // 40)):
        with pytest.raises(TyirError, match="damaged"):
            decode(data[:cut])
    with pytest.raises(TyirError, match="1 bytes follow"):
        decode(data + b"\0")


def test_tool_goes_both_ways(make_model: Callable[..., Any], tmp_path: Path) -> None:
    from tyir.tools.tyir_dis import main

    text, binary, again = (tmp_path / n for n in ("a.edge10", "a.bin", "b.edge10"))
    text.write_text(print_op(make_model(group=16).lowered[0]))
    assert main(["--assemble", str(text), "-o", str(binary)]) == 0
    assert main([str(binary), "-o", str(again)]) == 0
    assert again.read_text() == text.read_text()
    assert (
        main([str(text), "-o", str(again)]) == 0 and again.read_text() == text.read_text()
    )  # text is read too
    assert main(["--assemble", str(text)]) == 1 and main([str(tmp_path / "none.bin")]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"x.br"()[^next] : () -> ()\n^next:\n"x.end"() : () -> ()', "'x.br' jumps to another block"),
        ('"x.br"() : () -> ()\n^next:\n"x.end"() : () -> ()', "the label ^next"),
        ('^bb0(%x: i32 loc("a")):\n"x.end"() : () -> ()', "locations of arguments"),
        ('"x.use"(%a) : (i32) -> ()\n%a = "x.make"() : () -> i32', "uses a value before its definition"),
    ],
)
def test_what_the_bytes_do_not_hold(text: str, message: str) -> None:
    with pytest.raises(TyirError) as error:
        encode(parse_module(f'"x.region"() ({{\n{text}\n}}) : () -> ()'))
    assert message in str(error.value)


def test_resources_are_refused() -> None:
    module = parse_module('"x.op"() : () -> ()')
    module.resources["key"] = (4, b"data")
    with pytest.raises(TyirError, match="has resources"):
        encode(module)
