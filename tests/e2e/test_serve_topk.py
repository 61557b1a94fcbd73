"""Artifacts that return the best tokens: what they can sample is what logits give, the rest is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from tests.e2e.serving import Served, serving
from tyir.manifest import BuildOptions
from tyir.runtime_sim.serving.choosing import Sampling
from tyir.runtime_sim.serving.generation import Scored
from tyir.tools.api import compile_path
from tyir.tools.serve.async_engine import AsyncEngine, Params

K = 8
PROMPT = "The old house stood at the end of"


@pytest.fixture(scope="module")
def best(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `four`, but for what a step returns."""
    options = BuildOptions(dies=1, seqlens=(1, 8), max_kv=128, weights="int4", batch=4, output=f"topk={K}")
    return compile_path(imported, tmp_path_factory.mktemp("best"), options)


@pytest.fixture(scope="module")
def served(best: Path) -> Iterator[Served]:
    with serving(best) as made:
        yield made


def test_nucleus_and_smallest_share_within_top_k(served: Served, four: Path) -> None:
    """The same tokens as from all logits, for the same seeds."""
    asked = [
        Sampling(temperature=t, top_k=k, top_p=p, min_p=m, seed=7)
        for t, k, p, m in ((1.0, K, 0.8, 0.0), (1.4, K, 1.0, 0.2), (0.7, 5, 0.6, 0.1), (0.0, 0, 1.0, 0.0))
    ]

    async def texts(folder: Path) -> list[str]:
        async with AsyncEngine(folder) as engine:
            return [
                "".join([d.text async for d in engine.generate(PROMPT, Params(max_tokens=12, sampling=s))])
                for s in asked
            ]

    logits = asyncio.run(texts(four))
    for sampling, wanted in zip(asked, logits):
        given = {"temperature": sampling.temperature, "top_p": sampling.top_p, "min_p": sampling.min_p}
        more: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k else {}
        reply = served.post("/v1/completions", prompt=PROMPT, max_tokens=12, seed=7, **given, **more)
        assert reply["choices"][0]["text"] == wanted, sampling
    assert len(set(logits)) == len(asked)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.4, top_k=5, seed=3)], ids=["greedy", "sampled"]
)
def test_log_probabilities_are_those_of_all_logits(served: Served, four: Path, sampling: Sampling) -> None:
    """Of raw logits, whatever the temperature: the chosen token's and the K best ones'."""
    params = Params(max_tokens=12, sampling=sampling, logprobs=K)

    async def scored() -> list[Scored]:
        async with AsyncEngine(four) as engine:
            return [t async for d in engine.generate(PROMPT, params) for t in d.tokens]

    wanted = asyncio.run(scored())
    given = {"temperature": sampling.temperature, "top_k": sampling.top_k, "seed": sampling.seed}
    reply = served.post(
        "/v1/completions", prompt=PROMPT, max_tokens=12, logprobs=K, return_tokens_as_token_ids=True, **given
    )
    found = reply["choices"][0]["logprobs"]
    assert found["tokens"] == [f"token_id:{one.token}" for one in wanted] and len(wanted) == 12
    for one, own, top in zip(wanted, found["token_logprobs"], found["top_logprobs"]):
        assert own == pytest.approx(one.logprob, abs=1e-5) and own == top[f"token_id:{one.token}"]
        best = {f"token_id:{token}": pytest.approx(value, abs=1e-5) for token, value in one.top}
        assert top == best


def test_a_nucleus_of_all_tokens_is_that_of_all_logits(served: Served, four: Path) -> None:
    """top_p and min_p without top_k: the same text as from all logits, or an error that says why."""
    asked = [
        Sampling(temperature=t, top_p=p, min_p=m, seed=seed)
        for t, p, m in ((1.0, 0.2, 0.0), (1.0, 1.0, 0.4), (0.5, 0.3, 0.0), (1.2, 0.9, 0.5), (1.0, 1.0, 0.001))
        for seed in (1, 2)
    ]

    async def texts() -> list[str]:
        async with AsyncEngine(four) as engine:
            return [
                "".join([d.text async for d in engine.generate(PROMPT, Params(max_tokens=6, sampling=s))])
                for s in asked
            ]

    equal, refused = [], []
    for sampling, wanted in zip(asked, asyncio.run(texts())):
        status, reply = served.ask(
            "POST",
            "/v1/completions",
            {
                "prompt": PROMPT,
                "max_tokens": 6,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "min_p": sampling.min_p,
                "top_k": 0,
                "seed": sampling.seed,
            },
        )
        if status == 200:
            assert reply["choices"][0]["text"] == wanted, sampling
            equal.append(sampling)
        else:
            message = reply["error"]["message"]
            assert status == 400 and f"more than the {K} best tokens" in message, reply
            assert "without top_k" in message and "compile with a larger K" in message
            refused.append(sampling)
    assert len({(s.temperature, s.top_p, s.min_p) for s in equal}) >= 2, refused
    assert [s for s in refused if s.min_p == 0.001], "a thousandth of the best is within 8 tokens nowhere"


def test_defaults_are_within_what_is_returned(served: Served) -> None:
    found = served.engine.defaults()
    assert 0 < found.top_k <= K and found == replace(found, repetition_penalty=1.0)
    assert served.post("/v1/completions", prompt=PROMPT, max_tokens=2)["choices"][0]["text"]


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("top_p without top_k at a temperature above 1", {"temperature": 1.2, "top_p": 0.9, "top_k": 0}),
        ("sampling without top_k", {"temperature": 1, "top_k": 0}),
        ("--top-k 9", {"temperature": 1, "top_k": K + 1}),
        ("logprobs 9", {"logprobs": K + 1}),
        ("logprobs of the prompt", {"logprobs": 1, "echo": True, "max_tokens": 0}),
        ("penalties", {"presence_penalty": 1}),
        ("penalties", {"repetition_penalty": 1.2}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
        ("allowed_token_ids", {"allowed_token_ids": [5]}),
        ("bad_words", {"bad_words": ["old"]}),
        ("structured_outputs", {"structured_outputs": {"regex": "a"}}),
    ],
)
def test_what_needs_all_logits_is_refused_by_name(served: Served, name: str, given: dict[str, Any]) -> None:
    status, content = served.ask("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 2, **given})
    assert status == 400, content
    message = content["error"]["message"]
    assert name in message and ("--output" in message or "best tokens" in message), message
