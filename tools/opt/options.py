"""The command line of `tyir-opt`: MLIR's flags, passes as flags of their own."""

from __future__ import annotations

import argparse

from tyir.tools.cli import ToolParser, add_json_option

__all__ = ["make_parser", "split_pass_flags", "with_mlir_spellings"]

_EPILOG = """\
Each pass is also a flag, with its options as value: --cse --kv-materialize="max-kv=512".  The IR goes to standard output, everything else to
standard error; the exit code is 0 or 1.  Flags may be spelled as mlir-opt does (--mlir-timing, --mlir-print-ir-after-all, ...).
"""  # noqa: E501


def make_parser() -> ToolParser:
    """The parser; it leaves flags it does not know (passes) to the caller."""
    parser = ToolParser(
        prog="tyir-opt",
        description="Read IR, run passes, print IR.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "input", nargs="?", default="-", metavar="FILE", help="IR file; - (the default) is standard input"
    )
    parser.add_argument(
        "-o",
        "--output",
        default="-",
        metavar="FILE",
        help="where the IR goes; - (the default) is standard output",
    )
    _add_pipeline(parser)
    _add_reading(parser)
    _add_printing(parser)
    _add_watching(parser)
    return parser


def _add_pipeline(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what to run")
    group.add_argument(
        "--pass-pipeline",
        metavar="TEXT",
        help="such as 'builtin.module(cse,func.func(canonicalize))', or the name of a pipeline",
    )
    group.add_argument(
        "-p",
        "--passes",
        dest="pass_pipeline",
        metavar="TEXT",
        help="the same, as xdsl-opt spells it: -p 'cse,canonicalize'",
    )
    group.add_argument(
        "--load-pass",
        action="append",
        default=[],
        metavar="FILE.py",
        help="make the passes of a Python file known",
    )
    group.add_argument(
        "--load-dialect",
        action="append",
        default=[],
        metavar="FILE.py",
        help="make the ops of a Python file known",
    )
    group.add_argument(
        "--run-reproducer", action="store_true", help="run the pipeline that the input's metadata holds"
    )
    group.add_argument(
        "--list-passes",
        type=_format,
        nargs="?",
        const="text",
        metavar="json",
        help="list passes with their options, and named pipelines",
    )
    group.add_argument(
        "--show-dialects",
        type=_format,
        nargs="?",
        const="text",
        metavar="json",
        help="list the dialects and how many ops they have",
    )
    group.add_argument(
        "--dump-pass-pipeline",
        action="store_true",
        help="print the pipeline that will run, options spelled out",
    )


def _add_reading(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reading and checking")
    group.add_argument(
        "--allow-unregistered-dialect", action="store_true", help="accept ops that no dialect declares"
    )
    group.add_argument(
        "--split-input-file",
        action="store_true",
        help="treat the parts between // ----- lines as files of their own",
    )
    group.add_argument(
        "--verify-each",
        type=_boolean,
        nargs="?",
        const=True,
        default=True,
        metavar="0|1",
        help="verify after each pass (default: 1)",
    )
    group.add_argument(
        "--verify-roundtrip",
        action="store_true",
        help="check that printing and parsing gives the same IR back",
    )
    group.add_argument(
        "--verify-diagnostics",
        choices=("all", "only-expected"),
        nargs="?",
        const="all",
        help=(
            "check errors against the file's // expected-error {{...}} comments; only-expected: others do not"
            " count"
        ),
    )


def _add_printing(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("printing")
    help = "print locations (default: 1: passes read the module path they hold)"
    group.add_argument(
        "--print-debuginfo", type=_boolean, nargs="?", const=True, default=True, metavar="0|1", help=help
    )
    group.add_argument(
        "--print-ir-before",
        action="append",
        default=[],
        metavar="PASSES",
        help="print the IR before these passes",
    )
    group.add_argument(
        "--print-ir-after",
        action="append",
        default=[],
        metavar="PASSES",
        help="print the IR after these passes",
    )
    group.add_argument("--print-ir-before-all", action="store_true")
    group.add_argument("--print-ir-after-all", action="store_true")
    group.add_argument(
        "--print-ir-after-change",
        action="store_true",
        help="of those after passes, only where something changed",
    )
    group.add_argument("--print-ir-after-failure", action="store_true")
    group.add_argument(
        "--print-ir-module-scope",
        action="store_true",
        help="print the whole module, not only the op a pass ran on",
    )
    group.add_argument(
        "--print-ir-tree-dir",
        metavar="DIR",
        help="write those prints (without other flags: those after all passes) to files below a folder",
    )
    group.add_argument(
        "--pretty",
        action="store_true",
        help="print declared ops in the short form; the default when a terminal shows it",
    )
    group.add_argument(
        "--print-op-generic",
        action="store_true",
        help="print the generic form that mlir-opt and xDSL read; the default in files",
    )
    help = (
        "leave constants of more than N elements (default: 16) and all resources out of what is printed;"
        " tyir-compile refuses such files"
    )
    group.add_argument("--elide-large-constants", type=int, nargs="?", const=16, metavar="N", help=help)


def _add_watching(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("watching")
    group.add_argument(
        "--timing",
        type=_format,
        nargs="?",
        const="text",
        metavar="json",
        help="wall time and peak memory per pass",
    )
    group.add_argument(
        "--pass-statistics",
        type=_format,
        nargs="?",
        const="text",
        metavar="json",
        help="what the passes counted",
    )
    add_json_option(group, "lists, times and statistics as JSON")
    group.add_argument(
        "--opt-bisect-limit",
        type=int,
        metavar="N",
        help="skip every run of a pass after the first N and say on stderr which (-1: skip none)",
    )
    group.add_argument(
        "--crash-reproducer",
        metavar="FILE",
        help="if a pass fails, write the IR before it and the rest of the pipeline",
    )


def _boolean(text: str) -> bool:
    if text.lower() in ("1", "true", "on", "yes"):
        return True
    if text.lower() in ("0", "false", "off", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither 0 nor 1")


def _format(text: str) -> str:
    if text not in ("text", "json"):
        raise argparse.ArgumentTypeError(f"'{text}' is neither text nor json")
    return text


# Without "=value" these take a default; argparse would take the next word, which may be the file.
_BARE = {
    "--print-debuginfo": "1",
    "--verify-each": "1",
    "--timing": "text",
    "--pass-statistics": "text",
    "--list-passes": "text",
    "--show-dialects": "text",
    "--elide-large-constants": "16",
    "--verify-diagnostics": "all",
}
_SPELLINGS = {
    "--mlir-elide-elementsattrs-if-larger": "--elide-large-constants",
    "--mlir-elide-resource-strings-if-larger": "--elide-large-constants",
    "--mlir-print-op-generic": "--print-op-generic",
    "--mlir-timing": "--timing",
    "--mlir-pass-statistics": "--pass-statistics",
    "--mlir-print-debuginfo": "--print-debuginfo",
    "--mlir-pass-pipeline-crash-reproducer": "--crash-reproducer",
}
# Of mlir-opt's, what holds here anyway: one thread, locations where they belong.
_GIVEN = ("--mlir-disable-threading", "--mlir-print-local-scope")


def with_mlir_spellings(arguments: list[str]) -> list[str]:
    """mlir-opt's names of flags as ours: `--mlir-print-ir-after=cse` is `--print-ir-after=cse`.

    One dash is as good as two.
    """
    changed = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if len(name) > 2 and name[0] == "-" and name[1] != "-":
            name = "-" + name
        if name.startswith("--mlir-print-ir"):
            name = "--" + name.removeprefix("--mlir-")
        name = _SPELLINGS.get(name, name)
        if name in _GIVEN:
            continue
        if name in _BARE and not equals:
            equals, value = "=", _BARE[name]
        changed.append(name + equals + value if name.startswith("--") else argument)
    return changed


def split_pass_flags(arguments: list[str], parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """The arguments for the parser, and flags that it does not know: passes.

    Options of a pass may hold spaces; argparse takes such words for files.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    flags = [a for a in arguments if a.startswith("--") and len(a) > 2 and a.partition("=")[0] not in known]
    return [a for a in arguments if a not in flags], flags
