"""Token ids that somebody gives to a session: whole numbers of the vocabulary, or a message."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from tyir.diagnostics import TyirError

__all__ = ["checked_ids"]


def checked_ids(ids: Sequence[int], vocabulary: int | None, what: str = "") -> list[int]:
    """The ids as Python's own integers (numpy's are welcome).

    `what` begins the messages: "sequence 1: ".  `TyirError` for text, for what is not a whole number, and for
    ids beyond a vocabulary.
    """
    if isinstance(ids, str):
        raise TyirError(
            f"{what}a session runs token ids, not text",
            help="load_tokenizer(session.artifacts) of tyir.tools.tokenizer makes ids of text",
        )
    found = []
    for given in ids:
        try:
            token = operator.index(given)
        except TypeError:
            raise TyirError(
                f"{what}{given!r} is not a token id", help="a prompt is a list of whole numbers"
            ) from None
        if token < 0 or (vocabulary is not None and token >= vocabulary):
            raise TyirError(
                f"{what}token {token} is not in the vocabulary of {vocabulary}",
                help="give ids of the model's own tokenizer",
            )
        found.append(token)
    return found
