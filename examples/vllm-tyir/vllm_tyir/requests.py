"""A request under way in the worker: its tokens, how the next is chosen, what tokens are worth."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.runtime_sim.serving.choosing import Chooser, best_log_probabilities, log_probabilities
from vllm_tyir.sampling import sampling_of

__all__ = ["Request", "Scored", "scored", "table"]

Scored = tuple[list[int], list[float], int]


class _Mask:
    """Which tokens vLLM's grammar lets follow, for one step."""

    def __init__(self) -> None:
        self.bits: npt.NDArray[np.bool_] | None = None

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        return self.bits

    def accept(self, token: int) -> None:
        self.bits = None  # vLLM's scheduler follows the text


@dataclass
class Request:
    """`computed` of its tokens are in the cache of `slot`; `params` are vLLM's.

    `scores`: of the prompt's tokens from the second on, where they were asked for.
    """

    name: str
    prompt: list[int]
    params: Any
    slot: int
    computed: int = 0
    made: list[int] = field(default_factory=list)
    scores: list[Scored] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.mask = _Mask()
        self._choose = Chooser(sampling_of(self.params), self.prompt, self.mask)

    @property
    def length(self) -> int:
        """Tokens that are known."""
        return len(self.prompt) + len(self.made)

    @property
    def scores_prompt(self) -> bool:
        """Whether all rows of its prompt are read."""
        return self.params.prompt_logprobs is not None and self.computed < len(self.prompt)

    def ids(self, count: int) -> list[int]:
        """The next tokens to compute."""
        return [*self.prompt, *self.made][self.computed : self.computed + count]

    def score(self, logits: npt.NDArray[np.float32]) -> None:
        """Note what the prompt's tokens are worth, of rows [n, V] from `computed` on."""
        following = self.prompt[self.computed + 1 : self.computed + 1 + len(logits)]
        self.scores += [
            scored({"logits": row}, token, self.params.prompt_logprobs)
            for row, token in zip(logits, following)
        ]

    def next(self, outputs: Mapping[str, Any]) -> int:
        """Choose a token from a step's outputs at the last position.

        Where nothing may follow, the most likely token does: vLLM has no way to end one request alone.
        """
        early = len(self.made) < self.params.min_tokens and "logits" in outputs
        refused = sorted(self.params.all_stop_token_ids) if early else ()
        try:
            token = self._choose(outputs, self.made, refused)
        except TyirError as error:
            problem = error.diagnostics[0].message
            logging.getLogger("vllm").warning("request %s: %s; it is not held to that", self.name, problem)
            token = int(np.argmax(outputs["logits"]))
        self.made.append(token)
        return token


def scored(outputs: Mapping[str, Any], token: int, count: int) -> Scored:
    """A token and the `count` best (-1: all), from a step's outputs at one position: ids, log-probabilities,
    and the token's rank from 1 on.
    """
    if "logits" not in outputs:
        names, found = best_log_probabilities(outputs)
        own = float(found[list(names).index(token)])
        ids = [token, *map(int, names[:count])]
        return ids, [own, *map(float, found[:count])], int((found >= own).sum())
    values = log_probabilities(np.asarray(outputs["logits"], np.float32))
    count = len(values) if count < 0 else min(count, len(values))
    best = np.argpartition(-values, count - 1)[:count] if count else np.empty(0, np.int64)
    best = best[np.lexsort((best, -values[best]))]
    ids = [token, *map(int, best)]
    return ids, [float(values[i]) for i in ids], int((values >= values[token]).sum())


def table(
    rows: Sequence[Scored],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """Ids [n, k], log-probabilities [n, k] f64 and ranks [n]; shorter rows are padded.

    In f64, as they were computed: sums of them are then `tyir-serve`'s.
    """
    width = max(len(ids) for ids, _, _ in rows)
    ids = np.zeros((len(rows), width), np.int32)
    values = np.full((len(rows), width), -np.inf, np.float64)
    for number, (own, numbers, _) in enumerate(rows):
        ids[number, : len(own)], values[number, : len(own)] = own, numbers
    return ids, values, np.array([rank for _, _, rank in rows], np.int32)
