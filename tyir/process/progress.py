"""How far long work is, on standard error: a bar with the time left on a terminal; in a pipe or a file
nothing, or with `lines_in_pipes` a line now and then, never a carriage return.

    for tensor in track(tensors, "weights", "tensor", show=True): ...

    with Bar("import", 100, show=True) as bar:
        bar.stage("tracing", 40)        # what comes next, and how much of the whole it is

Amounts of the unit "byte" are said in MB, with the rate.  `report_to` has it told to a program as well.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self, TypeVar

__all__ = ["Bar", "lines_in_pipes", "report_to", "track"]

_T = TypeVar("_T")
_EVERY: Final = 10.0  # seconds between lines where there is no terminal: work that is shorter says nothing
_TOLD_EVERY: Final = 1.0  # seconds between what a program is told
_MB: Final = 1e6
_lines = False
_told: Callable[[Mapping[str, object]], None] | None = None
_FORMAT: Final = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"


def lines_in_pipes(wanted: bool) -> None:
    """Whether there are lines where no terminal shows a bar; programs that read standard error want none."""
    global _lines
    _lines = wanted


def report_to(told: Callable[[Mapping[str, object]], None] | None) -> None:
    """Have all progress told to a function as well, shown or not: what, done, total, unit, seconds."""
    global _told
    _told = told


class Bar:
    """Progress of `what` through `total` units; nothing is said unless `show`.

    Several threads may advance it.  A context manager: leaving it ends the bar, at its end if nothing went
    wrong.
    """

    def __init__(self, what: str, total: float, unit: str = "", *, show: bool = False) -> None:
        self.what, self.total, self.unit, self.show = what, total, unit, show and total > 0
        self.done = 0.0
        self._share = 0.0  # of the stage under way
        self._now = ""
        self._begin = self._said = time.monotonic()
        self._told = 0.0
        self._lock = threading.RLock()
        self._bar: Any = None

    def __enter__(self) -> Self:
        if self.show and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=self.total, desc=self.what, bar_format=_FORMAT, file=sys.stderr, dynamic_ncols=True
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._now = ""
            self.advance(self.total - self.done)
        if self._bar is not None:
            self._bar.close()

    def advance(self, count: float = 1) -> None:
        """So many more units are done."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if _told is not None and (now - self._told >= _TOLD_EVERY or self.done >= self.total):
                self._told = now
                _told(
                    {
                        "event": "progress",
                        "what": self.what,
                        "done": self.done,
                        "total": self.total,
                        "unit": self.unit,
                        "seconds": now - self._begin,
                    }
                )
            if self._bar is not None:
                now_at = ", ".join(filter(None, (self._now, self._rate(now - self._begin))))
                self._bar.set_postfix_str(now_at, refresh=False)
                self._bar.update(count)
            elif self.show and _lines and now - self._said >= _EVERY and self.done < self.total:
                self._say()

    def _rate(self, seconds: float) -> str:
        return f"{self.done / _MB / seconds:.0f} MB/s" if self.unit == "byte" and seconds > 0 else ""

    def stage(self, name: str, share: float) -> None:
        """The stage before is done; `name` is under way, `share` units of the whole."""
        self._now, before, self._share = name, self._share, share
        self.advance(before)

    def _say(self) -> None:
        self._said = time.monotonic()
        seconds = self._said - self._begin
        left = seconds * (self.total - self.done) / self.done if self.done else None
        if self.unit == "byte":
            amount = f"{self.done / _MB:.0f} of {self.total / _MB:.0f} MB, {self._rate(seconds)}"
        elif self.unit:
            amount = f"{self.done:.0f} of {self.total:.0f} {self.unit}s"
        else:
            amount = f"{100 * self.done / self.total:.0f} %"
        rest = f", about {left:.0f} s left" if left is not None else ""
        print(f"{self.what}: {amount}{rest}", file=sys.stderr, flush=True)

    def line(self, text: str, file: Any = None) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(text, file=file or sys.stdout)
        else:
            print(text, file=file or sys.stdout, flush=True)


def track(items: Sequence[_T], what: str, unit: str, *, show: bool) -> Iterator[_T]:
    """The items, with progress."""
    with Bar(what, len(items), unit, show=show) as bar:
        for item in items:
            yield item
            bar.advance()
