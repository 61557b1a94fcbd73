"""The fast parser and the normative grammar read the same IR: from every IR file of the tests, and from
random modules in both forms.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

import pytest

from tests.grammar_parser import parse_with_grammar
from tyir.attributes import ArrayAttr, Attribute, DictAttr, StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.ir import Block, Op, Region, Value, unregistered_op
from tyir.location import UNKNOWN, Location
from tyir.parser import parse_module
from tyir.printer import print_op
from tyir.registry import dialect_names, dialect_ops
from tyir.traits import IsolatedFromAbove
from tyir.types import FunctionType, Type

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


# --------------------------------------------------------------------------------------------- random modules


@cache
def _pool() -> tuple[list[Attribute], list[Type], list[Location]]:
    """Every attribute, type and location of the tests' files."""
    found: dict[Attribute, None] = {}
    for path in sorted(TESTS.rglob("*.ir")):
        for text in path.read_text(encoding="utf-8").split("// -----"):
            try:
                module = parse_module(text)
            except TyirError:
                continue
            for op in module.walk():
                found.update(
                    dict.fromkeys(
                        [
                            op.loc,
                            *op.properties.values(),
                            *op.attributes.values(),
                            *(v.type for v in op.results),
                        ]
                    )
                )
    return (
        [x for x in found if not isinstance(x, Location)],
        [x for x in found if isinstance(x, Type)],
        [x for x in found if isinstance(x, Location)],
    )


class _Random:
    """Random IR: functions of declared and of unknown ops, some with regions, over values in scope."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.attributes, self.types, self.locations = _pool()
        self.declared = [
            c for d in dialect_names() for c in dialect_ops(d).values() if c is not Func and c is not Module
        ]

    def module(self) -> Module:
        module = Module.empty(self.maybe("m"))
        for number in range(self.rng.randint(1, 2)):
            module.body.append(self.function(f"f{number}"))
        return module

    def function(self, name: str) -> Func:
        kinds = self.kinds(3)
        region = Region()
        if self.rng.random() < 0.9:
            entry = region.append(Block(kinds, [self.name() for _ in kinds]))
            self.fill(entry, list(entry.args), 2)
            entry.append(Return.create())
        entries: dict[str, Attribute] = {
            "sym_name": StringAttr(name),
            "function_type": FunctionType(tuple(kinds), tuple(self.kinds(2))),
        }
        if self.rng.random() < 0.3:
            entries["sym_visibility"] = StringAttr(self.rng.choice(["private", "public", "nested", "odd"]))
        if self.rng.random() < 0.3:
            entries["arg_attrs"] = ArrayAttr([self.dictionary() for _ in kinds])
        return Func.create(
            properties=DictAttr(entries), attributes=self.dictionary(), regions=[region], loc=self.loc()
        )

    def fill(self, block: Block, visible: list[Value], depth: int) -> None:
        for _ in range(self.rng.randint(0, 3)):
            cls: type[Op] = (
                self.rng.choice(self.declared)
                if self.rng.random() < 0.7
                else unregistered_op(self.rng.choice(["x.a", "x.b", "y"]))
            )
            outside = [] if IsolatedFromAbove in cls.traits else visible
            regions = [
                self.region(outside, depth - 1)
                for _ in range(self.rng.choice((0, 0, 0, 1, 2)) if depth else 0)
            ]
            op = cls.create(
                self.rng.sample(visible, min(len(visible), self.rng.randint(0, 3))),
                self.kinds(3),
                self.properties(cls),
                self.dictionary(),
                regions,
                loc=self.loc(),
                result_names=[self.name() for _ in range(2)],
            )
            block.append(op)
            visible = [*visible, *op.results]

    def region(self, visible: list[Value], depth: int) -> Region:
        block = Block(self.kinds(2), [self.name()])
        self.fill(block, [*visible, *block.args], depth)
        return Region([block])

    def properties(self, cls: type[Op]) -> DictAttr:
        keys = [f.key for f in getattr(cls, "attr_fields", ())] if self.rng.random() < 0.9 else ["other key"]
        return DictAttr({key: self.rng.choice(self.attributes) for key in keys if self.rng.random() < 0.7})

    def dictionary(self) -> DictAttr:
        count = self.rng.choice((0, 0, 0, 1, 2))
        return DictAttr(
            {
                self.rng.choice(["tyir.die", "a", "with space"]): self.rng.choice(self.attributes)
                for _ in range(count)
            }
        )

    def kinds(self, most: int) -> list[Type]:
        return (
            [self.rng.choice(self.types)] * self.rng.randint(0, most)
            if self.rng.random() < 0.5
            else self.rng.sample(self.types, self.rng.randint(0, most))
        )

    def name(self) -> str | None:
        return self.maybe(self.rng.choice(["a", "b_1", "arg0", "long.name"]))

    def maybe(self, name: str) -> str | None:
        return name if self.rng.random() < 0.5 else None

    def loc(self) -> Location:
        return self.rng.choice(self.locations) if self.rng.random() < 0.5 else UNKNOWN


def _round_trips(seed: int, count: int) -> None:
    source = _Random(seed)
    for _ in range(count):
        module = source.module()
        generic = print_op(module)
        for text in (generic, print_op(module, pretty=True)):
            assert print_op(parse_module(text)) == generic
            assert print_op(parse_with_grammar(text)) == generic


def test_random_modules() -> None:
    _round_trips(seed=1, count=150)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_random_modules_many(seed: int) -> None:
    _round_trips(seed=1000 + seed, count=2000)
