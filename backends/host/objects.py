"""Object files of kernels: made once for what they compute and the target, however many libraries take them.

A process remembers the last 64 MiB of those it has made or read; a cache keeps them beyond it, so that a
compile with one option changed builds only the kernels whose shapes are others.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final

from tyir.process.cache import Cache

__all__ = ["made_once"]

_REMEMBERED: Final = 64 << 20  # bytes

_lock: Final = threading.Lock()
_known: Final[OrderedDict[str, bytes]] = OrderedDict()  # the last used at the end
_making: Final[dict[str, Future[bytes]]] = {}


def made_once(key: str, make: Callable[[], bytes], cache: Cache | None = None) -> bytes:
    """The object of a key: remembered, out of the cache, or made now.

    Threads that want the same object wait for the first of them.  What `make` raises is raised in all.
    """
    with _lock:
        if (data := _known.get(key)) is not None:
            _known.move_to_end(key)
            return data
        waiting = _making.get(key)
        mine = _making[key] = waiting or Future()
    if waiting is not None:
        return waiting.result()
    try:
        data = _read_or_made(key, make, cache)
    except BaseException as error:
        mine.set_exception(error)
        raise
    else:
        _remember(key, data)
        mine.set_result(data)
        return data
    finally:
        with _lock:
            del _making[key]


def _read_or_made(key: str, make: Callable[[], bytes], cache: Cache | None) -> bytes:
    if cache is None:
        return make()
    if (data := cache.read(key)) is None:
        cache.write(key, data := make())
    return data


def _remember(key: str, data: bytes) -> None:
    with _lock:
        _known[key] = data
        while sum(map(len, _known.values())) > _REMEMBERED:
            _known.popitem(last=False)
