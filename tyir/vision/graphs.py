"""The graphs of a model: a vision-language model's module has its language model and a tower for each size
of pictures, as functions that say what they are.

    func.func @main(%input_ids, %position_ids) attributes {tyir.graph = {kind = "language"}}
    func.func @visual_252x168(%patches) attributes {tyir.graph = {kind = "vision", images = [{given = [252, 168], ...}], order = array<i64: 0, 1, ...>}}

Passes that work on one kind ask here.  `extract-graph` makes a module of one graph, which the rest of the
pipeline takes for a model.
"""  # noqa: E501

from __future__ import annotations

from typing import Final

from tyir.attributes import Attribute, DictAttr, StringAttr
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func

__all__ = ["GRAPH", "LANGUAGE", "VISION", "graph_kind", "graphs_of", "mark_graph"]

GRAPH: Final = "tyir.graph"
LANGUAGE: Final = "language"
VISION: Final = "vision"


def mark_graph(function: Func, kind: str, **facts: Attribute) -> None:
    """Say that a function is a graph of the model."""
    function.set_attribute(GRAPH, DictAttr({"kind": StringAttr(kind), **facts}))


def graph_kind(function: Func) -> str | None:
    """`language` or `vision`; None for a function that says nothing, as that of a model of text alone."""
    said = function.attributes.get(GRAPH)
    kind = said.get("kind") if isinstance(said, DictAttr) else None
    return kind.value if isinstance(kind, StringAttr) else None


def graphs_of(module: Module) -> dict[str, Func]:
    """The graphs of a module by their names."""
    return {str(f.sym_name): f for f in module.body if isinstance(f, Func) and graph_kind(f) is not None}
