"""A cache that is cut by tokens computes what an uncut one does: on every engine, around the borders of
blocks, with dies that hold nothing yet, with windows, 8-bit caches and dual chunk attention.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

from tests.llm import Shape, build
from tests.long_context.programs import EDGE10, Programs
from tyir.artifacts.dual_chunk import CONFIG_KEY
from tyir.artifacts.json_attributes import to_attribute
from tyir.artifacts.token_blocks import TokenBlocks
from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.ty import Attention

Array = npt.NDArray[Any]
BLOCK: Final = 16
CAPACITY: Final = 120
IDS: Final = [(37 * i * i + 11 * i + 5) % 61 for i in range(110)]
ROUNDING: Final = 2e-3  # sums in another order, through layers in f16
INT8, INT4 = 0.02, 0.15  # values that fall to the other side of a step
# Query heads, key/value heads, dies: groups of dies with one head or several, dies without a query head.
CUTS: Final = ((4, 1, 2), (4, 1, 3), (4, 2, 3), (4, 2, 4), (7, 1, 4), (2, 1, 4))


def off(got: Array, wanted: Array) -> float:
    """The largest error of a row, in its norm."""
    wide, right = got.astype(np.float64), wanted.astype(np.float64)
    return float((np.linalg.norm(wide - right, axis=1) / np.linalg.norm(right, axis=1)).max())


def programs(
    heads: int,
    kv_heads: int,
    dies: int,
    seqlen: int,
    cut: str,
    facts: dict[str, Any] | None = None,
    **more: Any,
) -> Programs:
    """Of two layers with these heads."""
    module, weights = build(Shape(heads=heads, kv_heads=kv_heads))
    module.set_attribute("tyir.model", to_attribute(facts or {}))
    window = more.pop("window", 0)
    for attention in module.walk_type(Attention):
        attention.window = window
    options = {"max_kv": CAPACITY, "seqlen": seqlen, "dies": dies, **more}
    return Programs(module, weights, cut=cut, **options)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize(("count", "size"), [(1, 4), (2, 1), (3, 4), (4, 3)])
def test_every_position_is_on_one_die(number: int, count: int, size: int) -> None:
    dies = [TokenBlocks(n, count, size) for n in range(count)]
    for position in range(5 * count * size):
        rows = [row for die in dies if (row := die.row_of(position)) is not None]
        assert len(rows) == 1 and rows[0] < dies[0].rows(position + 1)
    own = dies[number % count]
    held = [p for p in range(5 * count * size) if own.row_of(p) is not None]
    assert [own.position_of(row) for row in range(len(held))] == held
    assert [own.rows_before(p) for p in range(held[-1])] == [
        sum(q < p for q in held) for p in range(held[-1])
    ]


@pytest.mark.parametrize(("heads", "kv_heads", "dies"), CUTS)
def test_the_same_as_cut_by_heads(heads: int, kv_heads: int, dies: int) -> None:
    """Prompts that end before, at and after a border, and in blocks of which some dies have none."""
    by_heads = programs(heads, kv_heads, dies, 8, "kv-split=heads")
    by_tokens = programs(heads, kv_heads, dies, 8, f"kv-split=tokens kv-block={BLOCK}")
    wanted = by_heads.feed(IDS, "interpreter")
    for engine in ("interpreter", "edge10"):
        by_tokens.reset()
        got = np.concatenate([by_tokens.feed(IDS[:13], engine), by_tokens.feed(IDS[13:], engine)])
        assert off(got, wanted) < ROUNDING


@pytest.mark.parametrize(
    ("dies", "seqlen", "cache", "options"),
    [
        pytest.param(4, 1, "", {}, id="one token", marks=pytest.mark.slow),
        pytest.param(4, 33, "", {}, id="steps over several blocks"),
        pytest.param(2, 110, "", {}, id="a step of all blocks", marks=pytest.mark.slow),
        pytest.param(3, 144, "", {"max_kv": 160}, id="blocks of rows"),
        pytest.param(3, 8, "dtype=int8", {}, id="int8", marks=pytest.mark.slow),
        pytest.param(3, 8, "layout=NHD", {}, id="NHD", marks=pytest.mark.slow),
        pytest.param(3, 40, "layout=NHD dtype=int8", {}, id="NHD and int8"),
        pytest.param(3, 8, "dtype=int4", {}, id="int4"),
        pytest.param(2, 40, "layout=NHD dtype=int4", {}, id="NHD and int4", marks=pytest.mark.slow),
        pytest.param(6, 8, "", {"pp": 2}, id="two stages of three"),
        pytest.param(3, 8, "", {"window": 20}, id="a window over the borders of blocks"),
        pytest.param(2, 1, "", {"window": 37}, id="a window, one token", marks=pytest.mark.slow),
    ],
)
def test_caches_and_steps(dies: int, seqlen: int, cache: str, options: dict[str, Any]) -> None:
    by_heads = programs(4, 1, dies, seqlen, "kv-split=heads", cache=cache, **options)
    cut = f"kv-split=tokens kv-block={BLOCK}"
    by_tokens = programs(4, 1, dies, seqlen, cut, cache=cache, **options)
    ids = IDS if seqlen > 1 else IDS[:60]
    for engine in ("interpreter", "edge10"):
        by_heads.reset()
        by_tokens.reset()
        error = off(by_tokens.feed(ids, engine), by_heads.feed(ids, engine))
        assert error < (INT4 if "int4" in cache else INT8 if "int8" in cache else ROUNDING)


@pytest.mark.parametrize("seqlen", [1, 12])
@pytest.mark.parametrize("dies", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_dual_chunk_attention(dies: int, seqlen: int) -> None:
    """Chunks of two blocks each: a die has keys of some chunks only."""
    facts = {CONFIG_KEY: {"chunk_size": 48, "local_size": 16, "original_max_position_embeddings": 32}}
    by_heads = programs(4, 1, dies, seqlen, "kv-split=heads", facts)
    by_tokens = programs(4, 1, dies, seqlen, f"kv-split=tokens kv-block={BLOCK}", facts)
    ids = IDS if seqlen > 1 else IDS[:70]
    wanted = by_heads.feed(ids, "interpreter")
    for engine in ("interpreter", "edge10"):
        by_tokens.reset()
        assert off(by_tokens.feed(ids, engine), wanted) < ROUNDING


@pytest.mark.parametrize(
    ("heads", "kib"),
    [(4, 48), pytest.param(8, 64, marks=pytest.mark.slow), pytest.param(16, 48, marks=pytest.mark.slow)],
)
def test_what_does_not_fit_sram_goes_through_dram(heads: int, kib: int) -> None:
    """Queries, parts and what is merged of them in DRAM, as of long steps of large models."""
    small = EDGE10.with_overrides({"sram.capacity_bytes": kib << 10})
    found = programs(heads, 1, 3, 64, f"kv-split=tokens kv-block={BLOCK}", machine=small)
    moved = {
        (source.value, op.name)
        for op in found.lowered[0].walk()
        if isinstance(source := op.attributes.get("tyir.source"), StringAttr)
    }
    assert ("kv.merge_attention", "edge10.load") in moved
    assert ("ty.slice", "edge10.store" if heads == 4 else "edge10.load") in moved
    wanted = programs(heads, 1, 3, 64, "kv-split=heads").feed(IDS, "interpreter")
    assert off(found.feed(IDS, "edge10"), wanted) < ROUNDING


def test_blocks_that_a_die_cannot_take_whole_are_refused() -> None:
    with pytest.raises(
        TyirError, match="blocks of 20 positions; a die's attention takes 16 at a time"
    ) as caught:
        programs(4, 1, 2, 8, "kv-split=tokens kv-block=20")
    assert "kv-block=32" in str(caught.value)
