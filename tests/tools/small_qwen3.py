"""A small random checkpoint with a tokenizer, for quantising: grouped heads, norms of queries and keys."""

from __future__ import annotations

import shutil
from pathlib import Path

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen2"


def save_small(folder: Path, layers: int, positions: int, seed: int) -> Path:
    """Write `layers` layers of Qwen3's kind for prompts of `positions` tokens; returns the folder."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.Qwen3Config(
        vocab_size=4096,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )
    transformers.Qwen3ForCausalLM(config).to(torch.float16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return folder
