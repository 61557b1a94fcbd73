"""How a server is set up."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Settings"]


@dataclass(frozen=True)
class Settings:
    """`names`: the model's, the first is answered with.  `keys`: hashes of those that open the server; none:
    it is open.  `max_body`: bytes of a request.  `always_usage`: streams end with usage, asked for or not.
    `tool_parser`: how calls of tools are read; None: tools are refused.
    """

    names: Sequence[str] = ("tyir",)
    keys: Sequence[bytes] = field(default=(), repr=False)
    max_body: int = 4 << 20
    always_usage: bool = True
    tool_parser: Literal["hermes"] | None = "hermes"

    @staticmethod
    def hashed(keys: Sequence[str]) -> tuple[bytes, ...]:
        """What is kept of keys."""
        return tuple(hashlib.sha256(key.encode()).digest() for key in keys)

    def opens(self, key: bytes) -> bool:
        """Whether a key is one of them, in a time that does not depend on it."""
        given = hashlib.sha256(key).digest()
        return sum(hmac.compare_digest(given, known) for known in self.keys) > 0
