"""Caches of 8 and of 4 bits: what they store, how little they change, and that they are cut
over the dies like any other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.llm import Shape, Step, build, dies_of
from tyir.diagnostics import TyirError
from tyir.dialects.func import Func
from tyir.dialects.kv import (
    QuantizeGroups,
    QuantizeRows,
    channel_groups,
    dequantize_groups,
    dequantize_rows,
)
from tyir.dialects.ty import tensor_type
from tyir.pipeline import run_pipeline
from tyir.types import TensorType, f16

IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
KV = "kv-materialize{max-kv=16 dtype=int8}"
KV4 = "kv-materialize{max-kv=16 dtype=int4}"
NEAR = {KV: 0.999, KV4: 0.99}  # cosines of logits beside the f16 cache


def quantize(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    function = Func.make("f", [TensorType(rows.shape, f16)])
    return QuantizeRows(function.args[0]).evaluate(rows)


@given(st.integers(0, 1000), st.sampled_from([1e-7, 1e-3, 1.0, 300.0]))
def test_rows_come_back_within_half_a_step(seed: int, size: float) -> None:
    rows = (np.random.default_rng(seed).standard_normal((2, 3, 2, 16)) * size).astype(np.float16)
    q, scales = quantize(rows)
    assert q.dtype == np.int8 and scales.shape == (2, 3, 2)
    step = scales[..., None].astype(np.float32)
    error = np.abs(dequantize_rows(q, scales).astype(np.float32) - rows.astype(np.float32))
    rounding = np.abs(rows).astype(np.float32) * 2**-10 + 2**-24  # of the scale, and of the product
    assert np.all(error <= np.where(step > 0, step / 2, np.abs(rows)) + rounding)


def test_a_row_of_zeros_has_scale_zero() -> None:
    rows = np.zeros((1, 1, 2, 4), np.float16)
    rows[0, 0, 1] = [127, -127, 0.5, 1.5]
    q, scales = quantize(rows)
    assert scales.tolist() == [[[0.0, 1.0]]]
    assert q.tolist() == [[[[0, 0, 0, 0], [127, -127, 0, 2]]]]


def quantize_groups(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    function = Func.make("f", [TensorType(rows.shape, f16)])
    return QuantizeGroups(function.args[0]).evaluate(rows)


@given(
    st.integers(0, 1000), st.sampled_from([1e-6, 1e-3, 1.0, 300.0]), st.sampled_from([16, 48, 80, 96, 128])
)
def test_groups_come_back_within_half_a_step(seed: int, size: float, dim: int) -> None:
    rng = np.random.default_rng(seed)
    rows = (rng.standard_normal((2, 3, 2, dim)) * size + rng.normal() * size).astype(np.float16)
    q, words = quantize_groups(rows)
    groups = channel_groups(dim)
    assert (q.shape[-1], words.shape[-1]) == (dim // 2, groups)
    by_group = rows.astype(np.float32).reshape(2, 3, 2, 2, groups, -1)
    spread = np.maximum(by_group.max(axis=(3, 5)), 0) - np.minimum(by_group.min(axis=(3, 5)), 0)
    step = spread / 15 * (1 + 2**-6) + 2**-20  # scales have six bits, and a smallest
    error = np.abs(dequantize_groups(q, words).astype(np.float32) - rows.astype(np.float32))
    assert np.all(error.reshape(by_group.shape) <= step[:, :, :, None, :, None] * (0.5 + 1e-3))


def test_a_code_by_hand() -> None:
    """A spread of 15 from -5 to 10: a step of 1, and zero is code 5."""
    rows = np.zeros((1, 1, 1, 32), np.float16)
    rows[0, 0, 0, [0, 1, 16, 31]] = [-5, 10, 2.6, -0.4]
    q, words = quantize_groups(rows)
    assert words.tolist() == [[[[0x3C00 | 5]]]]
    assert (q[0, 0, 0, 0], q[0, 0, 0, 1], q[0, 0, 0, 15]) == (0 | 8 << 4, 15 | 5 << 4, 5 | 5 << 4)
    wanted = np.zeros(32)
    wanted[[0, 1, 16]] = [-5, 10, 3]
    assert dequantize_groups(q, words)[0, 0, 0].tolist() == wanted.tolist()


def test_what_is_not_finite_stays_so() -> None:
    rows = np.ones((1, 1, 1, 64), np.float16)
    rows[0, 0, 0, 3] = np.nan
    back = dequantize_groups(*quantize_groups(rows))[0, 0, 0]
    assert np.isnan(back[:16]).all() and np.isfinite(back[16:32]).all()


def test_a_pair_costs_its_own_group_alone() -> None:
    rows = np.random.default_rng(0).standard_normal((1, 1, 1, 128)).astype(np.float16)
    spiked = rows.copy()
    spiked[..., [5, 69]] = 600
    one, other = (dequantize_groups(*quantize_groups(x)) for x in (rows, spiked))
    same = (one == other).reshape(2, 4, 16).all(axis=(0, 2))
    assert same.tolist() == [False, True, True, True]


def test_heads_that_no_group_divides_are_named() -> None:
    module, _ = build(Shape(layers=1, head_dim=24))
    with pytest.raises(TyirError, match="which do not divide heads of 24") as caught:
        run_pipeline(module, KV4)
    assert "int8" in str(caught.value)


def test_the_caches_are_state_with_their_scales() -> None:
    module, _ = build(Shape(layers=2))
    run_pipeline(module, KV)  # the verifier, which runs after each pass, checks the aliasing
    main = module.lookup("main")
    assert isinstance(main, Func)
    types = {str(a.name): str(a.type) for a in main.args[2:]}
    assert list(types) == [f"{n}{i}" for i in (0, 1) for n in ("k", "k_scales", "v", "v_scales")]
    assert (types["k0"], types["k_scales0"]) == ("tensor<1x2x16x16xi8>", "tensor<1x2x16xf16>")
    assert [main.res_attr(1 + i)["tyir.alias"].value for i in range(8)] == list(range(2, 10))  # type: ignore[attr-defined]


def logits(pipeline: str, shape: Shape) -> np.ndarray:
    module, weights = build(shape)
    run_pipeline(module, pipeline)
    step = Step(module, weights)
    return np.concatenate([step.feed(IDS[:7]), step.feed(IDS[7:10]), step.feed(IDS[10:])])


@pytest.mark.parametrize("cache", [KV, KV4])
@pytest.mark.parametrize("dies", [1, 2, 3, 5, 16])
def test_any_die_count(dies: int, cache: str) -> None:
    """Cut over the dies: the same as whole within f16 rounding that may move a value to the next of 255 or
    of 16 steps; like f16 within a cosine.
    """
    shape = Shape(heads=6, kv_heads=2, width=80, vocabulary=101)
    whole, plain = logits(cache, shape), logits("kv-materialize{max-kv=16}", shape)
    got = logits(f"{cache},partition-dies{{dies={dies} strategy=split}}", shape)
    np.testing.assert_allclose(got, whole, atol=(0.03 if cache == KV else 0.15) * np.abs(whole).max())
    assert cosine(got, plain) > NEAR[cache]
    assert cosine(whole, plain) < 1.0, "nothing was quantised"


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize(
    ("cache", "dim", "wanted"),
    [(KV, 4, [(1, 2, 16, 4), (1, 2, 16)]), (KV4, 32, [(1, 2, 16, 16), (1, 2, 16, 1)])],
)
def test_each_die_holds_the_scales_of_its_heads(cache: str, dim: int, wanted: list[tuple[int, ...]]) -> None:
    module, _ = build(Shape(layers=1, heads=28, kv_heads=4, head_dim=dim, width=148 * 16))
    run_pipeline(module, f"{cache},partition-dies{{dies=3 strategy=split}}")
    for die in dies_of(module):
        main = die.lookup("main")
        assert isinstance(main, Func)
        assert [tensor_type(a).dims for a in main.args[2:4]] == wanted
