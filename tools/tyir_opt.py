"""`tyir-opt`: read IR, run passes, print IR; the flags are mlir-opt's.

    tyir-opt --pass-pipeline='builtin.module(canonicalize,cse)' model.ir -o out.ir
    tyir-opt --canonicalize --cse < model.ir

IR goes to standard output, everything else to standard error; exit code 0 or 1.  Unlike mlir-opt's, locations
are printed by default: they hold the model's module paths, which later passes read.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyir.diagnostics import Diagnostic, Label, SourceText, TyirError, did_you_mean
from tyir.tools.cli import ToolParser, read_stdin, run_tool, write_output
from tyir.tools.opt.options import make_parser, split_pass_flags, with_mlir_spellings

if TYPE_CHECKING:
    import argparse

    from tyir.dialects.builtin import Module
    from tyir.ir import Op
    from tyir.pass_manager.instruments import Bisect, Timing
    from tyir.pass_manager.registry import PassRegistry
    from tyir.pipeline import Instrument, Pipeline

__all__ = ["main", "make_parser"]

_SPLIT = "// -----"
_SHORT_HEAD = re.compile(r"(?:%[^=\n]*=\s*)?[A-Za-z_][\w$.]*")


@run_tool
def main(argv: Sequence[str]) -> int:
    """Run the tool; 0 on success."""
    parser = make_parser()
    known, flags = split_pass_flags(with_mlir_spellings(list(argv)), parser)
    args, unknown = parser.parse_known_args(known)
    parser.said(args)
    if args.json:
        for name in ("list_passes", "show_dialects", "timing", "pass_statistics"):
            setattr(args, name, getattr(args, name) and "json")
    flags += unknown
    from tyir.pass_manager.registry import PassRegistry

    registry = PassRegistry()
    with _dialects(args.load_dialect):
        for path in args.load_pass:
            registry.load_file(path)
        return _run(args, parser, flags, registry)


def _run(args: argparse.Namespace, parser: ToolParser, flags: list[str], registry: PassRegistry) -> int:
    if args.list_passes or args.show_dialects:
        from tyir.tools.opt.lists import dialect_list, pass_list

        print(pass_list(registry, args.list_passes) if args.list_passes else dialect_list(args.show_dialects))
        return 0
    job = _Job(args, registry, _pipeline_text(args, flags, parser, registry))
    name, text = _read(args.input)
    parts = _parts(text) if args.split_input_file else [text]
    results = [job.run(name, part) for part in parts]
    printed = [r for r in results if r is not None]
    if len(printed) == len(parts) or args.verify_diagnostics:
        write_output(f"{_SPLIT}\n".join(printed), args.output)
    job.report()
    return 1 if job.failed else 0


@contextmanager
def _dialects(paths: Sequence[str]) -> Iterator[None]:
    """The ops that these files declare are known, and unknown again after it: a process may call several
    tools.
    """
    from tyir.pass_manager.registry import load_module_file
    from tyir.registry import load_dialect_module, unload_dialect

    loaded: list[str] = []
    try:
        for path in paths:
            loaded += load_dialect_module(load_module_file(path))
        yield
    finally:
        for name in loaded:
            unload_dialect(name)


def _read(path: str) -> tuple[str, str]:
    from tyir.text.source_file import read_source

    return ("<stdin>", read_stdin()) if path == "-" else (path, read_source(path))


def _parts(text: str) -> list[str]:
    """The parts between `// -----` lines.

    Each is padded with empty lines so that line numbers stay the file's.
    """
    parts: list[list[str]] = [[]]
    for number, line in enumerate(text.splitlines()):
        if line.startswith(_SPLIT):
            parts.append([""] * (number + 1))
        else:
            parts[-1].append(line)
    return ["\n".join(lines) + "\n" for lines in parts]


def _pipeline_text(
    args: argparse.Namespace, flags: list[str], parser: ToolParser, registry: PassRegistry
) -> str | None:
    """The pipeline of `--pass-pipeline` or of the pass flags, None when there are neither."""
    items: list[str] = []
    unknown: list[str] = []
    for flag in flags:
        if not flag.startswith("--"):
            raise TyirError(f"too many inputs: '{args.input}' and '{flag}'", help="tyir-opt reads one file")
        name, _, options = flag.removeprefix("--").partition("=")
        if registry.find(name) is None and name not in registry.pipelines():
            unknown.append(flag)
        items.append(f"{name}{{{options}}}" if options else name)
    if unknown:
        from tyir.tools.commands.unknown import unknown_options

        raise unknown_options(parser, unknown, [f"--{n}" for n in (*registry.names(), *registry.pipelines())])
    if items and args.pass_pipeline is not None:
        raise TyirError(
            f"--pass-pipeline and the flag '{flags[0]}' exclude each other",
            help="write all passes into --pass-pipeline",
        )
    return ",".join(items) if items else args.pass_pipeline


@dataclass
class _Job:
    """One invocation: what to do with each part of the input."""

    args: argparse.Namespace
    registry: PassRegistry
    pipeline_text: str | None
    failed: bool = False
    timing: Timing | None = None
    bisect: Bisect | None = None

    def __post_init__(self) -> None:
        self.statistics: dict[str, int] = {}
        self.said: list[Diagnostic] = []  # warnings and remarks of passes, for --verify-diagnostics

    def run(self, name: str, text: str) -> str | None:
        """The printed result of one part; None after an error, which has been reported."""
        if not self.args.verify_diagnostics:
            try:
                return self._process(name, text)
            except TyirError as error:
                if not self.args.split_input_file:
                    raise
                print(error.render(), file=sys.stderr)
                self.failed = True
                return None
        from tyir.tools.opt.diagnostics import check_expected

        result, self.said = None, []
        try:
            result = self._process(name, text)
        except TyirError as error:
            self.said += error.diagnostics
        problems = check_expected(text, self.said, name, self.args.verify_diagnostics == "only-expected")
        for problem in problems:
            print(problem, file=sys.stderr)
        self.failed = self.failed or bool(problems)
        return result

    def _process(self, name: str, text: str) -> str:
        from tyir.parser import parse_module
        from tyir.printer import print_op
        from tyir.verifier import verify

        source = SourceText(name, text)
        positions: dict[Op, int] = {}
        module = parse_module(text, name, positions)
        if not self.args.allow_unregistered_dialect:
            _check_registered(module, source, positions)
        verify(module, lambda op: _label(op, source, positions))
        if self.args.verify_diagnostics:
            _locate(source, positions)
        if self.args.verify_roundtrip:
            _check_round_trip(module)
        pipeline_text, verify_each = self._pipeline_of(text)
        if pipeline_text is not None:
            self._run_pipeline(module, pipeline_text, verify_each, source, positions)
        locations = self.args.print_debuginfo and not self.args.verify_diagnostics
        return print_op(module, locations, self.pretty, self.args.elide_large_constants)

    @property
    def pretty(self) -> bool:
        """The short form is for people: on request, or when a terminal shows the output.

        What other tools read is generic.
        """
        args = self.args
        return args.pretty or (args.output == "-" and not args.print_op_generic and sys.stdout.isatty())

    def _pipeline_of(self, text: str) -> tuple[str | None, bool]:
        if not self.args.run_reproducer:
            return self.pipeline_text, self.args.verify_each
        from tyir.pass_manager.instruments import read_reproducer

        found = read_reproducer(text)
        if found is None:
            raise TyirError(
                "the input holds no reproducer",
                help="a reproducer has mlir_reproducer: { pipeline: ... } in its metadata section",
            )
        return found[0], found[1] and self.args.verify_each

    def _run_pipeline(
        self, module: Module, text: str, verify_each: bool, source: SourceText, positions: dict[Op, int]
    ) -> None:
        from tyir.pipeline import PassContext, build_pipeline

        pipeline = build_pipeline(text, self.registry)
        if self.args.dump_pass_pipeline:
            print(f"Pass Manager with {len(pipeline.items)} passes:\n{pipeline.text()}", file=sys.stderr)
        context = PassContext(
            statistics=self.statistics,
            verify_each=verify_each,
            instruments=self._instruments(pipeline, verify_each),
            registry=self.registry,
            label_of=lambda op: _label(op, source, positions),
        )
        if self.args.verify_diagnostics:
            context.report = self.said.append
        try:
            pipeline.run(module, context)
        except TyirError:
            raise
        except Exception as error:
            if self.args.crash_reproducer is None:
                error.add_note(_leave_reproducer(source.text, pipeline))
            raise

    def _instruments(self, pipeline: Pipeline, verify_each: bool) -> list[Instrument]:
        from tyir.pass_manager.instruments import Bisect, PrintIr, Reproducer, Timing

        args = self.args
        instruments: list[Instrument] = []
        if args.opt_bisect_limit is not None:
            self.bisect = self.bisect or Bisect(args.opt_bisect_limit)
            instruments.append(self.bisect)
        before = _pass_names(args.print_ir_before, args.print_ir_before_all, self.registry)
        after = _pass_names(args.print_ir_after, args.print_ir_after_all, self.registry)
        asked = before or after or args.print_ir_after_change or args.print_ir_after_failure
        if asked or args.print_ir_tree_dir:
            instruments.append(
                PrintIr(
                    before,
                    after if asked else frozenset(("*",)),
                    args.print_ir_after_change,
                    args.print_ir_after_failure,
                    args.print_ir_module_scope,
                    args.print_debuginfo,
                    Path(args.print_ir_tree_dir) if args.print_ir_tree_dir else None,
                    self.pretty,
                    args.elide_large_constants,
                )
            )
        if args.crash_reproducer is not None:
            instruments.append(Reproducer(Path(args.crash_reproducer), pipeline, verify_each))
        if args.timing:
            self.timing = self.timing or Timing()
            instruments.append(self.timing)
        return instruments

    def report(self) -> None:
        """Timing and statistics of all parts together."""
        if self.timing is not None:
            print(
                (
                    self.timing.report()
                    if self.args.timing == "text"
                    else json.dumps({"timing": self.timing.as_json()})
                ),
                file=sys.stderr,
            )
        if self.args.pass_statistics == "json":
            print(json.dumps({"statistics": dict(sorted(self.statistics.items()))}), file=sys.stderr)
        elif self.args.pass_statistics:
            for key, value in sorted(self.statistics.items()):
                print(f"{value:>10} {key}", file=sys.stderr)


def _pass_names(lists: list[str], all_passes: bool, registry: PassRegistry) -> frozenset[str]:
    """The passes that a flag names; `*` for all."""
    if all_passes:
        return frozenset(("*",))
    names = frozenset(name for names in lists for name in names.split(",") if name)
    unknown = sorted(name for name in names if registry.find(name) is None)
    if unknown:
        raise TyirError(
            [
                Diagnostic(
                    f"there is no pass '{name}' to print the IR at", help=did_you_mean(name, registry.names())
                )
                for name in unknown
            ]
        )
    return names


def _label(op: Op, source: SourceText, positions: dict[Op, int]) -> Label | None:
    """Where an op stands in the text: from its results to its name."""
    start = positions.get(op)
    if start is None:
        return None
    quote = source.text.find('"', start)
    short = _SHORT_HEAD.match(source.text, start)
    end = short.end() if short is not None else source.text.find('"', quote + 1) + 1
    return Label(source, start, max(end, start + 1))


def _locate(source: SourceText, positions: dict[Op, int]) -> None:
    """Give every op its place in the file as location, so that errors of passes have a line.

    As mlir-opt does.
    """
    from tyir.location import FileLoc

    for op, offset in positions.items():
        line, col = source.line_col(offset)
        op.loc = FileLoc(source.name, line, col)


def _check_registered(module: Module, source: SourceText, positions: dict[Op, int]) -> None:
    """All ops that no dialect declares, in one error."""
    from tyir.registry import dialect_names, dialect_ops

    problems: list[Diagnostic] = []
    seen: set[str] = set()
    for op in module.walk():
        if op.registered or op.name in seen or len(problems) == 20:
            continue
        seen.add(op.name)
        known = dialect_ops(op.dialect) if op.dialect in dialect_names() else {}
        everywhere = [n for d in dialect_names() for n in dialect_ops(d)] if not known else list(known)
        hint = did_you_mean(op.name, everywhere)
        accept = "--load-dialect FILE.py makes ops known, --allow-unregistered-dialect accepts any"
        help = f"{hint} ({accept})" if hint else accept
        what = (
            f"dialect '{op.dialect}' has no op '{op.name}'" if known else f"no dialect declares '{op.name}'"
        )
        problems.append(Diagnostic(what, label=_label(op, source, positions), help=help))
    if problems:
        raise TyirError(problems)


def _check_round_trip(module: Module) -> None:
    from tyir.parser import parse_module
    from tyir.printer import print_op

    first = print_op(module)
    second = print_op(parse_module(first, "<printed>"))
    if first != second:
        lines = zip(first.splitlines(), second.splitlines())
        different = next(
            (f"printed:  {a}\nreprinted: {b}" for a, b in lines if a != b),
            "one text is longer than the other",
        )
        raise TyirError(Diagnostic("printing and parsing does not give the same IR back", excerpt=different))


def _leave_reproducer(text: str, pipeline: Pipeline) -> str:
    """After an internal error: the input and the pipeline in a temporary file; a sentence that says where."""
    from tyir.pass_manager.instruments import reproducer_text

    with tempfile.NamedTemporaryFile(
        "w", prefix="tyir-reproducer-", suffix=".ir", delete=False, encoding="utf-8"
    ) as file:
        file.write(reproducer_text(text, pipeline.text()))
    return f"reproducer: tyir-opt --run-reproducer {file.name}"


if __name__ == "__main__":
    sys.exit(main())
