"""One form for what can be written in several ways; runs between other passes, in any order and any number
of times.

    %b = ty.reshape(%a) {shape = [s1]}; %c = ty.reshape(%b) {shape = [s2]}      -->   %c = ty.reshape(%a) {shape = [s2]}
    %b = ty.transpose(%a) {perm = p};   %c = ty.transpose(%b) {perm = q}        -->   %c = ty.transpose(%a) {perm = p[q]}
    %b = ty.cast(%a : f16) {element = f16}, ty.reshape to the same shape, ty.transpose by the identity, ty.slice of the whole   -->   %a
    unused pure ops   -->   (deleted)

Algorithm: the greedy driver of `tyir.rewrite` with the patterns below and every op's own `fold`.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

from tyir.dialects.ty import Reshape, Slice, Transpose
from tyir.ir import Op
from tyir.opdef import DeclaredOp
from tyir.pipeline import Pass, PassContext
from tyir.rewrite import Pattern, Rewriter, pattern, rewrite_greedily

__all__ = ["PATTERNS", "Canonicalize"]


@dataclass(frozen=True)
class Canonicalize(Pass):
    """Fold and simplify until nothing changes."""

    anchor: ClassVar[str] = "any"

    def run(self, op: Op, context: PassContext) -> None:
        changes = rewrite_greedily(op, PATTERNS)
        context.count("canonicalize.changes", changes)
        if not changes:
            context.nothing_changed()


def _replace(op: Op, new: DeclaredOp, inner: Op, rewriter: Rewriter) -> bool:
    """Put `new` in the place of `op`, which did its work together with `inner`; not when the type would
    change, nor when what `inner` takes is updated in place, maybe before `op`.
    """
    if new.results[0].type is not op.results[0].type or rewriter.is_overwritten(inner.operands[0]):
        new.drop_references()
        return False
    new.results[0].name = op.results[0].name
    rewriter.replace(op, rewriter.insert(new, before=op).results, absorbed=[inner])
    return True


@pattern(Reshape)
def reshape_of_reshape(op: Reshape, rewriter: Rewriter) -> bool:
    """Only the last shape counts."""
    inner = op.x.op
    merged = op.merged() if isinstance(inner, Reshape) else None
    return inner is not None and merged is not None and _replace(op, merged, inner, rewriter)


@pattern(Transpose)
def transpose_of_transpose(op: Transpose, rewriter: Rewriter) -> bool:
    """Permutations compose."""
    inner = op.x.op
    merged = op.merged() if isinstance(inner, Transpose) else None
    return inner is not None and merged is not None and _replace(op, merged, inner, rewriter)


@pattern(Slice)
def slice_of_slice(op: Slice, rewriter: Rewriter) -> bool:
    """Offsets along one axis add."""
    inner = op.x.op
    if not isinstance(inner, Slice) or inner.axis != op.axis:
        return False
    new = Slice(
        inner.x, axis=op.axis, offset=inner.offset + op.offset, size=op.size, attributes=op.attributes
    )
    return _replace(op, new, inner, rewriter)


PATTERNS: Final[tuple[Pattern, ...]] = (reshape_of_reshape, transpose_of_transpose, slice_of_slice)
