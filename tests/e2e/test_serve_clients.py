"""Clients as they are published, unchanged, against a real server; skipped by name where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from tests.e2e.serving import Served, serving

PROMPT = "The old house stood at the end of"
MESSAGES = [{"role": "user", "content": PROMPT}]


@pytest.fixture(scope="module")
def served(four: Path) -> Iterator[Served]:
    with serving(four) as made:
        yield made


def test_openai(served: Served) -> None:
    openai = pytest.importorskip("openai", reason="openai's client is not installed")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        assert [m.id for m in client.models.list()] == ["tiny", "other"]
        whole = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, logprobs=2
        )
        (choice,) = whole.choices
        assert choice.finish_reason == "length" and "".join(choice.logprobs.tokens) == choice.text
        stream = client.completions.create(
            model="tiny", prompt=PROMPT, max_tokens=8, temperature=0, stream=True
        )
        assert "".join(c.choices[0].text for c in stream if c.choices) == choice.text
        asked = {"model": "other", "messages": MESSAGES, "max_completion_tokens": 8, "seed": 7, "n": 2}
        chat = client.chat.completions.create(**asked, logprobs=True, top_logprobs=3)
        assert len(chat.choices) == 2 and chat.usage.completion_tokens <= 16
        assert all(len(e.top_logprobs) == 3 for c in chat.choices for e in c.logprobs.content)
        said = ["", ""]
        for chunk in client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        ):
            for part in chunk.choices:
                said[part.index] += part.delta.content or ""
        assert said == [c.message.content for c in chat.choices]
        assert chunk.usage.completion_tokens == chat.usage.completion_tokens
        for error, bad in (
            (openai.NotFoundError, {"model": "x"}),
            (openai.BadRequestError, {"temperature": -1}),
            (openai.BadRequestError, {"max_tokens": 4000}),
        ):
            with pytest.raises(error) as found:
                client.completions.create(**{"model": "tiny", "prompt": PROMPT, **bad})
            assert found.value.body["message"]


def test_ollama(served: Served) -> None:
    ollama = pytest.importorskip("ollama", reason="Ollama's client is not installed")
    client = ollama.Client(host=served.url)
    assert [m.model for m in client.list().models] == ["tiny:latest", "other:latest"]
    assert client.show("tiny").modelinfo["Qwen2ForCausalLM.context_length"] == 128
    options = {"temperature": 0, "num_predict": 8}
    before = served.counts()
    whole = client.chat("tiny", messages=MESSAGES, options=options)
    assert (whole.done_reason, whole.eval_count) == ("length", 8)
    more = {name: value - before.get(name, 0) for name, value in served.counts().items()}
    assert more["vllm:generation_tokens_total"] == 8
    # the rate that its users compute is that of the server's own counts
    rate = more["vllm:generation_tokens_total"] / more["vllm:request_decode_time_seconds_sum"]
    assert whole.eval_count / (whole.eval_duration / 1e9) == pytest.approx(rate, rel=0.05)
    assert whole.prompt_eval_duration / 1e9 == pytest.approx(more["vllm:request_prefill_time_seconds_sum"])
    parts = list(client.chat("tiny", messages=MESSAGES, options=options, stream=True))
    assert "".join(p.message.content for p in parts) == whole.message.content
    raw = client.generate("tiny", prompt=PROMPT, raw=True, options=options)
    assert raw.response and raw.eval_duration > 0
    with pytest.raises(ollama.ResponseError, match="--max-kv 4096"):
        client.generate("tiny", prompt=PROMPT, options={"num_ctx": 4096})
    client._client.close()  # its connections, which it keeps otherwise
