"""The prompts that a user gave, as text: arguments and standard input in any locale."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final

from tyir.diagnostics import TyirError
from tyir.process.streams import read_input
from tyir.tools.tokenizer import tokenizing

__all__ = ["read_prompts", "token_ids"]

_MAX_BYTES: Final = 64 << 20  # of standard input
_FIRST_LOOK: Final = 1 << 16  # characters that are tokenized before all of a long prompt


def read_prompts(given: Sequence[str] | None) -> list[str]:
    """The prompts of `--prompt`, else all of standard input; `TyirError` for bytes that are not UTF-8."""
    return [_argument(text) for text in given] if given else [_standard_input()]


def _argument(text: str) -> str:
    """An argument whose bytes the locale could not decode (`surrogateescape`), as UTF-8."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        pass
    try:
        return os.fsencode(text).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8("--prompt", error) from None
    except UnicodeEncodeError as error:  # half of a pair, which no bytes stand for
        raise TyirError(
            f"--prompt holds the surrogate {text[error.start]!r} at character {error.start}, which is not"
            " text",
            help="give the prompt as UTF-8",
        ) from None


def _standard_input() -> str:
    try:
        content = read_input(_MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8("the prompt on standard input", error) from None
    except OSError as error:
        raise TyirError(f"cannot read standard input: {error.strerror}", help="give --prompt TEXT") from None
    return content.replace("\r\n", "\n")


def _not_utf8(what: str, error: UnicodeDecodeError) -> TyirError:
    byte = error.object[error.start]
    return TyirError(
        f"{what} is not UTF-8: byte 0x{byte:02x} at {error.start}", help="convert it: iconv -t UTF-8"
    )


def token_ids(tokenizer: Any, prompt: str, capacity: int | None = None) -> list[int]:
    """The tokens of a prompt; `TyirError` when there are none, or clearly more than `capacity`.

    A text that begins with the beginning-of-sequence token, as chat templates write it, does not get a second
    one from tokenizers that put one before every text.
    """
    if capacity is not None:
        _refuse_too_long(tokenizer, prompt, capacity)
    ids = _ids(tokenizer, prompt)
    begin, token = tokenizer.bos_token_id, tokenizer.bos_token
    if token and prompt.startswith(token):
        own = _ids(tokenizer, prompt, add_special_tokens=False)
        if own[:1] == [begin] and ids[: len(own) + 1] == [begin, *own]:
            del ids[0]
    if not ids:
        what = "is empty" if not prompt else f"{prompt[:40]!r} makes no tokens"
        raise TyirError(f"the prompt {what}: there is nothing to continue", help="give some text")
    return ids


def _ids(tokenizer: Any, text: str, **options: bool) -> list[int]:
    with tokenizing("cannot tokenize the prompt"):
        return [int(token) for token in tokenizer(text, **options)["input_ids"]]


def _refuse_too_long(tokenizer: Any, prompt: str, capacity: int) -> None:
    """A megabyte takes seconds to tokenize, so the beginning of a long prompt is first, then twice as much
    and so on: that alone may be too long.

    The last word is cut, and its letters may have been one token: hence the margin.
    """
    length = _FIRST_LOOK
    while length < len(prompt):
        if (count := len(_ids(tokenizer, prompt[:length]))) > 2 * capacity + 1000:
            raise TyirError(
                f"the prompt does not fit: {length} of its {len(prompt)} characters make {count} tokens, and"
                f" the cache has {capacity} positions",
                help=f"shorten it, or compile with --max-kv {2 * count} or more",
            )
        length *= 2
