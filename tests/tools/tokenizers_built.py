"""Tokenizers of every kind that transformers loads, built here with a small vocabulary.

`BUILDERS[name](folder)` gives one as tyir-run would have it; what needs files writes them into `folder`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    BertTokenizer,
    ByT5Tokenizer,
    CanineTokenizer,
    CTRLTokenizer,
    GemmaTokenizer,
    GPT2Tokenizer,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    T5Tokenizer,
)

__all__ = ["BUILDERS", "TEXTS"]

TEXTS: Final = (
    "The old house stood at the end of the road, and the garden was wild.",
    "def f(x):\n    return x + 1\n\n\tif x: print('it''s')",
    "don't you, they're 's 've I'm it ' s ' quoted ' . ? ! , n't",
    "naïve café 東京 привет नमस्ते",
    "👩‍👩‍👧 🇩🇪 👍🏽 a🙂b",
    "  leading and trailing  ",
)
_SPECIAL: Final = ["<unk>", "<s>", "</s>", "<pad>"]
_BYTES: Final = [f"<0x{byte:02X}>" for byte in range(256)]
_ROLES: Final = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def _fast(made: Tokenizer, **options: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=made, **{**_ROLES, **options})


def _trained(model: Any, trainer: Any, pre_tokenizer: Any, decoder: Any, normalizer: Any = None) -> Tokenizer:
    made = Tokenizer(model)
    if normalizer is not None:
        made.normalizer = normalizer
    made.pre_tokenizer = pre_tokenizer
    if decoder is not None:
        made.decoder = decoder
    made.train_from_iterator(TEXTS * 4, trainer)
    return made


def byte_level(folder: Path) -> Any:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=_SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    pre = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return _fast(_trained(models.BPE(), trainer, pre, decoders.ByteLevel()))


def _pieces() -> list[str]:
    words = sorted({"▁" + word for text in TEXTS for word in text.split() if word.isascii()})
    letters = sorted({c for text in TEXTS for c in text if c.isalnum()})
    return [*dict.fromkeys(["▁", "▁▁", "▁▁▁▁", *letters, *words])]


def _llama_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    vocabulary = {name: i for i, name in enumerate([*_SPECIAL, *_BYTES])}
    merges = []
    for piece in _pieces():
        for character in piece:
            vocabulary.setdefault(character, len(vocabulary))
        for end in range(1, len(piece)):
            if piece[: end + 1] not in vocabulary:
                vocabulary[piece[: end + 1]] = len(vocabulary)
                merges.append((piece[:end], piece[end]))
    return vocabulary, merges


def byte_fallback(folder: Path) -> Any:
    """Llama 2's: a space is prepended and stripped, unknown characters are bytes."""
    vocabulary, merges = _llama_bpe()
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(_SPECIAL)
    return _fast(made)


def _unigram(scheme: str) -> Any:
    scores = [(name, 0.0) for name in _SPECIAL] + [(name, -20.0) for name in _BYTES]
    scores += [(piece, -float(3 + len(piece) % 5)) for piece in _pieces()]
    made = Tokenizer(models.Unigram(scores, unk_id=0, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace("▁", scheme)
    made.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace("▁", scheme)])
    made.add_special_tokens(_SPECIAL)
    return _fast(made)


def word_piece(folder: Path, *, cleanup: bool = True, **options: Any) -> Any:
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=_SPECIAL, show_progress=False)
    pre = pre_tokenizers.BertPreTokenizer()
    decoder = decoders.WordPiece(cleanup=cleanup)
    return _fast(_trained(models.WordPiece(unk_token="<unk>"), trainer, pre, decoder), **options)


def whitespace(folder: Path, decoder: Any = None) -> Any:
    trainer = trainers.WordLevelTrainer(special_tokens=_SPECIAL, show_progress=False)
    pre = pre_tokenizers.WhitespaceSplit()
    return _fast(_trained(models.WordLevel(unk_token="<unk>"), trainer, pre, decoder))


def end_of_word(folder: Path) -> Any:
    """GPT's: `</w>` ends a word."""
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=_SPECIAL, end_of_word_suffix="</w>", show_progress=False
    )
    model = models.BPE(unk_token="<unk>", end_of_word_suffix="</w>")
    return _fast(_trained(model, trainer, pre_tokenizers.WhitespaceSplit(), decoders.BPEDecoder("</w>")))


def llama(folder: Path) -> Any:
    vocabulary, merges = _llama_bpe()
    return LlamaTokenizer(vocab=vocabulary, merges=merges)


def gemma(folder: Path) -> Any:
    vocabulary, merges = _llama_bpe()
    names = {"<s>": "<bos>", "</s>": "<eos>"}
    return GemmaTokenizer(
        vocab={**{names.get(k, k): v for k, v in vocabulary.items()}, "<mask>": len(vocabulary)},
        merges=merges,
    )


def gpt2(folder: Path) -> Any:
    made = byte_level(folder).backend_tokenizer
    model = json.loads(made.to_str())["model"]
    vocabulary = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    return GPT2Tokenizer(vocab=vocabulary, merges=[tuple(pair) for pair in model["merges"]])


def t5(folder: Path) -> Any:
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((piece, -5.0) for piece in _pieces())]
    return T5Tokenizer(vocab=scores, extra_ids=4)


def bert(folder: Path) -> Any:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    model = json.loads(word_piece(folder).backend_tokenizer.to_str())["model"]
    pieces = [piece for piece in model["vocab"] if piece not in _SPECIAL]
    return BertTokenizer(vocab={name: i for i, name in enumerate([*names, *pieces])})


def ctrl(folder: Path) -> Any:
    """`@@ ` joins pieces."""
    words = ["the", "hou@@", "se", "ro@@", "ad", "a@@", "b", "<unk>", ".", "'", "s"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nh o\nho u\n")
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


BUILDERS: Final[dict[str, Callable[[Path], Any]]] = {
    "byte-level BPE": byte_level,
    "BPE with byte fallback": byte_fallback,
    "Unigram, Metaspace always": lambda folder: _unigram("always"),
    "Unigram, Metaspace first": lambda folder: _unigram("first"),
    "Unigram, Metaspace never": lambda folder: _unigram("never"),
    "WordPiece": word_piece,
    "WordPiece, spaces kept": lambda folder: word_piece(folder, cleanup=False),
    "WordPiece, cleaned up": lambda folder: word_piece(
        folder, cleanup=False, clean_up_tokenization_spaces=True
    ),
    "WhitespaceSplit": whitespace,
    "WhitespaceSplit, fused": lambda folder: whitespace(folder, decoders.Fuse()),
    "end of word": end_of_word,
    "LlamaTokenizer": llama,
    "GemmaTokenizer": gemma,
    "GPT2Tokenizer": gpt2,
    "T5Tokenizer": t5,
    "BertTokenizer": bert,
    "ByT5Tokenizer": lambda folder: ByT5Tokenizer(),
    "CanineTokenizer": lambda folder: CanineTokenizer(),
    "CTRLTokenizer": ctrl,
}
