"""When a generation ends, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from tyir.diagnostics import TyirError

__all__ = ["EndReason", "check_limit", "end_reason"]

EndReason = Literal["stop token", "limit", "cache full"]


def end_reason(made: Sequence[int], limit: int, free: int, stop: Callable[[int], bool]) -> EndReason | None:
    """Why nothing follows the tokens `made`, None when the last of them is to be run.

    They ended the text, are `limit`, or no position of the cache is `free` for the last.
    """
    if made and stop(made[-1]):
        return "stop token"
    if len(made) >= limit:
        return "limit"
    return "cache full" if made and free <= 0 else None


def check_limit(limit: int) -> None:
    """`TyirError` for a number of tokens that cannot be made."""
    if limit < 0:
        raise TyirError(f"--max-tokens {limit} is out of range", help="--max-tokens takes a number from 0 on")
