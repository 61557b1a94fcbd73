"""Choosing the next token from logits, or from the best tokens that a program returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError

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


def make_sampler(
    temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None
) -> Sampler:
    """A sampler with transformers' meaning of its arguments: temperature, then top-k, then nucleus.

    Temperature 0 is greedy.

    `top_k` = 0 and `top_p` = 1 leave everything in.  `TyirError` for values out of range.
    """
    if temperature < 0 or not 0 < top_p <= 1 or top_k < 0:
        raise TyirError(
            f"temperature {temperature}, top-k {top_k}, top-p {top_p}: need temperature >= 0, top-k >= 0 and"
            " 0 < top-p <= 1"
        )
    if temperature == 0:
        return greedy
    rng = np.random.default_rng(seed)

    def sample(logits: Logits) -> int:
        scaled = logits.astype(np.float64) / temperature
        order = np.argsort(-scaled, kind="stable")
        if top_k:
            order = order[:top_k]
        weights: npt.NDArray[Any] = np.exp(scaled[order] - scaled[order[0]])
        weights /= weights.sum()
        keep = int(np.searchsorted(np.cumsum(weights), top_p)) + 1  # the smallest set that reaches top_p
        weights = weights[:keep] / weights[:keep].sum()
        return int(order[rng.choice(len(weights), p=weights)])

    return sample
