"""Times commands from their start to the first text that they print, in turn.

    python -m tyir.tools.bench.first_token "tyir-run out/1die --prompt Hello --max-tokens 1" "tyir-run out/1die --ids 5,6"

Each command is started anew in every round: the interpreter, imports, reading the tokenizer and opening the artifacts
are part of it.  The first round, in which files come into memory and caches are filled, does not count.  Printed as
Markdown: medians of the wall time to the first byte of standard output and to the end, and of the processor time, ms.
"""  # noqa: E501

from __future__ import annotations

import argparse
import os
import resource
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, run_tool

__all__ = ["main"]


class _Times(NamedTuple):
    """Milliseconds of one run."""

    first: float
    end: float
    processor: float


def _run(command: Sequence[str]) -> _Times:
    """`TyirError` for a command that fails or prints nothing."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    try:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError as error:
        raise TyirError(f"{command[0]} cannot be run: {error.strerror}", help="give its whole path") from None
    with process:
        assert process.stdout is not None
        printed = os.read(process.stdout.fileno(), 1)
        first = time.perf_counter() - began
        process.stdout.read()
        code = process.wait()
    end, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if code or not printed:
        what = f"ended with {code}" if code else "printed nothing"
        raise TyirError(f"{shlex.join(command)} {what}", help="run it by itself, which says why")
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return _Times(1e3 * first, 1e3 * end, 1e3 * spent)


@run_tool
def main(argv: Sequence[str] | None = None) -> int:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ToolParser(description=__doc__, formatter_class=raw)
    parser.add_argument("commands", nargs="+", metavar="COMMAND", help="each in quotes")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise TyirError(f"--rounds is {args.rounds}: a median needs 1 at least", help="use --rounds 10")
    commands = [shlex.split(command) for command in args.commands]
    for command in commands:
        _run(command)
    rounds = [[_run(command) for command in commands] for _ in range(args.rounds)]
    print("| command | first text ms | end ms | processor ms |")
    print("| --- | ---: | ---: | ---: |")
    for text, times in zip(args.commands, zip(*rounds), strict=True):
        medians = (f"{statistics.median(column):.0f}" for column in zip(*times))
        print(f"| {text} | {' | '.join(medians)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
