"""`tyir-dis FILE.bin`: a binary command program as text; with `--assemble`, the text of an `.edge10` file as bytes.

tyir-dis llm_die0.bin | less
tyir-dis --assemble llm_die0.edge10 -o llm_die0.bin
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, add_debug_option, run_tool, write_output

__all__ = ["main"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    args = _parser().parse_args(argv)
    from tyir.edge10_binary import decode, encode
    from tyir.printer import print_op

    if not args.file.is_file():
        raise TyirError(f"{args.file} is not a file", help="give a .bin file, or with --assemble an .edge10 file")
    if not args.assemble:
        write_output(print_op(decode(args.file.read_bytes(), str(args.file))), args.output)
        return 0
    from tyir.parser import parse_file

    if args.output == "-":
        raise TyirError("bytes are not written to a terminal", help="add -o FILE.bin")
    Path(args.output).write_bytes(encode(parse_file(args.file)))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(prog="tyir-dis", description="Print a binary command program as text, or make one from text.")
    parser.add_argument("file", type=Path, metavar="FILE.bin", help="binary program (with --assemble: FILE.edge10)")
    parser.add_argument("-o", "--output", default="-", metavar="FILE", help="where to write; - is standard output (the default)")
    parser.add_argument("--assemble", action="store_true", help="text to bytes instead")
    add_debug_option(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
