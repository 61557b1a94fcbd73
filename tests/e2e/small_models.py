"""Checkpoints that are compiled in a few seconds and whose answers are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

__all__ = ["BYTES", "byte_tokenizer", "chain", "edit_json", "save_llama"]

_SPECIAL: Final = ("<pad>", "<bos>", "<eos>")
BYTES: Final = 3  # the id of byte 0


def byte_tokenizer(
    folder: Path, *, end: str = "<eos>", template: str = "", special: tuple[str, ...] = ()
) -> int:
    """One token for each byte after `_SPECIAL`, then `special`; returns how many there are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    names = bytes_to_unicode()
    vocabulary = {name: i for i, name in enumerate([*_SPECIAL, *(names[b] for b in range(256)), *special])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*_SPECIAL, *special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token=end, pad_token="<pad>"
    )
    if template:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def save_llama(folder: Path, edit: Callable[[Any], None], **sizes: Any) -> Path:
    """A Llama that `edit` has been given to, in f16, with a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 259,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **sizes}))
    with torch.no_grad():
        edit(model)
    model.half().save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


def chain(folder: Path, following: Mapping[int, int], vocabulary: int = 259) -> Path:
    """A model that answers `following[t]` after t, and else t: a channel of the hidden state for each."""
    import torch

    width = -(-vocabulary // 8) * 8

    def edit(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(vocabulary, width))
        model.lm_head.weight.zero_()
        for token in range(vocabulary):
            model.lm_head.weight[following.get(token, token), token] = 1

    sizes = {"hidden_size": width, "head_dim": 16, "num_hidden_layers": 1, "vocab_size": vocabulary}
    return save_llama(folder, edit, **sizes)


def edit_json(path: Path, **changes: Any) -> None:
    """Other values in a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
