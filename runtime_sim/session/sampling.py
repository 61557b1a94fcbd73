"""Choosing the next token from logits, or from the best tokens that a program returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import Diagnostic, TyirError

__all__ = ["Candidates", "Sampler", "check_sampling", "greedy", "make_sampler"]

Logits = npt.NDArray[np.float32]
Sampler = Callable[[Logits], int]


@dataclass(frozen=True)
class Candidates:
    """The best tokens to follow each of n positions, best first.

    `ids` [n, K] i32 with their logits `values` [n, K] f32.
    """

    values: npt.NDArray[np.float32]
    ids: npt.NDArray[np.int32]


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
    rng = np.random.default_rng(seed)

    def sample(logits: Logits) -> int:
        wide = logits.astype(np.float64)
        with np.errstate(over="ignore"):  # the smallest temperatures leave the best token alone
            scaled = (wide - wide.max()) / temperature
        order = np.argsort(-scaled, kind="stable")
        if top_k:
            order = order[:top_k]
        weights: npt.NDArray[Any] = np.exp(scaled[order])
        weights /= weights.sum()
        keep = int(np.searchsorted(np.cumsum(weights), top_p)) + 1  # the smallest set that reaches top_p
        weights = weights[:keep]
        weights = weights[weights >= min_p * weights[0]]
        return int(order[rng.choice(len(weights), p=weights / weights.sum())])

    return sample
