"""An 8-bit cache: what it stores, how little it changes, and that it is cut over the dies like any other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.llm import Shape, Step, build, dies_of
from tyir.dialects.func import Func
from tyir.dialects.kv import QuantizeRows, dequantize_rows
from tyir.dialects.ty import tensor_type
from tyir.pipeline import run_pipeline
from tyir.types import TensorType, f16

IDS = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9]
KV = "kv-materialize{max-kv=16 dtype=int8}"


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


@pytest.mark.parametrize("dies", [1, 2, 3, 5, 16])
def test_any_die_count(dies: int) -> None:
    """Cut over the dies: the same as whole within f16 rounding that may move a value to the next of 255
    steps; like f16 within a cosine of 0.999.
    """
    shape = Shape(heads=6, kv_heads=2, width=80, vocabulary=101)
    whole, plain = logits(KV, shape), logits("kv-materialize{max-kv=16}", shape)
    got = logits(f"{KV},partition-dies{{dies={dies} strategy=split}}", shape)
    np.testing.assert_allclose(got, whole, atol=0.03 * np.abs(whole).max())
    assert cosine(got, plain) > 0.999
    assert cosine(whole, plain) < 1.0, "nothing was quantised"


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def test_each_die_holds_the_scales_of_its_heads() -> None:
    module, _ = build(Shape(layers=1, heads=28, kv_heads=4, head_dim=4, width=148 * 16))
    run_pipeline(module, f"{KV},partition-dies{{dies=3 strategy=split}}")
    for die in dies_of(module):
        main = die.lookup("main")
        assert isinstance(main, Func)
        assert [tensor_type(a).dims for a in main.args[2:4]] == [(1, 2, 16, 4), (1, 2, 16)]
