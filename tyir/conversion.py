"""Dialect conversion: patterns that turn illegal ops into legal ones, and an error that counts what remains.

    target = Target(legal_dialects={"ty", "func", "builtin"}, illegal_ops={"ty.attention"}, legal_if={"ty.cast": lambda op: ...})
    convert(module, target, patterns)

Unlike the greedy driver, patterns are tried on illegal ops alone, each illegal op that a pattern makes is converted in turn, and nothing is folded.  An op
that the target does not speak of is illegal; with `partial=True` it may stay, and only what is declared illegal counts.  Values may change their types:
`tyir.type_conversion`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import UnrealizedConversionCast
from tyir.ir import Op
from tyir.printer import op_excerpt
from tyir.rewrite import Listener, Pattern, Rewriter
from tyir.type_conversion import ConversionRewriter, TypeConverter, convert_functions, resolve_casts

__all__ = ["Target", "convert"]

_MAX_STEPS_PER_OP: Final = 50


@dataclass(frozen=True)
class Target:
    """What may exist after a conversion.  The more special entry decides: `legal_if`, then ops, then dialects."""

    legal_dialects: frozenset[str] | set[str] = frozenset()
    illegal_dialects: frozenset[str] | set[str] = frozenset()
    legal_ops: frozenset[str] | set[str] = frozenset()
    illegal_ops: frozenset[str] | set[str] = frozenset()
    legal_if: Mapping[str, Callable[[Op], bool]] = field(default_factory=dict)

    def is_legal(self, op: Op) -> bool | None:
        """None when the target says nothing of the op."""
        name, dialect = op.name, op.dialect
        if name in self.legal_if:
            return self.legal_if[name](op)
        if name in self.legal_ops or name in self.illegal_ops:
            return name in self.legal_ops
        if dialect in self.legal_dialects or dialect in self.illegal_dialects:
            return dialect in self.legal_dialects
        return None


def convert(
    root: Op,
    target: Target,
    patterns: Iterable[Pattern],
    partial: bool = False,
    listeners: Sequence[Listener] = (),
    types: TypeConverter | None = None,
) -> int:
    """Convert everything below `root` in place; returns the number of rewrites.

    With `types`, functions, calls and returns get the converted types first, patterns receive a `ConversionRewriter`, and casts are resolved at the end.

    Raises `TyirError` that counts the illegal ops by name, each with its first place, when some remain; the IR is then half converted.
    """
    by_class: dict[type[Op], list[Pattern]] = {}
    for p in sorted(patterns, key=lambda p: -p.benefit):
        by_class.setdefault(p.op_class, []).append(p)
    changes = 0 if types is None else convert_functions(root, types, listeners)
    rewriter = Rewriter(listeners) if types is None else ConversionRewriter(listeners, types=types)
    work, queued = rewriter._work, rewriter._queued
    work.extend(op for op in root.walk() if op is not root)
    work.reverse()
    queued.update(work)
    limit = _MAX_STEPS_PER_OP * (len(work) + 20) + changes
    while work:
        op = work.pop()
        if op not in queued:
            continue
        queued.remove(op)
        if _may_stay(op, target, partial):
            continue
        for p in by_class.get(type(op), ()):
            rewriter._inserted.clear()
            if p.rewrite(op, rewriter):
                changes += 1
                break
        if changes > limit:
            raise TyirError(
                Diagnostic("the conversion does not come to an end: patterns make ops that are illegal again", excerpt=op_excerpt(op))
            )
    _check(root, target, partial)
    if types is not None:
        resolve_casts(root, types, partial)
    return changes


def _may_stay(op: Op, target: Target, partial: bool) -> bool:
    legal = True if isinstance(op, UnrealizedConversionCast) else target.is_legal(op)
    return partial if legal is None else legal


def _check(root: Op, target: Target, partial: bool) -> None:
    counts: Counter[str] = Counter()
    first: dict[str, Op] = {}
    for op in root.walk():
        if op is not root and not _may_stay(op, target, partial):
            counts[op.name] += 1
            first.setdefault(op.name, op)
    if counts:
        raise TyirError([_remains(name, count, first[name]) for name, count in counts.most_common()])


def _remains(name: str, count: int, op: Op) -> Diagnostic:
    from tyir.verify import location_text

    what = "illegal op remains" if count == 1 else "illegal ops remain"
    return Diagnostic(
        f"{what}: {count} x '{name}'; no pattern converts {'it' if count == 1 else 'the first one'}",
        where=location_text(op.loc),
        excerpt=op_excerpt(op),
    )
