"""Passes and pipelines.

    @dataclass(frozen=True)
    class MyPass(Pass):
        \"\"\"What it does.\"\"\"
        max_kv: int = 1024                       # the option max-kv

        def run(self, op: Op, context: PassContext) -> None: ...   # changes op in place

A pipeline is text (`tyir.pass_manager.text`).  Items run in order on the current op, at first the module;
`func.func(...)` runs its items on every function directly below the current op, one function after the other,
as in MLIR; a pass made for functions (`anchor`) that stands at module level runs on all functions below.
Named pipelines (`passes/pipelines.py`) stand where a pass may.  After each pass the op it ran on is verified,
unless the pass says that it changed nothing: what a pass made for functions did not reach is not looked at
again.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Final

from tyir.attributes import StringAttr
from tyir.diagnostics import Diagnostic, Label, Severity, TyirError, did_you_mean
from tyir.dialects.builtin import Module
from tyir.ir import Op
from tyir.pass_manager.analysis import AnalysisManager
from tyir.pass_manager.options import make_pass, options_text
from tyir.pass_manager.registry import PassRegistry
from tyir.pass_manager.text import (
    MAX_PASSES,
    Nest,
    PassText,
    PipelineItem,
    parse_pipeline_text,
    pipeline_error,
)
from tyir.printer import op_excerpt
from tyir.process.collector import collector_paused
from tyir.stages import KEY, require_stage
from tyir.verifier import location_text, verify

if TYPE_CHECKING:
    from tyir.execution.weights import WeightSource

__all__ = [
    "Instrument",
    "Pass",
    "PassContext",
    "Pipeline",
    "build_pipeline",
    "run_at_stage",
    "run_pipeline",
    "run_verified_once",
]

ANY: Final = "any"
_WORD_STARTS: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


@dataclass(frozen=True)
class Pass:
    """Base of all passes; a subclass is a frozen dataclass whose fields are its options.

    `stage`: the stages (`tyir.stages`) that a module may stand at for it, () being all; `to_stage`: the one
    it takes the module to.
    """

    anchor: ClassVar[str] = "builtin.module"
    stage: ClassVar[tuple[str, ...]] = ()
    to_stage: ClassVar[str | None] = None

    @classmethod
    def name(cls) -> str:
        """The pass's name: its class's, in words with dashes (`KvMaterialize` is `kv-materialize`)."""
        return _WORD_STARTS.sub("-", cls.__name__).replace("_", "-").lower()

    def run(self, op: Op, context: PassContext) -> None:
        """Change `op` (an op of the kind `anchor` names) in place.

        `TyirError` for what the user can mend.
        """
        raise TypeError(f"{type(self).__name__} does not define run")

    def text(self) -> str:
        """The pass as pipeline text."""
        return self.name() + options_text(self)


class Instrument:
    """Watches a pipeline; override what you need.  Called around every run of a pass on an op."""

    def wants(self, pass_: Pass, op: Op) -> bool:
        """Whether the pass may run at all; when any instrument says no, it is skipped."""
        return True

    def before(self, pass_: Pass, op: Op) -> None:
        """The pass is about to run."""

    def after(self, pass_: Pass, op: Op) -> None:
        """The pass has run and the op verifies."""

    def failed(self, pass_: Pass, op: Op, error: BaseException) -> None:
        """The pass raised, or the op does not verify any more."""


def _show(diagnostic: Diagnostic) -> None:
    """Where nobody listens, on standard error."""
    print(diagnostic.render(), file=sys.stderr)


@dataclass
class PassContext:
    """What passes may use besides the IR: the weights (None when there are none), statistics to add to, and
    `error`, `warning` and `remark` about an op.

    `report` is given warnings and remarks as they come; `label_of` says where an op stands in the text that
    was read.
    """

    weights: WeightSource | None = None
    statistics: dict[str, int] = field(default_factory=dict)
    verify_each: bool = True
    instruments: list[Instrument] = field(default_factory=list)
    registry: PassRegistry = field(default_factory=PassRegistry)
    analyses: AnalysisManager = field(default_factory=AnalysisManager)
    report: Callable[[Diagnostic], None] = _show
    label_of: Callable[[Op], Label | None] | None = None
    _unchanged: bool = False
    _preserved: tuple[Callable[[Any], Any], ...] = ()
    _errors: list[Diagnostic] = field(default_factory=list)

    def error(self, op: Op, message: str, *, help: str = "", notes: Sequence[Diagnostic] = ()) -> None:
        """Said by a pass: `op` is wrong, for which `help` is the cure.

        The pass goes on, so that all that is wrong is found together; when it has run, the pipeline ends with
        a `TyirError` of all its errors.
        """
        self._errors.append(self._about(op, message, "error", help, notes))

    def warning(self, op: Op, message: str, *, help: str = "", notes: Sequence[Diagnostic] = ()) -> None:
        """Said by a pass: `op` is likely not what was meant."""
        self.report(self._about(op, message, "warning", help, notes))

    def remark(self, op: Op, message: str, *, help: str = "", notes: Sequence[Diagnostic] = ()) -> None:
        """Said by a pass: something worth knowing about `op`."""
        self.report(self._about(op, message, "remark", help, notes))

    def _about(
        self, op: Op, message: str, severity: Severity, help: str, notes: Sequence[Diagnostic]
    ) -> Diagnostic:
        label = self.label_of(op) if self.label_of is not None else None
        return Diagnostic(
            message,
            severity=severity,
            where=location_text(op.loc),
            label=label,
            excerpt="" if label is not None else op_excerpt(op),
            notes=tuple(notes),
            help=help,
        )

    def take_errors(self) -> list[Diagnostic]:
        """The errors that passes have said since the last call."""
        taken, self._errors = self._errors, []
        return taken

    def nothing_changed(self) -> None:
        """Said by a pass: the op is as it was, neither verification nor the analyses need to be repeated."""
        self._unchanged = True

    def preserve(self, *analyses: Callable[[Any], Any]) -> None:
        """Said by a pass: these analyses still hold although the op has changed."""
        self._preserved = (*self._preserved, *analyses)

    def count(self, key: str, amount: int = 1) -> None:
        """Add to a statistic."""
        self.statistics[key] = self.statistics.get(key, 0) + amount


@dataclass(frozen=True)
class Pipeline:
    """Passes and nested pipelines for ops named `anchor` (`any`: all)."""

    anchor: str
    items: tuple[Pass | Pipeline, ...]

    def text(self) -> str:
        """The pipeline as text, options spelled out."""
        return f"{self.anchor}({','.join(item.text() for item in self.items)})"

    def passes(self) -> Iterator[Pass]:
        """The passes in order, those of nested pipelines included."""
        for item in self.items:
            if isinstance(item, Pipeline):
                yield from item.passes()
            else:
                yield item

    def run(self, op: Op, context: PassContext) -> None:
        """Run on one op of the anchor's kind."""
        for item in self.items:
            if isinstance(item, Pipeline):
                for inner in _children(op, item.anchor):
                    item.run(inner, context)
            else:
                for target in _targets(item, op):
                    _run_pass(item, target, context)


