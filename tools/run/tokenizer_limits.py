"""What a tokenizer's files may ask of the library that reads them.

The `tokenizers` library believes a tokenizer.json: a normaliser may turn a character into a megabyte, forty
in a row may double the text each, and where the memory for that is not there the process is ended from
within.  Sizes and growth are therefore bounded by what the file says, before it is loaded.  The largest in
use have 900,000 tokens, or 7,000 added ones, and replace a character by three.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from typing import Any, Final

from tyir.process.files import json_kind

__all__ = ["MAX_BYTES", "tokenizer_problem"]

MAX_BYTES: Final = 64 << 20  # of each of a tokenizer's files
_MOST_TOKENS: Final = 1 << 20
_MOST_ADDED: Final = 20_000
_MOST_GROWTH: Final = 64  # characters that one becomes, in all steps together
_MOST_STEPS: Final = 1000  # of a post-processor's template
_DEEPEST: Final = 32  # sequences within sequences


def tokenizer_problem(data: bytes) -> str | None:
    """What is wrong with a tokenizer.json beyond what its reader says; None when nothing is."""
    try:
        content = json.loads(data)
    except RecursionError:
        return "its lists or objects are nested too deeply"
    except ValueError:
        return None  # which the reader says better
    if not isinstance(content, dict):
        return f"it holds a JSON {json_kind(content)}, an object is needed"
    model, added = content.get("model"), content.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    for what, value, most in (("tokens", vocabulary, _MOST_TOKENS), ("added tokens", added, _MOST_ADDED)):
        if isinstance(value, (dict, list)) and len(value) > most:
            return f"it has {len(value)} {what}, more than the {most} it may have"
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        for step in _steps(content.get(part)):
            growth *= _growth(step)
        if growth > _MOST_GROWTH:
            return f"its {part} makes {growth:.0f} characters of one, more than the {_MOST_GROWTH} it may"
    steps = sum(
        len(step[key])
        for step in _steps(content.get("post_processor"))
        for key in ("single", "pair", "special_tokens")
        if isinstance(step.get(key), (list, dict))
    )
    if steps > _MOST_STEPS:
        return f"its post_processor has {steps} steps, more than the {_MOST_STEPS} it may have"
    return None


def _steps(value: Any, depth: int = 0) -> Iterator[Mapping[str, Any]]:
    """A component, or those that a sequence is made of."""
    if not isinstance(value, dict) or depth > _DEEPEST:
        return
    yield value
    for inner in value.values():
        for item in inner if isinstance(inner, list) else ():
            yield from _steps(item, depth + 1)


def _growth(step: Mapping[str, Any]) -> float:
    """How many characters a step makes of one at most."""
    kind, content = step.get("type"), step.get("content")
    if kind == "Replace" and isinstance(content, str):
        pattern = step.get("pattern")
        text = pattern.get("String") if isinstance(pattern, dict) else None
        return max(1.0, len(content) / len(text) if isinstance(text, str) and text else len(content) + 1)
    if kind == "Prepend":
        return 1.0 + len(str(step.get("prepend", "")))
    if kind == "Precompiled" and isinstance(step.get("precompiled_charsmap"), str):
        return _longest_replacement(step["precompiled_charsmap"])
    return 1.0


def _longest_replacement(text: str) -> float:
    """Of SentencePiece's table: the length of a trie in a word, the trie, then texts that each end in 0."""
    try:
        table = base64.b64decode(text)
    except ValueError:
        return 1.0  # which the reader says better
    texts = table[4 + int.from_bytes(table[:4], "little") :]
    return max(1.0, max(map(len, texts.split(b"\0"))) / 4)
