"""Files as somebody with bad intentions, or a bad disk, would leave them: what is tried, and what came of it.

A case survives when it is refused by a `TyirError`, or when what is read does what it did before.  Anything
else, an internal error, another result, a file opened that the folder does not hold, a case that does not
end, fails the test that tried it.  Every test is a row of the table at the end of a run (`tests/tally.py`).
"""

from __future__ import annotations

import copy
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.tally import Tally
from tyir.diagnostics import TyirError

__all__ = ["DELETED", "CallTally", "changed", "places", "sample", "watched"]

DELETED = object()
_HANGS_AFTER = 60  # seconds; no case takes one


class CallTally(Tally):
    """Counts cases of an area that are calls in this process."""

    def case(self, name: str, use: Callable[[], bool], *, must_refuse: bool = False) -> None:
        """One case: `use` reads the file and says whether it does what the unchanged one did."""
        signal.signal(signal.SIGALRM, _hangs)
        signal.alarm(_HANGS_AFTER)
        problem, began = None, time.monotonic()
        try:
            with watched() as opened:
                same = use()
            if not same or must_refuse:
                problem = "accepted" if same else "another result"
        except TyirError as error:
            said = error.render()
            if not said.strip() or len(said) > 20_000:
                problem = f"says {len(said)} characters"
        except Exception as error:  # what a tool would call an internal error
            problem = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.alarm(0)
        self.count(name, f"opened {opened[0]}" if opened else problem, time.monotonic() - began)


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
