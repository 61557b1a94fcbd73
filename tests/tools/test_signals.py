"""A signal that ends a tool lets it clean up and gives the shell's exit code, whatever it interrupts."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest

from tyir.diagnostics import TyirError
from tyir.tools.cli import run_tool

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def strike(number: int) -> None:
    os.kill(os.getpid(), number)


def plain(number: int) -> None:
    strike(number)


def wrapped(number: int) -> None:
    """As a library that calls Python from C gives the exception back."""
    try:
        strike(number)
    except BaseException:
        raise RuntimeError("") from None


def explained(number: int) -> None:
    try:
        strike(number)
    except BaseException:
        raise TyirError("cannot read weights") from None


def twice(number: int) -> None:
    try:
        strike(number)
    finally:
        if number != signal.SIGINT:
            strike(number)


def in_clean_up(number: int) -> None:
    try:
        raise ValueError
    finally:
        strike(number)


class Dropping:
    """Python drops what a destructor raises."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        strike(self.number)


def in_destructor(number: int) -> None:
    Dropping(number)
    time.sleep(60)


def in_collection(number: int) -> None:
    """As with whatever watches the garbage collector."""

    def callback(phase: str, info: object) -> None:
        gc.callbacks.remove(callback)
        strike(number)

    gc.callbacks.append(callback)
    gc.collect()
    time.sleep(60)


@pytest.mark.parametrize("number", CODES)
@pytest.mark.parametrize(
    "where", [plain, wrapped, explained, twice, in_clean_up, in_destructor, in_collection]
)
def test_exit_codes(where: Callable[[int], None], number: int, capsys: pytest.CaptureFixture[str]) -> None:
    cleaned = []

    @run_tool
    def main(argv: object) -> int:
        try:
            where(number)
        finally:
            cleaned.append(True)
        return 0

    before = [signal.getsignal(n) for n in CODES]
    assert main([]) == CODES[number] and cleaned
    assert capsys.readouterr().err == ("interrupted\n" if number == signal.SIGINT else "terminated\n")
    assert [signal.getsignal(n) for n in CODES] == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_ignored_signals_stay_ignored(number: int) -> None:
    """As under nohup."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert run_tool(lambda argv: plain(number) or 0)([]) == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", CODES)
def test_work_that_ends_before_a_dropped_signal_is_back(number: int) -> None:
    assert run_tool(lambda argv: Dropping(number) and 0)([]) == CODES[number]


def test_a_tool_in_a_thread_leaves_the_handlers_alone() -> None:
    codes = []
    thread = threading.Thread(target=lambda: codes.append(run_tool(lambda argv: 3)([])))
    thread.start()
    thread.join()
    assert codes == [3]


def test_a_tool_in_a_thread_leaves_what_python_drops_to_others() -> None:
    before, seen = sys.unraisablehook, []
    thread = threading.Thread(target=run_tool(lambda argv: seen.append(sys.unraisablehook) or 0), args=([],))
    thread.start()
    thread.join()
    assert seen == [before]


def test_errors_without_a_signal_are_what_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(argv: object) -> int:
        raise TyirError("a file is missing")

    def bug(argv: object) -> int:
        raise RuntimeError("a bug")

    assert run_tool(wrong)([]) == run_tool(bug)([]) == 1
    assert "a file is missing" in (said := capsys.readouterr().err) and "RuntimeError: a bug" in said
