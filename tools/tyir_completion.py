"""`tyir-completion SHELL`: a script that makes a shell complete commands and options.

    tyir completion bash > ~/.local/share/bash-completion/completions/tyir
    tyir completion zsh > ~/.zfunc/_tyir

The script is made by shtab (the extra `completion`) from the commands' own parsers and starts no Python.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tyir.diagnostics import TyirError
from tyir.tools.cli import ToolParser, run_tool

__all__ = ["main", "make_parser"]

_FILES = (Path,)


@run_tool
def main(argv: Sequence[str]) -> int:
    """Print the script."""
    args = make_parser().parse_args(argv)
    try:
        import shtab
    except ImportError:
        raise TyirError(
            "completion scripts are made by shtab, which is not installed",
            help="pip install 'tyir[completion]', or pip install shtab",
        ) from None
    print(shtab.complete(_whole(shtab), shell=args.shell))
    return 0


def _whole(shtab: Any) -> argparse.ArgumentParser:
    """`tyir` with every command as a subcommand, and files where an argument is a path."""
    from tyir.tools.commands.table import commands

    whole = argparse.ArgumentParser(prog="tyir")
    found = whole.add_subparsers()
    for name, command in commands().items():
        parser = command.parser()
        for action in parser._actions:
            if action.type in _FILES or action.metavar in ("FILE", "FOLDER", "DIR", "HF_DIR", "OUT"):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
            action.help = str(action.help or "").partition(";")[0]
        added = found.add_parser(name, help=command.summary, parents=[parser], add_help=False)
        added.description = command.summary
    return whole


def make_parser() -> ToolParser:
    """The parser of `tyir-completion`."""
    parser = ToolParser(
        prog="tyir-completion",
        description="Print a script that makes a shell complete tyir's commands and options.",
        epilog="bash: tyir completion bash > ~/.local/share/bash-completion/completions/tyir",
    )
    parser.add_argument("shell", choices=("bash", "zsh"), metavar="SHELL", help="bash or zsh")
    return parser


if __name__ == "__main__":
    sys.exit(main())
