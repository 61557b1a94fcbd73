"""Calls of tools are told from text, however the text is cut into pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from hypothesis import given
from hypothesis import strategies as st

from tyir.tools.serve.errors import RequestError
from tyir.tools.serve.fields import ChatFields
from tyir.tools.serve.tool_calls import Calls, HermesReader, Tools

ODD = json.dumps({"a": 'brace } and "quote" \\', "b": [{"c": "</tool_call>"[:5]}], "é": None})
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'
CASES: list[tuple[str, str, list[tuple[str, str]]]] = [
    ("plain text, a < b", "plain text, a < b", []),
    (CALL, "", [("f", '{"x": 1}')]),
    (f"Let me look. {CALL}\n", "Let me look. ", [("f", '{"x": 1}')]),
    (f"{CALL}\n{CALL}", "", [("f", '{"x": 1}')] * 2),
    (f"{CALL}\nand more", "\nand more", [("f", '{"x": 1}')]),
    (f'<tool_call>{{"name":"g.h","arguments":{ODD}}}</tool_call>', "", [("g.h", ODD)]),
    ('<tool_call>{"arguments": {"x": 2}, "name": "f"}</tool_call>', "", [("f", '{"x": 2}')]),
    ('<tool_call>{"name": "f"}</tool_call>', "", [("f", "{}")]),
    ('<tool_call>{"arguments": {}, "name": "f"}', "", [("f", "{}")]),  # the end of the text closes it
    ("<tool_call>not JSON</tool_call> so", "<tool_call>not JSON</tool_call> so", []),
    ('<tool_call>{"name": 1, "arguments": {}}', '<tool_call>{"name": 1, "arguments": {}}', []),
    ('<tool_call>{"name": "f", "arguments": {"x": "cut', "", [("f", '{"x": "cut')]),
    ("ends in <tool_c", "ends in <tool_c", []),
]


def read(pieces: list[str], **options: Any) -> tuple[str, list[tuple[str, str]]]:
    reader, calls, said = HermesReader(**options), Calls(), ""
    for text, found in [*(reader.put(p) for p in pieces), reader.end()]:
        said += text
        calls.add(found)
    assert reader.called == bool(calls.calls) and len({c["id"] for c in calls.calls}) == len(calls.calls)
    return said, [(c["function"]["name"], c["function"]["arguments"]) for c in calls.calls]


@pytest.mark.parametrize(("text", "said", "calls"), CASES)
def test_what_is_read(text: str, said: str, calls: list[tuple[str, str]]) -> None:
    """At once, letter by letter, and cut at random."""
    rng = random.Random(len(text))
    cuts = sorted(rng.choices(range(len(text)), k=4))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]
    for pieces in ([text], list(text), parts):
        assert read(pieces) == (said, calls)


@given(
    st.lists(
        st.sampled_from(["<tool_call>", "</tool_call>", '{"name": "f", "arguments": {', "}}", '"', "a", "\\"])
    )
)
def test_any_text_is_read_the_same_in_pieces(parts: list[str]) -> None:
    assert read(parts) == read(["".join(parts)])


def test_arguments_come_as_they_are_written() -> None:
    reader = HermesReader()
    reader.put('<tool_call>{"name": "f", "arguments": {"x": ')
    assert [p.arguments for p in reader.put("1, ")[1]] == ["1, "]


def test_one_call_where_one_is_allowed() -> None:
    assert read([f"{CALL}\n{CALL}"], parallel=False) == ("", [("f", '{"x": 1}')])


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def fields(**given: Any) -> ChatFields:
    return ChatFields.model_validate({"messages": [], **given})


def test_choices() -> None:
    assert Tools.of(fields()) is None and Tools.of(fields(tools=[], tool_choice="auto")) is None
    assert Tools.of(fields(tools=[TOOL], tool_choice="none")) is None
    auto = Tools.of(fields(tools=[TOOL]))
    assert auto is not None and auto.grammar() is None and auto.offered == [TOOL]
    must = Tools.of(
        fields(tools=[TOOL, {"type": "function", "function": {"name": "g"}}], tool_choice="required")
    )
    assert must is not None and "call+" in str(must.grammar()) and "anyOf" in str(must.grammar())
    one = Tools.of(fields(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "f"}}))
    assert one is not None and one.named and "start: call\n" in str(one.grammar())


@pytest.mark.parametrize(
    ("param", "given"),
    [
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": "g"}),
        ("tool_choice", {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}),
        ("tools.0.function", {"tools": [{}]}),
        ("tools.0.function", {"tools": [{"function": {"name": 'a"b'}}]}),
        ("tools.0.function.parameters", {"tools": [{"function": {"name": "f", "parameters": 3}}]}),
        ("tools", {"tools": [TOOL] * 129}),
    ],
)
def test_what_is_no_tool(param: str, given: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as found:
        Tools.of(fields(**given))
    assert (found.value.status, found.value.param) == (400, param)
