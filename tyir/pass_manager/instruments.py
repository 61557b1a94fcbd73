"""Watching a pipeline run: print the IR around passes, time them, keep a reproducer.

Everything goes to stderr or to files, never to stdout.
"""

from __future__ import annotations

import re
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tyir.diagnostics import TyirError
from tyir.ir import Op
from tyir.pipeline import Instrument, Pass, Pipeline
from tyir.printer import print_op
from tyir.process.stopwatch import StageTime, Stopwatch
from tyir.text.attribute_printer import escape
from tyir.text.lexer import unescape

__all__ = ["Bisect", "PrintIr", "Reproducer", "Timing", "read_reproducer", "reproducer_text"]


def _outermost(op: Op) -> Op:
    while (parent := op.parent_op) is not None:
        op = parent
    return op


@dataclass
class PrintIr(Instrument):
    """Dumps of the IR before and after passes, with MLIR's headings.

    `before_passes` and `after_passes` hold names, or `*` for all.  `after_change` prints only where the text
    has changed.  With `folder`, each dump is a file `<number>_<pass>.ir` below it instead of text on stderr,
    in a folder per op as mlir-opt lays them out: `builtin_module_no-symbol-name/func_func_main/`.
    """

    before_passes: frozenset[str] = frozenset()
    after_passes: frozenset[str] = frozenset()
    after_change: bool = False
    after_failure: bool = False
    module_scope: bool = False
    locations: bool = True
    folder: Path | None = None
    pretty: bool = False
    elide: int | None = None
    _texts: list[str] = field(default_factory=list)
    _count: int = 0

    def before(self, pass_: Pass, op: Op) -> None:
        if self.after_change:
            self._texts.append(self._text(op))
        if not self.before_passes.isdisjoint(("*", pass_.name())):
            self._dump("Before", pass_, op)

    def after(self, pass_: Pass, op: Op) -> None:
        changed = not self.after_change or self._texts.pop() != self._text(op)
        wanted = not self.after_passes.isdisjoint(("*", pass_.name())) or (
            self.after_change and not self.after_passes
        )
        if wanted and changed:
            self._dump("After", pass_, op)

    def failed(self, pass_: Pass, op: Op, error: BaseException) -> None:
        if self.after_change:
            self._texts.pop()
        if self.after_failure or not self.after_passes.isdisjoint(("*", pass_.name())):
            self._dump("After", pass_, op, " Failed")

    def _text(self, op: Op) -> str:
        return print_op(_outermost(op) if self.module_scope else op, self.locations, self.pretty, self.elide)

    def _dump(self, when: str, pass_: Pass, op: Op, suffix: str = "") -> None:
        heading = f"// -----// IR Dump {when} {type(pass_).__name__}{suffix} ({pass_.name()}) //----- //"
        if self.folder is None:
            print(f"{heading}\n{self._text(op)}", file=sys.stderr)
            return
        folder = self.folder.joinpath(*_nest(op))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{self._count}_{'' if when == 'After' else 'before_'}{pass_.name()}.ir"
            path.write_text(f"{heading}\n{self._text(op)}", encoding="utf-8")
        except OSError as error:
            raise TyirError(f"cannot write dumps to {folder}: {error.strerror}") from None
        self._count += 1


def _nest(op: Op) -> list[str]:
    """The folders of an op's dumps: one per op around it, outermost first."""
    parts: list[str] = []
    current: Op | None = op
    while current is not None:
        symbol = re.sub(r"[^\w.-]", "_", current.sym_name) if current.sym_name else "no-symbol-name"
        parts.append(f"{current.name.replace('.', '_')}_{symbol}")
        current = current.parent_op
    return parts[::-1]


@dataclass
class Bisect(Instrument):
    """Skips every run of a pass after the first `limit` (negative: none), and says on stderr what ran: to
    find the pass that breaks something.
    """

    limit: int
    count: int = 0

    def wants(self, pass_: Pass, op: Op) -> bool:
        self.count += 1
        runs = self.limit < 0 or self.count <= self.limit
        symbol = f" @{op.sym_name}" if op.sym_name else ""
        print(
            f"BISECT: {'' if runs else 'NOT '}running pass ({self.count}) {pass_.name()} on"
            f" '{op.name}'{symbol}",
            file=sys.stderr,
        )
        return runs


