"""Analyses: facts computed from an op when first asked for, and kept until a pass changes the op.

    graph = context.analyses.get(call_graph, module)

An analysis is a function of an op; what it returns must be treated as read-only.  The pass manager drops
analyses after a pass, except those of ops the pass cannot have reached, and all of them stay when the pass
said `context.nothing_changed()`; `context.preserve(call_graph)` keeps one kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tyir.ir import Op

__all__ = ["AnalysisManager"]

_T = TypeVar("_T")


@dataclass
class AnalysisManager:
    """Results by analysis and op; `computed` counts how often an analysis really ran."""

    computed: int = 0
    _results: dict[tuple[Callable[[Any], Any], Op], Any] = field(default_factory=dict)

    def get(self, analysis: Callable[[Op], _T], op: Op) -> _T:
        """The result for an op, computed at most once between two changes."""
        key = (analysis, op)
        if key not in self._results:
            self.computed += 1
            self._results[key] = analysis(op)
        result: _T = self._results[key]
        return result

    def invalidate(self, changed: Op, preserved: Iterable[Callable[[Any], Any]] = ()) -> None:
        """Forget what is known of `changed`, of everything below and of everything around it, but not
        analyses among `preserved`.
        """
        kept = set(preserved)
        for analysis, op in list(self._results):
            if analysis not in kept and (
                changed.is_ancestor_of(op)
                or op.is_ancestor_of(changed)
                or (op.block is None and op is not changed)
            ):
                del self._results[analysis, op]
