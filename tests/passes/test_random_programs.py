"""Random models on random boards: partitioned, bucketed, interrupted or quantised, the program gives what the
whole model gives.

A handful of cases by default, hundreds with --slow.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.llm import Shape, Step, build, run_ty
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.session.chunks import plan_chunks

CAPACITY = 24
Case = tuple[Shape, int, int, int, str, tuple[int, ...], list[int], int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Shape, dies, stages, group size of 4-bit weights (0: f16), layout of the caches, lengths, tokens, where
    to interrupt.
    """
    kv_heads, ratio = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    int4 = draw(st.booleans())
    dim = draw(st.sampled_from([8, 16] if not int4 else [32]))
    shape = Shape(
        layers=draw(st.integers(1, 3)),
        hidden=draw(st.sampled_from([32, 64, 96])),
        heads=kv_heads * ratio,
        kv_heads=kv_heads,
        head_dim=dim,
        width=32 * draw(st.integers(1, 9)),
        vocabulary=draw(st.integers(17, 90)),
        bias=draw(st.booleans()),
        tied=draw(st.booleans()),
    )
    dies = draw(st.integers(1, 16))
    stages = draw(st.sampled_from([k for k in (1, 2, 3) if dies % k == 0 and k <= shape.layers]))
    lengths = tuple(sorted(draw(st.sets(st.sampled_from([2, 3, 4, 8]), max_size=2)) | {1}))
    count = draw(st.integers(2, CAPACITY))
    tokens = [draw(st.integers(0, shape.vocabulary - 1)) for _ in range(count)]
    inputs = (shape.hidden, shape.width, shape.heads * shape.head_dim)
    group = (
        draw(st.sampled_from([g for g in (8, 16, 32, 64, 96) if all(k % g == 0 for k in inputs)]))
        if int4
        else 0
    )
    return (
        shape,
        dies,
        stages,
        group,
        draw(st.sampled_from(["HND", "NHD"])),
        lengths,
        tokens,
        draw(st.integers(1, count - 1)),
    )


def check(case: Case) -> None:
    shape, dies, stages, group, layout, lengths, tokens, cut = case
    module, weights = build(shape)
    if group:
        run_pipeline(module, f"quantize-weights{{group-size={group}}}")
    wanted = run_ty(module, weights, tokens).astype(np.float32)
    run_pipeline(
        module,
        f"kv-materialize{{max-kv={CAPACITY} layout={layout}}},partition-dies{{dies={dies} pp={stages}"
        " strategy=split}",
    )
    run_pipeline(module, f"specialize-seqlen{{seqlens={','.join(map(str, lengths))}}},to-program")

    def feed(step: Step, ids: list[int]) -> list[np.ndarray]:  # type: ignore[type-arg]
        first = step.position
        chunks = list(plan_chunks(len(ids), first, lengths, CAPACITY))
        return [
            step.feed(ids[c.start - first : c.start - first + c.count], f"main_s{c.seqlen}", padded=c.seqlen)
            for c in chunks
        ]

    step = Step(module, weights)
    rows = feed(step, tokens[:cut])
    resumed = Step(module, weights)  # the cache of an interrupted run, taken over by another
    resumed.caches = None if step.caches is None else [[c.copy() for c in die] for die in step.caches]
    resumed.position = step.position
    got = np.concatenate([*rows, *feed(resumed, tokens[cut:])])
    np.testing.assert_allclose(got, wanted, atol=0.03 * float(np.abs(wanted).max()))


@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(case=cases())
def test_a_few(case: Case) -> None:
    check(case)


@pytest.mark.slow
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(case=cases())
def test_hundreds(case: Case) -> None:
    check(case)
