"""`tyir-dis FILE`: a command program, as bytes or as text, printed as text.

With `--assemble`, written as bytes.

tyir-dis out/4die/batch_1/seqlen_1/llm_die0.bin | less
tyir-dis --assemble llm_die0.edge10 -o llm_die0.bin
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, run_tool, write_output

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = make_parser().parse_args(argv)
    from tyir.edge10.binary import encode, read_program
    from tyir.printer import print_op

    if not args.file.is_file():
        raise TyirError(f"{args.file} is not a file", help=_programs_in(args.file))
    module = read_program(args.file)
    if not args.assemble:
        write_output(print_op(module), args.output)
    elif args.output == "-":
        raise TyirError("bytes are not written to a terminal", help="add -o FILE.bin")
    else:
        write_output(encode(module), args.output)
    return 0


def _programs_in(folder: Path) -> str:
    """A program below a folder, to suggest."""
    found = min((p for s in ("bin", "edge10") for p in folder.glob(f"**/llm_die*.{s}")), default=None)
    return f"did you mean {found}?" if found else "give a .bin or .edge10 file that tyir-compile wrote"


def make_parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-dis", description="Print a command program as text, or write one as bytes."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="command program, .bin or .edge10")
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="where to write; - is standard output (the default)",
    )
    parser.add_argument("--assemble", action="store_true", help="write bytes instead of text")
    return parser


if __name__ == "__main__":
    sys.exit(main())
