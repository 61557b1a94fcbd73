"""Counts ops by name and prints the table on stderr; the IR stays as it is.

Operations encountered:
  func.func     , 1
  ty.linear     , 28
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from tyir.ir import Op
from tyir.pipeline import Pass, PassContext

__all__ = ["PrintOpStats"]


@dataclass(frozen=True)
class PrintOpStats(Pass):
    """Print how many ops of each name there are (`json=true`: as JSON)."""

    anchor: ClassVar[str] = "any"
    json: bool = False

    def run(self, op: Op, context: PassContext) -> None:
        counts = dict(sorted(Counter(o.name for o in op.walk()).items()))
        print(json.dumps(counts, indent=2) if self.json else _table(counts), file=sys.stderr)
        context.nothing_changed()


def _table(counts: dict[str, int]) -> str:
    width = max(map(len, counts))
    return "Operations encountered:\n" + "\n".join(
        f"  {name:<{width}}, {count}" for name, count in counts.items()
    )
