"""Raise the imported graph from PyTorch's operators to the tensor dataflow of a language model.

    %w   = ty.get_global {symbol = @model.norm.weight} : tensor<256xf16>
    %1   = aten.to %x {element = f32}                    -->   %w = ty.get_global {symbol = @model.norm.weight}
    %2   = aten.pow %1 {exponent = 2.0}                        %0 = ty.rms_norm %x, %w {eps = 1.0e-6}
    %3   = aten.mean %2 {dim = [-1], keepdim = true}
    %4   = aten.add %3 {scalar = 1.0e-6}
    %5   = aten.rsqrt %4
    %6   = aten.mul %1, %5
    %7   = aten.to %6 {element = f16}
    %8   = aten.mul %w, %7

Runs first, on what `tyir-import` wrote: every later pass knows `ty` only.  Rules are tried phase by phase
(`_raise_rules.PHASES`); after each phase nothing dead remains.  Afterwards only `func` and `ty` ops are
left, and `quant` ops in weight expressions.  What no rule raised is an error that lists every such op with
its count, the first layer and the model's source line.  Numbers change by rounding alone: `ty` ops compute
in f32 and round once.
"""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import func, ty
from tyir.dialects.builtin import Module
from tyir.ir import Op
from tyir.layers import layer_in, path_of
from tyir.location import FileLoc, FusedLoc, Location, NameLoc, module_path
from tyir.passes._raise_rules import PHASES
from tyir.pipeline import Pass, PassContext, run_at_stage
from tyir.rewrite import rewrite_phases

__all__ = ["RaiseAten", "raise_aten"]


@dataclass(frozen=True)
class RaiseAten(Pass):
    """Turn `aten` ops into `ty` ops; an op that no rule raises is an error."""

    stage: ClassVar[tuple[str, ...]] = ("aten",)
    to_stage: ClassVar[str | None] = "ty"

    def run(self, op: Op, context: PassContext) -> None:
        assert isinstance(op, Module)
        functions = [f for f in op.body if isinstance(f, func.Func) and not f.is_external]
        for function in functions:
            rewrite_phases(function, PHASES, context.statistics)
        _check(functions)
        _drop_unused_globals(op)


def raise_aten(module: Module, statistics: dict[str, int] | None = None) -> None:
    """Raise every function of `module` in place; `statistics` counts the uses of each rule.  `TyirError`
    lists the ops that no rule raises.
    """
    run_at_stage(RaiseAten(), module, PassContext(statistics={} if statistics is None else statistics))


def _drop_unused_globals(module: Module) -> None:
    """Weights that nothing reads any more."""
    used = {op.symbol.leaf for op in module.walk_type(ty.GetGlobal)}
    for op in module.body:
        if isinstance(op, ty.Global) and op.sym_name not in used:
            op.erase()


def _check(functions: list[func.Func]) -> None:
    """Report every op outside `func` and `ty`, by name."""
    left: dict[str, list[Op]] = {}
    for function in functions:
        for op in function.body:
            if op.dialect not in ("func", "ty", "quant"):
                left.setdefault(op.name, []).append(op)
    if left:
        total = sum(map(len, left.values()))
        lines = [f"{name}: {_times(len(ops))}, first {_place(ops[0])}" for name, ops in sorted(left.items())]
        kinds = f"{len(left)} kinds of operations" if len(left) > 1 else "1 kind of operation"
        message = (
            f"raise-aten left {kinds} ({total} op{'s' if total > 1 else ''}) that no rule knows:\n  "
            + "\n  ".join(lines)
        )
        raise TyirError(
            Diagnostic(
                message,
                help=(
                    "the model computes something that is not among the rules of passes/_raise_rules.py and"
                    " _raise_rotary.py; add a rule there"
                ),
            )
        )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _place(op: Op) -> str:
    """`in layer 3, model.layers.3.mlp (modeling_qwen2.py:45)`."""
    path, line = path_of(op) or module_path(op.loc), _file_line(op.loc)
    layer = None if path is None else layer_in(path)
    words = [f"in layer {layer}" if layer is not None else "outside the layers", *([path] if path else [])]
    return ", ".join(words) + (f" ({line})" if line else "")


def _file_line(location: Location | None) -> str | None:
    if isinstance(location, FileLoc):
        return f"{location.file}:{location.line}"
    if isinstance(location, NameLoc):
        return _file_line(location.child)
    if isinstance(location, FusedLoc):
        return _file_line(location.parts[-1])
    return None
