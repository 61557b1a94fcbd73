"""Artifacts of a vision-language model as a batch of one: requests with pictures that a server answers.

    session = VisionBatchSession(Path("out/1die"))
    session.begin(request)
    session.step([request.ids[:16]], 16)

Rotary tables are one request's, so such artifacts run one sequence; which request's tokens the next ones are
is told by `begin`.  What of a request is in the cache already is the scheduler's knowledge, by
`VisionRequest.row_keys`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import EngineGroup, EngineName
from tyir.runtime_sim.vision.preprocessor import vision_of
from tyir.runtime_sim.vision.request import VisionRequest
from tyir.runtime_sim.vision.rope_tables import RopeTables

__all__ = ["VisionBatchSession"]

Array = npt.NDArray[Any]


class VisionBatchSession(BatchSession):
    """A `BatchSession` of a vision-language model; `TyirError` for artifacts of a model without pictures."""

    def __init__(
        self,
        folder: str | Path | Artifacts,
        engine: EngineName = "host",
        *,
        threads: int | None = None,
        group: EngineGroup | None = None,
    ) -> None:
        super().__init__(folder, engine, threads=threads, group=group)
        self.vision = vision_of(self.artifacts)
        self._tables = RopeTables(self.artifacts, engine)
        self._request: VisionRequest | None = None
        self.begin(VisionRequest.text(()))

    def begin(self, request: VisionRequest) -> None:
        """The request that the next tokens are of."""
        if request is self._request:
            return
        self._request = request
        self._rope = self._tables.filled(request.positions)

    def _inputs(
        self, parts: Sequence[Sequence[int]], seqlen: int, lengths: Sequence[int]
    ) -> dict[str, Array]:
        assert self._request is not None
        inputs = super()._inputs(parts, seqlen, lengths)
        embeddings = inputs["embeddings"] = np.array(inputs["embeddings"])
        addends = [np.zeros_like(embeddings) for _ in range(self.vision.deepstack)]
        self._request.fill(embeddings[0], [a[0] for a in addends], len(self.tokens[0]), len(parts[0]))
        return {**inputs, **self._rope, **{f"deepstack{i}": a for i, a in enumerate(addends)}}
