"""Work on the rows of a weight, which are independent of each other: in threads, a part of the rows each.

Searches are many small steps.  Sharing each step between threads makes all of them wait for the slowest as
often, and on a machine that does something else beside, that is what takes the time; a thread that goes
through all the steps of its own rows waits for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Final, TypeVar

import torch

__all__ = ["by_rows", "threads_for"]

_T = TypeVar("_T")
_LEAST: Final = 256
_ALONE: Final = (
    10_000_000_000  # weights of a layer x tokens; below it a second thread costs more than it does
)


@contextmanager
def threads_for(weights: int, tokens: int) -> Iterator[None]:
    """One thread, where so many tokens through so many weights are so little that every step ends before a
    second thread has begun: it would only be waited for, for as long as the machine does something else.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if weights * tokens < _ALONE else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_rows(count: int, most: int, device: str, work: Callable[[slice], _T]) -> list[_T]:
    """What `work` gives for consecutive parts of `count` rows, `most` rows or fewer in each, in order.

    The parts depend on the numbers alone, not on the threads, and within a part torch uses one thread: so do
    the bits.  On an accelerator all rows are one part.
    """
    if device != "cpu":
        return [work(slice(0, count))]
    # two at least, for two threads, unless the steps would be so short that the interpreter is all they take
    parts = max(-(-count // max(most, 1)), min(2, count // _LEAST), 1)
    bounds = [count * i // parts for i in range(parts + 1)]
    rows = [slice(a, b) for a, b in pairwise(bounds)]
    threads = torch.get_num_threads()
    if threads == 1 or parts == 1:
        return [work(each) for each in rows]
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        return list(pool.map(work, rows))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
