"""Which tokens end an answer: what every file says that could know.

The sources disagree in published checkpoints: a chat model's generation_config.json may still have the base
model's end while its template closes turns with another token.  vLLM stops at the tokenizer's own end and at
all of generation_config.json; so do we, and at the ends of turns that the chat template writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.session.ending import EndReason
from tyir.text.json_files import json_object, token_ids
from tyir.tools.cli import warn
from tyir.tools.run.turn_ends import turn_ends
from tyir.tools.tokenizer import files_of, tokenizing

__all__ = ["end_tokens", "why"]

_FILES: Final = ("generation_config.json", "config.json")
_KEY: Final = "eos_token_id"
_TEXT_MODELS: Final = ("text_config", "llm_config")  # of a config.json's own: transformers', InternVL's
_NAMED: Final = ("tokenizer_config.json", "special_tokens_map.json")
_STOPS: Final = "stop_strings"
# Special tokens that end a turn, by the families that write them.
_TURN_ENDS: Final = (
    "<|im_end|>",  # ChatML: Qwen, SmolLM
    "<|eot_id|>",  # Llama 3
    "<|eom_id|>",  # Llama 3, before a tool's answer
    "<|eot|>",  # Llama 4
    "<end_of_turn>",  # Gemma
    "<|end|>",  # Phi-3
    "<|endoftext|>",
    "<|end_of_text|>",  # Granite
    "<|end_of_role|>",
    "<|END_OF_TURN_TOKEN|>",  # Cohere
    "<|user|>",  # GLM-4
    "[|endofturn|]",  # EXAONE
)


def end_tokens(source: Artifacts | Path, tokenizer: Any) -> dict[int, str]:
    """Every token that ends an answer, with the source that says so.

    `generation_config.json`, `config.json` (also its text model's), the tokenizer's end of text, its
    `eot_token`, the `stop_strings` of generation_config.json that are one token each, and the ends of turns
    in the chat template; without a tokenizer (None) what the files say.  A stop string of several tokens is
    warned about: what ends is a token.  `TyirError` for a file that is not JSON, or whose `eos_token_id` is
    no token.
    """
    found: dict[int, str] = {}
    folder, find = files_of(source)
    for name in _FILES:
        if (data := find(name)) is None:
            continue
        content = json_object(data, folder / name, "restore the file of the original model")
        for part in (content, *(content.get(key) for key in _TEXT_MODELS)):
            for token in token_ids(part, _KEY, folder / name, data) if isinstance(part, dict) else ():
                found.setdefault(token, name)
        if name == _FILES[0] and tokenizer is not None:
            for token in _stop_strings(content.get(_STOPS), name, tokenizer):
                found.setdefault(token, f"{_STOPS} of {name}")
    if tokenizer is None:
        return found
    if isinstance(tokenizer.eos_token_id, int):
        found.setdefault(tokenizer.eos_token_id, "the tokenizer")
    for name in _NAMED:
        if (data := find(name)) is not None:
            content = json_object(data, folder / name, "restore the file of the original model")
            extra = content.get("extra_special_tokens")
            for part in (content, extra if isinstance(extra, dict) else {}):
                if (end := _single(_content(part.get("eot_token")), tokenizer)) is not None:
                    found.setdefault(end, f"eot_token of {name}")
    template = tokenizer.chat_template or ""
    templates = list(template.values()) if isinstance(template, dict) else [template]
    added = tokenizer.get_added_vocab()
    for name in sorted({n for text in templates for n in _ends_in(str(text), tokenizer)}):
        if name in added:
            found.setdefault(added[name], "the chat template")
    return found


def _content(token: Any) -> Any:
    """The text of a special token, which may be an object with settings."""
    return token.get("content") if isinstance(token, dict) else token


def _single(text: Any, tokenizer: Any) -> int | None:
    """The token that a text is, whole and by itself; None for several, or what is no text."""
    if not isinstance(text, str) or not text:
        return None
    with tokenizing("cannot tokenize an end of answers"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 and tokenizer.decode(ids) == text else None


def _stop_strings(said: Any, name: str, tokenizer: Any) -> Iterator[int]:
    """The stop strings that are one token."""
    texts = [said] if isinstance(said, str) else said if isinstance(said, list) else []
    for text in texts:
        if (token := _single(text, tokenizer)) is not None:
            yield token
        elif isinstance(text, str) and text:
            warn(
                f"{text[:40]!r} of {_STOPS} in {name} is more than one token and ends no answer; `stop` of a"
                " request to tyir-serve does"
            )


def _ends_in(template: str, tokenizer: Any) -> set[str]:
    """The ends of turns in a chat template: those of known families, and what follows an answer there."""
    texts = {name: text for name, text in tokenizer.special_tokens_map.items() if isinstance(text, str)}
    begins = {texts.get(name) for name in ("bos_token", "pad_token", "unk_token")} - {texts.get("eos_token")}
    special = {t.content for t in tokenizer.added_tokens_decoder.values() if t.special} - begins
    return {name for name in _TURN_ENDS if name in template} | turn_ends(template, special, texts)


def why(
    reason: EndReason | None, made: Sequence[int], stops: Mapping[int, str], tokenizer: Any, capacity: int
) -> str:
    """Why an answer ended, for people."""
    if reason == "stop token":
        token = f" ({tokenizer.convert_ids_to_tokens(made[-1])})" if tokenizer is not None else ""
        return f"by stop token {made[-1]}{token} of {stops[made[-1]]}"
    if reason == "cache full":
        return f"because the cache of {capacity} positions is full; compile with a larger --max-kv"
    return f"after {len(made)} tokens, as many as --max-tokens allows"
