"""Patterns and the greedy driver that applies them until nothing matches.

    @pattern(Transpose)
    def fold_inverse(op: Transpose, rewriter: Rewriter) -> bool:
        ...
        rewriter.replace(op, [value])
        return True

The driver folds (`op.fold()`), deletes unused pure ops, and tries the patterns of an op's class by falling
benefit.  What it changes puts the neighbours back on the worklist.  Ops a pattern makes get the locations
of the ops they replace, fused, and their place in the model (`tyir.layers`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from tyir.attributes import Attribute
from tyir.checking.dominance import unreachable_blocks
from tyir.checking.in_place import Overwrites
from tyir.diagnostics import Diagnostic, TyirError
from tyir.ir import Block, Op, Value
from tyir.layers import carry
from tyir.location import UNKNOWN, fuse
from tyir.opdef import DeclaredOp
from tyir.printer import op_excerpt
from tyir.registry import dialect_ops
from tyir.traits import ConstantLike, IsolatedFromAbove, Pure

__all__ = [
    "Listener",
    "Pattern",
    "Phase",
    "Rewriter",
    "Rule",
    "blocks_below",
    "erase_all",
    "pattern",
    "rewrite_greedily",
    "rewrite_phases",
]

_OpT = TypeVar("_OpT", bound=Op)
_REWRITES_PER_OP: Final = 50  # more than this on average is a pair of patterns that undo each other


@dataclass(frozen=True)
class Pattern:
    """A rewrite of one kind of op.

    `rewrite` returns whether it changed anything; higher `benefit` is tried first.
    """

    op_class: type[Op]
    rewrite: Callable[[Any, Rewriter], bool]
    benefit: int = 1

    @property
    def name(self) -> str:
        return getattr(self.rewrite, "__name__", "pattern")


def pattern(op_class: type[_OpT], benefit: int = 1) -> Callable[[Callable[[_OpT, Rewriter], bool]], Pattern]:
    """Declare a function as a pattern for one op class."""
    return lambda rewrite: Pattern(op_class, rewrite, benefit)


class Listener:
    """Hears of every change that goes through a rewriter; override what you need."""

    def inserted(self, op: Op) -> None:
        """A new op is in its place; its location may not be final yet."""

    def replaced(self, op: Op, values: Sequence[Value]) -> None:
        """An op is about to be replaced by these values and erased."""

    def erased(self, op: Op) -> None:
        """An unused op is about to be erased."""

    def changed(self, op: Op) -> None:
        """An op was changed in place."""


@dataclass
class Rewriter:
    """What patterns change the IR with, so that the driver (and who listens) sees it."""

    listeners: Sequence[Listener] = ()
    is_overwritten: Callable[[Value], bool] = field(default_factory=Overwrites)  # updated in place
    _work: list[Op] = field(default_factory=list)
    _queued: set[Op] = field(default_factory=set)
    _inserted: list[Op] = field(default_factory=list)

    def insert(self, op: _OpT, before: Op) -> _OpT:
        """Put a new op in front of `before`."""
        op.insert_before(before)
        self._inserted.append(op)
        self._push(op)
        for listener in self.listeners:
            listener.inserted(op)
        return op

    def replace(self, op: Op, values: Sequence[Value], absorbed: Iterable[Op] = ()) -> None:
        """Replace the results of `op` and erase it.

        `absorbed` are further ops whose work the new ones do: their locations are fused in.
        """
        old = (*absorbed, op)
        for new in self._inserted:
            carry(new, *old)
            if new.loc is UNKNOWN:
                new.loc = fuse(o.loc for o in old)
        self._inserted.clear()
        for value in values:
            if value.op is not None:
                self._push(value.op)
        for result in op.results:
            for user in result.uses:
                self._push(user)
        sources = [v.op for v in op.operands if v.op is not None]
        self._forget(op)
        for listener in self.listeners:
            listener.replaced(op, values)
        op.replace_with(values)
        for source in sources:
            self._push(source)

    def erase(self, op: Op) -> None:
        """Erase an op without uses; its operands' makers are looked at again."""
        sources = [v.op for v in op.operands if v.op is not None]
        self._forget(op)
        for listener in self.listeners:
            listener.erased(op)
        op.erase()
        for source in sources:
            self._push(source)

    def changed(self, op: Op) -> None:
        """An op was changed in place: look at it and its users again."""
        for listener in self.listeners:
            listener.changed(op)
        self._push(op)
        for result in op.results:
            for user in result.uses:
                self._push(user)

    def _push(self, op: Op) -> None:
        if op not in self._queued:
            self._queued.add(op)
            self._work.append(op)

    def _forget(self, op: Op) -> None:
        self._queued.discard(op)
        if op.regions:
            self._queued.difference_update(op.walk())


