"""Two layers of real models' shapes over every number of dies give the logits of one die, and are cut as
evenly as can be.  Minutes: --slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.e2e.real_shapes import MODELS, WEIGHTS, Weights, cut_of, measure, table_head, table_line


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", MODELS)
def test_every_die_count(name: str, weights: Weights, tmp_path: Path) -> None:
    check(name, weights, range(2, 17), tmp_path / "model")


def test_awq_on_three_dies(tmp_path: Path) -> None:
    """Heads 4/4/4, key/value heads 1/2/1, groups 24/23/23: packed words of eight columns and groups of 128
    rows are cut where neither divides.
    """
    check("Qwen2.5-1.5B", "awq", (3,), tmp_path / "model")


def check(name: str, weights: Weights, dies: Sequence[int], folder: Path) -> None:
    print("\n" + table_head())
    for row in measure(name, weights, dies, folder):
        print(table_line(row), flush=True)
        assert row.cosine >= 0.9999, row
        assert row.drift < 0.2, f"errors lean to one side: {row}"


def smallest_share(heads: int, ratio: int, dies: int, caches: int) -> int:
    """The largest share of heads, of the cut that makes it smallest: all are tried in which no die's heads
    read more than so many key/value heads.
    """

    @cache
    def least(first: int, left: int) -> int:
        if first == heads:
            return 0
        ends = range(first + 1, heads + 1) if left else ()
        fit = (end for end in ends if (end - 1) // ratio - first // ratio < caches)
        return min((max(end - first, least(end, left - 1)) for end in fit), default=heads + 1)

    return least(0, dies)


@pytest.mark.parametrize("name", MODELS)
def test_no_die_holds_much_more_than_its_share(name: str) -> None:
    """No more key/value heads than it must, which it caches, then no more query heads than any cut with so
    few gives its largest die; at most one MLP group more than the smallest share.
    """
    heads, groups = MODELS[name].heads, MODELS[name].kv_heads
    for dies in (2, 3, 4, 5, 8, 16):
        cut = cut_of(MODELS[name], dies, int4=True)
        caches = -(-groups // dies)
        assert sum(cut.queries) == heads and max(cut.kv_heads) == caches
        assert max(cut.queries) == smallest_share(heads, heads // groups, dies, caches)
        assert (
            max(cut.mlp_groups) - min(cut.mlp_groups) <= 1 and sum(cut.mlp_groups) * 128 == MODELS[name].width
        )
        assert all(
            kv <= -(-q * MODELS[name].kv_heads // MODELS[name].heads) + 1
            for q, kv in zip(cut.queries, cut.kv_heads)
        )
