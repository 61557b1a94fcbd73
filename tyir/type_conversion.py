"""Conversion of types: values get other types, and casts stand between what is converted and what is not yet.

    types = TypeConverter(lambda kind: bf16_to_f16(kind), materialize=lambda value, kind: Cast(value, element=kind.element))
    convert(module, target, patterns, types=types)

Functions come first: entry arguments, other blocks' arguments, returns and calls get the converted types.  A pattern asks `rewriter.converted(value)` for an
operand as it will be; where a pattern replaces a result by a value of another type, the old users see it through a `builtin.unrealized_conversion_cast` back.
At the end casts that undo each other vanish, those that remain are made real by `materialize`, and what it does not make is an error that counts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tyir.diagnostics import TyirError
from tyir.dialects.builtin import UnrealizedConversionCast as Cast
from tyir.dialects.func import Call, Func, Return
from tyir.ir import Op, Value
from tyir.location import UNKNOWN, Location
from tyir.rewrite import Listener, Rewriter
from tyir.types import FunctionType, Type

__all__ = ["ConversionRewriter", "TypeConverter", "convert_functions", "resolve_casts"]


def _never(value: Value, kind: Type) -> Op | None:
    return None


@dataclass(frozen=True)
class TypeConverter:
    """`convert` gives the type that stands for another one (itself where it may stay).

    `materialize(value, type)` makes an op, not inserted yet, whose one result is the value in another type; None where there is no such op.
    """

    convert: Callable[[Type], Type]
    materialize: Callable[[Value, Type], Op | None] = _never

    def is_legal(self, op: Op) -> bool:
        """Whether no operand, result, block argument or signature of an op would change (for `Target.legal_if`)."""
        values = [*op.operands, *op.results, *(a for region in op.regions for block in region.blocks for a in block.args)]
        kinds = [v.type for v in values]
        if isinstance(op, Func):
            kinds += [*op.function_type.inputs, *op.function_type.results]
        return all(self.convert(kind) is kind for kind in kinds)

    def convert_all(self, kinds: Iterable[Type]) -> tuple[Type, ...]:
        return tuple([self.convert(kind) for kind in kinds])


@dataclass
class ConversionRewriter(Rewriter):
    """A rewriter whose patterns may change types."""

    types: TypeConverter = field(default_factory=lambda: TypeConverter(lambda kind: kind))

    def converted(self, value: Value) -> Value:
        """A value in its converted type: as it is, what a cast back was made of, or through a cast behind its definition."""
        wanted = self.types.convert(value.type)
        if wanted is value.type:
            return value
        if isinstance(value.op, Cast) and value.op.operands[0].type is wanted:
            return value.op.operands[0]
        for user in value.uses:
            if isinstance(user, Cast) and user.results[0].type is wanted:
                return user.results[0]
        return _cast_behind(value, wanted).results[0]

    def replace(self, op: Op, values: Sequence[Value], absorbed: Iterable[Op] = ()) -> None:
        """As `Rewriter.replace`; values of other types than the results are cast back for the users there are."""
        seen = [new if new.type is old.type else _cast_back(new, old.type, op) for old, new in zip(op.results, values, strict=True)]
        super().replace(op, seen, absorbed)


def _cast(value: Value, kind: Type, loc: Location) -> Cast:
    return Cast.create([value], [kind], loc=loc)


def _cast_back(value: Value, kind: Type, before: Op) -> Value:
    return _cast(value, kind, before.loc).insert_before(before).results[0]


def _cast_behind(value: Value, kind: Type) -> Cast:
    """A cast where all users of the value can see it."""
    if value.op is not None:
        return _cast(value, kind, value.op.loc).insert_after(value.op)
    block = value.block
    assert block is not None
    new = _cast(value, kind, UNKNOWN if block.parent_op is None else block.parent_op.loc)
    block.insert(new, before=block.first_op)
    return new


def convert_functions(root: Op, types: TypeConverter, listeners: Sequence[Listener] = ()) -> int:
    """Convert signatures, block arguments, returns and calls below `root`; returns how many of these ops changed."""
    rewriter = ConversionRewriter(listeners, types=types)
    functions = list(root.walk_type(Func))
    changed = [function for function in functions if not types.is_legal(function)]
    for function in changed:
        kind = function.function_type
        function.function_type = FunctionType(types.convert_all(kind.inputs), types.convert_all(kind.results))
        for block in function.regions[0].blocks:
            for argument in block.args:
                _convert_argument(argument, types)
    others = [op for op in root.walk() if isinstance(op, (Return, Call)) and not types.is_legal(op)]
    for op in others:
        operands = [rewriter.converted(v) for v in op.operands]
        if isinstance(op, Return):
            op.operands = operands
        else:
            names = [v.name for v in op.results]
            new = Call.create(
                operands, types.convert_all(v.type for v in op.results), op.properties, op.attributes, loc=op.loc, result_names=names
            )
            rewriter.replace(op, new.insert_before(op).results)
    return len(changed) + len(others)


def _convert_argument(argument: Value, types: TypeConverter) -> None:
    """Give a block argument its converted type; its users see the old one through a cast."""
    old, argument.type = argument.type, types.convert(argument.type)
    if argument.type is old or not argument.uses:
        return
    cast = _cast_behind(argument, old)
    argument.replace_all_uses_with(cast.results[0], unless=lambda user: user is cast)


def resolve_casts(root: Op, types: TypeConverter, partial: bool) -> None:
    """Remove casts that undo each other or have no users, make the others real; `TyirError` counts what cannot be (`partial`: they stay)."""
    casts = list(root.walk_type(Cast))
    for cast in casts:
        source = cast.operands[0].op
        if isinstance(source, Cast) and source.operands[0].type is cast.results[0].type:
            cast.results[0].replace_all_uses_with(source.operands[0])
    left: Counter[tuple[Type, Type]] = Counter()
    for cast in reversed(casts):
        result = cast.results[0]
        if not result.uses:
            cast.erase()
        elif (real := types.materialize(cast.operands[0], result.type)) is not None:
            real.loc = cast.loc
            cast.replace_with(real.insert_before(cast))
        else:
            left[cast.operands[0].type, result.type] += 1
    if left and not partial:
        texts = [f"{count} x from {a} to {b}" for (a, b), count in left.most_common()]
        raise TyirError(
            f"values of converted and of unconverted types meet and no cast between them is known: {', '.join(texts)}",
            help="convert the ops between them, or give the TypeConverter a `materialize` that makes such a cast",
        )
