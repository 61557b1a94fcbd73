"""The residual stream of a vision tower becomes smaller by a power of two, so that f16 holds it.

    %x = ty.linear(%patches, %w)             %x = ty.linear(%patches, ty.scale(%w) {factor = 2^-k})
    %h = ty.rms_norm(%x, %g) {eps = 1e-6} -> %h = ty.rms_norm(%x, %g) {eps = 1e-6 * 2^-2k}
    %y = ty.linear(%h, %o)                   %y = ty.linear(%h, ty.scale(%o) {factor = 2^-k})
    %z = ty.add(%x, %y)                      %z = ty.add(%x, %y)

Towers normalise before every block, and a norm does not see the size of what it is given.  The last blocks of
Qwen2.5-VL's tower pass 65504 for some pictures (ggml-org/llama.cpp #17534): with f32 sums that is of no help,
the stored value does not fit.  Multiplying by a power of two is exact but for weights that become subnormal,
which lose at most 2^-25.

The stream is found by dataflow: what a norm reads, what is added to it, and what passes it on in another
shape.
Where it leaves the tower without a norm, as CLIP's does, the next weight or the result gets the factor back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

from tyir.artifacts.vision import MAX_EXPONENT, VISION_EXPONENT
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.func import Func, Return
from tyir.dialects.ty import Add, Concat, LayerNorm, Linear, Norm, Reshape, RmsNorm, Scale, Slice, Transpose
from tyir.execution.constexpr import ConstantExpressions
from tyir.ir import Op, Value
from tyir.layers import carry, path_of
from tyir.pipeline import Pass, PassContext
from tyir.vision.graphs import VISION, graph_kind

__all__ = ["ScaleResidual", "check_exponent"]

_SHAPES: Final = (Add, Concat, Reshape, Scale, Slice, Transpose)  # what passes a stream on


def check_exponent(exponent: int) -> None:
    """`TyirError` for an exponent that towers cannot be scaled by."""
    if not 0 <= exponent <= MAX_EXPONENT:
        raise TyirError(f"exponent {exponent} is not in 0..{MAX_EXPONENT}", help="6 divides by 64")


@dataclass(frozen=True)
class ScaleResidual(Pass):
    """Towers whose residual stream is 2^-`exponent` of what it was; outputs stay."""

    stage: ClassVar[tuple[str, ...]] = ("ty",)

    exponent: int = VISION_EXPONENT

    def run(self, op: Op, context: PassContext) -> None:
        check_exponent(self.exponent)
        towers = [f for f in op.walk_type(Func) if graph_kind(f) == VISION]
        if not towers:
            raise TyirError("the module has no vision tower", help="tyir-import --image makes towers")
        if self.exponent:
            for tower in towers:
                _Stream(tower, 2.0**-self.exponent).scale()
        context.statistics["towers"] = len(towers) if self.exponent else 0


class _Stream:
    """The residual stream of one function, and what is done where it begins and ends."""

    def __init__(self, function: Func, factor: float) -> None:
        self.function, self.factor = function, factor
        self.constants = ConstantExpressions()
        self.values: dict[Value, None] = {}

    def scale(self) -> None:
        norms = list(self.function.walk_type(RmsNorm)) + list(self.function.walk_type(LayerNorm))
        waiting = [norm.x for norm in norms]
        while waiting:
            value = waiting.pop()
            if value not in self.values and not self.constants.is_constant(value):
                self.values[value] = None
                waiting += self._same_stream(value)
        for value in list(self.values):
            self._begin(value)
        for op in [o for o in self.function.walk() if o is not self.function]:
            self._end(op)

    def _same_stream(self, value: Value) -> Iterator[Value]:
        """Values that are of the size of this one: what it is made of, and what is made of it."""
        if isinstance(value.op, _SHAPES):
            yield from value.op.operands
        for use in value.uses:
            if isinstance(use, _SHAPES):
                yield from use.results

    def _begin(self, value: Value) -> None:
        """Make what gives this value smaller, where it is not the stream itself."""
        op = value.op
        if isinstance(op, Linear):
            self._multiply(op, 1, self.factor)
            if op.bias is not None:
                self._multiply(op, 2, self.factor)
        elif isinstance(op, Norm):  # CLIP normalises once before its first block
            for index in range(1, len(op.operands)):
                self._multiply(op, index, self.factor)
        elif isinstance(op, _SHAPES):
            for index, operand in enumerate(op.operands):
                if self.constants.is_constant(operand):  # learned positions, a class token
                    self._multiply(op, index, self.factor)
        else:
            where = f"'{op.name}' at {path_of(op)}" if isinstance(op, Op) else "an argument"
            raise TyirError(
                Diagnostic(
                    f"the residual stream of @{self.function.sym_name} comes from {where}",
                    help="it can be scaled where linears, norms and constants add to it; use exponent=0,"
                    " tyir-compile --vision-exponent 0",
                )
            )

    def _end(self, op: Op) -> None:
        """Undo it where something reads the stream that does see its size."""
        inside = [i for i, operand in enumerate(op.operands) if operand in self.values]
        if not inside or isinstance(op, _SHAPES):
            return
        if isinstance(op, Norm) and inside == [0]:
            op.eps = op.eps * self.factor**2
        elif isinstance(op, Linear) and inside == [0]:
            self._multiply(op, 1, 1 / self.factor)
        elif isinstance(op, Return):
            for index in inside:
                self._multiply(op, index, 1 / self.factor)
        else:
            raise TyirError(
                Diagnostic(
                    f"'{op.name}' at {path_of(op)} reads the residual stream of @{self.function.sym_name}",
                    help="norms, linears and the tower's result may; use exponent=0, tyir-compile"
                    " --vision-exponent 0",
                )
            )

    def _multiply(self, op: Op, index: int, factor: float) -> None:
        """Give an op one of its operands multiplied."""
        scaled = Scale(op.operands[index], factor=factor, loc=op.loc)
        operands = list(op.operands)
        operands[index] = carry(scaled, op).insert_before(op).result
        op.operands = operands
