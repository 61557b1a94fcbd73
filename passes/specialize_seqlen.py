"""One function per sequence length: `@main` over `?` tokens becomes `@main_s1`, `@main_s8`, ... with
static shapes, marked as entry points (`tyir.entry`).

    @main(%ids: tensor<1x?xi32>, ...)   -->   @main_s1(%ids: tensor<1x1xi32>, ...)  @main_s8(%ids: tensor<1x8xi32>, ...)

A prompt runs as chunks of these lengths over the cache, the last one padded.  All lengths share the
weights. Runs after partition-dies, so that the dies are cut once.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tyir.diagnostics import TyirError
from tyir.dialects.func import Func
from tyir.dialects.kv import Append
from tyir.execution.entry_points import mark_entry
from tyir.ir import Op
from tyir.manifest import record
from tyir.opdef import DeclaredOp
from tyir.pipeline import Pass, PassContext
from tyir.types import TensorType, Type

__all__ = ["SpecializeSeqlen", "check_seqlens", "infer_results"]


def check_seqlens(seqlens: Sequence[int], capacity: int) -> None:
    """`TyirError` unless the lengths are a non-empty ascending list of distinct numbers in 1..capacity."""
    if not seqlens:
        raise TyirError("the list of sequence lengths is empty", help="use seqlens=1,8")
    wanted = sorted({min(max(s, 1), capacity) for s in seqlens})
    if list(seqlens) != wanted:
        what = (
            f"{min(seqlens)} is below 1" if min(seqlens) < 1
            else f"{max(seqlens)} is larger than the cache of {capacity} tokens" if max(seqlens) > capacity
            else "must ascend without repetition"
        )  # fmt: skip
        raise TyirError(
            f"sequence lengths {','.join(map(str, seqlens))}: {what}",
            help=f"use seqlens={','.join(map(str, wanted))}"
            + (f", or max-kv={max(seqlens)}" if max(seqlens) > capacity else ""),
        )


def infer_results(op: Op) -> None:
    """Recompute the result types of an op whose operand types changed."""
    if not isinstance(op, DeclaredOp) or not op.results or type(op).infer is DeclaredOp.infer:
        return
    inferred = op.infer()
    for value, new in zip(op.results, (inferred,) if isinstance(inferred, Type) else inferred):
        value.type = new


def static(type: Type, tokens: int) -> Type:
    """A tensor type with `?` replaced by the number of tokens."""
    if isinstance(type, TensorType) and not type.is_static:
        return type.with_shape(tokens if d is None else d for d in type.dims)
    return type


@dataclass(frozen=True)
class SpecializeSeqlen(Pass):
    """Static shapes for each sequence length of the list."""

    stage: ClassVar[tuple[str, ...]] = ("dist",)
    to_stage: ClassVar[str | None] = "static"

    seqlens: tuple[int, ...] = (1, 8)

    def run(self, op: Op, context: PassContext) -> None:
        dynamic = [
            f
            for f in op.walk_type(Func)
            if any(isinstance(a.type, TensorType) and not a.type.is_static for a in f.args)
        ]
        capacities = [c for f in dynamic if (c := cache_capacity(f)) is not None]
        check_seqlens(self.seqlens, min(capacities, default=1 << 31))
        for function in dynamic:
            for tokens in self.seqlens:
                self._specialize(function, tokens)
            function.erase()
        record(op, seqlens=self.seqlens)

    def _specialize(self, function: Func, tokens: int) -> None:
        new = function.clone()
        new.sym_name = f"{function.sym_name}_s{tokens}"
        mark_entry(new, tokens)
        for arg in new.args:
            arg.type = static(arg.type, tokens)
        for op in new.body:
            infer_results(op)
            for value in op.results:  # collectives, whose types do not follow from their operands
                value.type = static(value.type, tokens)
        new.refresh_type()
        new.insert_before(function)


def cache_capacity(function: Func) -> int | None:
    """The number of tokens the function's caches hold, None without caches."""
    return next((append.capacity for append in function.walk_type(Append)), None)