def _children(op: Op, anchor: str) -> list[Op]:
    """The ops directly below that a nested pipeline runs on."""
    inner = [o for region in op.regions for block in region.blocks for o in block]
    return [o for o in inner if (o.regions if anchor == ANY else o.name == anchor)]


def _targets(pass_: Pass, op: Op) -> Iterable[Op]:
    """The op itself, or every op below that the pass is made for."""
    if pass_.anchor in (ANY, op.name):
        return [op]
    return [o for o in op.walk() if o.name == pass_.anchor]


def _run_pass(pass_: Pass, op: Op, context: PassContext) -> None:
    if not all(instrument.wants(pass_, op) for instrument in context.instruments):
        return
    for instrument in context.instruments:
        instrument.before(pass_, op)
    context._unchanged, context._preserved = False, ()
    try:
        with collector_paused():
            run_at_stage(pass_, op, context)
            if not context._unchanged:
                context.analyses.invalidate(op, context._preserved)
                if context.verify_each:
                    _verify_after(pass_, op)
    except BaseException as error:
        _add_note(error, pass_, op)
        for instrument in reversed(context.instruments):
            instrument.failed(pass_, op, error)
        raise
    for instrument in reversed(context.instruments):
        instrument.after(pass_, op)


def run_at_stage(pass_: Pass, op: Op, context: PassContext) -> None:
    """Run a pass on a module that stands where the pass may run, and say where it stands afterwards."""
    if pass_.stage:
        require_stage(op, pass_.name(), pass_.stage)
    try:
        pass_.run(op, context)
    except TyirError as error:
        error.diagnostics = (*context.take_errors(), *error.diagnostics)
        raise
    if errors := context.take_errors():
        raise TyirError(errors)
    if pass_.to_stage is not None and op.parent_op is None:
        op.set_attribute(KEY, StringAttr(pass_.to_stage))


def _add_note(error: BaseException, pass_: Pass, op: Op) -> None:
    """Say in the error which pass ran on which op."""
    symbol = f" @{op.sym_name}" if op.sym_name else ""
    where = f"while running pass '{pass_.name()}' on '{op.name}'{symbol}"
    if isinstance(error, TyirError):
        error.diagnostics = (*error.diagnostics, Diagnostic(where, severity="note"))
    else:
        error.add_note(where)


