"""`tyir COMMAND ...`: one name for all commands; `tyir sim out/4die` is `tyir-sim out/4die`.

Only the command that is called is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from tyir.tools.cli import ToolParser, run_tool

__all__ = ["main", "make_parser"]


@run_tool
def main(argv: Sequence[str]) -> int:
    """Run `tyir-COMMAND` on the arguments after it."""
    from tyir.tools.commands.table import find_command

    if argv and not argv[0].startswith("-"):
        if argv[0] == "help":
            return main([*argv[1:2], "--help"])
        command = find_command(argv[0])
        if command is None:
            from tyir.tools.commands.unknown import unknown_command

            raise unknown_command(argv[0])
        code: int = importlib.import_module(command.module).main(argv[1:])
        return code
    parser = make_parser()
    parser.parse_args(argv)
    parser.print_help()
    return 0


def make_parser() -> argparse.ArgumentParser:
    """The parser of `tyir` without a command; its help lists the commands."""
    from tyir.tools.commands.table import commands

    lines = "\n".join(f"  {name:<14} {command.summary}" for name, command in commands().items())
    return ToolParser(
        prog="tyir",
        usage="tyir COMMAND ...",
        description="A compiler from Hugging Face language models to multi-die edge NPUs.\n\n"
        f"commands:\n{lines}",
        epilog="tyir COMMAND --help says what a command takes; each is also a program, tyir-COMMAND.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


if __name__ == "__main__":
    sys.exit(main())
