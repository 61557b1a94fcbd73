"""Text of tokens as they come, the same as decoding all of them at once.

    stream = TextStream(tokenizer, context=prompt_ids)
    for token in tokens: print(stream.put(token), end="")
    print(stream.end())

What a token says depends on its neighbours: SentencePiece drops the space before the first one, WordPiece
joins with `##`, a character may be made of several byte tokens.  As vLLM and TGI do, a window of the last
tokens is decoded anew for each (https://github.com/vllm-project/vllm, `detokenizer_utils.py`: prefix and read
offset), so that time does not grow with the text.  Two things make it exact: the end of the window's text is
held back while another token could still change it, and the window begins anew only where its text is then
the end of what the longer window gave.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from tyir.tools.tokenizer import tokenizing

__all__ = ["TextStream", "continuation", "decode", "pieces"]

_WINDOW: Final = 16  # tokens a window begins with
_LONGEST: Final = 48  # tokens at which it is begun anew
_SETTLED: Final = 8  # characters of context before what is still to be shown
_REPLACEMENT: Final = "\ufffd"  # what decoders write for bytes that are no character, or not yet
_SEARCHED: Final = 4096  # ids looked at for probes


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of all tokens at once, special tokens left out."""
    return _decoded(tokenizer, ids)


def _decoded(tokenizer: Any, ids: Sequence[int], skip: bool = True, **options: bool) -> str:
    with tokenizing("cannot decode the answer"):
        return str(tokenizer.decode(list(ids), skip_special_tokens=skip, **options))


class TextStream:
    """Text of the tokens after `context`, each piece once it is final; special tokens are left out with
    `skip`.
    """

    def __init__(self, tokenizer: Any, context: Sequence[int] = (), *, skip: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip
        self._clean = _Cleaner(tokenizer.clean_up_tokenization) if _cleans_up(tokenizer) else None
        self._probes = _probes(tokenizer)
        self._window = list(context)
        text = self._raw(self._window)
        self._shown = len(text)  # characters of the window's text that have been given out
        if self._clean is not None:
            self._clean.follow(text)
        self._shorten(text)

    def put(self, token: int) -> str:
        """The text that has become final with this token."""
        self._window.append(token)
        text = self._raw(self._window)
        final = self._final(text)
        new = text[self._shown : final]
        self._shown = max(self._shown, final)
        if len(self._window) >= _LONGEST:
            self._shorten(text)
        return new if self._clean is None else self._clean.put(new)

    def skip(self, token: int) -> None:
        """A token whose text is not wanted before that of a later one, or the end's."""
        self._window.append(token)

    def end(self) -> str:
        """What was held back; nothing follows it."""
        text = self._raw(self._window)
        new, self._shown = text[self._shown :], len(text)
        return new if self._clean is None else self._clean.put(new) + self._clean.end()

    def _raw(self, ids: Sequence[int]) -> str:
        """Text before transformers' removal of spaces."""
        if not ids:
            return ""  # which some decoders cannot be asked
        options = {} if self._clean is None else {"clean_up_tokenization_spaces": False}
        return _decoded(self._tokenizer, ids, self._skip, **options)

    def _final(self, text: str) -> int:
        """How many characters of the window's text no further token changes.

        A run of byte tokens (`<0xE2>`) that ends in no character becomes all replacement characters, `@@` at
        the end of a piece goes with the next piece: so a few tokens are tried.
        """
        common = [text, *(self._raw([*self._window, probe]) for probe in self._probes)]
        changes = (i for i, column in enumerate(zip(*common)) if len(set(column)) > 1)
        same = next(changes, min(map(len, common)))
        return len(text[:same].rstrip(_REPLACEMENT))

    def _shorten(self, text: str) -> None:
        """Begin the window later, where that leaves the rest of its text as it is."""
        left = len(text) - self._shown
        for start in range(max(len(self._window) - _WINDOW, 0), 0, -_WINDOW // 2):
            later = self._raw(self._window[start:])
            if len(later) - left >= _SETTLED and text.endswith(later):
                self._window, self._shown = self._window[start:], len(later) - left
                return
            if len(self._window) - start > 2 * _LONGEST:
                return  # there may be no such place; the next token tries again


def continuation(tokenizer: Any, context: Sequence[int], tokens: Sequence[int]) -> str:
    """The text that tokens add to their context's."""
    stream = TextStream(tokenizer, context)
    return "".join(map(stream.put, tokens)) + stream.end()


def pieces(stream: TextStream, tokens: Iterator[int]) -> Iterator[str]:
    """The text of each token as it comes, then what was held back."""
    for token in tokens:
        yield stream.put(token)
    yield stream.end()


@functools.lru_cache(maxsize=4)  # a server asks for every answer
def _probes(tokenizer: Any) -> Sequence[int]:
    """Tokens that show what may still change when one follows: a byte that begins no character, a word, and
    what goes on with one.
    """
    special, found = set(tokenizer.all_special_ids), dict[str, int]()
    with contextlib.suppress(ValueError, KeyError):  # of a tokenizer that has no such names
        byte = tokenizer.convert_tokens_to_ids("<0xFF>")
        if isinstance(byte, int) and byte != tokenizer.unk_token_id:
            found["byte"] = byte
    for token in range(min(len(tokenizer), _SEARCHED)):
        if "word" in found and "part" in found:
            break
        if token in special:
            continue
        text = _decoded(tokenizer, [token, token])
        if re.fullmatch(r"\s*[A-Za-z]+\s[A-Za-z]+\s*", text):
            found.setdefault("word", token)
        elif re.fullmatch(r"[#A-Za-z]+", text):
            found.setdefault("part", token)
    return list(found.values())


# ------------------------------------------------------------------------------------- transformers' clean-up


def _cleans_up(tokenizer: Any) -> bool:
    """Whether transformers removes spaces before punctuation from what this tokenizer decodes."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    backend = getattr(tokenizer, "backend_tokenizer", None)
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    return type(getattr(backend, "model", None)).__name__ != "BPE" or getattr(tokenizer, forced, False)


class _Cleaner:
    """`clean_up_tokenization` of a text that comes in pieces.

    It replaces ` .` and `n't` by what they mean, each with its space, so a text may be cut before a space
    that no quotation mark stands beside.
    """

    _CUT: Final = re.compile(r"(?<! ') (?=[^ '][^ ]| [^' ]|'[a-z])")

    def __init__(self, clean: Callable[[str], str]) -> None:
        self._cleaned = clean
        self._held = ""
        self._given = 0  # characters of the held text's clean form that were given out already

    def follow(self, text: str) -> None:
        """Take up after text that was given out elsewhere."""
        self._held = text[self._last_cut(text) :]
        self._given = len(self._cleaned(self._held))

    def put(self, text: str) -> str:
        self._held += text
        cut = self._last_cut(self._held)
        if not cut:
            return ""
        ready, self._held = self._cleaned(self._held[:cut]), self._held[cut:]
        new, self._given = ready[self._given :], max(self._given - len(ready), 0)
        return new

    def end(self) -> str:
        ready, self._held = self._cleaned(self._held), ""
        return ready[self._given :]

    def _last_cut(self, text: str) -> int:
        cuts = [match.start() for match in self._CUT.finditer(text)]
        return cuts[-1] if cuts else 0
