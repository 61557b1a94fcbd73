"""The step for one sequence becomes the step for `batch` sequences of the same length.

    @main(%ids: tensor<1x?xi32>, %pos: tensor<1xi32>, %k0: tensor<1xGxCAPxDxf16>)   -->   @main(%ids: tensor<4x?xi32>, %pos: tensor<4xi32>, %k0: tensor<4x...>)

Each sequence has its own position and its own part of the caches; weights are read once for all.  Runs at
stage ty or kv, before partition-dies.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.func import Func
from tyir.dialects.ty import Reshape, tensor_type
from tyir.execution.constexpr import ConstantExpressions
from tyir.ir import Op
from tyir.manifest import record
from tyir.passes.specialize_seqlen import infer_results
from tyir.pipeline import Pass, PassContext

__all__ = ["SpecializeBatch", "check_batch"]

_MOST = 64


def check_batch(batch: int) -> None:
    """`TyirError` unless the number of sequences is in 1..64."""
    if not 1 <= batch <= _MOST:
        raise TyirError(
            f"a batch of {batch}: 1 to {_MOST} sequences", help=f"use {min(max(batch, 1), _MOST)}"
        )


@dataclass(frozen=True)
class SpecializeBatch(Pass):
    """`batch` sequences in the place of one."""

    stage: ClassVar[tuple[str, ...]] = (
        "ty",
        "kv",
    )

    batch: int = 1

    def run(self, op: Op, context: PassContext) -> None:
        check_batch(self.batch)
        for function in list(op.walk_type(Func)):
            self._specialize(function)
        record(op, batch=self.batch)

    def _specialize(self, function: Func) -> None:
        others = [a for a in function.args if tensor_type(a).dims[:1] != (1,)]
        if others:
            raise TyirError(
                f"@{function.sym_name} takes %{others[0].name or others[0].index}: {others[0].type}, whose"
                " first dimension is not one sequence",
                help="run specialize-batch once, at stage ty or kv",
            )
        for arg in function.args:
            t = tensor_type(arg)
            arg.type = t.with_shape((self.batch, *t.dims[1:]))
        constants = ConstantExpressions()
        problems: list[Diagnostic] = []
        for op in function.body:
            if op.results and constants.is_constant(op.results[0]):
                continue
            if isinstance(op, Reshape):
                if op.shape[0] not in (1, -1):
                    problems.append(
                        Diagnostic(
                            f"a reshape to {list(op.shape)} mixes the sequences with other dimensions",
                            where=str(op.loc),
                        )
                    )
                op.shape = tuple(self.batch if i == 0 and d == 1 else d for i, d in enumerate(op.shape))
            infer_results(op)
        if problems:
            raise TyirError(problems)
        function.refresh_type()
