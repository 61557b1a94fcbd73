"""What single tokens are, as text and as bytes: for log-probabilities."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Final

from tyir.tools.tokenizer import tokenizing

__all__ = ["TokenTexts"]

_BYTE: Final = re.compile(r"<0x([0-9A-F]{2})>")  # as SentencePiece writes a byte
_SPACE: Final = "\u2581"  # as SentencePiece writes a space


def _byte_names() -> dict[str, int]:
    """The character that byte-level BPE writes for a byte (Radford et al., GPT-2's `bytes_to_unicode`)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


class TokenTexts:
    """The tokens of one tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._byte_level = "ByteLevel" in str(getattr(backend, "decoder", ""))
        self._special = set(tokenizer.all_special_ids)
        self._names = _byte_names()
        self.bytes_of = lru_cache(maxsize=1 << 16)(self._bytes_of)

    def text_of(self, token: int) -> str:
        """With replacement characters for bytes that are no characters."""
        return self.bytes_of(token).decode("utf-8", "replace")

    def name_of(self, token: int) -> str:
        """As the vocabulary spells it."""
        return str(self._tokenizer.convert_ids_to_tokens(token))

    def _bytes_of(self, token: int) -> bytes:
        name = self.name_of(token)
        if token in self._special:
            return name.encode("utf-8", "replace")
        if self._byte_level and all(c in self._names for c in name):
            return bytes(self._names[c] for c in name)
        if (match := _BYTE.fullmatch(name)) is not None:
            return bytes([int(match[1], 16)])
        if name.startswith(_SPACE):
            return name.replace(_SPACE, " ").encode("utf-8", "replace")
        with tokenizing("cannot decode a token"):
            return str(self._tokenizer.decode([token])).encode("utf-8", "replace")