def _verify_after(pass_: Pass, op: Op) -> None:
    try:
        verify(op)
    except TyirError as error:
        message = f"the IR does not verify after pass '{pass_.name()}'"
        raise TyirError([*error.diagnostics, Diagnostic(message, severity="note")]) from None


# ------------------------------------------------------------------------------------------------ from text


def build_pipeline(text: str, registry: PassRegistry | None = None, root: str = Module.name) -> Pipeline:
    """The pipeline of a text, to be run on an op named `root`.

    `TyirError` points at an unknown pass, option or value.
    """
    items = parse_pipeline_text(text)
    if len(items) == 1 and isinstance(items[0], Nest) and items[0].anchor in (root, ANY):
        items = items[0].items
    built = Pipeline(root, _build_items(items, root, registry or PassRegistry(), ()))
    if (count := sum(1 for _ in built.passes())) > MAX_PASSES:
        raise TyirError(
            f"the pipeline has {count} passes, more than the {MAX_PASSES} it may have",
            help="run it in parts, each on the output of the one before",
        )
    return built


def _build_items(
    items: Sequence[PipelineItem], anchor: str, registry: PassRegistry, within: tuple[str, ...]
) -> tuple[Pass | Pipeline, ...]:
    built: list[Pass | Pipeline] = []
    for item in items:
        if isinstance(item, Nest):
            built.append(Pipeline(item.anchor, _build_items(item.items, item.anchor, registry, within)))
        else:
            built.extend(_build_pass(item, anchor, registry, within))
    return tuple(built)


def _build_pass(
    item: PassText, anchor: str, registry: PassRegistry, within: tuple[str, ...]
) -> tuple[Pass | Pipeline, ...]:
    pass_class = registry.find(item.name)
    if pass_class is not None:
        if pass_class.anchor == Module.name and anchor not in (Module.name, ANY):
            help = f"write it outside of {anchor}(...)"
            raise pipeline_error(
                item.source,
                item.start,
                item.end,
                f"pass '{item.name}' runs on builtin.module, not on {anchor}",
                help,
            )
        return (make_pass(pass_class, item),)
    pipelines = registry.pipelines()
    if item.name not in pipelines:
        hint = did_you_mean(item.name, [*registry.names(), *pipelines]) or "tyir-opt --list-passes lists them"
        raise pipeline_error(
            item.source, item.start, item.end, f"there is no pass or pipeline '{item.name}'", hint
        )
    if item.options:
        raise pipeline_error(
            item.source,
            item.options[0].start,
            item.options[-1].end,
            f"pipeline '{item.name}' takes no options",
        )
    if item.name in within:
        raise TyirError(f"pipeline '{item.name}' contains itself: {' -> '.join((*within, item.name))}")
    inner = parse_pipeline_text(pipelines[item.name], f"<pipeline {item.name}>")
    if len(inner) == 1 and isinstance(inner[0], Nest) and inner[0].anchor == anchor:
        inner = inner[0].items
    return _build_items(inner, anchor, registry, (*within, item.name))


def run_pipeline(module: Module, text: str, context: PassContext | None = None) -> None:
    """Run a pipeline's text on a module in place; verifies before the first pass and after each one.

    Raises `TyirError` for a wrong text, for what a pass refuses and for IR that does not verify.
    """
    context = context or PassContext()
    pipeline = build_pipeline(text, context.registry)
    if context.verify_each:
        verify(module)
    pipeline.run(module, context)


def run_verified_once(module: Module, text: str, context: PassContext | None = None) -> None:
    """`run_pipeline` for a pipeline that is known to be right: the module is verified before the first pass
    and after the last one only.

    Where it does not verify then, or a pass fails otherwise than by refusing the module, the passes run once
    more on the module as it was, with verification after each: the error says which of them it was.  Raises
    as `run_pipeline`; with instruments, which look at what each pass leaves, it is `run_pipeline`.
    """
    context = context or PassContext()
    if context.instruments or not context.verify_each:
        run_pipeline(module, text, context)
        return
    verify(module)
    source = module.clone()
    passed = False
    try:
        run_pipeline(module, text, replace(context, verify_each=False))
        passed = True
        verify(module)
    except Exception as error:
        if passed or not isinstance(error, TyirError):
            again = PassContext(context.weights, registry=context.registry, report=_said_before)
            run_pipeline(source, text, again)
        raise


def _said_before(diagnostic: Diagnostic) -> None:
    """For passes that run a second time."""
