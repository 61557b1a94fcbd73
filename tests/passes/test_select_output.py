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
from tyir.dialects.ty import TopKCandidates, comparable, select_best, tensor_type
from tyir.passes.select_output import output_of, parse_output
from tyir.pipeline import run_pipeline

IDS = [3, 14, 15, 9, 26, 5, 35]
KV = "kv-materialize{max-kv=16}"


def step(shape: Shape, pipeline: str) -> Step:
    module, weights = build(shape)
    run_pipeline(module, f"{KV},{pipeline}")
    return Step(module, weights)


def check(shape: Shape, dies: int, k: int) -> None:
    split = f"partition-dies{{dies={dies} strategy=split}}"
    logits = step(shape, split).feed(IDS)
    values, ids = select_best(logits, np.broadcast_to(np.arange(shape.vocabulary), logits.shape), k)
    program = step(shape, f"select-output{{kind=topk k={k}}},{split}")
    np.testing.assert_array_equal(program.feed(IDS), values)
    np.testing.assert_array_equal(program.outputs[1][0], ids)


@pytest.mark.parametrize("dies", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("k", [1, 8, 101])
def test_top_k_equals_that_of_the_logits(dies: int, k: int) -> None:
    """A vocabulary of 101 over 16 dies: ranges of 6 and 7, fewer than the 8 best asked for."""
    check(Shape(layers=1, heads=6, kv_heads=2, vocabulary=101), dies, k)


@given(vocabulary=st.integers(17, 80), dies=st.integers(1, 16), k=st.integers(1, 17))
def test_random_vocabularies(vocabulary: int, dies: int, k: int) -> None:
    """Candidates of any cut, merged, are the best of the whole; values repeat, so that ties cross the dies'
    borders.
    """
    x = np.random.default_rng(vocabulary * dies + k).integers(-3, 3, (2, vocabulary)).astype(np.float32)
    function = Func.make("f", [tensor_of(x)])
    sizes = tuple(len(part) for part in np.array_split(np.arange(vocabulary), dies))
    op = TopKCandidates(function.args[0], k=k, sizes=sizes)
    wanted = select_best(x, np.broadcast_to(np.arange(vocabulary), x.shape), k)
    candidates = op.evaluate(x)
    assert candidates.shape == tensor_type(op.out).static_shape
    got = select_best(candidates[:, 0].view(np.float32), candidates[:, 1], k)
    for mine, theirs in zip(got, wanted):
        np.testing.assert_array_equal(mine, theirs)


def tensor_of(array: np.ndarray) -> object:
    from tyir.types import TensorType, f32

    return TensorType(array.shape, f32)


@pytest.mark.parametrize("dies", [2, 4])
def test_one_small_gather_replaces_that_of_the_logits(dies: int) -> None:
    module, _ = build(Shape(vocabulary=96))
    run_pipeline(module, f"{KV},select-output{{kind=topk k=5}},partition-dies{{dies={dies} strategy=split}}")
    (gather,) = dies_of(module)[0].walk_type(AllGather)
    assert tensor_type(gather.out).dims == (1, None, 2, 5 * dies)


def test_results_and_caches_keep_their_names_and_aliases() -> None:
    module, _ = build(Shape(layers=1))
    run_pipeline(
        module,
        f"{KV},select-output,partition-dies{{dies=2"
        " strategy=split},specialize-seqlen{seqlens=1},to-program",
    )
    main = dies_of(module)[0].lookup("main_s1")
    assert isinstance(main, Func)
    assert [main.res_attr(i).get("tyir.name").value for i in range(4)] == [
        "top_values",
        "top_ids",
        "k0",
        "v0",
    ]  # type: ignore[union-attr]
    assert [main.res_attr(i)["tyir.alias"].value for i in (2, 3)] == [2, 3]  # type: ignore[attr-defined]


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
