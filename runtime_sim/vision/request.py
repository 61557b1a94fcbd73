"""A prompt with pictures as a session takes it: tokens, rows of embeddings at their places, positions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.runtime_sim.vision.placeholders import Placed
from tyir.runtime_sim.vision.positions import RopePositions

__all__ = ["Rows", "VisionRequest", "request_of"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Rows:
    """What the tower gave for the tokens from `start` on: `embeddings` [n, H] f16, and the addends of the
    first decoder layers, [n, H] each.

    `sha256`: of the picture they are of.
    """

    start: int
    embeddings: Array
    deepstack: tuple[Array, ...]
    sha256: str

    @property
    def end(self) -> int:
        """The token after them."""
        return self.start + len(self.embeddings)

    def keys(self) -> npt.NDArray[np.uint64]:
        """A number for each row that other rows, of this picture and of others, do not have."""
        digest = hashlib.sha256(self.sha256.encode()).digest()
        first = int.from_bytes(digest[:8], "little") | 1  # never 0, which is text
        return np.uint64(first) + np.arange(len(self.embeddings), dtype=np.uint64) * np.uint64(2)


@dataclass(frozen=True, eq=False)
class VisionRequest:
    """`ids` with what belongs into them."""

    ids: tuple[int, ...]
    positions: RopePositions
    rows: tuple[Rows, ...] = ()

    @classmethod
    def text(cls, ids: Sequence[int]) -> VisionRequest:
        """A prompt without pictures."""
        return cls(tuple(ids), RopePositions(len(ids)))

    def content(self, start: int, count: int) -> npt.NDArray[np.uint64]:
        """[count]: 0 where a token's own embedding is used, else the number of the row that is."""
        found = np.zeros(count, np.uint64)
        for rows in self.rows:
            low, high = max(rows.start, start), min(rows.end, start + count)
            if low < high:
                found[low - start : high - start] = rows.keys()[low - rows.start : high - rows.start]
        return found

    def row_keys(self, vocabulary: int) -> list[int]:
        """A number for each token: the token, or from `vocabulary` on one for the row of a picture, so that
        equal beginnings have equal rows of the cache.
        """
        content = self.content(0, len(self.ids))
        return [vocabulary + int(c) if c else i for i, c in zip(self.ids, content)]

    def fill(self, embeddings: Array, addends: Sequence[Array], start: int, count: int) -> None:
        """Put the rows of pictures among the tokens [start, start + count) into `embeddings` [>= count, H]
        and their deepstack features into `addends`, of the same shape each.
        """
        for rows in self.rows:
            low, high = max(rows.start, start), min(rows.end, start + count)
            if low >= high:
                continue
            here, own = slice(low - start, high - start), slice(low - rows.start, high - rows.start)
            embeddings[here] = rows.embeddings[own]
            for addend, features in zip(addends, rows.deepstack):
                addend[here] = features[own]


def request_of(
    ids: Sequence[int],
    placed: Sequence[Placed],
    outputs: Sequence[Sequence[tuple[Array, ...]]],
    capacity: int,
) -> VisionRequest:
    """A request of a prompt and of what the tower gave for each part of each picture: embeddings [tokens, H],
    then deepstack features of the same shape.

    `TyirError` when it leaves no room in a cache of `capacity` positions.
    """
    taken = sum(span.count for item in placed for span in item.spans)
    if len(ids) > capacity:
        raise TyirError(
            f"the prompt has {len(ids)} tokens, {taken} of them for {len(placed)}"
            f" picture{'s' * (len(placed) != 1)}: the cache has {capacity} positions",
            help=f"give fewer or smaller pictures, or compile with --max-kv {len(ids) + 64} or more",
        )
    rows = [
        Rows(start, arrays[0], tuple(arrays[1:]), patches.sha256)
        for item, each in zip(placed, outputs)
        for (start, _), arrays, patches in zip(item.parts(), each, item.media.parts)
    ]
    spans = [span for item in placed for span in item.spans]
    return VisionRequest(tuple(ids), RopePositions(len(ids), spans), tuple(rows))
