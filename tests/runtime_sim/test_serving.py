"""Serving metrics: the identities of vLLM's definitions, arrivals, the printed block."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.artifacts.dual_chunk import DualChunk
from tyir.diagnostics import TyirError
from tyir.runtime_sim.serving.benchmark import (
    Request,
    SimulatedServer,
    poisson,
    read_trace,
    serve,
    summary,
    text_block,
)
from tyir.runtime_sim.serving.scheduler import Step
from tyir.runtime_sim.timing.predictor import Predictor

TIMES = {1: 0.02, 8: 0.05}


@dataclass
class FixedServer:
    """Steps of one token take 20 ms, those of eight 50 ms."""

    slots: int = 1
    capacity: int = 1000
    seqlens: Sequence[int] = (1, 8)
    chunks: DualChunk | None = None
    weights: Mapping[int, float] = field(default_factory=lambda: {1: 1.0, 8: 1.0})

    def run(self, step: Step) -> float:
        return TIMES[step.seqlen]

    def costs(self) -> Mapping[int, float]:
        return self.weights


def test_two_requests_by_hand() -> None:
    """Two steps for the first prompt, three for the second, which waits 90 ms for the first."""
    first, second = serve([Request(0, 10, 3), Request(0.05, 20, 1)], FixedServer())
    assert first.tokens == pytest.approx((0.1, 0.12, 0.14)) and (first.ttft, first.tpot) == pytest.approx(
        (0.1, 0.02)
    )
    assert (
        second.tokens == pytest.approx((0.29,)) and second.ttft == pytest.approx(0.24) and second.tpot is None
    )
    assert serve([Request(0, 10, 3), Request(0.05, 20, 1)], FixedServer(), max_concurrency=1)[
        1
    ].ttft == pytest.approx(0.15)
    figures = summary([first, second], {"ttft": 200})
    assert figures["duration"] == pytest.approx(0.29) and figures["output_throughput"] == pytest.approx(
        4 / 0.29
    )
    assert figures["request_goodput"] == pytest.approx(1 / 0.29) and figures["max_concurrent_requests"] == 2


def test_costs_decide_the_way_through_a_prompt() -> None:
    """Ten tokens: 8 + 1 + 1 (90 ms) is cheaper than 8 + 8 (100 ms), 13 are not: 8 + 8 instead of 8 + 5."""
    (ten,) = serve([Request(0, 10, 1)], FixedServer(weights=TIMES))
    assert ten.ttft == pytest.approx(0.09)
    (thirteen,) = serve([Request(0, 13, 1)], FixedServer(weights=TIMES))
    assert thirteen.ttft == pytest.approx(0.1)


def test_three_requests_on_two_sequences_by_hand() -> None:
    """Prompts of 10, 20 and 5 tokens at 0, 0.05 and 0.06; outputs 4, 2 and 2.

    0.05: eight of the first prompt.  0.10: its last two and eight of the second.  From now on the first is
    being answered, and every other step is short: 0.15 (long: 16 of the second), 0.17 (17), 0.22 (all 20:
    both get a token, the first is done).  The third takes its place.  0.24: short again, the second is done.
    0.29: the third's prompt.  0.31: its last token.
    """
    requests = [Request(0, 10, 4), Request(0.05, 20, 2), Request(0.06, 5, 2)]
    first, second, third = serve(requests, FixedServer(slots=2))
    assert first.tokens == pytest.approx((0.1, 0.15, 0.17, 0.22))
    assert second.tokens == pytest.approx((0.22, 0.24)) and third.tokens == pytest.approx((0.29, 0.31))
    assert [r.sent for r in serve(requests, FixedServer(slots=2), max_concurrency=2)] == pytest.approx(
        [0, 0.05, 0.22]
    )
    together = serve([Request(0, 10, 2), Request(0, 30, 1)], FixedServer(slots=2))
    assert [r.tokens for r in together] == [pytest.approx((0.1, 0.15)), pytest.approx((0.2,))]


def test_identities() -> None:
    rng = np.random.default_rng(1)
    requests = [
        Request(float(t), int(p), int(o))
        for t, p, o in zip(
            np.cumsum(rng.exponential(0.5, 40)), rng.integers(1, 60, 40), rng.integers(1, 30, 40)
        )
    ]
    results = serve(requests, FixedServer())
    for r in results:
        assert (r.tpot or 0.0) * (len(r.tokens) - 1) + r.ttft == pytest.approx(r.latency)
    weighted = sum((r.tpot or 0.0) * (len(r.tokens) - 1) for r in results) / sum(
        len(r.tokens) - 1 for r in results
    )
    figures = summary(results)
    assert figures["mean_itl_ms"] == pytest.approx(weighted * 1000)
    assert figures["total_token_throughput"] * figures["duration"] == pytest.approx(
        sum(r.prompt + r.output for r in requests)
    )
    assert all(a.tokens[-1] <= b.tokens[0] for a, b in itertools.pairwise(results))  # one stream


def test_simulated_server(make_model: Callable[..., Any]) -> None:
    prefill, decode = make_model(tokens=8, capacity=300), make_model(tokens=1, capacity=300)
    predictor = Predictor(lambda s: (prefill if s == 8 else decode).programs, (1, 8), 300, decode.machine)
    server = SimulatedServer(predictor)
    result = serve([Request(0, 20, 3)], server)[0]
    assert result.ttft == pytest.approx(predictor.ttft_ns(20, exact=False) * 1e-9)
    one = lambda position: server.run(Step(1, (position,), ((1,),)))  # noqa: E731
    assert one(128) == pytest.approx(predictor.tpot_ns(128) * 1e-9)
    assert one(100) == pytest.approx(predictor.tpot_ns(100) * 1e-9, rel=0.05)
    with pytest.raises(TyirError, match="cache of 300"):
        serve([Request(0, 290, 20)], server)


def test_arrivals(tmp_path: Path) -> None:
    assert {r.arrival for r in poisson(5, math.inf, 8, 2)} == {0.0}
    times = [r.arrival for r in poisson(4000, 2.0, 8, 2)]
    assert times[0] == 0 and times == sorted(times) and times[-1] / 4000 == pytest.approx(0.5, rel=0.05)
    path = tmp_path / "t.jsonl"
    path.write_text(
        '{"arrival": 1, "prompt_tokens": 3, "output_tokens": 2}\n\n{"arrival": 0, "prompt_tokens": 4,'
        ' "output_tokens": 1}\n'
    )
    assert read_trace(path) == [Request(0, 4, 1), Request(1, 3, 2)]
    path.write_text('{"arrival": 1}\nnonsense\n{"arrival": -1, "prompt_tokens": 3, "output_tokens": 2}\n')
    with pytest.raises(TyirError) as error:
        read_trace(path)
    assert [f"t.jsonl:{n}" in str(error.value) for n in (1, 2, 3)] == [True] * 3


def test_block_has_the_words_of_vllm() -> None:
    text = text_block(summary(serve([Request(0, 10, 3), Request(0, 5, 2)], FixedServer())))
    for words in (
        " Serving Benchmark Result ", "Successful requests:", "Benchmark duration (s):", "Total input tokens:", "Total generated tokens:", "Request throughput (req/s):",  # noqa: E501
        "Output token throughput (tok/s):", "Total Token throughput (tok/s):", "Mean TTFT (ms):", "Median TPOT (ms):", "P99 ITL (ms):", "Mean E2EL (ms):",  # noqa: E501
    ):  # fmt: skip
        assert words in text


@pytest.mark.parametrize("limit", [0, -1])
def test_no_request_at_a_time_is_refused(limit: int) -> None:
    with pytest.raises(TyirError, match=f"max_concurrency must be at least 1, got {limit}"):
        serve([Request(0, 10, 3)], FixedServer(), max_concurrency=limit)
