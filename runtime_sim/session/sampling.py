"""Choosing the next token from logits, or from the best tokens that a program returns.

Of K best tokens with the logsumexp L of all logits, a token's log-probability is its logit less L, so that
the probability that all others have together is known, and that none of them is likelier than the K-th.
With that, `top_p` and `min_p` of the whole vocabulary are found among the K where they end there; where that
is not known it is an error, never another choice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import Diagnostic, TyirError

__all__ = [
    "Candidates",
    "Sampler",
    "check_sampling",
    "choose",
    "greedy",
    "kept_of_all",
    "logsumexp",
    "make_sampler",
]

Logits = npt.NDArray[np.float32]
Sampler = Callable[[Logits], int]
_UNIT: Final = 2.0**-23  # of f32: how far a logsumexp may be off, relative to it


@dataclass(frozen=True)
class Candidates:
    """The best tokens to follow each of n positions, best first.

    `ids` [n, K] i32 with their logits `values` [n, K] f32; `logsumexp` [n] f32 of all logits of a position,
    None of artifacts of older versions.
    """

    values: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]
    logsumexp: npt.NDArray[np.float32] | None = None


def logsumexp(logits: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """log(sum(exp(logits))) over the last axis, in f64."""
    wide = logits.astype(np.float64)
    largest = wide.max(axis=-1)
    return np.asarray(largest + np.log(np.exp(wide - largest[..., None]).sum(axis=-1)))


def check_sampling(choices: int | None, temperature: float, top_k: int) -> None:
    """`TyirError` when sampling so needs more tokens of a position than the program returns.

    `choices` is how many it returns; None: all logits.
    """
    if choices is None or temperature == 0:
        return
    if choices == 1:
        raise TyirError(
            "these artifacts return the most likely token only, there is nothing to sample from",
            help="use --temperature 0, or compile with --output topk=K or --output logits",
        )
    if top_k > choices:
        raise TyirError(
            f"--top-k {top_k}: these artifacts return {choices} tokens of each position",
            help=f"use --top-k {choices}, or compile with --output topk={top_k}",
        )


def greedy(logits: Logits) -> int:
    """The most likely token; of equal ones the first, as Hugging Face does."""
    return int(np.argmax(logits))


@dataclass(frozen=True)
class _Argument:
    """A sampling argument: its option, what it must hold, in words."""

    option: str
    value: float | None
    holds: Callable[[float], bool]
    needed: str

    def problem(self) -> Diagnostic | None:
        value = self.value
        if value is None or (_is_number(value) and self.holds(value)):
            return None
        return Diagnostic(f"{self.option} {value} is out of range", help=f"{self.option} takes {self.needed}")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def make_sampler(
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    min_p: float = 0.0,
) -> Sampler:
    """A sampler with transformers' meaning of its arguments: temperature, then top-k, nucleus, min-p.

    Temperature 0 is greedy.

    `top_k` = 0, `top_p` = 1 and `min_p` = 0 leave everything in.  `TyirError` names every argument that is
    out of its range, NaN included.
    """
    arguments = (
        _Argument("--temperature", temperature, lambda v: 0 <= v < math.inf, "a finite number from 0 on"),
        _Argument("--top-k", top_k, lambda v: v >= 0 and v == int(v), "a whole number from 0 on"),
        _Argument("--top-p", top_p, lambda v: 0 < v <= 1, "a number above 0 and up to 1"),
        _Argument("--min-p", min_p, lambda v: 0 <= v <= 1, "a number from 0 to 1"),
        _Argument("--seed", seed, lambda v: v >= 0 and v == int(v), "a whole number from 0 on"),
    )
    if problems := [p for argument in arguments if (p := argument.problem()) is not None]:
        raise TyirError(problems)
    if temperature == 0:
        return greedy
    return _Random(temperature, int(top_k), top_p, min_p, np.random.default_rng(seed))


@dataclass(frozen=True)
class _Random:
    """What `make_sampler` gives for a temperature above 0."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    rng: np.random.Generator

    def __call__(self, logits: Logits) -> int:
        scaled = _scaled(logits, self.temperature)
        order = np.argsort(-scaled, kind="stable")
        if self.top_k:
            order = order[: self.top_k]
        weights: npt.NDArray[Any] = np.exp(scaled[order])
        weights /= weights.sum()
        keep = int(np.searchsorted(np.cumsum(weights), self.top_p)) + 1  # the smallest set that reaches top_p
        weights = weights[:keep]
        weights = weights[weights >= self.min_p * weights[0]]
        return int(order[self._drawn(weights)])

    def of_best(self, values: Logits, total: float | None) -> int:
        """Which of the best tokens, of logits `values`, best first; `total`: the logsumexp of all.

        Among the best with `top_k`, or where nothing bounds what is chosen among.  Otherwise `top_p` and
        `min_p` are of the whole vocabulary: `TyirError` where they leave in more than the best.
        """
        if self.top_k or (self.top_p == 1 and self.min_p == 0):
            return self(values)
        given = {"--top-p": self.top_p if self.top_p < 1 else None, "--min-p": self.min_p or None}
        named = " and ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
        asked = f"{named} without --top-k"
        help = f"use --top-k {len(values)}, or compile with a larger K of --output topk=K, or --output logits"
        if total is None:
            raise TyirError(
                f"{asked}: these artifacts, of an older version, return the {len(values)} best tokens of each"
                " position without the logsumexp of all",
                help=f"compile the model again, or use --top-k {len(values)}",
            )
        kept = kept_of_all(values, total, self.temperature, self.top_p, self.min_p)
        if kept is None:
            share = float(np.exp(values.astype(np.float64) - total).sum())
            raise TyirError(
                f"{asked} may leave in more than the {len(values)} best tokens that these artifacts return,"
                f" which have {share:.4f} of the probability here",
                help=help,
            )
        return self._drawn(np.exp(_scaled(values, self.temperature)[:kept]))

    def _drawn(self, weights: npt.NDArray[Any]) -> int:
        return int(self.rng.choice(len(weights), p=weights / weights.sum()))


