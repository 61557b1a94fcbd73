"""One function per sequence length: `@main` over `?` tokens becomes `@main_s1`, `@main_s8`, ... with
static shapes, marked as entry points (`tyir.entry`).

    @main(%ids: tensor<1x?xi32>, ...)   -->   @main_s1(%ids: tensor<1x1xi32>, ...)  @main_s8(%ids: tensor<1x8xi32>, ...)

A prompt runs as chunks of these lengths over the cache, the last one padded.  All lengths share the
weights. Runs after partition-dies, so that the dies are cut once.

A step of one token returns that token's row, also where `select-rows` has longer ones return one of theirs: it
takes no `row`.

A vision tower has one length, its patches: it becomes an entry point as it is.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from tyir.diagnostics import TyirError
from tyir.dialects.func import Func
from tyir.dialects.kv import Append
from tyir.dialects.ty import SelectRow, tensor_type
from tyir.execution.entry_points import arguments, mark_entry
from tyir.ir import Op
from tyir.manifest import record
from tyir.opdef import DeclaredOp
from tyir.pipeline import Pass, PassContext
from tyir.traits import Pure
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


# What ops of a class, with these properties and operands of these types, give.
Inferred = dict[tuple[object, ...], Sequence[Type]]


def infer_results(op: Op, known: Inferred | None = None) -> None:
    """Recompute the result types of an op whose operand types changed.

    `known` remembers those of pure ops, which follow from their properties and operand types alone (as the
    verifier takes it): the layers of a model ask the same again.
    """
    if not isinstance(op, DeclaredOp) or not op.results or type(op).infer is DeclaredOp.infer:
        return
    if known is None or Pure not in op.traits or op.region_fields:
        types = _inferred(op)
    else:
        key = (type(op), op.properties, *[v.type for v in op.operands])
        found = known.get(key)
        types = known[key] = _inferred(op) if found is None else found
    for value, new in zip(op.results, types):
        value.type = new


def _inferred(op: DeclaredOp) -> Sequence[Type]:
    types = op.infer()
    return (types,) if isinstance(types, Type) else types


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
        towers = [f for f in op.walk_type(Func) if arguments(f, "patches")]
        if towers:
            self._enter(towers)
            record(op, seqlens=self.seqlens)
            return
        dynamic = [
            f
            for f in op.walk_type(Func)
            if any(isinstance(a.type, TensorType) and not a.type.is_static for a in f.args)
        ]
        capacities = [c for f in dynamic if (c := cache_capacity(f)) is not None]
        check_seqlens(self.seqlens, min(capacities, default=1 << 31))
        known: Inferred = {}
        for function in dynamic:
            for tokens in self.seqlens:
                self._specialize(function, tokens, known)
            function.erase()
        record(op, seqlens=self.seqlens)

    def _enter(self, towers: Sequence[Func]) -> None:
        """Entry points of graphs that have one length, that of their input: a vision tower's patches."""
        for function in towers:
            rows = tensor_type(arguments(function, "patches")[0]).static_shape[0]
            if self.seqlens != (rows,):
                raise TyirError(
                    f"@{function.sym_name} takes {rows} patches, not {','.join(map(str, self.seqlens))}",
                    help=f"use seqlens={rows}: a vision tower has one size",
                )
            mark_entry(function, rows)

    def _specialize(self, function: Func, tokens: int, known: Inferred) -> None:
        new = function.clone()
        new.sym_name = f"{function.sym_name}_s{tokens}"
        mark_entry(new, tokens)
        if tokens == 1:
            _drop_selections(new)
        for arg in new.args:
            arg.type = static(arg.type, tokens)
        for op in new.body:
            infer_results(op, known)
            for value in op.results:  # collectives, whose types do not follow from their operands
                value.type = static(value.type, tokens)
        new.refresh_type()
        new.insert_before(function)


def _drop_selections(function: Func) -> None:
    """Of one row there is nothing to select (`select-rows`): the step is as if all were returned."""
    for op in list(function.walk_type(SelectRow)):
        op.replace_with([op.x])
    rows = arguments(function, "row")
    kept = [i for i, value in enumerate(function.args) if value not in rows]
    attrs = [function.arg_attr(i) for i in kept]
    for value in reversed(rows):
        function.body.erase_arg(value.index)  # behind all others, so that no alias changes its number
    if rows:
        function.refresh_type()
        function.set_arg_attrs(attrs)


def cache_capacity(function: Func) -> int | None:
    """The number of tokens the function's caches hold, None without caches."""
    return next((append.capacity for append in function.walk_type(Append)), None)
