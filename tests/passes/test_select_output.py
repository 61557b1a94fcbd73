"""A program that returns the best tokens returns those of its logits, however the vocabulary is cut."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.llm import Shape, Step, build, dies_of
from tyir.diagnostics import TyirError
from tyir.dialects.dist import AllGather
from tyir.dialects.func import Func
from tyir.dialects.ty import MergeTopK, TopK, TopKCandidates, comparable, select_best, tensor_type
from tyir.passes.select_output import output_of, parse_output
from tyir.pipeline import run_pipeline

IDS = [3, 14, 15, 9, 26, 5, 35]
KV = "kv-materialize{max-kv=16}"


def step(shape: Shape, pipeline: str) -> Step:
    module, weights = build(shape)
    run_pipeline(module, f"{KV},{pipeline}")
    return Step(module, weights)


def log_sum_exp(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float64)
    largest = wide.max(axis=-1, keepdims=True)
    return largest[..., 0] + np.log(np.exp(wide - largest).sum(axis=-1))


def check(shape: Shape, dies: int, k: int) -> None:
    split = f"partition-dies{{dies={dies} strategy=split}}"
    logits = step(shape, split).feed(IDS)
    values, ids = select_best(logits, np.broadcast_to(np.arange(shape.vocabulary), logits.shape), k)
    program = step(shape, f"select-output{{kind=topk k={k}}},{split}")
    np.testing.assert_array_equal(program.feed(IDS), values)
    np.testing.assert_array_equal(program.outputs[1][0], ids)
    np.testing.assert_allclose(program.outputs[2][0], log_sum_exp(logits), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dies", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("k", [1, 8, 101])
def test_top_k_equals_that_of_the_logits(dies: int, k: int) -> None:
    """A vocabulary of 101 over 16 dies: ranges of 6 and 7, fewer than the 8 best asked for."""
    check(Shape(layers=1, heads=6, kv_heads=2, vocabulary=101), dies, k)


def test_more_dies_than_tokens() -> None:
    """Dies without a column give no record."""
    check(Shape(layers=1, heads=6, kv_heads=2, vocabulary=40), 16, 5)


ROWS = {
    "ties": lambda rng, n: rng.integers(-3, 3, n),
    "random": lambda rng, n: rng.normal(size=n) * 8,
    "equal": lambda rng, n: np.full(n, rng.normal() * 1e4),
    "one huge": lambda rng, n: np.where(np.arange(n) == rng.integers(n), 1e38, rng.normal(size=n)),
    "falling": lambda rng, n: -np.arange(n) * 3.0,
}


@given(
    vocabulary=st.integers(17, 80),
    dies=st.integers(1, 16),
    k=st.integers(1, 17),
    kind=st.sampled_from(sorted(ROWS)),
    cap=st.sampled_from([None, 4.0]),
)
def test_random_vocabularies(vocabulary: int, dies: int, k: int, kind: str, cap: float | None) -> None:
    """Candidates of any cut, merged, are the best of the whole, with its sum; values repeat, so that ties
    cross the dies' borders.
    """
    rng = np.random.default_rng(vocabulary * dies + k)
    x = np.stack([ROWS[kind](rng, vocabulary) for _ in range(2)]).astype(np.float32)
    sizes = tuple(len(part) for part in np.array_split(np.arange(vocabulary), dies))
    function = Func.make("f", [tensor_of(x)])
    halves = TopKCandidates(function.args[0], k=k, sizes=sizes, softcap=cap)
    records = halves.evaluate(x)
    assert records.shape == tensor_type(halves.out).static_shape
    merge = MergeTopK(halves.out, k=k, counts=halves.counts(), softcap=cap)
    values, ids, total = merge.evaluate(records)
    _, names = select_best(x, np.broadcast_to(np.arange(vocabulary), x.shape), k)
    y = x if cap is None else np.asarray(np.tanh(x / np.float32(cap)) * np.float32(cap))
    np.testing.assert_array_equal(ids, names)
    np.testing.assert_array_equal(values, np.take_along_axis(y, names, axis=-1))
    np.testing.assert_allclose(total, log_sum_exp(y), rtol=1e-6, atol=1e-6)
    whole = TopK(function.args[0], k=k, softcap=cap).evaluate(x)
    for mine, theirs in zip((values, ids), whole):
        np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_allclose(total, whole[2], rtol=1e-6, atol=1e-6)


def tensor_of(array: np.ndarray) -> object:
    from tyir.types import TensorType, f32

    return TensorType(array.shape, f32)


@pytest.mark.parametrize("dies", [2, 4])
def test_one_small_gather_replaces_that_of_the_logits(dies: int) -> None:
    module, _ = build(Shape(vocabulary=96))
    run_pipeline(module, f"{KV},select-output{{kind=topk k=5}},partition-dies{{dies={dies} strategy=split}}")
    (gather,) = dies_of(module)[0].walk_type(AllGather)
    assert tensor_type(gather.out).dims == (1, None, (2 * 5 + 1) * dies)


def test_results_and_caches_keep_their_names_and_aliases() -> None:
    module, _ = build(Shape(layers=1))
    run_pipeline(
        module,
        f"{KV},select-output,partition-dies{{dies=2"
        " strategy=split},specialize-seqlen{seqlens=1},to-program",
    )
    main = dies_of(module)[0].lookup("main_s1")
    assert isinstance(main, Func)
    assert [main.res_attr(i).get("tyir.name").value for i in range(5)] == [
        "top_values",
        "top_ids",
        "logsumexp",
        "k0",
        "v0",
    ]  # type: ignore[union-attr]
    assert [main.res_attr(i)["tyir.alias"].value for i in (3, 4)] == [2, 3]  # type: ignore[attr-defined]


def test_values_without_order_count_as_the_lowest() -> None:
    x = np.array([[np.nan, -np.inf, 1.0, -3.0]], np.float32)
    values, ids = select_best(comparable(x), np.arange(4)[None], 4)
    assert ids.tolist() == [[2, 3, 0, 1]]
    assert np.isfinite(values).all()


@pytest.mark.parametrize("text", ["logits", "argmax", "topk=8"])
def test_outputs_have_names(text: str) -> None:
    assert output_of(parse_output(text)) == text


@pytest.mark.parametrize(
    ("text", "help"),
    [
        ("topk=0", "use topk=1"),
        ("topk", "use topk=8"),
        ("topk=-1", "use topk=1"),
        ("out/", "given by -o"),
        ("", "given by -o"),
    ],
)
def test_other_outputs_are_refused(text: str, help: str) -> None:
    with pytest.raises(TyirError, match=f"none of logits, argmax and topk=K(.|\n)*{help}"):
        parse_output(text)


def test_k_beyond_the_vocabulary() -> None:
    with pytest.raises(TyirError, match=r"k=81 is more than the 80 tokens(.|\n)*use k=80"):
        step(Shape(layers=1), "select-output{kind=topk k=81}")
    with pytest.raises(TyirError, match="k=0: at least 1 token"):
        step(Shape(layers=1), "select-output{kind=topk}")
    with pytest.raises(TyirError, match="k=4 goes with kind=topk"):
        step(Shape(layers=1), "select-output{kind=argmax k=4}")
