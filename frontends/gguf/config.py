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

__all__ = ["ARCHITECTURES", "Architecture", "config_of", "head_count", "parameter_name"]

# What llama.cpp, too, does not load a model without.
_SIZES: Final = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
}
_EPSILON: Final = "attention.layer_norm_rms_epsilon"
# Metadata of an architecture that this file reads besides: head sizes and the rotary frequencies.
_KV_HEADS: Final = "attention.head_count_kv"
_HEAD_SIZES: Final = ("attention.key_length", "attention.value_length", "rope.dimension_count")
_ROPE_READ: Final = (
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
)
# What says nothing of what is computed.
_WITHOUT_EFFECT: Final = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type")
# What would change it, by the values with which it does not (llama.cpp: llama-hparams.h, llama-graph.cpp);
# every other key is taken for one that does.
_NEUTRAL: Final[Mapping[str, tuple[Any, ...]]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
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
_CONFIG_BESIDE: Final = "put the original model's config.json beside the file: it says how"
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
_PATTERN: Final = "attention.sliding_window_pattern"  # every n-th layer sees everything; or true by layer
_LOCAL_BASE: Final = "rope.freq_base_swa"
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
        keys={**_WINDOW, **_SOFTCAPS},
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


def head_count(architecture: str, metadata: Mapping[str, Any], key_value: bool) -> int:
    """Query or key/value heads; `TyirError` when the file does not say one number."""
    found = _Metadata(architecture, metadata)
    heads = found.count("attention.head_count")
    return found.count(_KV_HEADS, heads) if key_value else heads


@dataclass(frozen=True)
class _Metadata:
    """The metadata whose keys begin with `prefix`, a dot after it."""

    prefix: str
    all: Mapping[str, Any]

    def get(self, key: str, default: Any = None) -> Any:
        return self.all.get(f"{self.prefix}.{key}", default)

    def number(self, key: str, default: Any = None) -> Any:
        """A number, or an array of the same one for every layer; `default` when the file does not say it."""
        if (value := self.get(key)) is None:
            return default
        values = value if isinstance(value, list) and value else [value]
        if not isinstance(values[0], (int, float)) or any(v != values[0] for v in values[1:]):
            raise self.wrong(key, value, "one number")
        return values[0]

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number."""
        value = self.number(key, default)
        if value is None:
            raise TyirError(
                f"the file does not say {self.prefix}.{key}",
                help=f"{_CONFIG_BESIDE}; or convert the model again",
            )
        if type(value) is not int or value <= 0:
            raise self.wrong(key, value, "a positive whole number")
        return value

    def wrong(self, key: str, value: Any, needed: str) -> TyirError:
        return TyirError(
            f"the file says that {self.prefix}.{key} is {_shown(value)}, {needed} is needed",
            help=_CONFIG_BESIDE,
        )

    def refuse_what_is_not_read(self, row: Architecture) -> None:
        prefix = f"{self.prefix}."
        read = {*_SIZES, _EPSILON, *row.keys, _KV_HEADS, *_HEAD_SIZES, *_ROPE_READ, *_WITHOUT_EFFECT}
        if "attention.sliding_window" in row.keys:
            read |= {_PATTERN, _LOCAL_BASE}
        wrong = [
            f"{key} {_shown(value)}"
            for key, value in self.all.items()
            if (name := key.removeprefix(prefix)) != key
            and name not in read
            and value not in _NEUTRAL.get(name, ())
        ]
        if wrong:
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise TyirError(
                f"the file says {', '.join(wrong[:5])}{more}, which is not read and may change what the model"
                " computes",
                help=_CONFIG_BESIDE,
            )

    def head_size(self, width: int, heads: int) -> int:
        """Elements of a head's queries, keys and values, all of them rotated."""
        size = self.count("attention.key_length", max(width // heads, 1))
        for key in _HEAD_SIZES:
            if self.number(key, size) != size:
                raise self.wrong(key, self.get(key), f"{size} as of the heads of queries")
        return size

    def layer_types(self, layers: int) -> list[str] | None:
        """The kind of each layer's attention where the file says it."""
        pattern = self.get(_PATTERN)
        if pattern is None:
            return None
        if type(pattern) is int and pattern >= 0:
            pattern = [pattern == 0 or (i + 1) % pattern != 0 for i in range(layers)]
        if not isinstance(pattern, list) or len(pattern) != layers:
            raise self.wrong(_PATTERN, pattern, f"a number or one value for each of {layers} layers")
        return ["sliding_attention" if local else "full_attention" for local in pattern]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def config_of(
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Collection[str],
    vocabulary: int | None,
    rope_freqs: npt.NDArray[np.float32] | None,
) -> dict[str, Any]:
    """config.json of a model, from its metadata and the names of its tensors (llama.cpp's).

    `vocabulary`: rows of the embedding.  `rope_freqs`: what the rotary frequencies are divided by, None when
    nothing is.  `TyirError` for metadata that are missing, that differ from layer to layer, or that change
    what is computed in a way that is not read, and for a scaling that cannot be told from them.
    """
    row = ARCHITECTURES[architecture]
    found = _Metadata(architecture, metadata)
    found.refuse_what_is_not_read(row)
    config: dict[str, Any] = {"model_type": row.model_type, "architectures": [row.model_class], **row.fixed}
    for source, key in _SIZES.items():
        config[key] = found.count(source)
    if (epsilon := found.number(_EPSILON)) is not None:
        config["rms_norm_eps"] = epsilon
    for source, key in row.keys.items():
        if (value := found.number(source)) is not None:
            config[key] = value
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = found.count(_KV_HEADS, heads)
    config["head_dim"] = found.head_size(config["hidden_size"], heads)
    if (kinds := found.layer_types(config["num_hidden_layers"])) is not None:
        config["layer_types"] = kinds
    for key, ending in row.biases.items():
        config[key] = any(name.endswith(f".{ending}") for name in tensors)
    if row.model_type == "llama" and config["attention_bias"] and "blk.0.attn_output.bias" not in tensors:
        # a Llama with biases of q, k and v alone is what transformers calls Qwen2
        config.update(model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    config["rope_parameters"] = _rope(found, rope_freqs)
    tokens = _Metadata("tokenizer.ggml", metadata)
    for source, key in _TOKENS.items():
        if (token := tokens.number(source)) is not None:
            config[key] = int(token)
    ends = [int(t) for key in _ENDS if (t := tokens.number(key)) is not None]
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


def _rope(metadata: _Metadata, freqs: npt.NDArray[np.float32] | None) -> dict[str, Any]:
    """`rope_parameters`; of Gemma 3 one for each kind of layer."""
    theta = float(metadata.number("rope.freq_base", 10000.0))
    factor = metadata.number("rope.scaling.factor", metadata.number("rope.scale_linear", 1.0))
    # llama.cpp's default: a factor alone is a linear one
    kind = str(metadata.get("rope.scaling.type", "linear" if factor not in (0, 1) else "none"))
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    if freqs is not None:
        found.update(_llama3(freqs, theta))
    elif kind in ("linear", "yarn"):
        found.update(rope_type=kind, factor=float(factor))
        if kind == "yarn":
            for source, name in _YARN.items():
                if (value := metadata.number(f"rope.scaling.{source}")) is not None:
                    found[name] = value
    elif kind != "none":
        raise TyirError(f"the file scales its rotary frequencies as '{kind}'", help=_CONFIG_BESIDE)
    if metadata.prefix != "gemma3":
        return found
    local = {"rope_type": "default", "rope_theta": float(metadata.number(_LOCAL_BASE, 10000.0))}
    return {"full_attention": found, "sliding_attention": local}


_YARN: Final = {
    "original_context_length": "original_max_position_embeddings",
    "yarn_attn_factor": "attention_factor",
    "yarn_beta_fast": "beta_fast",
    "yarn_beta_slow": "beta_slow",
}


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
