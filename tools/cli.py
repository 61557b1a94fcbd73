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
* keeps the warnings of other libraries out of what a command says (`-v` lets them through),
* with `--debug` anywhere among the arguments shows the Python traceback instead of hiding it.

`ToolParser` gives every command `--version`, `-q`, `-v` and `--debug`, and answers what it does not know with
what was probably meant (`tyir.tools.commands.unknown`).  A command says things on standard error by `warn`
(always), `note` (not with `-q`) and `detail` (with `-v`), and prints a result by `print` or, with `--json`,
by `tyir.tools.commands.json_forms.print_json`.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NoReturn, Protocol

from tyir.diagnostics import Diagnostic, TyirError

__all__ = [
    "EXIT_CODES",
    "Terminated",
    "ToolMain",
    "ToolParser",
    "add_json_option",
    "add_ray_option",
    "check_output",
    "check_ray_has_a_sweep",
    "detail",
    "note",
    "quiet",
    "read_stdin",
    "run_tool",
    "warn",
    "whole_number",
    "write_output",
]

# What a command's exit code means; docs/json.md is written from this.
EXIT_CODES: Final = {
    0: "done; everything that was to be written is written",
    1: "`error: ...` on standard error, with a cure: a wrong file, argument or IR, a check that failed"
    " (`tyir-verify`, `tyir-opt --verify-diagnostics`), or what the system refuses (memory, space,"
    " permission, a closed standard output); `internal error` is a bug of tyir",
    129: "the terminal was closed (SIGHUP)",
    130: "interrupted (Ctrl-C, SIGINT)",
    141: "nobody reads standard output any more (a pager that was closed)",
    143: "terminated (SIGTERM)",
}


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
            import hashlib  # noqa: F401  (while there is memory: without, it logs tracebacks of its own)

            from tyir.process import extras, system_errors  # noqa: F401  (while files can be opened)

            extras.begin_command()
            if not {"-v", "--verbose"}.intersection(sys.argv[1:]):
                _quieten_libraries()
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
    after a signal are taken for its consequence.  What is raised where Python drops exceptions (destructors,
    callbacks of the garbage collector or of C) is raised again a moment later.  Signals that are ignored
    (nohup) or that somebody else handles stay as they are; so do all of them outside of the main thread,
    where Python allows no handlers.
    """
    received: list[int] = []
    heard, main_thread = threading.Event(), threading.get_ident()
    reminders: list[threading.Thread] = []

    def end(number: int, frame: object) -> None:
        heard.set()
        received.append(number)
        if number != signal.SIGINT:
            signal.signal(number, signal.SIG_IGN)
        raise Terminated(number)

    def dropped(what: sys.UnraisableHookArgs) -> None:
        if not isinstance(what.exc_value, Terminated):
            others_hook(what)
            return
        number = what.exc_value.signal
        signal.signal(number, end)
        heard.clear()
        reminders.append(threading.Thread(target=remind, args=(number,), daemon=True))
        reminders[-1].start()

    def remind(number: int) -> None:
        # more than once: Python looks for signals after a call, not between two that take long
        while not heard.wait(0.01):
            signal.pthread_kill(main_thread, number)

    defaults: dict[int, Any] = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    in_main = threading.current_thread() is threading.main_thread()
    ours = [number for number, usual in defaults.items() if in_main and signal.getsignal(number) is usual]
    for number in ours:
        signal.signal(number, end)
    others_hook = sys.unraisablehook
    if ours:  # of the process: a tool in another thread raises nothing that could be dropped
        sys.unraisablehook = dropped
    try:
        yield
        if reminders and not heard.is_set():
            raise Terminated(received[-1])
    except Exception as error:
        if received:
            raise Terminated(received[0]) from error
        raise
    finally:
        if ours:
            sys.unraisablehook = others_hook
        heard.set()
        for thread in reminders:
            thread.join()  # before its signal finds the system's handler
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
    from tyir.process.extras import missing_library
    from tyir.process.streams import silence_output
    from tyir.process.system_errors import system_error

    if isinstance(error, BrokenPipeError):
        silence_output()
        return 141
    trace = traceback.format_exc() if debug else ""
    if isinstance(error, TyirError):
        return _say(trace + error.render(), 1)
    if (absent := missing_library(error)) is not None:
        return _say(trace + absent.render(), 1)
    if (refused := system_error(error)) is not None:
        return _say(trace + refused.render(), 1)
    return _say(trace or _internal_error(error), 1)


def _quieten_libraries() -> None:
    """Keep warnings meant for who programs with a library from who runs a command; `-W` and the libraries'
    own variables still decide.
    """
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns on every fork otherwise


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


# ------------------------------------------------------------------------------------------ saying things

_level = 0  # of the command that runs: -1 with -q, 1 with -v


def warn(message: str) -> None:
    """A warning on stderr."""
    _say(f"warning: {message}", 0)


def note(message: str) -> None:
    """What a command did, on stderr; `-q` leaves it out."""
    if _level >= 0:
        print(message, file=sys.stderr)


def detail(message: str) -> None:
    """What only `-v` asks for, on stderr."""
    if _level > 0:
        print(message, file=sys.stderr)


def quiet() -> bool:
    """Whether `-q` was given: no progress, no notes."""
    return _level < 0


_COLOURS: Final = {"error": "1;31", "internal error": "1;31", "warning": "1;33", "help": "1;36"}
_KIND: Final = re.compile(r"^((?:[^\s:]+:\d+:\d+: )?)(error|internal error|warning|help)(?=: )", re.MULTILINE)


def _say(message: str, code: int) -> int:
    message = message.rstrip("\n")
    if _has_colours():
        message = _KIND.sub(lambda m: f"{m[1]}\x1b[{_COLOURS[m[2]]}m{m[2]}\x1b[0m", message)
    print(message, file=sys.stderr)
    return code


def _has_colours() -> bool:
    """On a terminal that has them, unless NO_COLOR says otherwise (https://no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb" and sys.stderr.isatty()


def _internal_error(error: BaseException) -> str:
    """One paragraph: what happened, where, and what to do."""
    frames = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    own = [frame for frame in frames if _is_users(frame.filename)]
    if own:
        line = f": {own[-1].line}" if own[-1].line else ""
        return (
            Diagnostic(
                text,
                where=f"{own[-1].filename}:{own[-1].lineno}:1",
                excerpt=f"in {own[-1].name}{line}",
                help="this is in a file of yours; --debug shows the whole traceback",
            ).render()
            + notes
        )
    place = f" (in {Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return (
        f"internal error: {text}{place}{notes}\n"
        "this is a bug in tyir, not in your input; run again with --debug for the traceback and report it"
        " with what tyir doctor prints"
    )


