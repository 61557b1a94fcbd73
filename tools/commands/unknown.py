"""Answers to command lines that a parser does not know: what was probably meant.

An unknown flag is looked up in the table of other programs' spellings, among this command's own flags, and
among those of the other commands and the passes, in this order.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Sequence
from typing import Final

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.tools.commands.foreign import FOREIGN_COMMANDS, FOREIGN_VALUES, foreign_option
from tyir.tools.commands.table import commands

__all__ = ["too_much", "unknown_command", "unknown_options", "wrong_usage", "wrong_value"]


_PASSES: Final = ", --list-passes the passes; --load-pass FILE.py makes passes of your own known"


def unknown_options(
    parser: argparse.ArgumentParser, flags: Iterable[str], passes: Iterable[str] = ()
) -> TyirError:
    """The error for flags that a command does not have; `passes`: flags that it has besides its parser's."""
    return TyirError(
        Diagnostic(
            f"{parser.prog}: unknown option '{flag.partition('=')[0]}'",
            help=_meant(parser, flag.partition("=")[0], list(passes))
            or f"{parser.prog} --help lists the options" + (_PASSES if parser.prog == "tyir-opt" else ""),
        )
        for flag in dict.fromkeys(flags)
    )


def _meant(parser: argparse.ArgumentParser, name: str, passes: list[str]) -> str:
    known = [*_flags(parser), *passes]
    own = f"--{name.lstrip('-').replace('_', '-')}"
    if own in known:
        return f"write {own}"
    found = list(foreign_option(name))
    if found:
        tool = parser.prog.removeprefix("tyir-")
        return max(found, key=lambda entry: tool in entry.tools).answer(name, parser.prog)
    for command in commands().values():
        if own in _flags(other := command.parser()) and command.script != parser.prog:
            return f"{own} is an option of {command.script}: {_help_of(other, own)}"
    return _pass_of(own.removeprefix("--")) or did_you_mean(name, known)


def _pass_of(name: str) -> str:
    from tyir.pass_manager.registry import PassRegistry

    registry = PassRegistry()
    known = name in registry.names() or name in registry.pipelines()
    return f"{name} is a pass: tyir-opt FILE.ir --{name}" if known else ""


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [option for action in parser._actions for option in action.option_strings]


def _help_of(parser: argparse.ArgumentParser, flag: str) -> str:
    return _meaning(parser, parser._option_string_actions[flag])


def wrong_value(parser: argparse.ArgumentParser, error: argparse.ArgumentError) -> TyirError:
    """The error for an argument whose value cannot be, with what the argument is for."""
    action = next((a for a in parser._actions if _named(a) == error.argument_name), None)
    if action is None:
        return wrong_usage(parser, str(error))
    help = f"{_spelt(action)}: {_meaning(parser, action)}"
    if action.choices is not None:
        value = error.message.partition("'")[2].partition("'")[0]
        flag = next((o for o in action.option_strings if o.startswith("--")), "")
        choices = ", ".join(map(str, action.choices))
        message = f"{parser.prog}: '{value}' is not a value of {flag or action.dest}: {choices}"
        if value:
            known = FOREIGN_VALUES.get((flag, value.lower()))
            return TyirError(message, help=known or did_you_mean(value, map(str, action.choices)) or help)
    return TyirError(f"{parser.prog}: {error}", help=help)


def _meaning(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """The help of an argument with its default filled in, as --help prints it."""
    return str(action.help) % {**vars(action), "prog": parser.prog}


def _named(action: argparse.Action) -> str | None:
    """argparse's name of an argument in its errors."""
    if action.option_strings:
        return "/".join(action.option_strings)
    return str(action.metavar) if action.metavar not in (None, argparse.SUPPRESS) else action.dest


def _spelt(action: argparse.Action) -> str:
    """`--dies N`, as one writes it."""
    if not action.option_strings:
        return str(action.metavar or action.dest.upper())
    flag = max(action.option_strings, key=len)
    if action.nargs == 0:
        return flag
    if action.choices is not None:
        return f"{flag} {'|'.join(map(str, action.choices))}"
    return f"{flag} {action.metavar or ('N' if action.type is int else action.dest.upper())}"


def wrong_usage(parser: argparse.ArgumentParser, message: str) -> TyirError:
    """The error for a command line that lacks something or has too much of it."""
    kind, _, rest = message.partition(": ")
    usage = " ".join([parser.prog, *(_spelt(a) for a in parser._actions if a.required)])
    if kind == "the following arguments are required":
        return TyirError(f"{parser.prog}: missing {rest}", help=f"{usage} ...; --help lists all")
    return TyirError(f"{parser.prog}: {message}", help=f"{parser.prog} --help lists the options")


def too_much(parser: argparse.ArgumentParser, words: Sequence[str], rest: Sequence[str]) -> TyirError:
    """The error for `words` on a command line of which no argument takes the `rest`."""
    usage = " ".join([parser.prog, *(_spelt(a) for a in parser._actions if a.required)])
    help = f"write {usage} ..."
    for flag, action in parser._option_string_actions.items():
        if flag in words and "," in str(action.metavar):
            values = itertools.takewhile(lambda w: not w.startswith("-"), words[words.index(flag) + 1 :])
            given = list(values)
            if rest[0] in given[1:]:
                help = f"a list is written with commas: {flag} {','.join(given)}"
    return TyirError(f"{parser.prog}: more was given than it takes: {' '.join(rest)}", help=help)


def unknown_command(name: str) -> TyirError:
    """The error for `tyir NAME` where there is no such command."""
    known = commands()
    if name in ("pull", "download"):
        help = "models are downloaded by the hub's own tool: hf download ORG/MODEL --local-dir MODEL"
    elif name in FOREIGN_COMMANDS:
        help = f"here that is tyir {FOREIGN_COMMANDS[name]}: {known[FOREIGN_COMMANDS[name]].summary}"
    else:
        help = did_you_mean(name, known) or f"there are {', '.join(known)}"
    return TyirError(f"there is no command 'tyir {name}'", help=help)
