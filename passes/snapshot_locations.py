"""Writes the IR to a file and makes every op point at its line there: an error of a later pass then names
a line of that file.

    %y = ty.silu(%x) loc("model.layers.0.mlp")      -->   %y = ty.silu(%x) loc(fused["step1.ir":3:3, "model.layers.0.mlp"])

MLIR's `--snapshot-op-locations`.  The old location stays behind the new one, because it says which
line of the model an op comes from; `replace=true` drops it.
"""  # noqa: E501

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.ir import Op
from tyir.location import FileLoc, NameLoc, fuse
from tyir.parser import parse_module
from tyir.pipeline import Pass, PassContext
from tyir.printer import print_op

__all__ = ["SnapshotLocations"]


@dataclass(frozen=True)
class SnapshotLocations(Pass):
    """Write the IR to `filename` and give ops their places in it; with `tag` the place is
    `loc("tag"("file":1:2))`.
    """

    filename: str = "snapshot.ir"
    tag: str | None = None
    replace: bool = False

    def run(self, op: Op, context: PassContext) -> None:
        assert isinstance(op, Module)
        text = print_op(op, locations=False)
        try:
            Path(self.filename).write_text(text, encoding="utf-8")
        except OSError as error:
            raise TyirError(f"cannot write {self.filename}: {error.strerror}") from None
        places = _places(text)
        for inner, (line, col) in zip(op.walk(), places):
            place = FileLoc(self.filename, line, col)
            new = NameLoc(self.tag, place) if self.tag else place
            inner.loc = new if self.replace else fuse([new, inner.loc])
        context.count("snapshot-locations.ops", len(places))


def _places(text: str) -> list[tuple[int, int]]:
    """Line and column of every op of a printed text, in the order of a walk."""
    positions: dict[Op, int] = {}
    parsed = parse_module(text, positions=positions)
    starts = [0]
    while (end := text.find("\n", starts[-1])) >= 0:
        starts.append(end + 1)
    return [_line_col(positions[op], starts) for op in parsed.walk()]


def _line_col(offset: int, starts: list[int]) -> tuple[int, int]:
    line = bisect_right(starts, offset)
    return line, offset - starts[line - 1] + 1
