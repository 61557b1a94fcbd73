"""Texts that end an answer: however the text is cut, what is shown is the same."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tyir.tools.serve.stop_strings import StopStrings


def shown(pieces: list[str], stops: list[str], include: bool) -> tuple[str, str | None]:
    texts = StopStrings(stops, include=include)
    out = ""
    for piece in pieces:
        text, stop = texts.put(piece)
        out += text
        if stop is not None:
            return out, stop
    return out + texts.end(), None


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stops", [[], ["ab"], ["b", "ba"], ["aab", "bb"], ["abab", "bab", "aaaa"]])
def test_every_way_to_cut_a_text(stops: list[str], include: bool) -> None:
    for text in ("".join(letters) for letters in product("ab", repeat=6)):
        ends = [(text.find(s) + len(s), text.find(s), s) for s in stops if s in text]
        wanted: tuple[str, str | None] = (text, None)
        if ends:
            end, at, stop = min(ends)
            wanted = text[: end if include else at], stop
        for count in range(len(text)):
            for cuts in combinations(range(1, len(text)), count):
                pieces = [text[a:b] for a, b in zip((0, *cuts), (*cuts, len(text)))]
                assert shown(pieces, stops, include) == wanted


def test_text_is_held_back_only_where_a_stop_could_begin() -> None:
    texts = StopStrings(["er, w"])
    put = [texts.put(p) for p in ("k", "eep", "er", ", x")]
    assert put == [("k", None), ("eep", None), ("", None), ("er, x", None)]
    assert texts.put("er,")[0] == "" and texts.put(" way") == ("", "er, w")