def _is_users(file: str) -> bool:
    """Whether code stands in a file of the user's: neither tyir's, nor a library's, nor Python's."""
    import sysconfig

    if file.startswith("<"):
        return False
    ours = [p for name in _PACKAGES if (module := sys.modules.get(name)) for p in module.__path__]
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    libraries += [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    real = Path(os.path.realpath(file))
    return not any(real.is_relative_to(os.path.realpath(folder)) for folder in (*ours, *libraries))


_PACKAGES: Final = (
    "tyir",
    *(f"tyir.{n}" for n in ("passes", "frontends", "backends", "runtime_sim", "tools")),
)

# ------------------------------------------------------------------------------------------------ arguments


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


def path(text: str) -> Path:
    """An argument of kind `Path`; nothing at all, as a variable that is not set leaves, is none, and would be
    the current folder.
    """
    if not text:
        raise argparse.ArgumentTypeError("the name is empty")
    return Path(text)


class _Version(argparse.Action):
    """Looks the version up when it is asked for: that takes longer than everything else here."""

    def __call__(self, parser: argparse.ArgumentParser, *unused: object) -> None:
        from importlib.metadata import version

        print(f"tyir {version('tyir')}")
        parser.exit()


class ToolParser(argparse.ArgumentParser):
    """An argument parser whose complaints are `TyirError`s; flags are never abbreviated and may stand between
    files.

    Exit code 1, in the style of all other messages.  Numbers of kinds `int` and `float` are bounded.  Every
    parser has `--version`, `-q`, `-v` and `--debug`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, **options)
        self.register("type", int, whole_number)
        self.register("type", float, number)
        self.register("type", Path, path)
        common = self.add_argument_group("options of every command")
        common.add_argument(
            "-q", "--quiet", action="store_true", help="no progress and no notes; warnings and errors stay"
        )
        common.add_argument(
            "-v",
            "--verbose",
            action="store_true",
            help="also say what is done meanwhile, and what libraries say",
        )
        common.add_argument("--debug", action="store_true", help="show Python tracebacks")
        common.add_argument("--version", action=_Version, nargs=0, help="print the version")

    def format_help(self) -> str:
        """The help, with what every command has at the end."""
        groups = self._action_groups
        groups.sort(key=lambda group: group.title == "options of every command")
        return super().format_help()

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """The arguments; `TyirError` with the cure of what is wrong with them."""
        words = list(sys.argv[1:] if args is None else args)
        self.refuse_unknown(words)
        found, rest = self.parse_known_intermixed_args(words, namespace)
        if rest:
            from tyir.tools.commands.unknown import too_much

            raise too_much(self, words, rest)
        self.said(found)
        return found

    def said(self, found: argparse.Namespace) -> None:
        """How much the command says from now on."""
        global _level
        _level = -1 if found.quiet else 1 if found.verbose else 0
        if found.verbose or "tyir.process.progress" in sys.modules:
            from tyir.process.progress import lines_in_pipes

            lines_in_pipes(found.verbose)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse's, whose complaints about one argument are said with what that argument is for."""
        try:
            return super().parse_known_args(args, namespace)
        except argparse.ArgumentError as error:
            from tyir.tools.commands.unknown import wrong_value

            raise wrong_value(self, error) from None

    def refuse_unknown(self, words: Sequence[str]) -> None:
        """`TyirError` for all flags that the parser does not have, before it misses what they stand for."""
        unknown = [word for word in self._flags(words) if not self._knows(word)]
        if unknown:
            from tyir.tools.commands.unknown import unknown_options

            raise unknown_options(self, unknown)

    def _flags(self, words: Sequence[str]) -> Iterator[str]:
        """The words that argparse takes for flags."""
        for word in words:
            if word == "--":
                return
            if word[:1] == "-" and len(word) > 1 and " " not in word and not re.match(r"-\.?\d", word):
                yield word

    def _knows(self, flag: str) -> bool:
        known = self._option_string_actions
        return flag.partition("=")[0] in known or (flag[1] != "-" and flag[:2] in known)

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        """The value of an option may be `--`, of which Python before 3.13 makes an empty list."""
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            return self._get_value(action, "--")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        from tyir.tools.commands.unknown import wrong_usage

        raise wrong_usage(self, message)


def add_json_option(parser: argparse._ActionsContainer, what: str = "print the result as JSON") -> None:
    """`--json`, spelled alike everywhere; what is printed is described in docs/json.md."""
    parser.add_argument("--json", action="store_true", help=f"{what} (docs/json.md)")


def add_ray_option(parser: argparse._ActionsContainer, what: str) -> None:
    """`--ray`, of commands whose work the machines of a cluster can share (`tyir.tools.cluster`)."""
    parser.add_argument("--ray", metavar="auto|ADDRESS", help=what)


def check_ray_has_a_sweep(args: argparse.Namespace, sweep: str) -> None:
    """`TyirError` when a command that shares the values of `--sweep` has none; `sweep`: an example."""
    if args.ray is not None and args.sweep is None:
        raise TyirError(
            "--ray shares the values of --sweep among the cluster's workers, and there is none",
            help=f"add --sweep {sweep}, or leave --ray out",
        )


# --------------------------------------------------------------------------------------------------- files


def check_output(path: str) -> None:
    """`TyirError` for a place where no file can be written, before the seconds of work."""
    if path == "-":
        return
    if not path:
        raise TyirError("cannot write: the name of the file is empty", help="give a file name")
    if Path(path).is_dir():
        raise TyirError(f"{path} is a folder", help=f"give a file name, such as {Path(path) / 'model.ir'}")
    above = next(p for p in Path(os.path.abspath(path)).parents if os.path.lexists(p))
    if not above.is_dir():
        raise TyirError(
            f"cannot write {path}: {above} is a file, not a folder", help="write to another folder"
        )
    if not os.access(above, os.W_OK | os.X_OK) and not Path(path).exists():
        raise TyirError(
            f"cannot write {path}: nothing may be written to {above}",
            help="give yourself the permission, or write somewhere else",
        )
    if Path(path).is_file():
        from tyir.tools.commands.model_files import model_of

        if (model := model_of(Path(path))) is not None:
            raise TyirError(f"{path} belongs to {model}, and would be lost", help="write to another file")


def write_output(text: str | bytes, path: str) -> None:
    """Write to a file, which appears complete or not at all and whose folders are made, or to standard output
    for `-` (text alone).

    `TyirError` when it cannot be written.
    """
    data = text.encode() if isinstance(text, str) else text
    if path == "-":
        sys.stdout.write(data.decode())
        return
    check_output(path)
    target = Path(os.path.realpath(path))  # a link stays a link
    temporary = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(data)  # a device or a pipe must be written to, never replaced
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except OSError as error:
        raise TyirError(f"cannot write {path}: {error.strerror}", help=_cure(error)) from None
    finally:
        temporary.unlink(missing_ok=True)


def _cure(error: OSError) -> str:
    from tyir.process.system_errors import system_error

    found = system_error(error)
    return (found.help if found is not None else "") or "write somewhere else"
