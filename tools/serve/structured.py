"""Text that is held to a grammar: JSON schemas, regular expressions, choices, through llguidance.

https://github.com/guidance-ai/llguidance: which tokens may follow is asked for each token.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.runtime_sim.serving.choosing import Constraint
from tyir.tools.serve.async_engine import AsyncEngine
from tyir.tools.serve.errors import RequestError, json_text

__all__ = ["constraint_of"]

_MOST_CHARACTERS: Final = 1 << 16
_MOST_CHOICES: Final = 1024
_SPACE: Final = r"[ \t\n]{0,16}"  # between the parts of JSON: small models fill answers with it otherwise


def constraint_of(
    response_format: Mapping[str, Any] | None,
    structured: Mapping[str, Any] | None,
    engine: AsyncEngine,
    grammar: str | None = None,
) -> Callable[[], Constraint] | None:
    """What makes the constraint of an answer; None when anything may be said.  `RequestError` for a grammar
    that cannot be used, or when llguidance is not installed.

    `grammar`: llguidance's Lark that goes before what the others say, of a call that must be made.
    """
    param = "response_format" if response_format is not None else "structured_outputs"
    param = "tools" if grammar is not None else param
    found = ("grammar", grammar) if grammar is not None else _grammar(response_format or {}, structured or {})
    if found is None:
        return None
    if importlib.util.find_spec("llguidance") is None:
        raise RequestError(
            400, f"{param} needs llguidance, which is not installed: pip install 'tyir[serve]'", param
        )
    kind, text = found
    if len(text) > _MOST_CHARACTERS:
        raise RequestError(400, f"{param} has {len(text)} characters, it may have {_MOST_CHARACTERS}", param)
    from llguidance import LLMatcher

    tokenizer = _tokenizer(engine)
    make = {
        "schema": partial(LLMatcher.grammar_from_json_schema, defaults={"whitespace_pattern": _SPACE}),
        "regex": LLMatcher.grammar_from_regex,
        "grammar": LLMatcher.grammar_from_lark,
    }[kind]
    try:
        made = make(text)
        problem = LLMatcher.validate_grammar(made, tokenizer)
    except Exception as error:  # the library's own, of several kinds
        problem = str(error)
    if problem:
        raise RequestError(400, f"Grammar error: {problem.splitlines()[0][:300]}", param)
    return lambda: _Grammar(LLMatcher(tokenizer, made), engine)


def _grammar(response_format: Mapping[str, Any], structured: Mapping[str, Any]) -> tuple[str, str] | None:
    """The kind of a grammar, and its text."""
    match response_format.get("type"):
        case None | "text":
            pass
        case "json_object":
            return "schema", '{"type":"object"}'
        case "json_schema":
            holder = response_format.get("json_schema")
            schema = holder.get("schema") if isinstance(holder, dict) else None
            if not isinstance(schema, (dict, bool)):
                raise RequestError(
                    400, "response_format.json_schema.schema must be a schema", "response_format"
                )
            return "schema", json_text(schema, "response_format")
        case other:
            raise RequestError(
                400, f"response_format of type {str(other)[:40]!r} is not known", "response_format"
            )
    given = {k: v for k, v in structured.items() if v is not None}
    if not given:
        return None
    if len(given) > 1:
        raise RequestError(
            400, "structured_outputs takes one of json, regex, choice, grammar", "structured_outputs"
        )
    ((name, value),) = given.items()
    if name == "json" and isinstance(value, (dict, str)):
        return "schema", value if isinstance(value, str) else json_text(value, "structured_outputs")
    if name in ("regex", "grammar") and isinstance(value, str):
        return name, value
    texts = [v for v in value if isinstance(v, str) and v] if isinstance(value, list) else []
    if name == "choice" and 0 < len(texts) <= _MOST_CHOICES and texts == value:
        return "regex", "|".join(f"({re.escape(v)})" for v in texts)
    raise RequestError(400, f"structured_outputs.{str(name)[:40]} cannot be used", "structured_outputs")


class _Grammar:
    """One answer's place in a grammar."""

    def __init__(self, matcher: Any, engine: AsyncEngine) -> None:
        self._matcher = matcher
        self._vocabulary = engine.engine.vocabulary
        self._ends = sorted(engine.ends)

    def allowed(self) -> npt.NDArray[np.bool_] | None:
        mask = np.zeros(self._vocabulary, np.bool_)
        if self._matcher.is_stopped():
            mask[self._ends] = True
            return mask
        bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), np.uint8), bitorder="little")
        mask[: len(bits)] = bits[: self._vocabulary]
        return mask

    def accept(self, token: int) -> None:
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


@lru_cache(maxsize=1)
def _tokenizer(engine: AsyncEngine) -> Any:
    """llguidance's form of the tokenizer; made once, in about a second for a large vocabulary."""
    from llguidance import LLTokenizer

    backend = getattr(engine.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise RequestError(
            400, "structured output needs a tokenizer.json with the artifacts", "response_format"
        )
    return LLTokenizer(backend.to_str(), n_vocab=engine.engine.vocabulary, eos_token=sorted(engine.ends))
