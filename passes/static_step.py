"""A vision tower becomes a step: one sequence of patches in, embeddings out, nothing kept between steps.

    @visual(%patches: tensor<216x1176xf16>) -> tensor<54x256xf16>         @visual(%patches {tyir.role = "patches"}) -> (.. {tyir.name = "embeddings"})
      %0 = ty.linear(%patches, %w) : tensor<216x192xf16>            -->     %0 = ty.reshape(%patches) : tensor<1x216x1176xf16>
      %1 = ty.rms_norm(%0, %g)     : tensor<216x192xf16>                    %1 = ty.linear(%0, %w) : tensor<1x216x192xf16>

What kv-materialize is for a language model.  The graphs of transformers line patches up [N, C]; a sequence
[1, N, C] is what every later pass cuts, fuses and lowers, as it does a decoder's tokens.  Rotary tables and
learned positions follow from the size: they are weight expressions already.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.dialects.ty import Concat, Linear, Norm, Reshape, Slice, Transpose, tensor_type
from tyir.execution.constexpr import ConstantExpressions
from tyir.execution.entry_points import argument, result
from tyir.ir import Op, Value
from tyir.layers import carry, path_of
from tyir.manifest import record
from tyir.pipeline import Pass, PassContext
from tyir.traits import Elementwise
from tyir.types import TensorType
from tyir.vision.graphs import VISION, graph_kind

__all__ = ["StaticStep"]


@dataclass(frozen=True)
class StaticStep(Pass):
    """Vision towers on sequences, with named inputs and outputs."""

    stage: ClassVar[tuple[str, ...]] = ("ty",)
    to_stage: ClassVar[str | None] = "kv"

    def run(self, op: Op, context: PassContext) -> None:
        assert isinstance(op, Module)
        functions = [f for f in op.body if isinstance(f, Func)]
        for function in functions:
            if graph_kind(function) != VISION:
                raise TyirError(
                    f"@{function.sym_name} is not a vision tower",
                    help="run extract-graph{graph=...} with a tower's name first; kv-materialize is for"
                    " language models",
                )
            _Sequences(function).run()
            names = [
                "embeddings",
                *(f"deepstack{i}" for i in range(len(function.body.terminator.operands) - 1)),
            ]
            function.set_arg_attrs([argument("patches", "patches")])
            function.set_res_attrs([result(name) for name in names])
            function.refresh_type()
        record(op, weights="fp16")


class _Sequences:
    """Rewrites one function; `lines` maps a value [N, ..] to the same as one sequence [1, N, ..]."""

    def __init__(self, function: Func) -> None:
        self.function = function
        self.constants = ConstantExpressions()
        self.lines: dict[Value, Value] = {}

    def run(self) -> None:
        block = self.function.body
        ops = list(block)
        for arg in block.args:
            reader = min(arg.users, key=ops.index, default=ops[0])
            sequence = Reshape(arg, shape=(1, *tensor_type(arg).static_shape), loc=reader.loc)
            self.lines[arg] = carry(sequence, reader).insert_before(ops[0]).results[0]
        for op in ops:
            if isinstance(op, Return):
                op.operands = [self._lined_up(v) for v in op.operands]
            elif op.results and not self.constants.is_constant(op.results[0]) and op.operands:
                self._convert(op)
        for op in reversed(list(block)):
            if op.results and op.is_unused:
                op.erase()

    def _lined_up(self, value: Value) -> Value:
        """A value in its own shape."""
        lifted = self.lines.get(value)
        if lifted is None:
            return value
        made = lifted.op
        assert made is not None
        back = Reshape(lifted, shape=tensor_type(value).static_shape, loc=made.loc)
        return carry(back, made).insert_before(self.function.body.terminator).results[0]

    def _convert(self, op: Op) -> None:
        if not any(v in self.lines for v in op.operands):
            if isinstance(op, Reshape) and not _is_sequence(op.out):
                sequence = Reshape(op.x, shape=(1, *tensor_type(op.out).static_shape), loc=op.loc)
                self.lines[op.out] = carry(sequence, op).insert_before(op).results[0]
            return  # a sequence already
        if isinstance(op, Reshape) and _is_sequence(op.out):
            known = Reshape(self.lines[op.x], shape=tensor_type(op.out).static_shape, loc=op.loc)
            op.replace_with([carry(known, op).insert_before(op).results[0]])
            return
        operands = [self.lines.get(v) or self._constant(v, op) for v in op.operands]
        properties = op.properties
        kinds = [_sequence_type(r) for r in op.results]
        new: Op
        if isinstance(op, Reshape):
            new = Reshape(operands[0], shape=kinds[0].static_shape, loc=op.loc)
        elif isinstance(op, Transpose):
            new = Transpose(operands[0], perm=(0, *(p + 1 for p in op.perm)), loc=op.loc)
        elif isinstance(op, Slice):
            new = Slice(operands[0], axis=op.axis + 1, offset=op.offset, size=op.size, loc=op.loc)
        elif isinstance(op, Concat):
            new = Concat(tuple(operands), axis=op.axis + 1, loc=op.loc)
        elif isinstance(op, (Linear, Norm)) or op.has_trait(Elementwise):
            new = type(op).create(operands, kinds, properties, loc=op.loc)
        else:
            parts = "linear, norms, elementwise ops, attention, rope and changes of shape"
            raise TyirError(
                Diagnostic(
                    f"'{op.name}' at {path_of(op)} works on lines of patches {op.results[0].type}",
                    help=f"towers are made of {parts}",
                )
            )
        for old, made in zip(op.results, carry(new, op).insert_before(op).results):
            self.lines[old] = made

    def _constant(self, value: Value, op: Op) -> Value:
        """A weight as it is; of an elementwise op and a concat a sequence."""
        if not self.constants.is_constant(value) or not (op.has_trait(Elementwise) or isinstance(op, Concat)):
            return value
        sequence = Reshape(value, shape=(1, *tensor_type(value).static_shape), loc=op.loc)
        return carry(sequence, value.op).insert_before(op).results[0]


def _is_sequence(value: Value) -> bool:
    """Whether a value is one sequence already: what attention takes, and all of towers that keep a batch."""
    dims = tensor_type(value).dims
    return dims[0] == 1 and len(dims) in (3, 4)


def _sequence_type(value: Value) -> TensorType:
    t = tensor_type(value)
    return t.with_shape((1, *t.dims))
