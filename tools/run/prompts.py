"""The prompts that a user gave, as text: arguments and standard input in any locale."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from tyir.diagnostics import TyirError
from tyir.process.streams import read_input

__all__ = ["read_prompts", "token_ids"]


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
        content = read_input().decode("utf-8")
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


def token_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt; `TyirError` when there are none.

    A text that begins with the beginning-of-sequence token, as chat templates write it, does not get a second
    one from tokenizers that put one before every text.
    """
    ids = [int(token) for token in tokenizer(prompt)["input_ids"]]
    begin, token = tokenizer.bos_token_id, tokenizer.bos_token
    if token and prompt.startswith(token):
        own = list(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        if own[:1] == [begin] and ids[: len(own) + 1] == [begin, *own]:
            del ids[0]
    if not ids:
        what = "is empty" if not prompt else f"{prompt[:40]!r} makes no tokens"
        raise TyirError(f"the prompt {what}: there is nothing to continue", help="give some text")
    return ids
