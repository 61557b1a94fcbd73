"""Files as somebody with bad intentions, or a bad disk, would leave them: what is tried, and what came of it.

A case survives when it is refused by a `TyirError`, or when what is read does what it did before.  Anything
else, an internal error, another result, a file opened that the folder does not hold, a case that does not
end, fails the test that tried it.  Every test prints a row of the table (`pytest -s`):

    area                       tried  refused  harmless
"""

from __future__ import annotations

import copy
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tyir.diagnostics import TyirError

__all__ = ["DELETED", "Tally", "changed", "places", "sample", "watched"]

DELETED = object()
_HANGS_AFTER = 60  # seconds; no case takes one


class Tally:
    """Counts the cases of an area."""

    def __init__(self, area: str) -> None:
        self.area = area
        self.refused = self.harmless = 0
        self.bad: list[str] = []

    def case(self, name: str, use: Callable[[], bool], *, must_refuse: bool = False) -> None:
        """One case: `use` reads the file and says whether it does what the unchanged one did."""
        signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(_HANGS_AFTER)
        try:
            with watched() as opened:
                same = use()
            if not same or must_refuse:
                self.bad.append(f"{name}: {'accepted' if same else 'another result'}")
            else:
                self.harmless += 1
        except TyirError as error:
            self.refused += 1
            said = error.render()
            if not said.strip() or len(said) > 20_000:
                self.bad.append(f"{name}: says {len(said)} characters")
        except Exception as error:  # what a tool would call an internal error
            self.bad.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
        finally:
            signal.alarm(0)
        if opened:
            self.bad.append(f"{name}: opened {opened[0]}")

    def close(self, least: int) -> None:
        """Prints the row; fails for every case that did not survive, and below `least` cases."""
        tried = self.refused + self.harmless + len(self.bad)
        print(f"\n{self.area:<28}{tried:>6} tried{self.refused:>6} refused{self.harmless:>6} harmless")
        assert not self.bad, "\n".join([f"{len(self.bad)} of {tried}", *self.bad[:40]])
        assert tried >= least


def _hangs(number: int, frame: Any) -> None:
    raise RuntimeError("does not end")


# ------------------------------------------------------------------------------------- files that are opened

_DECOY = "decoy-outside"  # in the name of every file that must not be opened
_opened: list[str] | None = None


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _opened is not None and event in ("open", "ctypes.dlopen") and arguments:
        name = str(arguments[0])
        if _DECOY in name or name == "/etc/passwd":
            _opened.append(name)


_audited = False


@contextmanager
def watched() -> Iterator[list[str]]:
    """The decoys that are opened within."""
    global _opened, _audited
    if not _audited:
        sys.addaudithook(_audit)
        _audited = True
    _opened = found = []
    try:
        yield found
    finally:
        _opened = None


# --------------------------------------------------------------------------------------------------- changes


def places(value: Any, prefix: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The paths of everything in a document of dictionaries and lists, itself excepted."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*prefix, key)
        yield from places(inner, (*prefix, key))


def changed(document: Any, place: tuple[str | int, ...], new: Any) -> Any:
    """A copy of a document with another value, or none, at a place."""
    made = copy.deepcopy(document)
    *way, last = place
    target = made
    for key in way:
        target = target[key]
    if new is DELETED:
        del target[last]
    else:
        target[last] = new
    return made


def sample(cases: list[Any], count: int, everything: bool) -> list[Any]:
    """All cases, or the same `count` of them every time."""
    return cases if everything or len(cases) <= count else random.Random(20).sample(cases, count)


def decoy(folder: Path, data: bytes, name: str = "file") -> Path:
    """A file outside of the artifacts that must not be opened."""
    path = folder / f"{_DECOY}-{name}"
    path.write_bytes(data)
    return path
