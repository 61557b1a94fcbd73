"""Rotary positions of a prompt with pictures: time, row and column of each token (mRoPE).

    positions = RopePositions(length, spans)
    positions.at(0, 96)      # [3, 96]: of the first chunk, wherever it cuts an image
    positions.at(length, 1)  # ... of the first generated token

`get_rope_index` of transformers 5.24 (`models/qwen2_vl`, `qwen2_5_vl`, `qwen3_vl`): text counts up on all
three; an image that begins at p has time p, row p + r, column p + c of the merged grid, and the text
after it goes on at p + max(rows, columns).  What is generated goes on after the largest position of all,
which is another number only after long videos.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.vision import Rope
from tyir.dialects.ty import rope_tables
from tyir.types import f16

__all__ = ["RopePositions", "VisionSpan", "rope_rows", "video_steps"]

Positions = npt.NDArray[np.int64]
_AXES: Final = 3


@dataclass(frozen=True)
class VisionSpan:
    """An image or video of a prompt: its first token, and its grid (rows, columns) of tokens.

    `steps`: the positions in time of its temporal patches, relative to its beginning; (0,) of an image.
    """

    start: int
    grid: tuple[int, int]
    steps: tuple[int, ...] = (0,)

    @property
    def count(self) -> int:
        """How many tokens stand for it."""
        return len(self.steps) * self.grid[0] * self.grid[1]

    @property
    def end(self) -> int:
        """The token after it."""
        return self.start + self.count

    def positions(self, first: int) -> Positions:
        """[3, count] where the first position is `first`."""
        rows, columns = self.grid
        axes = np.array(self.steps, np.int64), np.arange(rows), np.arange(columns)
        return np.stack([a.reshape(-1) for a in np.meshgrid(*axes, indexing="ij")]) + first


def video_steps(count: int, tokens_per_second: float | None, seconds: float = 1.0) -> tuple[int, ...]:
    """Positions in time of a video's `count` temporal patches.

    Qwen2.5-VL: `seconds` from one to the next, `tokens_per_second` of the tower's configuration; rounded down
    as transformers does, in float32.  None: one step each (Qwen2-VL).
    """
    if tokens_per_second is None:
        return tuple(range(count))
    interval = np.float32(tokens_per_second * np.float32(seconds))
    return tuple(int(step) for step in (np.arange(count, dtype=np.float32) * interval).astype(np.int64))


class RopePositions:
    """Where each slot of a request's cache stands: `length` tokens of a prompt with `spans`, then an answer.

    `delta`: what a slot of the answer is ahead of its position, one number for the whole prompt.
    """

    def __init__(self, length: int, spans: Iterable[VisionSpan] = ()) -> None:
        parts: list[Positions] = []
        slot = first = 0
        for span in sorted(spans, key=lambda span: span.start):
            parts += [_text(first, span.start - slot), span.positions(first + span.start - slot)]
            first += span.start - slot + max(span.grid)
            slot = span.end
        self.prompt: Positions = np.concatenate([*parts, _text(first, length - slot)], axis=1)
        self.delta = int(self.prompt.max(initial=-1)) + 1 - length

    @classmethod
    def going_on(cls, positions: Positions) -> RopePositions:
        """After tokens whose positions [3, n] are known, as those of a saved cache."""
        made = cls(0)
        made.prompt = positions
        made.delta = int(positions.max(initial=-1)) + 1 - positions.shape[1]
        return made

    def at(self, start: int, count: int) -> Positions:
        """[3, count] int64: the positions of the slots from `start` on."""
        asked = self.prompt[:, start : start + count]
        rest = np.arange(start + asked.shape[1], start + count)
        return np.concatenate([asked, np.broadcast_to(rest + self.delta, (_AXES, len(rest)))], axis=1)


def _text(first: int, count: int) -> Positions:
    return np.broadcast_to(np.arange(first, first + count, dtype=np.int64), (_AXES, count))


def rope_rows(positions: Positions, rope: Rope) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    """Cosines and sines [n, D/2] f16 of positions [3, n]: angles in f32, rounded last."""
    axes, frequencies = np.array(rope.axes), np.array(rope.inv_freq, np.float32)
    return rope_tables(positions[axes].T.astype(np.float32) * frequencies, frequencies, rope.scale, f16)
