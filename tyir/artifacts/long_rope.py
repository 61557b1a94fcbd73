"""Two rotary tables: a model whose frequencies are others from a length on (`longrope`, as Phi-3 has them).

A key is turned once, when it is cached, so a conversation has one of the two from its first token to its
last: the short frequencies if it never holds more than `original` tokens, else the long ones.  transformers
takes those of the length of a pass (`longrope_frequency_update`), which is the same for a prompt by itself.

One table [capacity + original, D/2] has both: row i the long frequencies at position i, row capacity + i the
short ones.  Which rows a step reads is its input `rope_rows` [b, s] i32, so that each sequence of a batch has
its own; no program knows of the choice.  Ding et al., arXiv:2402.13753.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError

__all__ = ["FACT", "LongRope"]

FACT: Final = "long_rope"  # among the model's facts, of models imported for more tokens than `original`


@dataclass(frozen=True)
class LongRope:
    """`original`: tokens up to which the short frequencies hold; `short`: these, f32, one for each pair of
    channels that is turned.
    """

    original: int
    short: tuple[float, ...]

    @classmethod
    def of_model(cls, model: Mapping[str, Any]) -> LongRope | None:
        """What a model's facts say (`FACT`), None when they say nothing; `TyirError` for what they cannot
        say.
        """
        entry = model.get(FACT)
        if entry is None:
            return None
        found = entry if isinstance(entry, Mapping) else {}
        original, short = found.get("original"), found.get("short_inv_freq")
        if type(original) is not int or not 1 <= original < 2**31:
            raise _unusable(f"has original {original!r}, a whole number from 1 to 2^31 - 1 is needed")
        if not isinstance(short, Sequence) or not short or not all(type(f) is float for f in short):
            raise _unusable("has no list of numbers short_inv_freq")
        return cls(original, tuple(short))

    @classmethod
    def used(cls, model: Mapping[str, Any], capacity: int) -> LongRope | None:
        """What a cache of `capacity` tokens takes of it: None where one table is enough."""
        found = cls.of_model(model)
        return found if found is not None and capacity > found.original else None

    def facts(self) -> dict[str, Any]:
        """What `of_model` reads."""
        return {"original": self.original, "short_inv_freq": list(self.short)}

    def is_long(self, length: int) -> bool:
        """Whether a conversation that comes to `length` tokens has the long frequencies."""
        return length > self.original

    def rows(self, first: int, count: int, long: bool, capacity: int) -> npt.NDArray[np.int32]:
        """The rows of the table [count] for tokens from position `first` on; what lies behind a part of the
        table is padding, and repeats its last row.
        """
        begin, held = (0, capacity) if long else (capacity, self.original)
        positions = np.minimum(np.arange(first, first + count), held - 1)
        return (begin + positions).astype(np.int32)


def _unusable(problem: str) -> TyirError:
    return TyirError(f"'{FACT}' of the model {problem}", help="compile the model again")
