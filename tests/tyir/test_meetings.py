"""Which programs of dies meet from beginning to end, so that compiled code need not look."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.execution.meetings import can_meet, workers_of
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


def test_threads_that_take_dies_through_their_steps() -> None:
    """Of stages one has work at a time, whose kernels all threads are for then."""
    assert [workers_of(threads, dies, 1) for threads, dies in [(1, 4), (2, 4), (4, 6), (8, 3)]] == [
        1,
        2,
        2,
        1,
    ]
    assert workers_of(4, 4, 2) == 1
