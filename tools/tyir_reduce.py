"""`tyir-reduce`: a smaller file that still fails, or a part of a file with the numbers that flow through it.

tyir-reduce model.ir --command 'tyir-opt --my-pass {}' --match KeyError -o small.ir
tyir-reduce model.ir --cut %q..%attn --arrays cut/ -o cut.ir
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, add_json_option, check_output, note, run_tool, write_output

if TYPE_CHECKING:
    from tyir.dialects.builtin import Module

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Run the tool; 0 on success."""
    args = make_parser().parse_args(argv)
    if (args.command is None) == (args.cut is None):
        raise TyirError(
            "tyir-reduce needs either --command or --cut", help="for example --command 'tyir-opt --cse {}'"
        )
    from tyir.parser import parse_file

    check_output(args.output)
    if args.json and args.output == "-":
        raise TyirError("--json and the IR would both go to standard output", help="add -o FILE.ir")
    module = parse_file(args.file)
    before = sum(1 for _ in module.walk())
    smaller, runs = _reduce(module, args) if args.command is not None else (_cut(module, args), 0)
    from tyir.printer import print_op

    write_output(print_op(smaller, pretty=args.pretty), args.output)
    after = sum(1 for _ in smaller.walk())
    if args.json:
        from tyir.tools.commands.json_forms import Reduced, print_json

        print_json(Reduced(output=args.output, ops_before=before, ops=after, runs=runs))
    elif args.command is not None:
        note(f"{before} ops -> {after} ops, the command ran {runs} times")
    return 0


_LONGEST: Final = 1e6  # seconds; the system's clocks take no more than 2^63 nanoseconds


class _Command:
    """Runs the command on a module; it is interesting when it fails the way it did at first."""

    def __init__(self, args: argparse.Namespace, folder: str) -> None:
        try:
            self.words = shlex.split(args.command)
            self.match = re.compile(args.match) if args.match else None
        except re.error as error:
            raise TyirError(f"--match {args.match[:100]!r} is not a regular expression: {error}") from None
        except ValueError as error:
            raise TyirError(f"--command cannot be split into words: {error}", help="quote it") from None
        if not self.words:
            raise TyirError("--command is empty", help="for example --command 'tyir-opt --cse {}'")
        if not args.timeout > 0:
            raise TyirError(
                f"--timeout {args.timeout} is out of range", help="--timeout takes seconds above 0"
            )
        self.timeout = min(args.timeout, _LONGEST)
        self.path = Path(folder) / "candidate.ir"
        if not any("{}" in word for word in self.words):
            self.words.append("{}")
        self.code: int | None = None

    def first_run(self, module: Module) -> None:
        """Learn the exit code; `TyirError` when the command does not fail, or not as `--match` says."""
        self.code, said = self.run(module)
        if self.code == 0:
            raise TyirError(
                "the command succeeds on the file as it is",
                help="tyir-reduce looks for a smaller file that makes it fail",
            )
        if self.match is not None and not self.match.search(said):
            raise TyirError(
                f"the command fails, but what it prints does not match '{self.match.pattern}'",
                help=said.strip()[-500:],
            )

    def __call__(self, module: Module) -> bool:
        code, said = self.run(module)
        return code == self.code and (self.match is None or self.match.search(said) is not None)

    def run(self, module: Module) -> tuple[int, str]:
        """Exit code (124 after a timeout) and everything the command printed."""
        from tyir.printer import print_op

        self.path.write_text(print_op(module), encoding="utf-8")
        words = [word.replace("{}", str(self.path)) for word in self.words]
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, errors="replace", timeout=self.timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return 124, ""
        except OSError as error:
            raise TyirError(f"cannot run '{words[0]}': {error.strerror}") from None
        return done.returncode, done.stdout + done.stderr


def _reduce(module: Module, args: argparse.Namespace) -> tuple[Module, int]:
    """The smaller module, and how often the command ran."""
    from tyir.tools.reduce.reduce_ir import reduce_module

    with tempfile.TemporaryDirectory() as folder:
        command = _Command(args, folder)
        command.first_run(module)
        result = reduce_module(module, command)
    return result.module, result.tried + 1


def _cut(module: Module, args: argparse.Namespace) -> Module:
    from tyir.dialects.func import Func
    from tyir.tools.reduce.cut_ir import check_array, cut_ops, read_array, sample_arguments

    first, dots, last = args.cut.partition("..")
    if not dots:
        last = first
    function = module.lookup(args.function)
    if not isinstance(function, Func):
        raise TyirError(f"there is no function @{args.function}", help="name one with --function")
    arrays = sample_arguments(function, args.tokens)
    positions = {value.name: value.index for value in function.args}
    for entry in args.arg:
        name, _, path = entry.partition("=")
        if name not in positions:
            raise TyirError(
                f"@{args.function} has no argument %{name}",
                help=f"its arguments: {', '.join(f'%{n}' for n in positions)}",
            )
        try:
            array = read_array(path)
        except (OSError, ValueError, EOFError) as error:
            why = error.strerror if isinstance(error, OSError) else str(error)
            raise TyirError(f"cannot read {path}: {why}", help="save it with numpy.save") from None
        arrays[positions[name]] = check_array(function.args[positions[name]], array)
    cut = cut_ops(module, first, last, arrays, args.function)
    if args.arrays is not None:
        for path in cut.save_arrays(args.arrays):
            note(str(path))
    return cut.with_constants() if args.constants else cut.module


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-reduce",
        description=(
            "Shrink an IR file that makes a command fail, or cut ops out of it with the numbers that flow in."
        ),
        epilog=(
            "The command's failure is its exit code, and with --match also what it prints; {} in it stands"
            " for the file."
        ),
    )
    parser.add_argument("file", help="IR file")
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="where the smaller IR goes; - (the default) is standard output",
    )
    parser.add_argument("--pretty", action="store_true", help="write it in the short form")
    shrink = parser.add_argument_group("shrinking")
    shrink.add_argument(
        "--command", "--test", metavar="CMD", help="the command that fails (mlir-reduce calls it --test)"
    )
    shrink.add_argument("--match", metavar="REGEX", help="what a failure that counts prints")
    shrink.add_argument(
        "--timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="a run that takes longer counts as exit code 124",
    )
    cut = parser.add_argument_group("cutting")
    cut.add_argument(
        "--cut",
        metavar="A..B",
        help="ops from %%A to %%B, named by their results or by their numbers in the function",
    )
    cut.add_argument("--function", default="main", metavar="NAME", help="of this function (default: main)")
    cut.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="NAME=FILE.npy",
        help="run the function on this argument",
    )
    cut.add_argument(
        "--tokens", type=int, default=4, metavar="N", help="size of '?' in arguments made up (default: 4)"
    )
    cut.add_argument(
        "--arrays", type=Path, metavar="DIR", help="save what flows into and out of the cut as .npy files"
    )
    cut.add_argument("--constants", action="store_true", help="put the inputs into the IR as constants")
    add_json_option(parser, "print the counts as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(main())
