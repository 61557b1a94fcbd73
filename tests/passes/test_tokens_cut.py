"""Which caches are cut by tokens, and why; whatever the heads and dies, the parts compute the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.llm import Shape, Step, build, dies_of, run_ty
from tyir.artifacts.dual_chunk import CONFIG_KEY
from tyir.artifacts.json_attributes import to_attribute
from tyir.attributes import StringAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.dist import AllGather
from tyir.dialects.kv import Append, CachedAttention
from tyir.dialects.ty import Linear, tensor_type
from tyir.manifest import BuildOptions, recorded, settled
from tyir.passes._tokens_cut import TokenGroups
from tyir.pipeline import run_pipeline

IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
# Of a layer of Qwen2.5-7B: reading its heads takes long beside what is exchanged.
SEVEN = Shape(layers=1, heads=28, kv_heads=4, head_dim=128, hidden=3584, width=256, vocabulary=64)


def cut(module: Module, max_kv: int, options: str) -> Module:
    run_pipeline(module, f"kv-materialize{{max-kv={max_kv}}},partition-dies{{{options}}}")
    return module


@given(
    kv_heads=st.integers(1, 4),
    readers=st.integers(1, 4),
    dies=st.integers(2, 9),
    block=st.integers(1, 5),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_parts_compute_the_whole(kv_heads: int, readers: int, dies: int, block: int) -> None:
    shape = Shape(layers=1, heads=kv_heads * readers, kv_heads=kv_heads, vocabulary=64)
    module, weights = build(shape)
    wanted = run_ty(module, weights, IDS)
    groups = TokenGroups(dies, tuple(h // readers for h in range(shape.heads)))
    if groups.parts == 1:
        with pytest.raises(TyirError, match="there are no copies to cut by tokens"):
            cut(module, 16, f"dies={dies} kv-split=tokens kv-block={block}")
        return
    cut(module, 16, f"dies={dies} kv-split=tokens kv-block={block}")
    for number, die in enumerate(dies_of(module)):
        rows = {op.blocks: tensor_type(op.cache).dims[2] for op in die.walk_type(Append)}
        assert rows == {
            (number % groups.parts, groups.parts, block): -(-16 // groups.parts // block) * block or 0
        }
        assert sum(len(op.dies or ()) == groups.parts for op in die.walk_type(AllGather)) == 2
    step = Step(module, weights)
    got = np.concatenate([step.feed(IDS[:7]), step.feed(IDS[7:10]), step.feed(IDS[10:])])
    np.testing.assert_allclose(got, wanted, atol=0.02 * np.abs(wanted.astype(np.float32)).max())


def test_groups_of_dies() -> None:
    """7 query heads to a head of Qwen2.5-7B; of the 14B's 5 to each of 8 heads."""
    seven = TokenGroups(16, tuple(h // 7 for h in range(28)))
    assert (seven.count, seven.parts) == (4, 4)
    assert seven.queries()[:5] == ((0, 2), (2, 2), (4, 2), (6, 1), (7, 2))
    assert seven.caches()[3:5] == ((0, 1), (1, 1))
    three = TokenGroups(3, tuple(h // 7 for h in range(28)))
    assert three.queries() == ((0, 10), (10, 9), (19, 9)) and three.caches() == ((0, 4),) * 3
    assert TokenGroups(16, tuple(h // 5 for h in range(40))).parts == 2


@pytest.mark.parametrize(
    ("dies", "max_kv", "chosen"),
    [
        (16, 512, "heads"),
        (16, 65536, "tokens"),
        (4, 65536, "heads"),
        (8, 65536, "tokens"),
        (1, 65536, "heads"),
    ],
)
def test_the_choice_is_one_of_cost(dies: int, max_kv: int, chosen: str) -> None:
    """Long caches pay for two exchanges a layer; four dies have a head each."""
    module, _ = build(SEVEN, draw=False)
    run_pipeline(module, f"kv-materialize{{max-kv={max_kv}}},annotate-sharding{{dies={dies}}}")
    assert recorded(module)["kv_split"] == chosen
    why = str(next(op for op in module.walk_type(Linear)).attributes.get("tyir.choice"))
    assert ("tokens: " in why) == (chosen == "tokens")
    if chosen == "tokens":
        assert "us with a half-full cache cut by tokens against" in why and "pinned" not in why


def test_a_pin_and_the_option_win_over_cost() -> None:
    module, _ = build(SEVEN, draw=False)
    next(op for op in module.walk_type(Linear)).set_attribute("tyir.pin", StringAttr("replicated"))
    assert recorded(cut(module, 65536, "dies=16"))["kv_split"] == "heads"
    module, _ = build(SEVEN, draw=False)
    assert recorded(cut(module, 65536, "dies=16 kv-split=heads"))["kv_split"] == "heads"
    module, _ = build(SEVEN, draw=False)
    assert recorded(cut(module, 512, "dies=16 kv-split=tokens"))["kv_parts"] == 4
    module, _ = build(SEVEN, draw=False)
    assert recorded(cut(module, 65536, "dies=16 strategy=split"))["kv_split"] == "heads"  # whatever it costs


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("dies=1 kv-split=tokens", "there is no cache to cut by tokens|one die has a whole cache"),
        ("dies=2 kv-split=tokens", "2 key/value heads leave each of 2 dies heads of its own"),
        ("dies=4 pp=2 kv-split=tokens", "2 key/value heads leave each of 2 dies heads of its own"),
        ("dies=4 kv-split=tokens kv-block=0", "kv-block is 0"),
        (
            "dies=4 kv-split=tokens kv-block=64",
            "a chunk of dual chunk attention, 32 tokens, is not whole blocks",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(options: str, said: str) -> None:
    module, _ = build(Shape(layers=2), draw=False)
    chunks = {"chunk_size": 48, "local_size": 16, "original_max_position_embeddings": 32}
    module.set_attribute("tyir.model", to_attribute({CONFIG_KEY: chunks}))
    with pytest.raises(TyirError, match=said):
        cut(module, 128, options)


def test_a_pin_to_replicate_is_refused() -> None:
    module, _ = build(Shape(layers=1), draw=False)
    next(op for op in module.walk_type(Linear)).set_attribute("tyir.pin", StringAttr("replicated"))
    with pytest.raises(TyirError, match="is pinned to be replicated"):
        cut(module, 64, "dies=4 kv-split=tokens")


def test_the_record_goes_on() -> None:
    """What was chosen is what a later step must ask for, if it asks."""
    module, _ = build(Shape(layers=1), draw=False)
    cut(module, 64, "dies=4 kv-split=tokens kv-block=16")
    found = settled(BuildOptions(dies=4, max_kv=64, kv_block=16), module)
    assert (found.kv_split, found.kv_block, found.kv_parts) == ("tokens", 16, 2)
    with pytest.raises(
        TyirError, match="kv_split = heads is asked for, the module was built with kv_split = tokens"
    ):
        settled({"kv_split": "heads"}, module)
    module, _ = build(Shape(layers=1), draw=False)
    cut(module, 64, "dies=2")
    assert settled(BuildOptions(dies=2, max_kv=64), module).kv_split == "heads"
    with pytest.raises(
        TyirError, match="kv_split = tokens is asked for, the module was built with kv_split = heads"
    ):
        settled({"kv_split": "tokens"}, module)


def test_attention_keeps_its_heads() -> None:
    module, _ = build(Shape(layers=1, heads=4, kv_heads=2), draw=False)
    attentions = [
        next(d.walk_type(CachedAttention)) for d in dies_of(cut(module, 64, "dies=3 kv-split=tokens"))
    ]
    assert [a.kv_heads for a in attentions] == [(0, 0, 1, 1)] * 3
