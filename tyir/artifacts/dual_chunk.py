"""Dual chunk attention: rotary positions of a model that is used beyond the length it was trained at.

With s = chunk_size - local_size, query i sees key j <= i from floor(i / s) - floor(j / s) chunks away:

    key j, however far away      rotated once, at j mod s
    query, same chunk            rotated at i mod s
    query, one chunk before      rotated at min(i mod s + s, chunk_size)
    query, further away          rotated at min(2 s - 1, chunk_size), the same for all

so that no distance is longer than chunk_size, and all of at most local_size are exact.  Scores are multiplied
by m^2, m = max(1, 0.1 ln(length / original_max_position_embeddings) + 1).  An et al., arXiv:2402.17463; the
constants and the temperature as Qwen2.5-1M has them (arXiv:2501.15383) and vLLM computed them.

The queries of one step lie in one chunk: steps end at multiples of s (`DualChunk.room`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tyir.diagnostics import TyirError

__all__ = ["CONFIG_KEY", "DualChunk"]

CONFIG_KEY: Final = "dual_chunk_attention_config"  # of config.json, and of what artifacts say of the model
_DEFAULTS: Final = {"chunk_size": 8192, "local_size": 1024, "original_max_position_embeddings": 0}  # vLLM's


@dataclass(frozen=True)
class DualChunk:
    """`original`: the trained length that the temperature counts from; 0 for no temperature."""

    chunk_size: int
    local_size: int
    original: int = 0

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> DualChunk | None:
        """What a model's facts say (`CONFIG_KEY`), None when they say nothing.

        `TyirError` for sizes that make no chunks.
        """
        entry = config.get(CONFIG_KEY)
        if entry is None:
            return None
        if not isinstance(entry, Mapping):
            raise _unusable(f"is {entry!r}, an object is needed")
        sizes = {key: entry.get(key, default) for key, default in _DEFAULTS.items()}
        for key, value in sizes.items():
            least = 0 if key.startswith("original") else 1
            if type(value) is not int or not least <= value < 2**31:
                raise _unusable(f"has {key} {value!r}, a whole number from {least} to 2^31 - 1 is needed")
        chunk, local, original = sizes.values()
        if local >= chunk:
            raise _unusable(f"has local_size {local}, which must be less than chunk_size {chunk}")
        return cls(chunk, local, original)

    @classmethod
    def used(cls, config: Mapping[str, Any], capacity: int) -> DualChunk | None:
        """What a cache of `capacity` tokens takes of it: None where plain attention is the same."""
        found = cls.of_config(config)
        return found if found is not None and capacity > found.exact else None

    def facts(self) -> dict[str, int]:
        """What `of_config` reads."""
        return dict(zip(_DEFAULTS, (self.chunk_size, self.local_size, self.original)))

    @property
    def step(self) -> int:
        """Tokens of a chunk."""
        return self.chunk_size - self.local_size

    @property
    def last(self) -> int:
        """The largest position that a query is rotated at."""
        return min(2 * self.step - 1, self.chunk_size)

    @property
    def exact(self) -> int:
        """Up to so many tokens it is plain attention: all distances are exact, the temperature is 1."""
        return min(self.last + 1, self.original or self.last + 1)

    def temperature(self, length: int) -> float:
        """m^2 for a prompt of `length` tokens, or for as many as are cached when one is generated."""
        if length <= self.original or not self.original:
            return 1.0
        return (0.1 * math.log(length / self.original) + 1.0) ** 2

    def room(self, position: int) -> int:
        """How many tokens a step at `position` may have."""
        return self.step - position % self.step


def _unusable(problem: str) -> TyirError:
    return TyirError(f"'{CONFIG_KEY}' {problem}", help="compare it with the original model's config.json")
