"""One graph of a model as a module of its own: what the rest of the pipeline takes for a model.

    module {                                                             module {
      ty.global @model.visual..., @model.language_model...                 ty.global @model.visual...
      func.func @main(...)             {tyir.graph = language}      -->    func.func @visual_252x168(%patches)
      func.func @visual_252x168(...)   {tyir.graph = vision}             }
    }

`graph` is the function's name.  Its weights, and what the module says of the checkpoint, stay.
"""

from __future__ import annotations

from dataclasses import dataclass

from tyir.diagnostics import TyirError, did_you_mean
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.dialects.ty import GetGlobal
from tyir.ir import Op
from tyir.pipeline import Pass, PassContext
from tyir.traits import Symbol

__all__ = ["ExtractGraph"]


@dataclass(frozen=True)
class ExtractGraph(Pass):
    """Keep the function `graph`, what it calls and the weights they read."""

    graph: str = "main"

    def run(self, op: Op, context: PassContext) -> None:
        assert isinstance(op, Module)
        functions = {str(f.sym_name): f for f in op.body if isinstance(f, Func)}
        if self.graph not in functions:
            raise TyirError(
                f"the module has no graph '{self.graph}'",
                help=did_you_mean(self.graph, functions) or f"graphs here: {', '.join(functions) or 'none'}",
            )
        kept = {self.graph}
        waiting = [functions[self.graph]]
        while waiting:
            for call in waiting.pop().walk_type(Call):
                if call.callee.leaf not in kept and call.callee.leaf in functions:
                    kept.add(call.callee.leaf)
                    waiting.append(functions[call.callee.leaf])
        for name, function in functions.items():
            if name not in kept:
                function.erase()
        used = {ref.symbol.leaf for ref in op.walk_type(GetGlobal)}
        for inner in list(op.body):
            if inner.has_trait(Symbol) and not isinstance(inner, Func) and inner.sym_name not in used:
                inner.erase()
