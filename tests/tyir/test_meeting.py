"""Dies in threads of their own meet as dies in lockstep do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.execution.lockstep import Layout, Meet, Meeting, OneProcess, Recv, Send


def layout(number: int) -> Layout:
    return Layout((1,), np.dtype(np.int64))


def joined(parts: Sequence[Any]) -> Any:
    return np.concatenate(list(parts))


def meet(value: int, *dies: int) -> Meet:
    return Meet("gather", dies, np.array([value]), joined, layout, "gather")


def run(dies: Sequence[Callable[[Meeting], Any]]) -> list[Any]:
    """What each die's function returns, or raises."""
    meeting = Meeting(OneProcess(len(dies)))

    def one(die: Callable[[Meeting], Any]) -> Any:
        try:
            return die(meeting)
        except TyirError as error:
            meeting.leave(error)
            return error
        else:
            meeting.leave()

    with ThreadPoolExecutor(len(dies)) as pool:
        return list(pool.map(one, dies))


def test_all_dies_get_all_parts_every_time() -> None:
    def die(number: int) -> Callable[[Meeting], list[list[int]]]:
        return lambda m: [m.ask(number, meet(10 * turn + number)).tolist() for turn in range(50)]  # type: ignore[union-attr]

    wanted = [[10 * turn, 10 * turn + 1, 10 * turn + 2] for turn in range(50)]
    assert run([die(0), die(1), die(2)]) == [wanted] * 3


def test_groups_meet_by_themselves_and_a_send_does_not_wait() -> None:
    def first(m: Meeting) -> Any:
        m.ask(0, Send((1,), 7, np.array([5]), "send"))
        return m.ask(0, meet(0, 0, 2))

    def second(m: Meeting) -> Any:
        return m.ask(1, Recv(0, 7, lambda: layout(0), "recv"))

    def third(m: Meeting) -> Any:
        return m.ask(2, meet(2, 0, 2))

    assert [a.tolist() for a in run([first, second, third])] == [[0, 2], [5], [0, 2]]


def test_dies_that_wait_in_vain_are_named() -> None:
    def waits(m: Meeting) -> Any:
        return m.ask(1, Recv(0, 7, lambda: layout(0), "dist.recv"))

    def ends(m: Meeting) -> Any:
        m.leave()

    meeting = Meeting(OneProcess(2))
    ends(meeting)
    with pytest.raises(TyirError, match=r"the dies do not meet: die 1 at dist\.recv; 1 of 2 dies have"):
        waits(meeting)


def test_what_one_die_fails_of_ends_the_others() -> None:
    def fails(m: Meeting) -> Any:
        raise TyirError("broken")

    failed = run([fails, lambda m: m.ask(1, meet(1))])
    assert [str(error) for error in failed] == [str(failed[0])] * 2
