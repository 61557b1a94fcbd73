"""One answer that is asked for: its prompt, how its tokens are chosen, when it ends, and who listens."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.manifest import Manifest
from tyir.runtime_sim.serving.choosing import (
    Chooser,
    Constraint,
    Sampling,
    best_log_probabilities,
    log_probabilities,
)
from tyir.runtime_sim.serving.scheduler import Task
from tyir.runtime_sim.vision.request import VisionRequest

__all__ = ["Finish", "FinishReason", "Generation", "Listener", "Scored", "Times"]

_NO_TOKEN: Final = 1 << 31  # beyond all vocabularies
FinishReason = Literal["stop", "length", "abort", "error", "timeout"]


@dataclass(frozen=True)
class Finish:
    """Why an answer ended; `stop` is the token or the text that did, None for the end of the text.

    `refused`: an error that is the request's own, as one that asks for more tokens than artifacts return.
    """

    reason: FinishReason
    stop: int | str | None = None
    message: str = ""
    refused: bool = False


@dataclass(frozen=True)
class Scored:
    """A token, its log-probability, and the most likely ones at its place, best first.

    None and empty where none were asked for, and for the first token of a prompt.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Listener(Protocol):
    """Hears what becomes of an answer.  Called by the engine's thread, between steps."""

    def prompt(self, scored: Sequence[Scored]) -> None:
        """The prompt with its log-probabilities, where they were asked for, before all tokens."""

    def token(self, scored: Scored, finish: Finish | None) -> Finish | None:
        """A token that was chosen, and why it is the last; the same, or why it is the last all the same."""

    def ended(self, finish: Finish) -> None:
        """Nothing follows.  Another thread calls this for a request that it ends."""


@dataclass
class Times:
    """Seconds on the engine's clock; NaN for what has not happened."""

    arrived: float = math.nan
    scheduled: float = math.nan  # got a slot
    first: float = math.nan  # token
    last: float = math.nan  # token, or the end
    ended: float = math.nan


@dataclass(eq=False)
class Generation:
    """`limit` tokens at most (0: the prompt alone is computed, for its log-probabilities).

    `stops` end the answer, not before `least` tokens.  `logprobs`: how many of the most likely tokens are
    reported with each, None for no log-probabilities.  `score_prompt`: the prompt's tokens too.  `after`: an
    answer to the same prompt, whose cache is waited for.  `pictures`: the prompt of a model that sees them,
    with those that are in it.
    """

    prompt: Sequence[int]
    listener: Listener
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    stops: frozenset[int] = frozenset()
    least: int = 0
    logprobs: int | None = None
    score_prompt: bool = False
    constraint: Constraint | None = None
    salt: str = ""
    after: Generation | None = None
    pictures: VisionRequest | None = None
    task: Task = field(init=False)
    made: list[int] = field(default_factory=list, init=False)
    finish: Finish | None = field(default=None, init=False)
    times: Times = field(default_factory=Times, init=False)

    def __post_init__(self) -> None:
        # what is the same in two caches: a picture's tokens alone do not say which picture it is
        keys = self.prompt if self.pictures is None else self.pictures.row_keys(_NO_TOKEN)
        self.task = Task(
            keys,
            self.after.task if self.after is not None else None,
            whole=self.score_prompt,
            salt=self.salt,
            most=len(self.prompt) + self.limit,
        )
        self._choose = Chooser(self.sampling, self.prompt, self.constraint)
        self._scored: list[Scored] = [Scored(self.prompt[0])] if self.score_prompt and self.prompt else []

    def score(self, logits: npt.NDArray[np.float32], start: int) -> None:
        """Note the log-probabilities of the prompt's tokens that follow rows [n, V], from `start` on."""
        following = self.prompt[start + 1 : start + 1 + len(logits)]
        for row, token in zip(logits, following):
            self._scored.append(self._report({"logits": row}, token))

    def next(self, outputs: dict[str, npt.NDArray[np.generic]], capacity: int) -> Finish | None:
        """Choose a token from the outputs at the last position; why the answer ends with it."""
        if self.score_prompt and not self.made:
            self.listener.prompt(self._scored)
        if not self.limit:
            return Finish("length")
        refused = sorted(self.stops) if len(self.made) < self.least and "logits" in outputs else ()
        token = self._choose(outputs, self.made, refused)
        self.made.append(token)
        scored = Scored(token)
        if self.logprobs is not None:
            scored = self._report(outputs, token)
        return self.listener.token(scored, self._finish(token, capacity))

    def _finish(self, token: int, capacity: int) -> Finish | None:
        if token in self.stops and len(self.made) > self.least:
            return Finish("stop", token)
        full = len(self.prompt) + len(self.made) > capacity
        return Finish("length") if full or len(self.made) >= self.limit else None

    def check(self, manifest: Manifest, vocabulary: int) -> None:
        """`TyirError` for what artifacts cannot do."""
        bad = [t for t in self.prompt if not 0 <= t < vocabulary]
        if bad:
            raise TyirError(f"token {bad[0]} is not in the vocabulary of {vocabulary}")
        needed = {
            "logprobs of the prompt": self.score_prompt,
            "a grammar (structured_outputs, response_format, tools that are required)": (
                self.constraint is not None
            ),
        }
        self.sampling.check(
            vocabulary,
            manifest.choices,
            manifest.has_logsumexp,
            logprobs=self.logprobs,
            others=[name for name, is_asked in needed.items() if is_asked],
        )
        if self.score_prompt:
            manifest.need_every_row("scoring a prompt (echo with logprobs)")

    def _report(self, outputs: Mapping[str, Any], token: int) -> Scored:
        """A token and the best ones, of one array: who compares them finds equal what is equal."""
        if "logits" not in outputs:
            ids, found = best_log_probabilities(outputs)
            tops = [(int(i), float(v)) for i, v in zip(ids, found)]
            return Scored(token, dict(tops)[token], tuple(tops[: self.logprobs or 0]))
        values = log_probabilities(np.asarray(outputs["logits"], np.float32))
        count = min(self.logprobs or 0, len(values))
        best = np.argpartition(-values, count - 1)[:count] if count else np.empty(0, np.int64)
        best = best[np.lexsort((best, -values[best]))]
        return Scored(token, float(values[token]), tuple((int(i), float(values[i])) for i in best))
