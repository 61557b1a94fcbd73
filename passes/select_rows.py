"""Of which tokens a step returns its outputs: of all, or of one of each sequence, which the caller names.

    %n = ty.rms_norm(%h, %w);  %logits = ty.linear(%n, %head)         %h: tensor<1x?xhxf16>, %logits: tensor<1x?xVxf32>
    -->
    @main(.., %row: tensor<1xi32>)
      %one = ty.select_row(%h, %row)                                  tensor<1x1xhxf16>
      %n = ty.rms_norm(%one, %w);  %logits = ty.linear(%n, %head)     tensor<1x1xVxf32>

Generation reads the last token's row of a prompt alone, so that the last norm, the head and what follows it (soft
cap, top-k, the dies' exchange) work for nothing on all others.  Which row that is only the caller knows: a
prompt's last step is padded.  Everything that leads from the layers to the results is computed for the one row;
the layers, whose caches need all, stay as they are.  `specialize-seqlen` takes the selection out of steps of one
token again.  `rows=all` changes nothing.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.func import Func
from tyir.dialects.kv import Append
from tyir.dialects.ty import LayerNorm, Linear, QuantizedLinear, RmsNorm, SelectRow, TopK, tensor_type
from tyir.execution.constexpr import ConstantExpressions
from tyir.execution.entry_points import alias_of, argument, arguments
from tyir.ir import Op, Value
from tyir.layers import carry, layer_of
from tyir.manifest import record
from tyir.passes.specialize_seqlen import infer_results
from tyir.pipeline import Pass, PassContext
from tyir.traits import Elementwise
from tyir.types import TensorType, i32

__all__ = ["SelectRows"]

_BY_ROWS: Final = (RmsNorm, LayerNorm, Linear, QuantizedLinear, TopK)  # and what is elementwise


@dataclass(frozen=True)
class SelectRows(Pass):
    """`rows` of a step that are returned: all, or last: of each sequence the one that `row` names."""

    stage: ClassVar[tuple[str, ...]] = ("kv",)

    rows: Literal["all", "last"] = "last"

    def run(self, op: Op, context: PassContext) -> None:
        functions = [f for f in op.walk_type(Func) if any(True for _ in f.walk_type(Append))]
        if not functions:
            raise TyirError("no function keeps a cache", help="run select-rows after kv-materialize")
        for function in functions if self.rows == "last" else ():
            if arguments(function, "row"):
                raise TyirError(f"@{function.sym_name} returns one row already", help="run select-rows once")
            _select(function)
        record(op, output_rows=self.rows)


def _select(function: Func) -> None:
    terminator = function.body.terminator
    results = [v for i, v in enumerate(terminator.operands) if alias_of(function, i) is None]
    tail, sources = _tail(function, results)
    batch = tensor_type(sources[0]).dims[0]
    attrs = [function.arg_attr(i) for i in range(len(function.args))]
    row = function.body.add_arg(TensorType((batch,), i32), "row")
    for source in sources:
        first = next(op for op in tail if source in op.operands)
        selected = carry(SelectRow(source, row, loc=first.loc), first).insert_before(first)
        for op in tail:
            op.operands = [selected.out if v is source else v for v in op.operands]
    for op in tail:
        infer_results(op)
    function.refresh_type()
    function.set_arg_attrs([*attrs, argument("row", "row")])


def _tail(function: Func, results: list[Value]) -> tuple[list[Op], list[Value]]:
    """The ops that lead from the layers to the results, in their order, and the values that they take from
    there.

    `TyirError` for one that does not compute each row of that row alone.
    """
    constants = ConstantExpressions()
    found: set[Op] = set()
    sources: list[Value] = []
    waiting = list(results)
    while waiting:
        value = waiting.pop()
        op = value.op
        if constants.is_constant(value) or (op is not None and op in found):
            continue
        if op is None or layer_of(op) is not None:
            if value not in sources:
                sources.append(value)
            continue
        if not (op.has_trait(Elementwise) or isinstance(op, _BY_ROWS)):
            raise TyirError(
                Diagnostic(
                    f"'{op.name}' stands between the layers and what the step returns, and may mix its rows",
                    where=str(op.loc),
                    help="use rows=all",
                )
            )
        found.add(op)
        waiting += op.operands
    tail = [op for op in function.body if op in found]
    wrong = [v for v in sources if tensor_type(v).rank < 3 or tensor_type(v).dims[1] is not None]
    if not tail or wrong:
        what = f"%{wrong[0].name or '?'}: {wrong[0].type}" if wrong else "the layers' results themselves"
        raise TyirError(
            f"@{function.sym_name} makes what it returns of {what}, which has no rows to select from",
            help="run select-rows after kv-materialize and before specialize-seqlen",
        )
    return tail, sources
