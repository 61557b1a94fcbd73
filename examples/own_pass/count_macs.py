"""Two passes of one's own in a file: `tyir-opt model.ir --load-pass=count_macs.py --count-macs=tokens=8 --pass-statistics`."""  # noqa: E501

from __future__ import annotations

from dataclasses import dataclass

from tyir import Op, Pass, PassContext, TyirError
from tyir.dialects.ty import Linear, tensor_type


@dataclass(frozen=True)
class CountMacs(Pass):
    """Count the multiply-accumulates of all linears, for so many tokens."""

    tokens: int = 1

    def run(self, op: Op, context: PassContext) -> None:
        if self.tokens < 1:
            raise TyirError(f"tokens is {self.tokens}", help="use a positive number such as tokens=8")
        for linear in op.walk_type(Linear):
            outputs, inputs = tensor_type(linear.weight).static_shape
            context.count("count-macs.total", self.tokens * outputs * inputs)
        context.nothing_changed()


@dataclass(frozen=True)
class CheckWidth(Pass):
    """Refuse linears with more output channels than `most`, remark on those of the widest allowed."""

    most: int = 1024

    def run(self, op: Op, context: PassContext) -> None:
        for linear in op.walk_type(Linear):
            outputs = tensor_type(linear.weight).static_shape[0]
            if outputs > self.most:
                context.error(linear, f"{outputs} output channels", help=f"use at most {self.most}")
            elif outputs == self.most:
                context.remark(linear, "as wide as allowed")
        context.nothing_changed()
