"""Which programs of dies meet from beginning to end, so that compiled code need not look."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest

from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.execution.meetings import FIRST_SITE, WORDS, MeetingMemory, can_meet, collectives_of
from tyir.parser import parse_module

SUM = '%{n} = "dist.all_reduce"(%x) : (tensor<8xf16>) -> tensor<8xf16>'
NOTHING = '%{n} = "dist.all_reduce"() : () -> tensor<8xf16>'
LONGER = '%{n} = "dist.all_reduce"(%y) : (tensor<16xf16>) -> tensor<16xf16>'
JOIN = (
    '%{n} = "dist.all_gather"(%x) <{{axis = 0 : i64, sizes = array<i64: 8, 16>}}>'
    " : (tensor<8xf16>) -> tensor<24xf16>"
)
JOIN_LONGER = JOIN.replace("%x", "%y").replace("(tensor<8xf16>)", "(tensor<16xf16>)")
SEND = '"dist.send"(%x) <{{tag = 3 : i64, targets = array<i64: 1>}}> : (tensor<8xf16>) -> ()'
TAKE = '%{n} = "dist.recv"() <{{source = 0 : i64, tag = 3 : i64}}> : () -> tensor<8xf16>'
TAKE_LONGER = TAKE.replace("tensor<8xf16>", "tensor<16xf16>")
CALL = '"func.call"(%x, %y) <{{callee = @layer}}> : (tensor<8xf16>, tensor<16xf16>) -> ()'


def function(name: str, lines: Sequence[str]) -> str:
    body = "\n".join(line.format(n=number) for number, line in enumerate(lines))
    return f"""func.func @{name}(%x: tensor<8xf16>, %y: tensor<16xf16>) {{
{body}
return
}}
"""


def die(*lines: str, layer: Sequence[str] = ()) -> list[Func]:
    module = parse_module(function("layer", layer) + function("main", lines))
    assert isinstance(module, Module)
    return [op for op in module.body if isinstance(op, Func)]


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        (die(SUM, JOIN), die(SUM, JOIN_LONGER), True),
        (die(SUM), die(NOTHING), True),
        (die(SEND, SUM), die(TAKE, SUM), True),
        (die(CALL, CALL, layer=[SUM]), die(SUM, SUM), True),
        (die(SUM), die(), False),
        (die(CALL, layer=[SUM]), die(SUM, SUM), False),
        (die(SUM), die(LONGER), False),
        (die(JOIN), die(JOIN), False),  # one of them gives fewer numbers than all expect
        (die(SUM, JOIN), die(JOIN_LONGER, SUM), False),
        (die(SEND), die(), False),  # what nobody takes would keep the next step's from being sent
        (die(), die(TAKE), False),
        (die(SEND), die(TAKE_LONGER), False),
        (die(SUM, SEND), die(TAKE, SUM), False),
    ],
)
def test_programs_that_meet(first: list[Func], second: list[Func], meet: bool) -> None:
    assert can_meet([first, second]) == meet


def test_dies_that_meet_have_the_same_places() -> None:
    programs = [die(SEND, SUM, JOIN), die(TAKE, SUM, JOIN_LONGER)]
    memory = MeetingMemory([collectives_of(functions) for functions in programs], workers=1, looks=5)
    words = FIRST_SITE + 1 + 3 + 3
    first, second = (_at(address, words) for address in memory.contexts)
    (worker,) = memory.workers
    assert first[0] == second[0] == worker
    assert first[1] == second[1] != first[2] == second[2] == first[5] == second[5]
    assert [*first[3:5], *second[3:5]] == [0, 2, 1, 2]
    list_of_dies = _at(worker, WORDS["list"] + 2)[WORDS["list"] :]
    assert [_at(address, 1)[0] for address in list_of_dies] == [d[0] for d in memory.of_dies]


def _at(address: int, words: int) -> list[int]:
    return list((ctypes.c_int64 * words).from_address(address))
