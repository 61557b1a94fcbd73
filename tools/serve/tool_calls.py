"""Tools: what a request offers, and the calls in an answer, as Hermes models write them.

    <tool_call>
    {"name": "weather", "arguments": {"city": "Oslo"}}
    </tool_call>

NousResearch's format, which Qwen's chat templates ask for too.  Answers are read as they come: a call's name
is told as soon as it is known, its arguments piece by piece as they are written, the same text in the end as
when nothing is streamed.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from tyir.tools.serve.errors import RequestError, json_text
from tyir.tools.serve.fields import ChatFields

__all__ = ["CallPiece", "Calls", "HermesReader", "Tools"]

_OPEN: Final = "<tool_call>"
_CLOSE: Final = "</tool_call>"
_HEAD: Final = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOST_TOOLS: Final = 128  # as OpenAI's
_MOST_HEAD: Final = 4096  # characters within which a call must have named itself to be streamed


@dataclass(frozen=True)
class Tools:
    """Functions that may be called: `choice` is "auto", "required", or the one that must be."""

    functions: tuple[Mapping[str, Any], ...]
    choice: str = "auto"
    named: bool = False
    parallel: bool = True

    @classmethod
    def of(cls, fields: ChatFields) -> Tools | None:
        """What a request offers; None when nothing may be called.  `RequestError` for what is no tool."""
        choice = fields.tool_choice
        if not fields.tools:
            if choice not in (None, "none", "auto"):
                raise RequestError(400, "when using tool_choice, tools must be set", "tool_choice")
            return None
        if len(fields.tools) > _MOST_TOOLS:
            raise RequestError(400, f"tools may hold {_MOST_TOOLS}, got {len(fields.tools)}", "tools")
        functions = tuple(_function(tool, number) for number, tool in enumerate(fields.tools))
        if choice == "none":
            return None
        parallel = fields.parallel_tool_calls is not False
        if choice in (None, "auto", "required"):
            return cls(functions, str(choice or "auto"), parallel=parallel)
        holder = choice.get("function") if isinstance(choice, dict) else None
        name = holder.get("name") if isinstance(holder, dict) else None
        if name not in [f["name"] for f in functions]:
            raise RequestError(
                400, "tool_choice must be none, auto, required, or the function of a tool", "tool_choice"
            )
        return cls(functions, str(name), named=True, parallel=False)

    @property
    def offered(self) -> list[dict[str, Any]]:
        """As chat templates take them."""
        return [{"type": "function", "function": dict(f)} for f in self.functions]

    def grammar(self) -> str | None:
        """What an answer that must be a call is held to, for llguidance; None when it may be anything.

        `RequestError` where the tools' schemas contradict one another.
        """
        if self.choice == "auto":
            return None
        chosen = [f for f in self.functions if not self.named or f["name"] == self.choice]
        shared: dict[str, Any] = {}  # what schemas refer to by `#/$defs/..`, which is looked for at the root
        forms = []
        for function in chosen:
            own = {"type": "object", **(function.get("parameters") or {})}
            for name, schema in (own.pop("$defs", None) or {}).items():
                if shared.setdefault(name, schema) != schema:
                    raise RequestError(400, f"two tools define $defs.{name[:64]} differently", "tools")
            forms.append(
                {
                    "type": "object",
                    "properties": {"name": {"const": function["name"]}, "arguments": own},
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        whole: dict[str, Any] = {"anyOf": forms} if len(forms) > 1 else forms[0]
        if shared:
            whole["$defs"] = shared
        schema = json_text({**whole, "x-guidance": {"whitespace_pattern": " ?"}}, "tools")
        many = "call+" if self.parallel else "call"
        return f'start: {many}\ncall: "{_OPEN}\\n" body "\\n{_CLOSE}" /\\n?/\nbody: %json {schema}\n'


def _function(tool: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(function, dict) or not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            400,
            'a tool is {"type": "function", "function": {"name": .., "parameters": {..}}}, and a name has 1'
            " to 64 letters, digits, dots, dashes and underscores",
            f"tools.{number}.function",
        )
    parameters = function.get("parameters")
    shared = parameters.get("$defs") if isinstance(parameters, dict) else None
    if not isinstance(parameters, (dict, type(None))) or not isinstance(shared, (dict, type(None))):
        raise RequestError(
            400, "parameters must be the JSON schema of an object", f"tools.{number}.function.parameters"
        )
    return function


@dataclass(frozen=True)
class CallPiece:
    """A part of call number `index`: its `id` and `name` first, then its arguments, which are JSON."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""

    def body(self) -> dict[str, Any]:
        """As a stream of OpenAI's has it."""
        head = {"id": self.id, "type": "function"} if self.id is not None else {}
        named = {"name": self.name} if self.name is not None else {}
        return {"index": self.index, **head, "function": {**named, "arguments": self.arguments}}