def _scaled(logits: Logits, temperature: float) -> npt.NDArray[np.float64]:
    wide = logits.astype(np.float64)
    with np.errstate(over="ignore"):  # the smallest temperatures leave the best token alone
        return np.asarray((wide - wide.max()) / temperature)


def kept_of_all(values: Logits, total: float, temperature: float, top_p: float, min_p: float) -> int | None:
    """How many tokens `top_p` and then `min_p` leave in of the whole vocabulary, if those are among the best,
    of logits `values` [K], best first; None where that is not known.  `total`: the logsumexp of all logits.

    In units of the best token's probability let y <= 1 be the K-th one's and R the sum of what is not
    returned, each of which is at most min(y, R).  At temperature 1 the others weigh R.  At another one each
    x of them weighs x^(1 / temperature) = x * x^(1 / temperature - 1): below 1 that is at most R *
    min(y, R)^(1 / temperature - 1) together, above 1 at least R * y^(1 / temperature - 1).  What is kept is
    known where both ends agree on it.
    """
    power = 1 / temperature
    best = _scaled(values, 1.0)
    weights = np.exp(_scaled(values, temperature))
    whole = math.exp(min(total - float(values[0]), 700.0))
    rest, doubt = whole - float(np.exp(best).sum()), whole * _UNIT * max(abs(total), 16.0)
    least, most = max(rest - doubt, 0.0), max(rest + doubt, 0.0)
    last = math.exp(float(best[-1]))
    largest = min(last, most)  # of one of the others
    if power > 1:
        low, high = 0.0, most * largest ** (power - 1)
    elif power == 1:
        low, high = least, most
    else:
        low, high = least * max(last, 1e-300) ** (power - 1), math.inf
    sums = np.cumsum(weights)

    def nucleus(others: float) -> float:
        """How many tokens reach `top_p`, if the others weigh so much."""
        count = int(np.searchsorted(sums, top_p * (float(sums[-1]) + others))) + 1
        return count if top_p < 1 and count <= len(sums) else math.inf

    share = math.inf
    if largest**power < min_p or weights[-1] < min_p:
        share = int((weights >= min_p).sum())
    kept = min(nucleus(low), share)
    return int(kept) if kept == min(nucleus(high), share) and kept < math.inf else None


def choose(outputs: Mapping[str, Any], sampler: Sampler) -> int:
    """The token to follow, from a step's outputs at one position: `logits` [V], or the `top_values` [K] of
    `top_ids` [K] and the `logsumexp`.
    """
    if "logits" in outputs:
        return sampler(np.asarray(outputs["logits"], np.float32))
    values, total = np.asarray(outputs["top_values"], np.float32), outputs.get("logsumexp")
    if isinstance(sampler, _Random):
        place = sampler.of_best(values, None if total is None else float(total))
    else:
        place = sampler(values)
    return int(outputs["top_ids"][place])
