"""What all command-line tools share: exit codes and how errors are shown.

    @run_tool
    def main(argv: Sequence[str]) -> int: ...

gives `main(argv: Sequence[str] | None = None) -> int` (None: the process's arguments) which

* turns `TyirError` into its message on stderr and exit code 1,
* turns an interrupt into exit code 130 and a closed output pipe into a silent 141,
* does the same for SIGTERM and SIGHUP, which clean up alike; exit codes 143 and 129,
* turns what the system refuses (no memory, a full disk, a closed output) into a message that says so
  (`tyir.process.system_errors`) and exit code 1,
* turns anything else into "internal error ... this is a bug" and exit code 1,
* works with its standard streams closed or full and in any locale, and keeps the libraries it loads from
  starting more threads than the system gives (`tyir.process`),
* with `--debug` anywhere among the arguments shows the Python traceback instead of hiding it.

argparse's own exits (`--help` 0, wrong usage 2) pass through as return values.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tyir.diagnostics import TyirError

__all__ = [
    "Terminated",
    "ToolMain",
    "ToolParser",
    "add_debug_option",
    "read_stdin",
    "run_tool",
    "warn",
    "whole_number",
    "write_output",
]


class ToolMain(Protocol):
    """A tool's entry point: None means the process's own arguments; the exit code is returned."""

    def __call__(self, argv: Sequence[str] | None = None) -> int: ...


def run_tool(main: Callable[[Sequence[str]], int]) -> ToolMain:
    """Decorate a tool's `main`; see the module's docstring."""

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> int:
        if argv is None:  # as the process that it is, not as a function
            from tyir.process.streams import adopt_streams, finish_output
            from tyir.process.threads import limit_threads

            adopt_streams()
            limit_threads()
        arguments = list(sys.argv[1:] if argv is None else argv)
        try:
            try:
                with _ending_signals_as_interrupts():
                    code = main(arguments)
            except SystemExit as exit:  # argparse's own, of --help and --version
                code = _exit_code(exit)
            sys.stdout.flush()
            if argv is None:
                finish_output()
                # the process ends: its memory goes as a whole, not object by object (0.8 s for a module of
                # 100,000 ops)
                gc.freeze()
            return code
        except BaseException as error:
            try:
                return _report(error, "--debug" in arguments)
            except MemoryError:  # not even for saying so
                os.write(2, b"error: there is not enough memory\nhelp: allow more (ulimit -v)\n")
                return 1

    return wrapped


class Terminated(KeyboardInterrupt):
    """A signal that ends the process: whatever cleans up after an interrupt does so after these."""

    def __init__(self, signal: int) -> None:
        super().__init__()
        self.signal = signal


@contextmanager
def _ending_signals_as_interrupts() -> Iterator[None]:
    """Inside, SIGINT, SIGTERM and SIGHUP raise `Terminated`; after the last two, more of them are ignored, so
    that the first one's cleaning up comes to its end.

    What is raised in the middle of a library may come out as an exception of the library's: all exceptions
    after a signal are taken for its consequence.  Signals that are ignored (nohup) or that somebody else
    handles stay as they are; so do all of them outside of the main thread, where Python allows no handlers.
    """
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        received.append(number)
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)
        raise Terminated(number)

    defaults: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, usual in defaults.items() if in_main and signal.getsignal(number) is usual]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    except Exception as error:
        if received:
            raise Terminated(received[0]) from error
        raise
    finally:
        for number in ours:
            signal.signal(number, defaults[number])


def _exit_code(exit: SystemExit) -> int:
    if exit.code is None or isinstance(exit.code, int):
        return exit.code or 0
    return _say(str(exit.code), 1)


def _report(error: BaseException, debug: bool) -> int:
    """Say what ended a tool; the exit code."""
    if isinstance(error, Terminated):
        return _say("interrupted" if error.signal == signal.SIGINT else "terminated", 128 + error.signal)
    if isinstance(error, KeyboardInterrupt):
        return _say("interrupted", 130)
    from tyir.process.streams import silence_output
    from tyir.process.system_errors import system_error

    if isinstance(error, BrokenPipeError):
        silence_output()
        return 141
    trace = traceback.format_exc() if debug else ""
    if isinstance(error, TyirError):
        return _say(trace + error.render(), 1)
    if (refused := system_error(error)) is not None:
        return _say(trace + refused.render(), 1)
    return _say(trace or _internal_error(error), 1)


def add_debug_option(parser: argparse.ArgumentParser) -> None:
    """The `--debug` flag, for the help text; `run_tool` itself looks for it."""
    parser.add_argument("--debug", action="store_true", help="show Python tracebacks")


def read_stdin() -> str:
    """The text on standard input; `TyirError` when there is none, or when it is not UTF-8."""
    from tyir.process.streams import read_input
    from tyir.text.source_file import MAX_SOURCE, decode_source

    try:
        data = read_input(MAX_SOURCE)
    except OSError as error:
        raise TyirError(
            f"cannot read standard input: {error.strerror}", help="give a file, or pipe the text in"
        ) from None
    return decode_source(data, "<stdin>")


def warn(message: str) -> None:
    """A warning on stderr."""
    print(f"warning: {message}", file=sys.stderr)


def _say(message: str, code: int) -> int:
    print(message.rstrip("\n"), file=sys.stderr)
    return code


def _internal_error(error: BaseException) -> str:
    """One paragraph: what happened, where, and what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" (in {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    text = str(error).splitlines()[0][:300] if str(error) else ""
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    return (
        f"internal error: {type(error).__name__}: {text}{place}{notes}\n"
        "this is a bug in tyir, not in your input; run again with --debug for the traceback and report it"
    )


def whole_number(text: str) -> int:
    """An argument of kind `int`: what the IR's i64 holds.

    `ValueError` for what is not one, `ArgumentTypeError` for one that is too large.
    """
    value = int(text) if len(text) < 1000 else 1 << 63
    if not -(1 << 63) <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"{text[:40]} has more than 63 bits")
    return value


def number(text: str) -> float:
    """An argument of kind `float`; NaN is not one."""
    value = float(text)
    if math.isnan(value):
        raise ValueError("not a number")
    return value


class ToolParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `TyirError`s; flags are never abbreviated.

    Exit code 1, in the style of all other messages.  Numbers of kinds `int` and `float` are bounded.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)
        self.register("type", int, whole_number)
        self.register("type", float, number)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The value of an option may be `--`, of which Python before 3.13 makes an empty list."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        raise TyirError(f"{self.prog}: {message}", help=f"{self.prog} --help lists the options")


def write_output(text: str, path: str) -> None:
    """Write text to a file, which appears complete or not at all, or to standard output for `-`.

    `TyirError` when it cannot be written.
    """
    if path == "-":
        sys.stdout.write(text)
        return
    target = Path(os.path.realpath(path))  # a link stays a link
    if target.exists() and not target.is_file():
        _write_through(text, target)
        return
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise TyirError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)


def _write_through(text: str, target: Path) -> None:
    """A device or a pipe must be written to, never replaced."""
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TyirError(f"cannot write {target}: {error.strerror}") from None
