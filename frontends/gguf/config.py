"""What GGUF's metadata and llama.cpp's tensor names mean in transformers' terms, one row per architecture.

Sources: llama.cpp's convert_hf_to_gguf.py (what its converter does to names and values) and gguf-py's
constants.py (keys).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError

__all__ = ["ARCHITECTURES", "Architecture", "config_of", "parameter_name"]

_SIZES: Final = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
_TOKENS: Final = {"bos_token_id": "bos_token_id", "padding_token_id": "pad_token_id"}
_ENDS: Final = ("eos_token_id", "eot_token_id", "eom_token_id")  # llama.cpp stops at each of them
_TOP: Final = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PARTS: Final = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FOUR_NORMS: Final = {  # Gemma 2 and 3: a norm before and after attention and MLP
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_BLOCK: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
ROPE_FREQS: Final = "rope_freqs.weight"
_SILU: Final = {"hidden_act": "silu"}
# Llama 3's way of scaling rotary frequencies; of its four numbers only the factor differs between releases
# (https://huggingface.co/meta-llama, config.json of 3.1 to 3.3).
_LLAMA3: Final = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """One `general.architecture`.

    `interleaved`: the rows of q and k alternate between a head's halves.  `norm_offset`: the converter added
    1 to the weights of norms.  `parts` beside the usual names of a layer's tensors, `keys` beside the usual
    metadata (key after the architecture: key of config.json), `biases`: config keys that follow from tensors
    that are there.  `fixed`: what config.json would say for every model.
    """

    model_type: str
    model_class: str
    interleaved: bool = False
    norm_offset: bool = False
    parts: Mapping[str, str] = field(default_factory=dict)
    keys: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)


_ATTENTION_BIAS: Final = {"attention_bias": "attn_q.bias"}
_BOTH_BIASES: Final = {**_ATTENTION_BIAS, "mlp_bias": "ffn_down.bias"}
_WINDOW: Final = {"attention.sliding_window": "sliding_window"}
_GRANITE: Final = {
    "logit_scale": "logits_scaling",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "attention.scale": "attention_multiplier",
}
_SOFTCAPS: Final = {
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
ARCHITECTURES: Final = {
    "llama": Architecture("llama", "LlamaForCausalLM", interleaved=True, biases=_BOTH_BIASES, fixed=_SILU),
    "granite": Architecture(
        "granite", "GraniteForCausalLM", True, keys=_GRANITE, biases=_BOTH_BIASES, fixed=_SILU
    ),
    "qwen2": Architecture("qwen2", "Qwen2ForCausalLM", fixed=_SILU),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", biases=_ATTENTION_BIAS, fixed=_SILU),
    "gemma": Architecture("gemma", "GemmaForCausalLM", norm_offset=True, biases=_ATTENTION_BIAS),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        norm_offset=True,
        parts=_FOUR_NORMS,
        keys={**_WINDOW, **_SOFTCAPS},
        biases=_ATTENTION_BIAS,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        norm_offset=True,
        parts=_FOUR_NORMS,
        keys=_WINDOW,
        biases=_ATTENTION_BIAS,
    ),
}


def parameter_name(name: str, architecture: Architecture) -> tuple[str, str]:
    """transformers' name of a tensor, and the part of a layer it belongs to ("attn_q"); of others the stored
    name or "".
    """
    match = _BLOCK.fullmatch(name)
    if match is None:
        return _TOP.get(name, name), ""
    layer, part, kind = match.groups()
    target = {**_PARTS, **architecture.parts}.get(part)
    return (name if target is None else f"model.layers.{layer}.{target}.{kind}"), part


def config_of(
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    vocabulary: int | None,
    rope_freqs: npt.NDArray[np.float32] | None,
) -> dict[str, Any]:
    """config.json of a model, from its metadata and the names of its tensors (llama.cpp's).

    `vocabulary`: rows of the embedding.  `rope_freqs`: what the rotary frequencies are divided by, None when
    nothing is.  `TyirError` for a scaling that cannot be told from them.
    """
    row = ARCHITECTURES[architecture]
    config: dict[str, Any] = {"model_type": row.model_type, "architectures": [row.model_class], **row.fixed}
    config["head_dim"] = metadata.get(f"{architecture}.rope.dimension_count")
    for source, key in {**_SIZES, **row.keys}.items():
        if (value := metadata.get(f"{architecture}.{source}")) is not None:
            config[key] = value
    config = {k: v for k, v in config.items() if v is not None}
    for key, ending in row.biases.items():
        config[key] = any(name.endswith(f".{ending}") for name in tensors)
    if row.model_type == "llama" and config["attention_bias"] and "blk.0.attn_output.bias" not in tensors:
        # a Llama with biases of q, k and v alone is what transformers calls Qwen2
        config.update(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    config["rope_parameters"] = _rope(architecture, metadata, rope_freqs)
    for source, key in _TOKENS.items():
        if (token := metadata.get(f"tokenizer.ggml.{source}")) is not None:
            config[key] = int(token)
    ends = [int(t) for key in _ENDS if (t := metadata.get(f"tokenizer.ggml.{key}")) is not None]
    if ends:
        distinct = list(dict.fromkeys(ends))
        config["eos_token_id"] = distinct[0] if len(distinct) == 1 else distinct
    if vocabulary is not None:
        config["vocab_size"] = vocabulary
    config["tie_word_embeddings"] = "output.weight" not in tensors
    if architecture in _QUERY_SCALAR:
        config["query_pre_attn_scalar"] = _query_scalar(architecture, config)
    return config


# Layers of the one model of each family whose queries are scaled by the width over the heads; the others take
# the head's width (llama.cpp: llama-model.cpp, f_attention_scale).
_QUERY_SCALAR: Final = {"gemma2": 46, "gemma3": 62}


def _query_scalar(architecture: str, config: Mapping[str, Any]) -> int:
    if config.get("num_hidden_layers") == _QUERY_SCALAR[architecture]:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config.get("head_dim", 256))


def _rope(
    architecture: str, metadata: Mapping[str, Any], freqs: npt.NDArray[np.float32] | None
) -> dict[str, Any]:
    """`rope_parameters`; of Gemma 3 one for each kind of layer."""

    def key(name: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.rope.{name}", default)

    theta, kind = float(key("freq_base", 10000.0)), str(key("scaling.type", "none"))
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if freqs is not None:
        found.update(_llama3(freqs, theta))
    elif kind in ("linear", "yarn"):
        found.update(rope_type=kind, factor=float(key("scaling.factor", 1.0)))
        if kind == "yarn" and (length := key("scaling.original_context_length")) is not None:
            found["original_max_position_embeddings"] = int(length)
        for source, name in (
            ("attn_factor", "attention_factor"),
            ("yarn_beta_fast", "beta_fast"),
            ("yarn_beta_slow", "beta_slow"),
        ):
            if (value := key(f"scaling.{source}")) is not None:
                found[name] = float(value)
    elif kind != "none":
        raise TyirError(f"the file scales its rotary frequencies as '{kind}'", help=_CONFIG_BESIDE)
    if architecture != "gemma3":
        return found
    local = {"rope_type": "default", "rope_theta": float(key("freq_base_swa", 10000.0))}
    return {"full_attention": found, "sliding_attention": local}


_CONFIG_BESIDE: Final = "put the original model's config.json beside the file: it says how"


def _llama3(freqs: npt.NDArray[np.float32], theta: float) -> dict[str, Any]:
    """Llama 3's parameters whose divisors of the rotary frequencies are `freqs`; `TyirError` when there are
    none.
    """
    factor = float(freqs.max())
    wavelengths = 2 * np.pi * theta ** (np.arange(freqs.size) / freqs.size)
    turns = _LLAMA3["original_max_position_embeddings"] / wavelengths
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    wanted = 1 / ((1 - smooth) / factor + smooth)
    if not np.allclose(freqs, wanted, rtol=1e-3):
        raise TyirError(
            f"the file scales its rotary frequencies ({ROPE_FREQS}) in another way than Llama 3 does",
            help=_CONFIG_BESIDE,
        )
    return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
