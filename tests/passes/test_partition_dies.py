"""Partitioned programs compute what the whole model computes, for any number of dies and any shape."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.llm import Shape, Step, build, dies_of, run_ty
from tyir.diagnostics import TyirError
from tyir.dialects.dist import AllGather, AllReduce
from tyir.dialects.func import Func
from tyir.dialects.kv import CachedAttention
from tyir.dialects.ty import tensor_type
from tyir.layers import layer_of
from tyir.pipeline import run_pipeline
from tyir.sharding import even_ranges, head_ranges

IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]


def check(shape: Shape, dies: int, pipeline: str = "", tolerance: float = 0.02) -> None:
    module, weights = build(shape)
    ids = [i % shape.vocabulary for i in IDS]
    if pipeline:
        run_pipeline(module, pipeline)
    wanted = run_ty(module, weights, ids)
    run_pipeline(module, f"kv-materialize{{max-kv=16}},partition-dies{{dies={dies} strategy=split}}")
    step = Step(module, weights)
    got = np.concatenate([step.feed(ids[:7]), step.feed(ids[7:10]), step.feed(ids[10:])])
    np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted.astype(np.float32)).max())


@pytest.mark.parametrize("dies", range(1, 17))
def test_any_die_count(dies: int) -> None:
    check(Shape(heads=6, kv_heads=2, width=80, vocabulary=101), dies)


@pytest.mark.parametrize("dies", [1, 2, 3, 5, 16])
def test_quantized(dies: int) -> None:
    check(Shape(heads=6, kv_heads=2, hidden=96, width=192), dies, "quantize-weights{group-size=32}")


def test_head_and_kv_ranges_of_qwen2_7b_on_3_dies() -> None:
    """28 query heads over 4 key/value heads: 10/9/9 and 2/2/2 (a group of 7 crosses each die border)."""
    shape = Shape(layers=1, heads=28, kv_heads=4, head_dim=4, width=148 * 16)
    module, _ = build(shape)
    run_pipeline(module, "kv-materialize{max-kv=16},partition-dies{dies=3 strategy=split}")
    attentions = [next(d.walk_type(CachedAttention)) for d in dies_of(module)]
    assert [tensor_type(a.q).dims[2] for a in attentions] == [10, 9, 9]
    assert [tensor_type(a.k).dims[1] for a in attentions] == [2, 2, 2]
    assert attentions[1].kv_heads == (0, 0, 0, 0, 1, 1, 1, 1, 1)


@pytest.mark.parametrize("dies", [2, 4])
def test_two_all_reduces_a_layer_and_one_gather(dies: int) -> None:
    """The closed-form minimum: two per layer, one for the embedding, one gather of the logits."""
    module, _ = build(Shape(layers=3))
    run_pipeline(module, f"kv-materialize{{max-kv=16}},partition-dies{{dies={dies} strategy=split}}")
    main = next(dies_of(module)[0].walk_type(Func))
    assert sum(1 for _ in main.walk_type(AllReduce)) == 2 * 3 + 1
    assert sum(1 for _ in main.walk_type(AllGather)) == 1


def test_one_die_has_no_collectives() -> None:
    module, _ = build(Shape())
    run_pipeline(module, "kv-materialize{max-kv=16},partition-dies{dies=1}")
    assert not list(module.walk_type(AllReduce)) and not list(module.walk_type(AllGather))


@pytest.mark.parametrize("dies", [0, 17, -1])
def test_die_counts_out_of_range_name_the_nearest(dies: int) -> None:
    module, _ = build(Shape())
    with pytest.raises(TyirError, match=f"{dies} dies.*1 to 16(.|\n)*use {min(max(dies, 1), 16)}"):
        run_pipeline(module, f"kv-materialize{{max-kv=16}},partition-dies{{dies={dies}}}")


def test_remap_must_name_every_die_once() -> None:
    module, _ = build(Shape())
    with pytest.raises(TyirError, match=r"remap=1,1 must name 2 different dies(.|\n)*use remap=1,0"):
        run_pipeline(module, "kv-materialize{max-kv=16},partition-dies{dies=2 remap=1,1}")


@given(total=st.integers(0, 500), dies=st.integers(1, 16), unit=st.sampled_from([1, 2, 16]))
def test_ranges_cover_without_gap_and_are_even(total: int, dies: int, unit: int) -> None:
    ranges = even_ranges(total * unit, dies, unit)
    assert [o for o, _ in ranges] == [sum(s for _, s in ranges[:i]) for i in range(dies)]
    assert sum(s for _, s in ranges) == total * unit
    assert max(s for _, s in ranges) - min(s for _, s in ranges) in (0, unit)


@settings(max_examples=30, deadline=None)
@given(groups=st.integers(1, 12), ratio=st.integers(1, 8))
def test_more_dies_never_cache_more_heads(groups: int, ratio: int) -> None:
    """Heads are covered without gap; of the largest die, neither its key/value heads nor its query heads grow
    with the number of dies, and the former are the fewest there can be.
    """
    kv_heads = [head // ratio for head in range(groups * ratio)]
    largest = (groups, groups * ratio)
    for dies in range(1, 17):
        ranges = head_ranges(kv_heads, dies)
        assert [o for o, _ in ranges] == [sum(s for _, s in ranges[:i]) for i in range(dies)]
        assert sum(s for _, s in ranges) == len(kv_heads) and len(ranges) == dies
        caches = max(len(set(kv_heads[o : o + s])) for o, s in ranges)
        assert caches == -(-groups // dies)
        queries = max(s for _, s in ranges)
        assert caches <= largest[0] and queries <= largest[1]
        largest = (caches, queries)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    kv_heads=st.integers(1, 4),
    ratio=st.integers(1, 4),
    groups=st.integers(1, 9),
    vocabulary=st.integers(17, 90),
    dies=st.integers(1, 16),
    int4=st.booleans(),
    tied=st.booleans(),
)
def test_random_shapes(
    kv_heads: int, ratio: int, groups: int, vocabulary: int, dies: int, int4: bool, tied: bool
) -> None:
    shape = Shape(
        layers=1,
        hidden=64,
        heads=kv_heads * ratio,
        kv_heads=kv_heads,
        head_dim=16,
        width=32 * groups,
        vocabulary=vocabulary,
        tied=tied,
    )
    if int4 and (shape.heads * 16) % 32:
        shape = Shape(
            layers=1,
            hidden=64,
            heads=2,
            kv_heads=1,
            head_dim=16,
            width=32 * groups,
            vocabulary=vocabulary,
            tied=tied,
        )
    check(shape, dies, "quantize-weights{group-size=32}" if int4 else "")


@pytest.mark.parametrize(("dies", "stages"), [(2, 2), (4, 2), (6, 3), (8, 4)])
def test_pipeline_stages(dies: int, stages: int) -> None:
    """Each stage's dies hold its layers alone; the numbers stay the same."""
    shape = Shape(layers=4, heads=4, kv_heads=2, width=128)
    module, weights = build(shape)
    wanted = run_ty(module, weights, IDS)
    run_pipeline(module, f"kv-materialize{{max-kv=16}},partition-dies{{dies={dies} pp={stages}}}")
    layers = [{layer_of(a) for a in d.walk_type(CachedAttention)} for d in dies_of(module)]
    size = dies // stages
    assert all(
        a == b for i in range(0, dies, size) for a, b in zip(layers[i : i + size], layers[i : i + size][1:])
    )
    assert sorted(layer for i in range(0, dies, size) for layer in layers[i] if layer is not None) == [
        0,
        1,
        2,
        3,
    ]
    step = Step(module, weights)
    got = np.concatenate([step.feed(IDS[:7]), step.feed(IDS[7:])])
    np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted.astype(np.float32)).max())


def test_every_stage_needs_a_layer() -> None:
    module, _ = build(Shape(layers=2))
    with pytest.raises(TyirError, match=r"pp=4 stages for a decoder of 2 layers(.|\n)*use pp=2"):
        run_pipeline(module, "kv-materialize{max-kv=16},partition-dies{dies=4 pp=4}")


def test_stages_must_divide_the_dies() -> None:
    module, _ = build(Shape())
    with pytest.raises(TyirError, match=r"pp=3 stages of 4 dies(.|\n)*must divide the dies: 1, 2, 4"):
        run_pipeline(module, "kv-materialize{max-kv=16},partition-dies{dies=4 pp=3}")