@dataclass
class Calls:
    """Pieces put together."""

    calls: list[dict[str, Any]] = field(default_factory=list)

    def add(self, pieces: Sequence[CallPiece]) -> None:
        for piece in pieces:
            if piece.id is not None:
                function = {"name": piece.name, "arguments": ""}
                self.calls.append({"id": piece.id, "type": "function", "function": function})
            self.calls[piece.index]["function"]["arguments"] += piece.arguments


class HermesReader:
    """Tells calls from the text of one answer.

        text, pieces = reader.put(part)      # .. and in the end
        text, pieces = reader.end()

    What does not hold a call although it says so is text.  Without `parallel` calls after the first are left
    out.
    """

    def __init__(self, *, parallel: bool = True) -> None:
        self._parallel = parallel
        self._held = ""
        self._state = self._outside
        self._count = 0
        self._depth = 0
        self._quoted = self._escaped = False

    @property
    def called(self) -> bool:
        """Whether there was a call."""
        return self._count > 0

    def put(self, text: str) -> tuple[str, list[CallPiece]]:
        self._held += text
        return self._collect(self._read(end=False))

    def end(self) -> tuple[str, list[CallPiece]]:
        """Nothing follows."""
        return self._collect(self._read(end=True))

    def _collect(self, found: Iterator[str | CallPiece]) -> tuple[str, list[CallPiece]]:
        texts, pieces = [], []
        for part in found:
            if isinstance(part, str):
                texts.append(part)
            elif self._parallel or part.index == 0:
                pieces.append(part)
        return "".join(texts), pieces

    def _read(self, end: bool) -> Iterator[str | CallPiece]:
        """Go through the states for as long as one of them gets on."""
        before = None
        while self._held and before != (self._state, self._held):
            before = self._state, self._held
            yield from self._state(end)

    def _outside(self, end: bool) -> Iterator[str | CallPiece]:
        at = self._held.find(_OPEN)
        if at >= 0:
            text, self._held = self._held[:at], self._held[at + len(_OPEN) :]
            self._state = self._head
        else:
            kept = 0 if end else _begun(self._held, _OPEN)
            if self._count and not self._held.strip():
                kept = len(self._held)  # between calls and after the last: of no meaning
            text, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        if text and not (self._count and not text.strip()):
            yield text

    def _head(self, end: bool) -> Iterator[str | CallPiece]:
        match = _HEAD.match(self._held[:_MOST_HEAD])
        name = _text(match[1]) if match is not None else None
        if match is not None and name is not None:
            self._held = self._held[match.end() :]
            self._depth, self._quoted, self._escaped = 0, False, False
            self._state = self._arguments
            yield self._begin(name)
            return
        at = self._held.find(_CLOSE)
        if at < 0 and not end:
            return
        body, self._held = (self._held, "") if at < 0 else (self._held[:at], self._held[at + len(_CLOSE) :])
        self._state = self._outside
        call = _call(body)
        if call is None:
            yield _OPEN + body + (_CLOSE if at >= 0 else "")
        else:
            yield self._begin(call[0])
            yield CallPiece(self._count - 1, arguments=call[1])

    def _arguments(self, end: bool) -> Iterator[str | CallPiece]:
        """Up to the brace that closes the first one."""
        for number, character in enumerate(self._held):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    text, self._held = self._held[: number + 1], self._held[number + 1 :]
                    self._state = self._tail
                    yield CallPiece(self._count - 1, arguments=text)
                    return
        text, self._held = self._held, ""
        yield CallPiece(self._count - 1, arguments=text)

    def _tail(self, end: bool) -> Iterator[str | CallPiece]:
        """What closes a call says nothing."""
        at = self._held.find(_CLOSE)
        if at >= 0:
            self._held = self._held[at + len(_CLOSE) :]
            self._state = self._outside
        elif end:
            self._held = ""
        yield from ()

    def _begin(self, name: str) -> CallPiece:
        self._count += 1
        return CallPiece(self._count - 1, f"chatcmpl-tool-{uuid.uuid4().hex}", name)


def _begun(text: str, mark: str) -> int:
    """How many characters at the end of a text are the beginning of a mark."""
    return next((n for n in range(min(len(mark) - 1, len(text)), 0, -1) if text.endswith(mark[:n])), 0)


def _text(quoted: str) -> str | None:
    try:
        return str(json.loads(quoted, strict=False))
    except ValueError:
        return None


def _call(body: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is written in another order; None when it is none."""
    try:
        said = json.loads(body, strict=False)
    except (ValueError, RecursionError):
        return None
    name = said.get("name") if isinstance(said, dict) else None
    arguments = said.get("arguments", {}) if isinstance(said, dict) else None
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return name, json.dumps(arguments, ensure_ascii=False)