@dataclass
class Timing(Instrument):
    """Wall seconds and peak memory per pass, passes that ran on several ops summed up."""

    watch: Stopwatch = field(default_factory=Stopwatch)
    _running: list[AbstractContextManager[None]] = field(default_factory=list)

    def before(self, pass_: Pass, op: Op) -> None:
        stage = self.watch.stage(pass_.name())
        stage.__enter__()
        self._running.append(stage)

    def after(self, pass_: Pass, op: Op) -> None:
        self._running.pop().__exit__(None, None, None)

    def failed(self, pass_: Pass, op: Op, error: BaseException) -> None:
        self._running.pop().__exit__(None, None, None)

    def report(self) -> str:
        """The table; verification after a pass counts as part of it."""
        return self._merged().report()

    def as_json(self) -> dict[str, object]:
        """The same as data: seconds and peak MiB (None where the system does not tell) per pass."""
        return self._merged().as_json()

    def _merged(self) -> Stopwatch:
        merged: dict[str, StageTime] = {}
        for stage in self.watch.stages:
            before = merged.get(stage.name)
            if before is not None:
                peaks = [p for p in (before.peak_mib, stage.peak_mib) if p is not None]
                stage = replace(
                    stage, seconds=before.seconds + stage.seconds, peak_mib=max(peaks, default=None)
                )
            merged[stage.name] = stage
        return Stopwatch(list(merged.values()))


@dataclass
class Reproducer(Instrument):
    """When a pass fails, writes the module as it was before that pass, with what was left of the pipeline, to
    `path`.
    """

    path: Path
    pipeline: Pipeline
    verify_each: bool = True
    _before: str = ""
    _started: int = 0

    def before(self, pass_: Pass, op: Op) -> None:
        self._before = print_op(_outermost(op))

    def failed(self, pass_: Pass, op: Op, error: BaseException) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(
            reproducer_text(self._before, _remaining(self.pipeline, pass_).text(), self.verify_each),
            encoding="utf-8",
        )
        print(
            f"note: reproducer written to {self.path}; run it with tyir-opt --run-reproducer {self.path}",
            file=sys.stderr,
        )


def _remaining(pipeline: Pipeline, failed: Pass) -> Pipeline:
    """The pipeline from the item that holds the failed pass on."""
    for index, item in enumerate(pipeline.items):
        if item is failed or (isinstance(item, Pipeline) and _holds(item, failed)):
            return Pipeline(pipeline.anchor, pipeline.items[index:])
    return pipeline


def _holds(pipeline: Pipeline, wanted: Pass) -> bool:
    return any(
        item is wanted or (isinstance(item, Pipeline) and _holds(item, wanted)) for item in pipeline.items
    )


_PIPELINE = re.compile(r'mlir_reproducer:\s*\{[^}]*?pipeline:\s*"((?:[^"\\\n]|\\.)*)"')
_VERIFY = re.compile(r"verify_each:\s*(true|false)")


def reproducer_text(ir: str, pipeline: str, verify_each: bool = True) -> str:
    """IR text with the pipeline in its metadata section, where mlir-opt keeps it too."""
    options = (
        f"pipeline: {escape(pipeline)},\n      disable_threading: true,\n      verify_each:"
        f" {str(verify_each).lower()}"
    )
    section = f"  external_resources: {{\n    mlir_reproducer: {{\n      {options}\n    }}\n  }}\n#-}}\n"
    head, found, _ = ir.rstrip().rpartition("#-}")
    return f"{head.rstrip()},\n{section}" if found and "{-#" in head else f"{ir.rstrip()}\n\n{{-#\n{section}"


def read_reproducer(text: str) -> tuple[str, bool] | None:
    """The pipeline and the verify_each setting of a reproducer's metadata, or None."""
    start = text.rfind("{-#")
    match = _PIPELINE.search(text, start) if start >= 0 else None
    if match is None:
        return None
    verify = _VERIFY.search(text, start)
    return unescape(match[1]), verify is None or verify[1] == "true"
