"""What `top_p` and `min_p` leave in of the whole vocabulary, known from its best tokens and the logsumexp."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tyir.diagnostics import TyirError
from tyir.runtime_sim.session.sampling import choose, greedy, kept_of_all, logsumexp, make_sampler

BEST = 16


def kept(logits: np.ndarray, temperature: float, top_p: float, min_p: float) -> int:
    """From all logits."""
    weights = np.exp((-np.sort(-logits.astype(np.float64)) - logits.max()) / temperature)
    weights /= weights.sum()
    nucleus = weights[: int(np.searchsorted(np.cumsum(weights), top_p)) + 1] if top_p < 1 else weights
    return int((nucleus >= min_p * nucleus[0]).sum())


@given(
    seed=st.integers(0, 1 << 32),
    scale=st.sampled_from([0.0, 0.3, 2.0, 6.0, 40.0]),
    size=st.sampled_from([BEST, BEST + 1, 300]),
    temperature=st.sampled_from([0.01, 0.4, 1.0, 1.5, 30.0]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.001, 0.2, 0.9]),
)
def test_what_is_said_is_true(
    seed: int, scale: float, size: int, temperature: float, top_p: float, min_p: float
) -> None:
    logits = (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)
    best = -np.sort(-logits)[:BEST]
    found = kept_of_all(best, float(np.float32(logsumexp(logits))), temperature, top_p, min_p)
    assert found is None or found == kept(logits, temperature, top_p, min_p)


def test_at_temperature_1_all_that_can_be_known_is() -> None:
    """A nucleus that ends clearly within the best is found, one that ends beyond is not."""
    rng, sides = np.random.default_rng(0), {True: 0, False: 0}
    for _ in range(300):
        logits = (rng.normal(size=400) * rng.choice([1.0, 3.0])).astype(np.float32)
        best, total = -np.sort(-logits)[:BEST], float(logsumexp(logits))
        reached = float(np.exp(best.astype(np.float64) - total).sum())
        for top_p in (0.3, 0.7):
            if abs(reached - top_p) > 1e-3:
                found = kept_of_all(best, total, 1.0, top_p, 0.0)
                assert (found is not None) == (reached > top_p)
                sides[reached > top_p] += 1
    assert min(sides.values()) > 50


def test_the_smallest_share_needs_no_sum() -> None:
    """At any temperature, where the last of the best is below it."""
    values = np.array([3.0, 2.0, 1.0, -4.0], np.float32)
    for temperature in (0.5, 1.0, 2.0):
        share = float(np.exp(-1.5 / temperature))
        assert kept_of_all(values, 20.0, temperature, 1.0, share) == 2
    assert kept_of_all(values, 20.0, 1.0, 1.0, 1e-6) is None


def test_choosing_among_the_best() -> None:
    logits = np.array([0.0, 5.0, 1.0, 4.5, -2.0, 4.9], np.float32)
    order = np.argsort(-logits)[:3]
    best = {"top_values": logits[order], "top_ids": order, "logsumexp": np.float32(logsumexp(logits))}
    for seed in range(20):
        whole, few = (make_sampler(1.0, top_p=0.9, seed=seed) for _ in range(2))
        assert choose(best, few) == choose({"logits": logits}, whole)
    assert choose(best, greedy) == 1 and choose(best, lambda values: len(values) - 1) == 3
    with pytest.raises(TyirError, match=r"more than the 3 best tokens(.|\n)*0\.9898 of the(.|\n)*--top-k 3"):
        choose(best, make_sampler(1.0, top_p=0.99))
