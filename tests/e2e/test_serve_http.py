"""`tyir-serve` as its clients see it: a real server on a free port, and requests of every kind."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from tests.e2e.serving import Held, Served, serving
from tyir.runtime_sim.session.session import Session
from tyir.tools.serve import async_engine

GREEDY = {"temperature": 0, "max_tokens": 8}
PROMPT = "The old house stood at the end of"


@pytest.fixture(scope="module")
def served(four: Path) -> Iterator[Served]:
    with serving(four) as made:
        yield made


def test_models_and_small_routes(served: Served) -> None:
    (first, second) = served.ask("GET", "/v1/models")[1]["data"]
    assert (first["id"], second["id"], first["max_model_len"], first["tyir"]["batch"]) == (
        "tiny",
        "other",
        128,
        4,
    )
    assert served.ask("GET", "/version")[0] == 200 and served.ask("GET", "/load")[1] == {"server_load": 0}
    found = served.post("/tokenize", prompt=PROMPT, return_token_strs=True)
    assert (
        found["count"] == len(found["tokens"]) == len(found["token_strs"]) and found["max_model_len"] == 128
    )
    assert served.post("/detokenize", tokens=found["tokens"]) == {"prompt": PROMPT}
    chat = served.post("/tokenize", messages=[{"role": "user", "content": PROMPT}])
    assert chat["tokens"][: found["count"]] == found["tokens"]
    assert served.ask("GET", "/nothing")[1]["error"]["code"] == 404
    assert served.ask("GET", "/v1/completions")[0] == 405


def test_a_completion_is_a_sessions_greedy_text(served: Served, four: Path) -> None:
    engine = served.engine
    ids = engine.ids_of(PROMPT)
    made = list(Session(four).generate(ids, 8))
    reply = served.post("/v1/completions", prompt=PROMPT, **GREEDY)
    (choice,) = reply["choices"]
    assert choice["text"] == engine.tokenizer.decode([*ids, *made])[len(PROMPT) :]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
    assert reply["usage"]["prompt_tokens"] == len(ids) and reply["usage"]["completion_tokens"] == 8
    same = [
        served.post("/v1/completions", prompt=p, **GREEDY, seed=None, logprobs=None, stop=None, unheard=1)
        for p in (ids, [PROMPT], [ids])
    ]
    assert [s["choices"][0]["text"] for s in same] == [choice["text"]] * 3
    assert same[0]["usage"]["prompt_tokens_details"] == {"cached_tokens": len(ids) - 1}
    assert len(served.post("/v1/completions", prompt=PROMPT, temperature=0)["choices"][0]["text"].split()) > 4


def test_a_chat_and_its_stream_say_the_same(served: Served) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": PROMPT}]}]
    whole = served.post("/v1/chat/completions", messages=messages, **GREEDY)
    assert whole["object"] == "chat.completion" and whole["id"].startswith("chatcmpl-")
    message = whole["choices"][0]["message"]
    first, *parts, usage = served.events("/v1/chat/completions", messages=messages, **GREEDY)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(p["choices"][0]["delta"]["content"] for p in parts) == message["content"]
    assert [p["choices"][0]["finish_reason"] for p in parts] == [None] * 7 + ["length"]
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8
    continuous = {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    told = served.events("/v1/chat/completions", messages=messages, max_completion_tokens=3, **continuous)
    assert all(t["usage"]["prompt_tokens"] for t in told) and told[-1]["usage"]["completion_tokens"] == 3


def test_several_prompts_and_answers(served: Served) -> None:
    reply = served.post(
        "/v1/completions",
        prompt=["The old", "She looked"],
        n=2,
        max_tokens=4,
        seed=3,
        temperature=1,
        echo=True,
    )
    texts = [c["text"] for c in reply["choices"]]
    assert [c["index"] for c in reply["choices"]] == [0, 1, 2, 3]
    assert [t.startswith(p) for t, p in zip(texts, ("The old", "The old", "She looked", "She looked"))] == [
        True
    ] * 4
    one = served.post("/v1/completions", prompt="She looked", max_tokens=4, seed=4, temperature=1)
    assert texts[3] == "She looked" + one["choices"][0]["text"]
    stream = served.events(
        "/v1/completions", prompt=["The old", "She looked"], n=2, max_tokens=4, seed=3, temperature=1
    )
    for number in range(4):
        said = "".join(e["choices"][0]["text"] for e in stream[:-1] if e["choices"][0]["index"] == number)
        assert texts[number].endswith(said) and said


def test_stops(served: Served) -> None:
    plain = served.post("/v1/completions", prompt=PROMPT, temperature=0, max_tokens=20)["choices"][0]["text"]
    stop = plain[7:10]
    cut = served.post("/v1/completions", prompt=PROMPT, temperature=0, max_tokens=20, stop=[stop])
    (choice,) = cut["choices"]
    assert choice["text"] == plain[: plain.index(stop)]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert cut["usage"]["completion_tokens"] < 20
    shown = served.post(
        "/v1/completions",
        prompt=PROMPT,
        temperature=0,
        max_tokens=20,
        stop=stop,
        include_stop_str_in_output=True,
    )
    assert shown["choices"][0]["text"] == choice["text"] + stop
    streamed = served.events("/v1/completions", prompt=PROMPT, temperature=0, max_tokens=20, stop=stop)
    assert "".join(e["choices"][0]["text"] for e in streamed[:-1]) == choice["text"]
    end = served.engine.ids_of(plain)[0]
    named = served.post("/v1/completions", prompt=PROMPT, temperature=0, max_tokens=20, stop_token_ids=[end])
    assert named["choices"][0]["stop_reason"] == end and named["choices"][0]["text"] == ""
    forced = {"logit_bias": {"0": 100}, "temperature": 0, "max_tokens": 3}
    ended = served.post("/v1/completions", prompt=PROMPT, **forced)
    assert (ended["choices"][0]["finish_reason"], ended["choices"][0]["stop_reason"]) == ("stop", None)
    assert (
        served.post("/v1/completions", prompt=PROMPT, **forced, ignore_eos=True)["usage"]["completion_tokens"]
        == 3
    )
    assert (
        served.post("/v1/completions", prompt=PROMPT, **forced, min_tokens=2)["usage"]["completion_tokens"]
        == 3
    )
    assert (
        served.post("/v1/completions", prompt=PROMPT, temperature=0, max_tokens=None)["usage"][
            "completion_tokens"
        ]
        == 16
    )


def test_scores_as_lm_eval_reads_them(served: Served, four: Path) -> None:
    """`tokens`, `token_logprobs` and `top_logprobs` have prompt + 1 entries; what was chosen is among the
    best with the very same number.
    """
    import numpy as np

    ids = served.engine.ids_of(PROMPT + " the road")
    asked = {"prompt": [ids], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1234}
    found = served.post("/v1/completions", **asked)["choices"][0]["logprobs"]
    assert {len(v) for v in found.values()} == {len(ids) + 1}
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    rows = Session(four).feed(ids).astype(np.float64)
    rows -= np.log(np.exp(rows).sum(1, keepdims=True))
    for row, following, value, top in zip(
        rows, ids[1:], found["token_logprobs"][1:], found["top_logprobs"][1:]
    ):
        assert value == pytest.approx(row[following], abs=1e-6)
        assert (value == max(top.values())) == (int(row.argmax()) == following) and value in top.values()
    only = served.post("/v1/completions", **{**asked, "max_tokens": 0})["choices"][0]["logprobs"]
    assert only["token_logprobs"] == found["token_logprobs"][:-1]
    chat = served.post(
        "/v1/chat/completions",
        messages=[{"role": "user", "content": "é"}],
        logprobs=True,
        top_logprobs=2,
        **GREEDY,
    )
    for entry in chat["choices"][0]["logprobs"]["content"]:
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
        assert bytes(entry["bytes"]).decode("utf-8", "replace") == entry["token"]
    named = served.post("/v1/completions", prompt="a", logprobs=0, return_tokens_as_token_ids=True, **GREEDY)
    assert all(t.startswith("token_id:") for t in named["choices"][0]["logprobs"]["tokens"])


def test_text_that_is_held_to_a_schema(served: Served) -> None:
    pytest.importorskip("llguidance", reason="the extra 'serve' is not installed")
    ask = lambda **more: served.post("/v1/completions", prompt=PROMPT, max_tokens=60, seed=1, **more)  # noqa: E731
    text = lambda reply: reply["choices"][0]["text"]  # noqa: E731
    assert text(ask(structured_outputs={"choice": ["yes", "no"]})) in ("yes", "no")
    assert text(ask(structured_outputs={"regex": "[a-c]{3}x"}))[3] == "x"
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
        "x-guidance": {"whitespace_flexible": False},  # llguidance's own: small models ramble otherwise
    }
    made = ask(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert set(json.loads(text(made))) == {"a"} and made["choices"][0]["finish_reason"] == "stop"
    for bad in (
        {"json": {"type": "nonsense"}},
        {"regex": "("},
        {"grammar": "start: ("},
        {"choice": []},
        {"regex": "a", "json": {}},
    ):
        status, content = served.ask("POST", "/v1/completions", {"prompt": "a", "structured_outputs": bad})
        assert status == 400, (bad, content)


HOSTILE: list[tuple[str, Any]] = [
    ("model", {"model": "x"}),
    ("prompt", {"prompt": ""}),
    ("prompt", {"prompt": []}),
    ("prompt", {"prompt": [[]]}),
    ("prompt", {"prompt": [4096]}),
    ("prompt", {"prompt": [-1]}),
    ("prompt", {"prompt": [10**30]}),
    ("body.prompt", {"prompt": None}),
    ("body.prompt", {"prompt": {"a": 1}}),
    ("prompt", {"prompt": "\ud800"}),
    ("input_tokens", {"prompt": [5] * 129}),
    ("max_tokens", {"max_tokens": 128}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": -1}),
    ("body.max_tokens", {"max_tokens": 1e40}),
    ("max_tokens", {"max_tokens": 10**30}),
    ("temperature", {"temperature": -1}),
    ("body.temperature", {"temperature": float("nan")}),
    ("body.temperature", {"temperature": float("inf")}),
    ("body.temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 2}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": -0.1}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("repetition_penalty", {"repetition_penalty": 1e-320}),
    ("repetition_penalty", {"repetition_penalty": 1e-31}),
    ("repetition_penalty", {"repetition_penalty": 1e308}),
    ("presence_penalty", {"presence_penalty": 3}),
    ("n", {"n": 100000}),
    ("n", {"n": 0}),
    ("best_of", {"best_of": 2}),
    ("best_of", {"n": 2, "best_of": 1}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("seed", {"seed": 2**63}),
    ("stop", {"stop": [""]}),
    ("stop", {"stop": ["a"] * 3000}),
    ("logit_bias", {"logit_bias": {"x": 1}}),
    (None, {"logit_bias": {"99999": 1}}),
    ("stop_token_ids", {"stop_token_ids": [-5]}),
    (None, {"allowed_token_ids": []}),
    ("logprobs", {"logprobs": 21}),
    ("suffix", {"suffix": "b"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("response_format", {"response_format": {"type": "xml"}}),
]


def test_what_is_refused_and_how(served: Served) -> None:
    before = served.counts()["vllm:request_success_total stop"]
    for param, change in HOSTILE:
        body = json.dumps({"prompt": PROMPT, **change}).encode()
        status, content = served.ask("POST", "/v1/completions", body)
        error = content["error"]
        assert (status, error["code"], error["param"]) == (404 if "model" in change else 400,) * 2 + (
            param,
        ), change
        assert error["message"] and len(error["message"]) < 2000
    for body in (
        b"",
        b"{",
        b"[" * 50_000,
        b'{"a":' * 50_000,
        b"\xff\xfe",
        b'"' + b"a" * (5 << 20) + b'"',
        b"null",
        b'{"prompt": ' + b"9" * 6000 + b"}",
        b"[1]",
    ):
        for path in (
            "/v1/completions",
            "/v1/chat/completions",
            "/tokenize",
            "/detokenize",
            "/api/chat",
            "/api/generate",
            "/api/show",
        ):
            status, content = served.ask("POST", path, body)
            assert status == 400 and content["error"], (path, body[:40], content)
    chat: list[Any] = [
        [],
        [{"role": "user"}] * 1025,
        [{"content": "a"}],
        [{"role": 1, "content": "a"}],
        [{"role": "user", "content": [{"type": "x"}]}],
        [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}],
            }
        ],
        [{"role": "user", "content": "a b " * 4000}],
        [{"role": "user", "content": "\udfff"}],
    ]
    for messages in chat:
        status, content = served.ask("POST", "/v1/chat/completions", {"messages": messages})
        assert status == 400, (messages[:1], content)
    good = {"messages": [{"role": "user", "content": "a"}]}
    for more in (
        {"top_logprobs": 2},
        {"tools": [{"type": "function"}]},
        {"chat_template": "{{ 1 }}"},
        {"top_logprobs": 21, "logprobs": True},
    ):
        assert served.ask("POST", "/v1/chat/completions", {**good, **more})[0] == 400
    assert served.ask("POST", "/v1/chat/completions", {**good, "tools": [], "max_tokens": 1})[0] == 200
    assert served.counts()["vllm:request_success_total stop"] == before
    served.post("/v1/completions", prompt=PROMPT, max_tokens=1)


def test_numbers_at_the_ends_of_their_ranges_are_answered(served: Served) -> None:
    for more in ({"repetition_penalty": 1e-30}, {"repetition_penalty": 1e30}, {"temperature": 5e-324}):
        served.post("/v1/completions", prompt=PROMPT, max_tokens=3, **more)


def test_what_a_request_tells_the_template(four: Path) -> None:
    """Qwen3's switch, by /tokenize and in chats; what the request says elsewhere is not told twice."""
    template = "{{ messages[0].content }}{% if enable_thinking is false %}no thoughts{% endif %}{{ more }}"
    messages = [{"role": "user", "content": PROMPT}]
    with serving(four, template=template) as served:
        known: Any = served.engine.tokenizer
        for given, text in (
            (None, PROMPT),
            ({}, PROMPT),
            ({"enable_thinking": True}, PROMPT),
            ({"enable_thinking": False}, f"{PROMPT}no thoughts"),
            ({"more": " of", "self": 1, "a": {"b": [1, None]}}, f"{PROMPT} of"),
        ):
            body = {"messages": messages, "chat_template_kwargs": given}
            ids = known(text, add_special_tokens=False)["input_ids"]
            assert served.post("/tokenize", **body)["tokens"] == ids
            usage = served.post("/v1/chat/completions", **body, best_of=1, max_tokens=1)["usage"]
            assert usage["prompt_tokens"] == len(ids)
        for name in ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template"):
            body = {"messages": messages, "chat_template_kwargs": {"enable_thinking": True, name: []}}
            for path in ("/v1/chat/completions", "/tokenize"):
                status, content = served.ask("POST", path, body)
                assert (status, content["error"]["param"]) == (400, "chat_template_kwargs"), content
                assert name in content["error"]["message"]


