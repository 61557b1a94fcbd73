"""A chat on standard input: a line is a question, one that begins with `/` a command.

At a terminal lines are edited and remembered (readline), an error is told and the turn is as if it had not
been asked, and Ctrl-C ends the answer, not the program.  From a pipe an error ends the chat.
"""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

from tyir.diagnostics import TyirError, did_you_mean
from tyir.tools.cli import Terminated, note
from tyir.tools.run.speaker import Speaker

__all__ = ["COMMANDS", "converse"]

COMMANDS: Final = {
    "/image": "FILE.. shows pictures with the next question",
    "/video": "FRAME.. or FOLDER shows a video with it",
    "/reset": "starts over",
    "/help": "says this",
    "/quit": "ends, as Ctrl-D does",
}
_MAX_LINE: Final = 64 << 20  # bytes, as of a prompt


def converse(
    speaker: Speaker,
    frames_per_second: float,
    images: Sequence[Path] = (),
    videos: Sequence[Sequence[Path]] = (),
) -> None:
    """Answer one line after the other, each with what was said before; `images` and `videos` belong to the
    first question.
    """
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    turns, waiting, showing = speaker.turns, list(images), list(videos)
    with _Interrupts(at_terminal) as interrupts:
        for line in _lines(at_terminal):
            name, _, rest = line.partition(" ")
            try:
                if name == "/quit":
                    return
                if name == "/help":
                    note("\n".join(f"{command} {does}" for command, does in COMMANDS.items()))
                elif name == "/reset":
                    turns.chat.forget()
                    turns.session.reset()
                    waiting, showing = [], []
                elif name == "/image":
                    waiting += map(Path, _words(rest))
                elif name == "/video":
                    showing.append([Path(part) for part in _words(rest)])
                elif name.startswith("/") and name[1:].isalpha():
                    help = did_you_mean(name, COMMANDS) or f"there are {', '.join(COMMANDS)}"
                    raise TyirError(f"there is no command {name}", help=help)
                elif line:
                    shown, waiting, showing = (waiting, showing), [], []
                    with interrupts.answering():
                        prompt = turns.ask(line, *shown, frames_per_second)
                        speaker.answer(prompt, lambda: interrupts.received)
            except TyirError as error:
                if not at_terminal or turns.failed:
                    raise
                print(error.render(), file=sys.stderr)


def _words(text: str) -> list[str]:
    """Names of files as a shell reads them."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise TyirError(f"cannot read {text}: {str(error).lower()}", help="close the quotation") from None
    if not found:
        raise TyirError("no file is named", help="write /image FILE, or /video FOLDER")
    return found


def _lines(at_terminal: bool) -> Iterator[str]:
    """Lines of standard input, without the spaces around them; `TyirError` for bytes that are not UTF-8."""
    if not at_terminal:
        yield from _piped_lines()
        return
    edited = sys.stdin is sys.__stdin__ and sys.stdout is not None and sys.stdout.isatty()
    if edited:
        try:
            import readline  # noqa: F401 - from now on `input` edits and remembers lines
        except ImportError:
            edited = False
    while True:
        try:
            if edited:
                line = input("> ")
            else:
                print("> ", end="", file=sys.stderr, flush=True)
                if not (line := sys.stdin.readline()):
                    return
        except EOFError:
            return
        except UnicodeDecodeError as error:
            line = ""
            print(f"error: that is not UTF-8: byte 0x{error.object[error.start]:02x}", file=sys.stderr)
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Terminated):  # not Ctrl-C: the process is to end
                raise
            print("\n(/quit or Ctrl-D ends the chat)", file=sys.stderr)
            continue
        yield line.strip()


def _piped_lines() -> Iterator[str]:
    if sys.stdin is None:
        return
    source: Any = getattr(sys.stdin, "buffer", sys.stdin)
    number = 0
    while line := source.readline(_MAX_LINE):
        number += 1
        if isinstance(line, bytes):
            try:
                line = line.decode("utf-8")
            except UnicodeDecodeError as error:
                byte = error.object[error.start]
                raise TyirError(
                    f"line {number} of standard input is not UTF-8: byte 0x{byte:02x}",
                    help="convert it: iconv -t UTF-8",
                ) from None
        yield str(line).strip()


class _Interrupts:
    """Ctrl-C at a terminal: the first one within an answer is `received`, any other does what it did before
    at a prompt or a second one, which ends the program.
    """

    def __init__(self, at_terminal: bool) -> None:
        self.received = False
        self._answering = False
        self._wanted = at_terminal and threading.current_thread() is threading.main_thread()
        self._before: Any = None

    def __enter__(self) -> _Interrupts:
        if self._wanted and callable(before := signal.getsignal(signal.SIGINT)):
            self._before = before
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Within, an interrupt is noted and nothing is raised."""
        self.received, self._answering = False, True
        try:
            yield
        finally:
            self._answering = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._answering:
            raise KeyboardInterrupt  # which the prompt expects
        if self.received:
            self._before(number, frame)
        self.received = True
