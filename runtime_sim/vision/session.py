"""A conversation with pictures: rows of embeddings and rotary tables beside the tokens.

    session = VisionSession(Path("out/1die"))
    for token in session.generate(request, 64): ...

The rotary table is filled for all slots of the cache when a request begins: those of its prompt by their
positions, later ones by the prompt's delta, so that neither chunks nor padding nor generated tokens need a
rule. What of a prompt is in the cache already is told by token, position and picture: all rows of pictures
have one token, and a second picture's answer must not be about the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.artifacts.vision import Vision
from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.program_engine import StepProbe
from tyir.runtime_sim.session.sampling import Sampler, greedy
from tyir.runtime_sim.session.saved_cache import Kind
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.runtime_sim.vision.positions import RopePositions
from tyir.runtime_sim.vision.preprocessor import vision_of
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.runtime_sim.vision.rope_tables import RopeTables
from tyir.runtime_sim.vision.tower import TowerGroup

__all__ = ["VisionSession"]

Array = npt.NDArray[Any]


class VisionSession(Session):
    """A `Session` of a vision-language model; `TyirError` for artifacts of a model that takes no pictures."""

    group: TowerGroup | None

    def __init__(
        self,
        folder: str | Path | Artifacts,
        engine: EngineName = "host",
        *,
        check: bool = True,
        probe: StepProbe | None = None,
        threads: int | None = None,
        group: TowerGroup | None = None,
    ) -> None:
        artifacts = folder if isinstance(folder, Artifacts) else Artifacts.open(folder, check=check)
        self.vision: Vision = vision_of(artifacts)
        super().__init__(artifacts, engine, probe=probe, threads=threads, group=group)
        # of the tokens in the cache: where they stand, and of which row of which picture they are
        self._positions = np.zeros((3, self.capacity), np.int64)
        self._content = np.zeros(self.capacity, np.uint64)
        self._tables = RopeTables(artifacts, engine)
        self.begin(VisionRequest.text(()))

    def begin(self, request: VisionRequest) -> None:
        """The request that the next tokens are of."""
        self.request = request
        self._rope = self._tables.filled(request.positions)

    def reset(self) -> None:
        """Start over with an empty cache."""
        super().reset()
        self.begin(VisionRequest.text(()))

    def prefill_request(self, request: VisionRequest) -> npt.NDArray[np.float32]:
        """Make the cache hold exactly a request's tokens; logits [n, V] of the n that were computed."""
        self.begin(request)
        return self.prefill(request.ids)

    def generate(
        self,
        prompt: Sequence[int] | VisionRequest,
        limit: int,
        *,
        sampler: Sampler = greedy,
        stop: Callable[[int], bool] = lambda token: False,
    ) -> Iterator[int]:
        """As `Session.generate`, of a request or of tokens without pictures."""
        request = prompt if isinstance(prompt, VisionRequest) else VisionRequest.text(prompt)
        self.begin(request)
        yield from super().generate(request.ids, limit, sampler=sampler, stop=stop)

    def shared_prefix(self, ids: Sequence[int]) -> int:
        """How many of the first tokens of the request the cache holds as they are there now."""
        return self.shared_with(self.request, super().shared_prefix(ids))

    def shared_with(self, request: VisionRequest, most: int | None = None) -> int:
        """How many of the first tokens of a request the cache holds: the same tokens, at the same
        positions, of the same pictures.
        """
        count = super().shared_prefix(request.ids) if most is None else most
        same = (self._content[:count] == request.content(0, count)) & (
            self._positions[:, :count] == request.positions.at(0, count)
        ).all(axis=0)
        return int(count if same.all() else np.argmin(same))

    def _beside(self) -> dict[str, Array]:
        """Positions and pictures of the tokens."""
        held = len(self.tokens)
        own = {"positions": self._positions[:, :held], "content": self._content[:held]}
        return {**super()._beside(), **own}

    def _kinds(self) -> dict[str, Kind]:
        own = {"positions": ((3, None), np.dtype(np.int64)), "content": ((None,), np.dtype(np.uint64))}
        return {**super()._kinds(), **own}

    def _restored(self, tokens: list[int], beside: Mapping[str, Array]) -> None:
        """What is generated next goes on where the saved tokens ended."""
        super()._restored(tokens, beside)
        self._positions[:, : len(tokens)] = beside["positions"]
        self._content[: len(tokens)] = beside["content"]
        self.begin(VisionRequest(tuple(tokens), RopePositions.going_on(beside["positions"])))

    def _inputs(self, ids: list[int], chunk: Chunk, length: int) -> dict[str, Array]:
        inputs = super()._inputs(ids, chunk, length)
        embeddings = inputs["embeddings"] = np.array(inputs["embeddings"])
        slots = slice(chunk.start, chunk.start + chunk.count)
        self._positions[:, slots] = self.request.positions.at(chunk.start, chunk.count)
        self._content[slots] = self.request.content(chunk.start, chunk.count)
        addends = [np.zeros_like(embeddings) for _ in range(self.vision.deepstack)]
        own = self.sequence
        self.request.fill(embeddings[own], [a[own] for a in addends], chunk.start, chunk.count)
        return {**inputs, **self._rope, **{f"deepstack{i}": a for i, a in enumerate(addends)}}