def test_a_template_without_an_end_is_refused(four: Path) -> None:
    with serving(four, template="{{ 'x' * n }}{{ messages[0].content }}") as served:
        for n, wanted in ((1, 200), (10**10, 400)):
            body = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 1}
            status, content = served.ask(
                "POST", "/v1/chat/completions", {**body, "chat_template_kwargs": {"n": n}}
            )
            assert status == wanted, content
        assert "a value of more than" in content["error"]["message"]


def test_who_leaves_frees_the_slot(served: Served) -> None:
    """Streamed or not, while it is answered or while it waits: nothing runs for them any more, and it is
    counted.
    """
    aborted = served.counts()["vllm:request_success_total abort"]
    for stream in (True, False):
        body = json.dumps(
            {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "stream": stream}
        ).encode()
        sockets = []
        for _ in range(6):  # four are answered, two wait
            one = socket.create_connection(("127.0.0.1", served.port))
            head = f"Host: a\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            one.sendall(b"POST /v1/completions HTTP/1.1\r\n" + head.encode() + body)
            sockets.append(one)
        _until(lambda: served.engine.engine.counts == (4, 2))
        for one in sockets[::-1]:
            one.close()
        _until(lambda: served.engine.engine.counts == (0, 0))
    assert served.counts()["vllm:request_success_total abort"] == aborted + 12


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_in_the_prompt_ends_it(four: Path, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    """The step that runs is the last one; what it computed is used for who asks the same again."""
    # measured on a busy computer, steps of 8 may cost more than eight of 1
    monkeypatch.setattr(async_engine, "step_costs", lambda session: {1: 1.0, 8: 1.5})
    with serving(four) as served:
        held = Held(served.engine.session.step)
        monkeypatch.setattr(served.engine.session, "step", held)
        body = {"prompt": list(range(100, 140)), "max_tokens": 4, "ignore_eos": True}
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=60)
        sent = json.dumps({**body, "stream": stream})
        connection.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
        try:
            assert held.called.wait(60)
            connection.close()
            _until(lambda: served.engine.engine.counts == (0, 0))
        finally:
            held.released.set()
        again = served.post("/v1/completions", **body)
        assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": 8}
        assert held.calls == 1 + 4 + 3, "one of the first, four of the rest of the prompt, the other tokens"
        assert served.counts()["vllm:request_success_total abort"] == 1


