"""Small random models for GGUF files, and what an import says of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tyir.diagnostics import Diagnostic
from tyir.frontends.checkpoint import open_checkpoint

Model = tuple[dict[str, Any], dict[str, Any]]
"""The fields of config.json, and the parameters by their names."""

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def parameters(model_type: str, **changes: Any) -> Model:
    """Configuration and random parameters of a small model; tied ones once."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SIZES, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter.data, -0.5, 0.5)
    state = {n: p.detach().numpy() for n, p in model.named_parameters()}
    return config.to_dict(), state


def refusal(path: Path) -> str:
    problems: list[Diagnostic] = []
    open_checkpoint(path, problems)
    return "\n".join(f"{p.message}; {p.help}" for p in problems)


def add_to(writer: Any, key: str, value: Any) -> None:
    """A value of metadata, in place of one that is there."""
    writer.kv_data[0].pop(key, None)
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    getattr(writer, f"add_{kinds[type(value)]}")(key, value)
