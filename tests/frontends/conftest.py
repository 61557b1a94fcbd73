"""Small random models saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.frontends.gguf_models import Model, parameters

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}

SaveModel = Callable[..., Path]


@pytest.fixture(scope="session")
def save_model(tmp_path_factory: pytest.TempPathFactory) -> SaveModel:
    """`save_model(model_type, dtype=..., shard=..., **config)`: a random model of transformers, saved; norm
    weights are not all ones.
    """

    def save(model_type: str, dtype: str = "bfloat16", shard: str = "5GB", **config: Any) -> Path:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        folder = tmp_path_factory.mktemp(model_type)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **{**SIZES, **config}), dtype=getattr(torch, dtype)
        )
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
        model.save_pretrained(folder, max_shard_size=shard)
        return folder

    return save


@pytest.fixture(scope="session")
def llama(save_model: SaveModel) -> Path:
    """A Llama in bf16, in several files with an index, with Llama 3's rope."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return save_model("llama", shard="50KB", rope_parameters=rope)


@pytest.fixture(scope="session")
def gguf_llama() -> Model:
    """A Llama of two layers, for files that llama.cpp's converter would write."""
    return parameters("llama", num_hidden_layers=2, tie_word_embeddings=False)