def _until(holds: Any) -> None:
    while not holds():  # ./tools/test ends what never holds
        time.sleep(0.005)


def test_counts_are_what_clients_saw(served: Served) -> None:
    before = served.counts()
    seen = [
        served.post("/v1/completions", prompt=PROMPT + " " * i, max_tokens=3 + i)["usage"] for i in range(3)
    ]
    after = served.counts()

    def more(name: str) -> float:
        return after[f"vllm:{name}"] - before[f"vllm:{name}"]

    made, asked = sum(u["completion_tokens"] for u in seen), sum(u["prompt_tokens"] for u in seen)
    assert (more("generation_tokens_total"), more("prompt_tokens_total")) == (made, asked)
    assert more("inter_token_latency_seconds_count") == made - 3
    assert more("time_to_first_token_seconds_count") == more("request_params_n_count") == 3
    assert more("prefix_cache_hits_total") == sum(u["prompt_tokens_details"]["cached_tokens"] for u in seen)
    assert after["vllm:num_requests_running"] == 0 and after["tyir:slots free"] == 4


def test_the_queue_is_bounded(four: Path) -> None:
    """Ten requests where six may be under way: four are refused at once, the six are answered."""
    with serving(four, most_waiting=2) as made:
        results: list[tuple[int, Any, Any]] = []

        def one() -> None:
            results.append(
                made.raw("POST", "/v1/completions", {"prompt": PROMPT, "max_tokens": 24, "temperature": 0})
            )

        threads = [threading.Thread(target=one) for _ in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(r[0] for r in results) == [200] * 6 + [429] * 4
        assert {r[2]["retry-after"] for r in results if r[0] == 429} == {"1"}
        assert len({json.loads(r[1])["choices"][0]["text"] for r in results if r[0] == 200}) == 1
        assert made.counts()["vllm:admission_rejections_total queue_full"] == 4


def test_what_takes_too_long_is_told(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """504 for a request that waits, or takes, longer than it may; in a stream an event."""
    body = {"prompt": PROMPT, "max_tokens": 100, "temperature": 0, "ignore_eos": True}
    with serving(four, request_timeout=0.02) as made:
        status, content = made.ask("POST", "/v1/completions", body)
        assert status == 504 and "longer than the 0.02 s" in content["error"]["message"]
        events = made.events("/v1/completions", **body)
        assert events[-2]["error"]["code"] == 504 and events[-1]["usage"]["completion_tokens"] < 100
        assert made.counts()["vllm:request_success_total timeout"] == 2
    with serving(four, queue_timeout=1.0) as made:
        clock = [0.0]  # stands still until somebody waits
        monkeypatch.setattr(made.engine.engine, "_now", lambda: clock[0])
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.append(made.ask("POST", "/v1/completions", body)[0]))
            for _ in range(10)
        ]
        for thread in threads:
            thread.start()
        _until(lambda: made.engine.engine.counts[1] > 0)
        clock[0] = 2.0
        for thread in threads:
            thread.join()
        assert set(found) == {200, 504} and made.counts()[
            "vllm:request_success_total timeout"
        ] == found.count(504)