@dataclass(slots=True)
class _Plan:
    """What the driver does with ops of one class."""

    patterns: tuple[Pattern, ...]
    folds: bool
    removable: bool


def rewrite_greedily(
    root: Op,
    patterns: Iterable[Pattern],
    fold: bool = True,
    listeners: Sequence[Listener] = (),
    dead_code: bool = True,
) -> int:
    """Apply patterns, folders (`fold`) and dead-code removal (`dead_code`) below `root` until nothing
    changes; returns the number of changes.

    Raises `TyirError` naming the pattern when the changes do not come to an end.
    """
    by_class: dict[type[Op], list[Pattern]] = {}
    for p in sorted(patterns, key=lambda p: -p.benefit):
        by_class.setdefault(p.op_class, []).append(p)
    plans: dict[type[Op], _Plan | None] = {}
    rewriter = Rewriter(listeners)
    with_blocks: list[Op] = []
    work, queued = rewriter._work, rewriter._queued
    total = 0
    for op in root.walk():
        total += 1
        cls = type(op)
        if cls not in plans:
            plans[cls] = _plan(cls, by_class, fold, dead_code)
        if plans[cls] is not None and op is not root:
            work.append(op)
        if op.regions and any(len(region.blocks) > 1 for region in op.regions):
            with_blocks.append(op)
    work.reverse()  # top down: definitions before uses
    queued.update(work)
    bounds = _Bounds.of(root, with_blocks)
    limit = _REWRITES_PER_OP * (total + 20)
    applied: Counter[str] = Counter()
    changes = 0
    while work:
        op = work.pop()
        if op not in queued:
            continue
        queued.remove(op)
        cls = type(op)
        if cls not in plans:
            plans[cls] = _plan(cls, by_class, fold, dead_code)
        plan = plans[cls]
        if plan is None or (bounds is not None and bounds.leave_out(op)):
            continue
        name = _visit(op, plan, rewriter)
        if name is None:
            continue
        changes += 1
        applied[name] += 1
        if changes > limit:
            _diverged(op, applied)
    return changes


@dataclass(slots=True)
class _Bounds:
    """Which ops the driver leaves alone: those outside of its root, and those in blocks that control never
    reaches, where a value may depend on itself.
    """

    root: Op
    inside_only: bool  # ops in the root may use what is defined outside
    unreachable: set[Block]

    @staticmethod
    def of(root: Op, with_blocks: Iterable[Op]) -> _Bounds | None:
        """The bounds of a root, in which these ops have regions of several blocks; None for a root that has
        none.
        """
        regions = [region for op in with_blocks for region in op.regions]
        lost = [block for region in regions for block in unreachable_blocks(region)]
        unreachable = {b for block in lost for b in (block, *(b for op in block for b in blocks_below(op)))}
        inside_only = root.block is not None and IsolatedFromAbove not in root.traits
        return _Bounds(root, inside_only, unreachable) if unreachable or inside_only else None

    def leave_out(self, op: Op) -> bool:
        if op.block in self.unreachable:
            return True
        return self.inside_only and (op is self.root or not self.root.is_ancestor_of(op))


def _plan(
    cls: type[Op], by_class: dict[type[Op], list[Pattern]], fold: bool, dead_code: bool
) -> _Plan | None:
    found = tuple(by_class.get(cls, ()))
    folds = fold and issubclass(cls, DeclaredOp) and cls.fold is not DeclaredOp.fold
    removable = dead_code and Pure in cls.traits
    return _Plan(found, folds, removable) if found or folds or removable else None


