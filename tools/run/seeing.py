"""From a text with places for pictures to a request: prepared, seen by the tower, put in their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.session.session import EngineName
from tyir.runtime_sim.vision.pixels import Media
from tyir.runtime_sim.vision.placeholders import Marks, VideoRule, expand, spans_of
from tyir.runtime_sim.vision.preprocessor import Preprocessor
from tyir.runtime_sim.vision.request import VisionRequest, request_of
from tyir.runtime_sim.vision.tower import TowerGroup, Towers
from tyir.tools.run.prompts import token_ids

__all__ = ["Seeing"]


class Seeing:
    """What artifacts of a vision-language model need to look at pictures; for one thread at a time.

    `TyirError` for artifacts of a model that takes none.
    """

    def __init__(
        self,
        artifacts: Artifacts,
        engine: EngineName,
        tokenizer: Any,
        marks: Marks,
        *,
        resize: bool = False,
        group: TowerGroup | None = None,
    ) -> None:
        """`group`: the processes that a tower's dies run in, None for this one alone."""
        self.preprocessor = Preprocessor(artifacts, resize=resize)
        self._towers = Towers(artifacts, engine, group)
        self._tokenizer = tokenizer
        self._marks = marks
        self._capacity = artifacts.manifest.options.max_kv

    def request(
        self, text: str, media: Sequence[Media], lap: Callable[[str], None] = lambda name: None
    ) -> VisionRequest:
        """The request of a text with a place for each picture and video; `lap` is told when a part of the
        work is done: `template`, then `tower`.

        `TyirError` when places and pictures do not agree, or there are more tokens than the cache holds.
        """
        vision = self.preprocessor.vision
        rule = VideoRule.of(vision.model_type, self.preprocessor.config.get("vision_config") or {})
        ids = token_ids(self._tokenizer, expand(text, media, self._marks, rule))
        placed = spans_of(ids, media, vision.ids, vision.pixels.merge, rule)
        lap("template")
        outputs = [[self._towers.run(part) for part in item.media.parts] for item in placed]
        lap("tower")
        return request_of(ids, placed, outputs, self._capacity)
