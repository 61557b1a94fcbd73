"""How the next token of one request is chosen: what may be chosen, what is less likely, then the sampler.

The order is vLLM's: log-probabilities are of the logits as they come; bias and penalties; what is not
allowed; then `tyir.runtime_sim.session.sampling` (temperature, top-k, nucleus, min-p).  Every request has its
own random generator, so that equal seeds give equal tokens whatever else shares the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import Diagnostic, TyirError
from tyir.runtime_sim.session.sampling import check_sampling, choose, logsumexp, make_sampler

__all__ = [
    "PENALTIES",
    "Chooser",
    "Constraint",
    "Sampling",
    "best_log_probabilities",
    "log_probabilities",
]

Logits = npt.NDArray[np.float32]
_LARGEST_SEED = 1 << 64
PENALTIES: Final = (1e-30, 1e30)  # within these, what is made of fp16's logits is finite


class Constraint(Protocol):
    """What the text may be, token by token: a grammar."""

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        """Which tokens may follow [V]; None: all."""

    def accept(self, token: int) -> None:
        """Note what has been chosen."""


@dataclass(frozen=True)
class Sampling:
    """What a request asks of the choice of its tokens; the defaults change nothing, and are greedy.

    `top_k`: 0 or -1 for all.  `bias`: by token, added to its logit.  `allowed`: no other token.  `bad`:
    sequences of tokens that must not appear.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    allowed: frozenset[int] | None = None
    bad: tuple[tuple[int, ...], ...] = ()

    def check(
        self,
        vocabulary: int,
        choices: int | None,
        logsumexp: bool = False,
        *,
        logprobs: int | None = None,
        others: Sequence[str] = (),
    ) -> None:
        """`TyirError` for what is out of range, and for what needs logits that the programs do not return:
        `choices` is how many tokens of a position they return, None for all logits, and `logsumexp` whether
        with that of all.

        `logprobs`: how many tokens' log-probabilities are asked for beside the chosen one's; `others`: by
        name, what else is asked that needs all logits.
        """
        make_sampler(self.temperature, max(self.top_k, 0), self.top_p, None, self.min_p)
        problems = [
            f"{name} {value} is out of range: {holds}"
            for name, value, good, holds in (
                ("top_k", self.top_k, self.top_k >= -1, "a whole number from -1 on"),
                (
                    "repetition_penalty",
                    self.repetition_penalty,
                    PENALTIES[0] <= self.repetition_penalty <= PENALTIES[1],
                    "from {:g} to {:g}".format(*PENALTIES),
                ),
                ("presence_penalty", self.presence_penalty, abs(self.presence_penalty) <= 2, "from -2 to 2"),
                (
                    "frequency_penalty",
                    self.frequency_penalty,
                    abs(self.frequency_penalty) <= 2,
                    "from -2 to 2",
                ),
            )
            if not good
        ]
        named = [*self.bias, *(self.allowed or ()), *(t for word in self.bad for t in word)]
        problems += [
            f"token {token} is not in the vocabulary of {vocabulary}"
            for token in dict.fromkeys(named)
            if not 0 <= token < vocabulary
        ]
        problems += [f"bias {v} is not a finite number" for v in self.bias.values() if not math.isfinite(v)]
        if self.allowed is not None and not self.allowed:
            problems.append("no token is allowed")
        if problems:
            raise TyirError([Diagnostic(p) for p in problems])
        if choices is not None:
            self._check_choices(choices, logsumexp, logprobs, others)

    def _check_choices(
        self, choices: int, logsumexp: bool, logprobs: int | None, others: Sequence[str]
    ) -> None:
        """The best tokens of a position say enough within `top_k` of them; with the logsumexp of all, also of
        log-probabilities, and, from case to case (`kept_of_all`), of a nucleus and a smallest share.
        """
        check_sampling(choices, self.temperature, max(self.top_k, 0))
        random = self.temperature > 0
        among_all = random and self.top_k <= 0
        bounded = self.top_p < 1 or self.min_p > 0
        hot = self.temperature > 1 and self.min_p == 0  # how many small ones share what is left is not known
        once_more = {
            "logprobs": logprobs is not None,
            "top_p without top_k": among_all and self.top_p < 1,
            "min_p without top_k": among_all and self.min_p > 0,
        }
        never = {
            "sampling without top_k": among_all and not bounded,
            "top_p without top_k at a temperature above 1": among_all and self.top_p < 1 and hot,
            "penalties": self._penalises,
            "logit_bias": bool(self.bias),
            "allowed_token_ids": self.allowed is not None,
            "bad_words": bool(self.bad),
            **dict.fromkeys(others, True),
        }
        returned = f"these artifacts return the {choices} best tokens of each position"
        if asked := [name for name, is_asked in never.items() if is_asked]:
            raise TyirError(
                f"{', '.join(asked)}: {returned} and not all logits", help="compile with --output logits"
            )
        if not logsumexp and (asked := [name for name, is_asked in once_more.items() if is_asked]):
            raise TyirError(
                f"{', '.join(asked)}: {returned} and not the logsumexp of all: they are of an older version",
                help="compile the model again, or with --output logits",
            )
        if logprobs is not None and not 0 <= logprobs <= choices:
            raise TyirError(
                f"logprobs {logprobs}: {returned}",
                help=f"ask for {choices} at most, or compile with a larger K of --output topk=K",
            )

    @property
    def _penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class Chooser:
    """The choices of one request; what it has chosen is what `made` holds at the next call."""

    def __init__(
        self, sampling: Sampling, prompt: Sequence[int], constraint: Constraint | None = None
    ) -> None:
        self._sampling = sampling
        self._prompt = np.array(sorted(set(prompt)), np.int64)
        self._constraint = constraint
        seed = None if sampling.seed is None else sampling.seed % _LARGEST_SEED
        self._sample = make_sampler(
            sampling.temperature, max(sampling.top_k, 0), sampling.top_p, seed, sampling.min_p
        )

    def __call__(self, outputs: Mapping[str, Any], made: Sequence[int], refused: Sequence[int] = ()) -> int:
        """The token to follow, from a step's outputs at one position; none of `refused`.

        `TyirError` when nothing may follow.
        """
        if "logits" not in outputs:
            return choose(outputs, self._sample)
        token = self._sample(self._changed(np.asarray(outputs["logits"], np.float32), made, refused))
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def _changed(self, logits: Logits, made: Sequence[int], refused: Sequence[int]) -> Logits:
        asked = self._sampling
        mask = self._constraint.allowed() if self._constraint is not None else None
        bad = [word[-1] for word in asked.bad if list(word[:-1]) == list(made[len(made) - len(word) + 1 :])]
        if not (
            asked.bias or asked._penalises or asked.allowed is not None or mask is not None or bad or refused
        ):
            return logits
        logits = logits.copy()
        for token, value in asked.bias.items():
            logits[token] += value
        if asked._penalises:
            self._penalise(logits, made)
        if asked.allowed is not None:
            keep = np.zeros(len(logits), np.bool_)
            keep[list(asked.allowed)] = True
            logits[~keep] = -np.inf
        if mask is not None:
            logits[: len(mask)][~mask[: len(logits)]] = -np.inf
            logits[len(mask) :] = -np.inf
        logits[[*bad, *refused]] = -np.inf
        if not np.isfinite(logits.max()):
            raise TyirError("no token may follow", help="allow more tokens, or forbid fewer")
        return logits

    def _penalise(self, logits: Logits, made: Sequence[int]) -> None:
        asked = self._sampling
        own, counts = np.unique(np.asarray(made, np.int64), return_counts=True)
        seen = np.union1d(self._prompt, own).astype(np.int64)
        of_seen = logits[seen]
        logits[seen] = np.where(
            of_seen > 0, of_seen / asked.repetition_penalty, of_seen * asked.repetition_penalty
        )
        logits[own] -= (asked.frequency_penalty * counts + asked.presence_penalty).astype(np.float32)


def log_probabilities(logits: Logits) -> npt.NDArray[np.float64]:
    """Of every token [.., V], natural logarithms, in f64."""
    return np.asarray(logits.astype(np.float64) - logsumexp(logits)[..., None])


def best_log_probabilities(
    outputs: Mapping[str, Any],
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """The tokens that a step returns at one position, best first, and their natural logarithms, in f64, among
    the whole vocabulary.
    """
    values = np.asarray(outputs["top_values"], np.float64) - float(outputs["logsumexp"])
    return np.asarray(outputs["top_ids"], np.int32), values
