"""Broken input: every text is read, or refused with a position; by the fast parser and the grammar alike."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.grammar_parser import parse_with_grammar
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.parser import parse_file, parse_module
from tyir.printer import print_op
from tyir.tools.tyir_opt import main

HERE = Path(__file__).parent
GENERIC = (HERE / "generic.ir").read_text(encoding="utf-8")
SHORT = "".join(
    line
    for line in (HERE / "pretty.ir").read_text(encoding="utf-8").splitlines(keepends=True)
    if not line.startswith("//")
)
ALPHABET = '"%@#!^<>(){}[]:=,-+.0123456789abxi\n \\/'
POSITION = re.compile(r"^<string>:\d+:\d+: error: ", re.MULTILINE)


def _read(text: str) -> Module | None:
    """The module; None for a text refused with a position.  Anything else fails the test."""
    try:
        return parse_module(text)
    except TyirError as error:
        assert POSITION.match(error.render()), error.render()
        return None


def _parses_or_refuses(text: str) -> str | None:
    """Any text is refused, or is read, printed and read again as the same IR, which is returned."""
    module = _read(text)
    if module is None:
        return None
    printed = print_op(module)
    assert print_op(parse_module(printed)) == printed
    return printed


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("text", [GENERIC, SHORT], ids=["generic", "short"])
def test_files_cut_at_any_character(text: str, step: int) -> None:
    for end in range(0, len(text), step):
        _read(text[:end])


@pytest.mark.parametrize("name", ["generic.ir", "pretty.ir"])
def test_files_cut_at_any_byte(name: str, tmp_path: Path) -> None:
    raw, path = (HERE / name).read_bytes(), tmp_path / "cut.ir"
    starts = [i for i, byte in enumerate(raw) if byte > 127]
    for end in {*starts, *[i + 1 for i in starts], *range(0, len(raw), 97)}:
        path.write_bytes(raw[:end])
        try:
            parse_file(path)
        except TyirError as error:
            assert re.match(re.escape(str(path)) + r":\d+:\d+: error: ", error.render())


def test_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    rng, path = random.Random(3), tmp_path / "wrong.ir"
    for _ in range(200):
        raw = bytearray(GENERIC.encode())
        raw[rng.randrange(len(raw))] = rng.randrange(128, 256)
        path.write_bytes(raw)
        try:
            parse_file(path)
        except TyirError as error:
            assert re.match(re.escape(str(path)) + r":\d+:\d+: error: ", error.render())


def _mutated(rng: random.Random) -> str:
    """Some lines, a part or all of a file, with a few characters changed, deleted or inserted."""
    base = rng.choice((GENERIC, SHORT))
    lines = base.splitlines(keepends=True)
    kind = rng.random()
    if kind < 0.4:
        text = list("".join(rng.sample(lines, 6)))
    elif kind < 0.7:
        text = list(base)
    else:
        text = list(base[(at := rng.randrange(len(base))) : at + 400])
    for _ in range(rng.randint(0, 4) if len(text) > 4 else 0):
        position, action = rng.randrange(len(text)), rng.random()
        if action < 0.4:
            text[position] = rng.choice(ALPHABET)
        elif action < 0.7:
            del text[position]
        else:
            text.insert(position, rng.choice(ALPHABET))
    return "".join(text)


def _mutations(count: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        text = _mutated(rng)
        _parses_or_refuses(text)


def _same_by_the_grammar(count: int, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(count):
        text = _mutated(rng)
        fast = _parses_or_refuses(text)
        try:
            slow: str | None = print_op(parse_with_grammar(text))
        except TyirError:
            slow = None
        assert fast == slow, text


def test_mutated_files() -> None:
    _mutations(1500, seed=1)


@pytest.mark.parametrize(
    "text",
    [
        '"x.y"() <{a = array<i764: 4>}> : () -> ()',
        '"x.y"() <{a = array<index: 4>}> : () -> ()',
        "moduleattributes {a} {\n}",
        "returned",
        '{-# dialect_resources: { builtin: { a: "0x01000000" } ,} #-}',
        '{-# dialect_resources: { builtin: { a: "0x01000000", } } #-}',
        "{-# external_resources: { a: 1 b: 2 } #-}",
        "{-# external_resources: { a: { b: 1, } } #-}",
        "{-# external_resources: { a: 1 #-}",
    ],
)
def test_refused_by_both_parsers(text: str) -> None:
    for parse in (parse_module, parse_with_grammar):
        with pytest.raises(TyirError):
            parse(text)


def test_mutated_files_by_the_grammar() -> None:
    _same_by_the_grammar(500, seed=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_mutated_files_many(seed: int) -> None:
    _mutations(10_000, seed=100 + seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_mutated_files_by_the_grammar_many(seed: int) -> None:
    _same_by_the_grammar(10_000, seed=200 + seed)


LINES: dict[str, Callable[[int], str]] = {
    "word": lambda n: "x" * (10 * n),
    "quotes": lambda n: '"x' * (5 * n),
    "brackets": lambda n: "(" * (10 * n),
    "string": lambda n: '"x.op"() <{a = "' + "y" * (10 * n) + '"}> : () -> ()',
    "dense": lambda n: '"x.op"() <{a = dense<"0x' + "0F" * (5 * n) + f'"> : tensor<{5 * n}xi8>}}> : () -> ()',
    "array": lambda n: '"x.op"() <{a = [' + "1, " * (3 * n) + "1]}> : () -> ()",
    "operands": lambda n: '"x.op"(' + "%a, " * (2 * n) + "%a) : () -> ()",
    "short operands": lambda n: "%a = ty.add " + "%a, " * (2 * n) + "%a : f16",
    "comment": lambda n: "/" * (10 * n),
    "locations": lambda n: "#a = loc(" * n,
    "types": lambda n: '"x.op"() : (' + "i32, " * (2 * n) + "i32) -> ()",
    "arguments": lambda n: "func.func @f(" + "%a: i32, " * n + ") {",
}


@pytest.mark.parametrize("size", [100_000, pytest.param(1 << 20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("line", LINES)
def test_long_lines(line: str, size: int) -> None:
    """Lines of one and of ten megabytes: a parser whose time grows with their square would not come back."""
    _read(LINES[line](size))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("module { func.func private @f()\nfunc.func private @f() }", "symbol @f"),
        ("#a = loc(#a)\n", "unknown alias #a"),
        ('"x.op"() : () -> () loc(#a)\n#a = loc("x"(#b))\n#b = loc("x"(#a))\n', "unknown alias #a"),
        ("!a = tensor<2x!a>\n", "unknown alias !a"),
        ("func.func @f() { call @g() : () -> ()\nreturn }", "@g"),
        ('%a = "x.op"(%a) : (i32) -> i32', "%a"),
        ('%a = "x.op"(%b) : (i32) -> i32\n%b = "x.op"(%a) : (i32) -> i32', "%b"),
    ],
)
def test_duplicates_and_cycles(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "in.ir"
    path.write_text(text)
    assert main([str(path), "--allow-unregistered-dialect"]) == 1
    error = capsys.readouterr().err
    assert re.match(re.escape(str(path)) + r":\d+:\d+: error: ", error)
    assert message in error


def test_functions_that_call_each_other_stay() -> None:
    text = (
        "func.func @f() {\n  call @g() : () -> ()\n  return\n}\nfunc.func @g() {\n  call @f() : () -> ()\n "
        " return\n}\n"
    )
    printed = _parses_or_refuses(text)
    assert printed is not None
    assert printed.count("func.call") == 2


def test_many_problems_of_one_kind_are_counted() -> None:
    """A damaged file makes hundreds that differ in names and numbers alone; others are not lost."""
    many = [Diagnostic(f"'model.layers.{i}.weight' holds {i} NaN values", help="again") for i in range(300)]
    error = TyirError([*many[:200], Diagnostic("config.json is damaged"), *many[200:]])
    text = str(error)
    assert len(error.diagnostics) == 301 and text.count("error:") == 9
    assert "config.json is damaged" in text
    assert text.endswith("... and 292 more like: 'model.layers.0.weight' holds 0 NaN values")
    assert "more like" not in str(TyirError(many[:8]))
