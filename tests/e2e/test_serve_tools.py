"""Tools through a real server, with OpenAI's own client: answers held to be calls are read as calls."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("llguidance", reason="the extra 'serve' is not installed")

from tests.e2e.serving import TEMPLATE, Served, serving

# What Qwen2.5's template does with tools and calls, in a line each.
TEMPLATE_WITH_TOOLS = (
    "{% for t in tools or [] %}{{ t.function.name }} {% endfor %}"
    "{% for m in messages %}{% for c in m.tool_calls or [] %}"
    "<tool_call>{{ c.function.name }} {{ c.function.arguments.city }}</tool_call>{% endfor %}"
    "{{ m.content }}\n{% endfor %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/City"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"City": {"enum": ["Oslo", "Rome"]}},  # as pydantic writes it
}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TIME = {"type": "function", "function": {"name": "now", "parameters": NOTHING}}
MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "The old house"}]
# The model was never trained to call anything: what it says first is decided here, its choice is its own.
SCRIPT = {
    "regex": r"I see\. <tool_call>\n"
    r'\{"name": "weather", "arguments": \{"city": "(Oslo|Rome)"\}\}\n</tool_call>'
}


@pytest.fixture(scope="module")
def served(four: Path) -> Iterator[Served]:
    with serving(four, template=TEMPLATE_WITH_TOOLS) as made:
        yield made


def ask(served: Served, **more: Any) -> dict[str, Any]:
    return {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 80,
        "seed": 3,
        "tools": [WEATHER, TIME],
        **more,
    }


def test_a_call_that_was_chosen(served: Served) -> None:
    (choice,) = served.post("/v1/chat/completions", **ask(served, structured_outputs=SCRIPT))["choices"]
    assert (choice["finish_reason"], choice["message"]["content"]) == ("tool_calls", "I see. ")
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")
    plain = served.post("/v1/chat/completions", **ask(served))["choices"][0]
    assert "tool_calls" not in plain["message"] and plain["message"]["content"]
    text = served.post("/v1/chat/completions", **ask(served, structured_outputs=SCRIPT, tool_choice="none"))[
        "choices"
    ][0]
    assert "<tool_call>" in text["message"]["content"] and text["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("choice", "names", "ends"),
    [
        ("required", {"weather", "now"}, "tool_calls"),
        ({"type": "function", "function": {"name": "weather"}}, {"weather"}, "stop"),
    ],
)
def test_a_call_that_must_be(served: Served, choice: Any, names: set[str], ends: str) -> None:
    asked = ask(served, tool_choice=choice, parallel_tool_calls=False)
    (found,) = served.post("/v1/chat/completions", **asked)["choices"]
    (call,) = found["message"]["tool_calls"]
    assert call["function"]["name"] in names and found["finish_reason"] == ends
    assert found["message"]["content"] is None
    if call["function"]["name"] == "weather":
        assert json.loads(call["function"]["arguments"])["city"] in ("Oslo", "Rome")


def test_the_round_trip_of_openais_client(served: Served) -> None:
    """A streamed call, its result, and an answer to that; whole and streamed say the same."""
    openai = pytest.importorskip("openai", reason="openai's client is not installed")
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        asked = ask(served, extra_body={"structured_outputs": SCRIPT})
        whole = client.chat.completions.create(**asked).choices[0]
        text, pieces, ends = "", [], []
        for chunk in client.chat.completions.create(**asked, stream=True):
            for choice in chunk.choices:
                text += choice.delta.content or ""
                pieces += choice.delta.tool_calls or []
                ends.append(choice.finish_reason)
        assert text == whole.message.content and ends[-1] == whole.finish_reason == "tool_calls"
        assert pieces[0].id and pieces[0].function.name == "weather" and len(pieces) > 2
        arguments = "".join(p.function.arguments for p in pieces)
        (call,) = whole.message.tool_calls
        assert arguments == call.function.arguments and all(p.index == 0 for p in pieces)
        said = whole.message.model_dump(exclude_none=True)
        result = {"role": "tool", "tool_call_id": call.id, "content": "cold"}
        after = client.chat.completions.create(
            **{**asked, "messages": [*MESSAGES, said, result], "extra_body": {}, "max_tokens": 4}
        )
        assert after.usage.prompt_tokens > whole.message.model_dump()["content"].count(" ")


def test_ollamas_calls(served: Served) -> None:
    asked = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": [WEATHER],
        "options": {"seed": 3, "num_predict": 8},
    }
    found = served.post("/api/chat", **asked, stream=False)
    assert found["message"]["content"] and "tool_calls" not in found["message"]
    assert "tools" in served.post("/api/show", model="tiny")["capabilities"]


def test_what_is_refused(served: Served, four: Path) -> None:
    for bad, param in (
        ({"tool_choice": "other"}, "tool_choice"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
         "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}]}, "messages.0.tool_calls"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}],
          "tool_choice": "required"}, "tools"),
    ):  # fmt: skip
        status, content = served.ask("POST", "/v1/chat/completions", ask(served, **bad))
        assert status == 400 and content["error"]["param"] == param, content
    other = {"type": "function", "function": {"name": "g", "parameters": {"$defs": {"City": {}}}}}
    deep: dict[str, Any] = {}
    for _ in range(900):
        deep = {"a": deep}
    nested = {"type": "function", "function": {"name": "g", "parameters": deep}}
    for tools in ([WEATHER, other], [nested]):
        status, content = served.ask(
            "POST", "/v1/chat/completions", ask(served, tools=tools, tool_choice="required")
        )
        assert status == 400 and content["error"]["param"] == "tools", content
    from tyir.tools.serve.settings import Settings

    with serving(four, template=TEMPLATE, settings=Settings(names=("tiny",))) as deaf:
        status, content = deaf.ask("POST", "/v1/chat/completions", ask(deaf))
        assert status == 400 and "does not know tools" in content["error"]["message"]
    off = Settings(names=("tiny",), tool_parser=None)
    with serving(four, template=TEMPLATE_WITH_TOOLS, settings=off) as without:
        status, content = without.ask("POST", "/v1/chat/completions", ask(without))
        assert status == 400 and "--tool-call-parser hermes" in content["error"]["message"]
