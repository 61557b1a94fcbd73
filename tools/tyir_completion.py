"""`tyir-completion SHELL`: a script that makes a shell complete commands and options.

    tyir completion bash > ~/.tyir-completion.bash   and in ~/.bashrc: source ~/.tyir-completion.bash
    tyir completion zsh > ~/.zfunc/_tyir             and in ~/.zshrc: fpath+=~/.zfunc, before compinit

The script is made by shtab (the extra `completion`) from the commands' own parsers and starts no Python.
shtab knows one program; a few lines of ours complete `tyir-sim ...` as it completes `tyir sim ...`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

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
    print(_for_scripts(shtab.complete(_whole(shtab), shell=args.shell), args.shell))
    return 0


_BASH: Final = """
# tyir-sim ... is completed as tyir sim ...
_tyir_scripts() {{
  local -a COMP_WORDS=(tyir "${{1##*/tyir-}}" "${{COMP_WORDS[@]:1}}")
  COMP_WORDS[1]="${{COMP_WORDS[1]#tyir-}}"
  local COMP_CWORD=$((COMP_CWORD + 1))
  _shtab_tyir
}}

complete -o bashdefault -F _tyir_scripts {scripts}
"""

_ZSH: Final = """
# tyir-sim ... is completed as tyir sim ...
_tyir_scripts() {{
  if [[ $service == tyir-* ]]; then
    words=(tyir "${{service#tyir-}}" "${{(@)words[2,-1]}}")
    (( CURRENT += 1 ))
  fi
  _shtab_tyir "$@"
}}

typeset -A opt_args

if [[ $zsh_eval_context[-1] == eval ]]; then
  compdef _tyir_scripts tyir {scripts}
else
  _tyir_scripts "$@"
fi
"""


def _for_scripts(script: str, shell: str) -> str:
    """shtab's script for `tyir`, and for `tyir-NAME`: its last lines, which bind it, are replaced for zsh."""
    from tyir.tools.commands.table import commands

    scripts = " ".join(command.script for command in commands().values())
    if shell == "bash":
        return script.rstrip("\n") + "\n" + _BASH.format(scripts=scripts)
    body = script.partition("\ntypeset -A opt_args")[0].replace(
        "#compdef tyir", f"#compdef tyir {scripts}", 1
    )
    return body.rstrip("\n") + "\n" + _ZSH.format(scripts=scripts)


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
        epilog="bash: tyir completion bash > ~/.tyir-completion.bash, and in ~/.bashrc: source"
        " ~/.tyir-completion.bash; zsh: tyir completion zsh > ~/.zfunc/_tyir, and in ~/.zshrc, before"
        " compinit: fpath+=~/.zfunc",
    )
    parser.add_argument("shell", choices=("bash", "zsh"), metavar="SHELL", help="bash or zsh")
    return parser


if __name__ == "__main__":
    sys.exit(main())
