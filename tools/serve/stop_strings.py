"""Texts that end an answer, found across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopStrings"]


class StopStrings:
    """What may be shown of a text that comes in pieces.

    The end of what has come is held back for as long as a stop text could begin there.  `include`: the text
    that stops is shown too.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = [s for s in stops if s]
        self._include = include
        self._held = ""

    def put(self, text: str) -> tuple[str, str | None]:
        """What can be shown now, and the stop that ends it: the one that is complete first, of several the
        one that begins first.
        """
        self._held += text
        found = [(at + len(s), at, s) for s in self._stops if (at := self._held.find(s)) >= 0]
        if found:
            end, at, stop = min(found)
            return self._held[: end if self._include else at], stop
        keep = max((self._begun(s) for s in self._stops), default=0)
        shown = len(self._held) - keep
        ready, self._held = self._held[:shown], self._held[shown:]
        return ready, None

    def end(self) -> str:
        """What was held back: nothing follows it."""
        ready, self._held = self._held, ""
        return ready

    def _begun(self, stop: str) -> int:
        """How many characters at the end of what is held are the beginning of a stop."""
        most = min(len(stop) - 1, len(self._held))
        return next((n for n in range(most, 0, -1) if self._held.endswith(stop[:n])), 0)