def _visit(op: Op, plan: _Plan, rewriter: Rewriter) -> str | None:
    """Change one op if anything applies; the name of what did."""
    if plan.removable:
        for result in op.results:
            if result.uses:
                break
        else:
            rewriter.erase(op)
            return "dead code"
    if plan.folds and _fold(op, rewriter):
        return f"fold of {op.name}"
    for p in plan.patterns:
        rewriter._inserted.clear()
        if p.rewrite(op, rewriter):
            return p.name
    return None


def _fold(op: Op, rewriter: Rewriter) -> bool:
    assert isinstance(op, DeclaredOp)
    folded = op.fold()
    if folded is None:
        return False
    old_and_new = (*op.results, *(item for item in folded if isinstance(item, Value)))
    if any(map(rewriter.is_overwritten, old_and_new)):
        return False  # one value in place of two would be read after its update
    rewriter._inserted.clear()
    values = [item if isinstance(item, Value) else _materialize(item, op, rewriter) for item in folded]
    if any(new.type is not old.type for new, old in zip(values, op.results)):
        raise ValueError(f"{op.name}.fold() gives a value of another type")
    rewriter.replace(op, values)
    return True


def _materialize(attribute: Attribute, op: Op, rewriter: Rewriter) -> Value:
    """A constant op for a folded attribute: of the kind that `op` reads, or of its dialect."""
    makers = [type(value.op) for value in op.operands if value.op is not None]
    for cls in (*makers, *dialect_ops(op.dialect).values()):
        if ConstantLike in cls.traits and issubclass(cls, DeclaredOp):
            constant = cls.materialize(attribute)
            if constant is not None:
                return rewriter.insert(constant, before=op).results[0]
    raise TypeError(f"{op.name}.fold() gives {attribute}, of which no constant can be made")


def _diverged(op: Op, applied: Counter[str]) -> None:
    names = ", ".join(f"'{name}' ({count} times)" for name, count in applied.most_common(3))
    raise TyirError(
        Diagnostic(
            f"rewriting does not come to an end; applied most: {names}",
            excerpt=op_excerpt(op),
            help="two of these patterns undo each other",
        )
    )


# ------------------------------------------------------------------------------------------ phases of rules

Rule = Callable[[Op], Value | None]
Phase = tuple[tuple[type[Op], Rule], ...]


def rewrite_phases(function: Op, phases: Iterable[Phase], statistics: dict[str, int]) -> None:
    """Rewrite a function by rules, phase by phase: for one dialect turned into another, where the largest
    pattern at a place must be tried before its parts and every op is met once.

    A rule takes the op at the root of its pattern and returns the value that replaces the op's result, or
    None when the pattern is not there.  It inserts new ops before the root and erases nothing: what the
    pattern consumed is dead afterwards and erased here.  Each phase is one sweep from the end of the function
    to its beginning, which visits no op that the phase has made.  `statistics` counts the uses of each rule.
    """
    blocks = [block for region in function.regions for block in region.blocks]
    for phase in phases:
        for block in reversed(blocks):
            for op in reversed(block):
                if op.has_trait(Pure) and op.is_unused:
                    op.erase()
                else:
                    _apply_rules(op, phase, statistics)


def _apply_rules(op: Op, phase: Phase, statistics: dict[str, int]) -> None:
    for root, rule in phase:
        if isinstance(op, root) and (value := rule(op)) is not None:
            name = getattr(rule, "__name__", "rule")
            if value.type is not op.result.type:
                raise AssertionError(f"rule {name} makes {value.type} of {op.result.type} at {op.loc}")
            op.replace_with([value])
            statistics[name] = statistics.get(name, 0) + 1
            return


def erase_all(ops: Iterable[Op]) -> None:
    """Erase ops whose results only they themselves use.

    Linear: use lists are filtered once each, however long.
    """
    dead = dict.fromkeys(ops)
    nested = [inner for op in dead if op.regions for inner in op.walk() if inner is not op]
    gone = {*dead, *nested}
    used: dict[Value, None] = {}
    for op in gone:
        used.update(dict.fromkeys(op._operands))
        op._operands = ()
    for value in used:
        value.uses = [user for user in value.uses if user not in gone]
    for op in dead:
        op.detach()


def blocks_below(op: Op) -> list[Block]:
    """Every block in an op, outer ones first."""
    return [
        block for inner in op.walk() if inner.regions for region in inner.regions for block in region.blocks
    ]
