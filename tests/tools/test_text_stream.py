"""Streamed text is the text of all tokens decoded at once, for every kind of tokenizer and any tokens."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest

from tests.tools.tokenizers_built import BUILDERS, TEXTS
from tyir.tools.run.text_stream import TextStream, continuation, decode, pieces

ROUNDS = int(os.environ.get("TYIR_STREAM_ROUNDS", "6"))


SLOW = ("CanineTokenizer",)  # makes a table of all code points
KINDS = [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in BUILDERS]


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "_"))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return BUILDERS[request.param](tmp_path_factory.mktemp("tokenizer"))


def some_tokens(tokenizer: Any, rng: random.Random) -> list[int]:
    """Random ids, runs of one kind, pieces of real texts and special tokens, one after the other."""
    size = min(len(tokenizer), 0x3000)  # of CANINE's code points, those before the surrogates
    special = [i for i in tokenizer.all_special_ids if i < size] or [0]
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    tokens: list[int] = []
    while len(tokens) < rng.choice((3, 20, 150)):
        kind = rng.randrange(5)
        if kind == 0:
            tokens += rng.choices(range(size), k=rng.randrange(1, 8))
        elif kind == 1:  # neighbours: bytes come after bytes
            first = rng.randrange(size)
            tokens += [min(first + rng.randrange(4), size - 1) for _ in range(rng.randrange(1, 60))]
        elif kind == 2:
            tokens.append(rng.choice(special))
        else:
            text = rng.choice(texts)
            if text:
                start = rng.randrange(len(text))
                tokens += text[start : start + rng.randrange(1, 30)]
    return tokens


def test_the_stream_is_the_whole(tokenizer: Any) -> None:
    rng = random.Random(7)
    for _ in range(ROUNDS):
        tokens = some_tokens(tokenizer, rng)
        stream = TextStream(tokenizer)
        assert "".join(pieces(stream, iter(tokens))) == decode(tokenizer, tokens), tokens


def test_the_stream_continues_its_context(tokenizer: Any) -> None:
    """What is printed after a prompt is what all tokens say after what the prompt's say."""
    rng = random.Random(8)
    for _ in range(ROUNDS):
        tokens, text = some_tokens(tokenizer, rng), rng.choice(TEXTS).strip()
        prompt = tokenizer(text)["input_ids"]
        before, whole = decode(tokenizer, prompt), decode(tokenizer, [*prompt, *tokens])
        if whole.startswith(before):  # else a byte has made the prompt's last characters others
            assert before + continuation(tokenizer, prompt, tokens) == whole, (text, tokens)


def test_text_comes_as_it_is_made(tokenizer: Any) -> None:
    """Nothing but the end of the text is held back, however long it is."""
    tokens = [t for text in TEXTS * 4 for t in tokenizer(text, add_special_tokens=False)["input_ids"]]
    stream, shown = TextStream(tokenizer), 0
    for count, token in enumerate(tokens, 1):
        shown += len(stream.put(token))
        if count % 50 == 0:
            whole = len(decode(tokenizer, tokens[:count]))
            assert shown >= whole - 40, (shown, whole)