@pytest.mark.parametrize("patience", [30.0, 0.0])
def test_a_signal_lets_streams_end(four: Path, patience: float) -> None:
    """New work is refused at once; the stream is finished, or told."""
    with serving(four, patience=patience) as made:
        connection = http.client.HTTPConnection("127.0.0.1", made.port, timeout=60)
        body = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        begun = reply.read1()
        made.server.handle_exit(15, None)
        if patience:
            status, content, headers = made.raw("POST", "/v1/completions", {"prompt": "a"})
            assert status == 503 and headers["retry-after"] and "stopping" in content
            assert made.raw("GET", "/health")[0] == 503
        events = (begun + reply.read()).decode().strip().split("\n\n")
        connection.close()
        assert events[-1] == "data: [DONE]"
        told = [json.loads(e.removeprefix("data: ")) for e in events[:-1] if e.startswith("data: {")]
        assert ("error" in told[-2] or "error" in told[-1]) == (patience == 0)
        assert patience == 0 or told[-1]["usage"]["completion_tokens"] == 60


def test_keys(four: Path) -> None:
    from tyir.tools.serve.settings import Settings

    with serving(four, settings=Settings(names=("tiny",), keys=Settings.hashed(["secret"]))) as made:
        schema = made.ask("GET", "/openapi.json", Authorization="Bearer secret")[1]
        paths = [(path, method.upper()) for path, entry in schema["paths"].items() for method in entry]
        assert len(paths) > 12
        for path, method in paths:
            if path == "/health":
                continue
            for key in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic secret"}):
                status, content, _ = made.raw(method, path, **key)
                assert status == 401 and (
                    method == "HEAD" or json.loads(content)["error"]["code"] == "invalid_api_key"
                )
            assert made.raw(method, path, Authorization="Bearer secret")[0] in (200, 400)
        assert made.raw("GET", "/health")[0] == 200


