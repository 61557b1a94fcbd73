"""Prints the graph of ops as Graphviz dot on stderr (or into a file); the IR stays as it is.

%y = ty.silu(%x); func.return(%y)      -->      n0 [label="%x"]; n1 [label="ty.silu\\nmodel.layers.0.mlp"]; n0 -> n1 [label="1x?x256xf16"]; ...

tyir-opt --view-op-graph model.ir -o out.ir 2> model.dot; dot -Tsvg model.dot > model.svg
"""  # noqa: E501

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tyir.diagnostics import TyirError
from tyir.ir import Block, Op, Value
from tyir.layers import path_of
from tyir.location import module_path
from tyir.pipeline import Pass, PassContext
from tyir.traits import ConstantLike

__all__ = ["ViewOpGraph", "dot_text"]


@dataclass(frozen=True)
class ViewOpGraph(Pass):
    """Print the graph of ops in dot (`file=...`: not on stderr; `constants=false`: without weights and
    constants).
    """

    anchor: ClassVar[str] = "any"
    file: str | None = None
    constants: bool = True
    max_label_len: int = 40

    def run(self, op: Op, context: PassContext) -> None:
        text = dot_text(op, constants=self.constants, max_label=self.max_label_len)
        if self.file is None:
            print(text, file=sys.stderr)
        else:
            try:
                Path(self.file).write_text(text + "\n", encoding="utf-8")
            except OSError as error:
                raise TyirError(f"cannot write {self.file}: {error.strerror}") from None
        context.nothing_changed()


def dot_text(root: Op, *, constants: bool = True, max_label: int = 40) -> str:
    """The dot text of everything below `root`: ops as boxes, values as edges, ops with regions as
    clusters.
    """
    writer = _Writer(constants, max_label)
    return "\n".join(
        [
            "digraph ir {",
            "  node [shape=box, fontname=monospace]",
            "  compound=true",
            *writer.op(root, "  "),
            *writer.edges,
            "}",
        ]
    )


class _Writer:
    def __init__(self, constants: bool, max_label: int) -> None:
        self.constants = constants
        self.max_label = max_label
        self.numbers: dict[Op | Value, int] = {}
        self.edges: list[str] = []

    def node(self, key: Op | Value) -> str:
        return f"n{self.numbers.setdefault(key, len(self.numbers))}"

    def op(self, root: Op, indent: str) -> Iterator[str]:
        """The lines of an op; nested ops by a stack of our own, however deep."""
        stack = [self._lines(root, indent)]  # of iterators over lines and further iterators
        while stack:
            line = next(stack[-1], None)
            if line is None:
                stack.pop()
            elif isinstance(line, str):
                yield line
            else:
                stack.append(line)

    def _lines(self, op: Op, indent: str) -> Iterator[Any]:
        if not op.regions:
            if self.constants or not op.has_trait(ConstantLike):
                yield f"{indent}{self.node(op)} [label={self._label(op)}]"
                self._uses(op)
            return
        yield f"{indent}subgraph cluster_{self.node(op)} {{"
        yield f"{indent}  label={self._label(op)}"
        yield f"{indent}  {self.node(op)} [label={self._label(op)}, shape=plaintext]"
        self._uses(op)
        for region in op.regions:
            for block in region.blocks:
                yield from self._arguments(block, indent + "  ")
                for inner in block:
                    yield self._lines(inner, indent + "  ")
        yield f"{indent}}}"

    def _arguments(self, block: Block, indent: str) -> Iterator[str]:
        for value in block.args:
            name = f"%{value.name}" if value.name else f"%arg{value.index}"
            yield f"{indent}{self.node(value)} [label={json.dumps(self._short(name))}, shape=ellipse]"

    def _uses(self, op: Op) -> None:
        for value in op.operands:
            source: Op | Value = value.op or value
            if self.constants or not isinstance(source, Op) or not source.has_trait(ConstantLike):
                kind = str(value.type).removeprefix("tensor<").removesuffix(">")
                self.edges.append(
                    f"  {self.node(source)} -> {self.node(op)} [label={json.dumps(self._short(kind))}]"
                )

    def _label(self, op: Op) -> str:
        head = f"{op.name} @{op.sym_name}" if op.sym_name else op.name
        path = path_of(op) or module_path(op.loc)
        return json.dumps("\n".join(self._short(text) for text in (head, path) if text))

    def _short(self, text: str) -> str:
        return text if len(text) <= self.max_label else text[: self.max_label - 1] + "…"
