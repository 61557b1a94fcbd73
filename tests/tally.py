"""The count of an area of reliability: how many cases were tried, which did not survive, what took longest.

Rows go to the table that `tests/conftest.py` prints at the end of a run, whatever process counted them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Tally", "table"]

_PROPERTY = "reliability"


@dataclass
class Tally:
    """The cases of one area; `record` is pytest's `record_property`."""

    area: str
    record: Callable[[str, object], None]
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")

    def count(self, name: str, problem: str | None, seconds: float = 0.0) -> None:
        """One case, and why it did not survive."""
        self.tried += 1
        self.slowest = max(self.slowest, (seconds, name))
        if problem is not None:
            self.failures.append(f"{name}: {problem}")

    def close(self, least: int = 1) -> None:
        """Write the row; fails for every case that did not survive, and below `least` cases."""
        self.record(_PROPERTY, [self.area, self.tried, self.tried - len(self.failures), *self.slowest])
        shown = "\n\n".join(self.failures[:40])
        assert not self.failures, f"{len(self.failures)} of {self.tried} did not survive:\n{shown}"
        assert self.tried >= least


def table(reports: Iterable[Any]) -> list[str]:
    """The lines of the table, from pytest's reports of tests; none when nothing was counted."""
    rows: dict[str, list[Any]] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == _PROPERTY and getattr(report, "when", "") == "call":
                area, tried, survived, seconds, slowest = value
                row = rows.setdefault(area, [0, 0, 0.0, ""])
                row[0] += tried
                row[1] += survived
                row[2:] = max(row[2:], [seconds, slowest])
    lines = [
        f"{area:<40}{tried:>6}{survived:>6}   slowest {seconds:5.1f} s: {slowest[:60]}"
        for area, (tried, survived, seconds, slowest) in sorted(rows.items())
    ]
    total = [sum(row[i] for row in rows.values()) for i in (0, 1)]
    return [*lines, f"{'all':<40}{total[0]:>6}{total[1]:>6}"] if rows else []