def test_ollama(served: Served) -> None:
    assert served.raw("GET", "/")[1] == "Ollama is running"
    assert served.ask("GET", "/api/version")[0] == 200
    (model, _) = served.ask("GET", "/api/tags")[1]["models"]
    assert (model["name"], model["details"]["quantization_level"]) == ("tiny:latest", "int4")
    assert served.ask("GET", "/api/ps")[1]["models"][0]["model"] == "tiny:latest"
    shown = served.post("/api/show", model="tiny:latest")
    assert shown["model_info"]["Qwen2ForCausalLM.context_length"] == 128
    options = {"temperature": 0, "num_predict": 6}
    asked = {"model": "tiny:latest", "prompt": PROMPT, "options": options}
    whole = served.post("/api/generate", **asked, raw=True, stream=False)
    wanted = served.post("/v1/completions", prompt=PROMPT, temperature=0, max_tokens=6)["choices"][0]["text"]
    assert (whole["response"], whole["done"], whole["done_reason"], whole["eval_count"]) == (
        wanted,
        True,
        "length",
        6,
    )
    assert whole["eval_duration"] > 0 and whole["total_duration"] > whole["eval_duration"]
    status, text, headers = served.raw("POST", "/api/generate", {**asked, "raw": True})
    lines = [json.loads(line) for line in text.splitlines()]
    assert headers["content-type"] == "application/x-ndjson" and [x["done"] for x in lines] == [False] * (
        len(lines) - 1
    ) + [True]
    assert "".join(x["response"] for x in lines) == wanted
    messages = [{"role": "user", "content": PROMPT}]
    chat = served.post("/api/chat", model="tiny", messages=messages, tools=[], stream=False, options=options)
    openai = served.post("/v1/chat/completions", messages=messages, temperature=0, max_tokens=6)
    assert chat["message"] == {"role": "assistant", "content": openai["choices"][0]["message"]["content"]}
    for bad, words in (
        ({"options": {"num_ctx": 4096}}, "--max-kv 4096"),
        ({"prompt": "a b " * 500}, "compile with --max-kv"),
    ):
        status, content = served.ask("POST", "/api/generate", {**asked, **bad})
        assert status == 400 and words in content["error"]
    assert served.ask("POST", "/api/generate", {**asked, "model": "x"})[0] == 404
    assert served.ask("POST", "/api/pull", {"model": "x"})[0] == 501


def test_the_page_asks_nobody_else(served: Served) -> None:
    status, page, headers = served.raw("GET", "/", Accept="text/html")
    assert status == 200 and headers["content-security-policy"].startswith("default-src 'self'")
    script = served.raw("GET", "/page.js")[1]
    for text in (page, script, served.raw("GET", "/page.css")[1]):
        assert "http:" not in text and "https:" not in text and "//cdn" not in text
    assert "innerHTML" not in script and "<script>" not in page


@pytest.mark.slow
def test_the_command(four: Path) -> None:
    """It says where it serves, serves there without torch, and ends with 0 after SIGTERM."""
    command = [sys.executable, "-m", "tyir.tools.tyir_serve", str(four), "--port", "0", "-q"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        place = process.stdout.readline().split()[-1].removeprefix("http://")
        try:

            def status() -> int:
                connection = http.client.HTTPConnection(place, timeout=10)
                try:
                    connection.request("GET", "/health")
                    return connection.getresponse().status
                finally:
                    connection.close()

            _until(lambda: status() == 200)
            loaded = Path(f"/proc/{process.pid}/maps").read_text()
            assert "libtvm_runtime" in loaded and "libtorch" not in loaded
        finally:
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=60)
        assert (process.returncode, said) == (0, "")
