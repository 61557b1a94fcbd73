"""GGUF files: tensors under Hugging Face's names, and the model's config from the metadata.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.  Read with the `gguf` package (extra
`gguf`), imported when a file is opened; no tensor is read.  A config.json beside the file is preferred to the
metadata.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import quant, ty
from tyir.dialects.quant import GGML_BLOCKS
from tyir.frontends.checkpoint import StoredTensor
from tyir.frontends.gguf_header import gguf_header_problem
from tyir.frontends.quant_formats import emit_dequantized
from tyir.frontends.weights import Emit, PlainFormat, Weights
from tyir.ir import Value
from tyir.types import TensorType, Type, bf16, f16, f32, ui8

__all__ = ["GgufFormat", "read_gguf"]

# architecture: transformers' model type and class
_ARCHITECTURES: Final = {
    "llama": ("llama", "LlamaForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
}
_KEYS: Final = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
_TOKENS: Final = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "padding_token_id": "pad_token_id",
}
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
_PLAIN: Final[dict[str, Type]] = {"F32": f32, "F16": f16, "BF16": bf16}
_BLOCK: Final = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")


def read_gguf(path: Path, *, needs_config: bool = True) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """(config as config.json would have it, empty unless needed; tensors by transformers' names).

    `TyirError` holds everything that cannot be imported.
    """
    reader = _open(path)
    fields = {
        name: field.contents()
        for name, field in reader.fields.items()
        if not name.startswith("tokenizer.ggml.") or name.endswith("_token_id")
    }
    architecture = fields.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in _ARCHITECTURES:
        message = f"{path.name} holds architecture {architecture!r}, which cannot be imported from GGUF"
        raise TyirError(
            message,
            where=str(path),
            help=f"architectures: {', '.join(_ARCHITECTURES)}; others import from safetensors",
        )
    problems: list[Diagnostic] = []
    tensors: dict[str, StoredTensor] = {}
    for tensor in reader.tensors:
        found = _stored(tensor, path, fields, architecture)
        if isinstance(found, StoredTensor):
            tensors[_name(tensor.name)] = found
        else:
            problems.append(
                Diagnostic(
                    found,
                    where=str(path),
                    help=f"types: {', '.join((*_PLAIN, *GGML_BLOCKS))}; convert the file with llama.cpp",
                )
            )
    if problems:
        raise TyirError(problems)
    config = _config(path, fields, architecture, tensors) if needs_config else {}
    tensors.pop("rope_freqs.weight", None)  # config.json says how the frequencies are scaled
    return config, tensors


def _open(path: Path) -> Any:
    try:
        import gguf
    except ImportError:
        raise TyirError(f"{path.name} needs the gguf package", help="pip install 'tyir[gguf]'") from None
    try:
        if (problem := gguf_header_problem(path)) is not None:
            raise ValueError(problem)
        return gguf.GGUFReader(path)
    except Exception as error:
        text = next(iter(str(error).splitlines()), type(error).__name__)
        raise TyirError(
            f"{path.name} is no GGUF file, or damaged: {text}",
            where=str(path),
            help="download the file again",
        ) from None


def _name(name: str) -> str:
    match = _BLOCK.fullmatch(name)
    if match is not None and match.group(2) in _PARTS:
        return f"model.layers.{match.group(1)}.{_PARTS[match.group(2)]}.{match.group(3)}"
    return _TOP.get(name, name)


def _stored(tensor: Any, path: Path, fields: Mapping[str, Any], architecture: str) -> StoredTensor | str:
    """A tensor as it lies in the file, or what is wrong with it."""
    kind = tensor.tensor_type.name
    dims = tuple(int(d) for d in reversed(tensor.shape))  # GGUF writes the fastest dimension first
    offset, nbytes = int(tensor.data_offset), int(tensor.n_bytes)
    if kind in _PLAIN:
        type = TensorType(dims, _PLAIN[kind])
    elif kind in GGML_BLOCKS:
        elements, size, _ = GGML_BLOCKS[kind]
        if len(dims) != 2 or dims[1] % elements:
            return (
                f"tensor '{tensor.name}' of type {kind} has shape {list(dims)}; rows must be whole blocks of"
                f" {elements}"
            )
        type = TensorType((dims[0], dims[1] // elements * size), ui8)
    else:
        return f"tensor '{tensor.name}' has type {kind}, which cannot be imported"
    if type.nbytes != nbytes or offset + nbytes > path.stat().st_size:
        return f"tensor '{tensor.name}' lies outside the file"
    match = _BLOCK.fullmatch(tensor.name)
    heads = (
        {"attn_q": "head_count", "attn_k": "head_count_kv"}.get(match.group(2))
        if architecture == "llama" and match is not None
        else None
    )
    count = (
        int(fields.get(f"llama.attention.{heads}", fields.get("llama.attention.head_count", 0)))
        if heads
        else 0
    )
    return StoredTensor(
        tensor.name, path.name, type, offset, nbytes, kind if kind in GGML_BLOCKS else "", count
    )


def _config(
    path: Path, fields: Mapping[str, Any], architecture: str, tensors: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    scaling = fields.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or "rope_freqs.weight" in tensors:
        message = (
            f"{path.name} scales its rotary frequencies"
            f" ({scaling if scaling != 'none' else 'rope_freqs.weight'})"
        )
        raise TyirError(
            message, where=str(path), help="put the original model's config.json beside the file: it says how"
        )
    model_type, name = _ARCHITECTURES[architecture]
    config: dict[str, Any] = {"model_type": model_type, "architectures": [name], "hidden_act": "silu"}
    for source, key in _KEYS.items():
        if (value := fields.get(f"{architecture}.{source}")) is not None:
            config[key] = value
    config.setdefault("head_dim", fields.get(f"{architecture}.rope.dimension_count") or None)
    config = {k: v for k, v in config.items() if v is not None}
    config["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": float(fields.get(f"{architecture}.rope.freq_base", 10000.0)),
    }
    for source, key in _TOKENS.items():
        if (token := fields.get(f"tokenizer.ggml.{source}")) is not None:
            config[key] = int(token)
    if (table := tensors.get("model.embed_tokens.weight")) is not None:
        config["vocab_size"] = table.type.dims[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in tensors
    return config


class GgufFormat:
    """GGUF's blocks, and llama.cpp's order of q and k rows (the two halves of a head interleaved).

    Q4_0 stays 4-bit, the other formats become dense.
    """

    def stored_keys(self, name: str, tensors: Mapping[str, StoredTensor]) -> tuple[str, ...]:
        stored = tensors.get(name)
        return (name,) if stored is not None and (stored.encoding or stored.interleaved) else ()

    def problem(self, name: str, shape: tuple[int, ...], tensors: Mapping[str, StoredTensor]) -> str | None:
        stored = tensors[name]
        if not stored.encoding:
            return PlainFormat().problem(name, shape, tensors)
        elements, nbytes, _ = GGML_BLOCKS[stored.encoding]
        rows, width = stored.type.static_shape
        found = (rows, width // nbytes * elements)
        if found != shape:
            return f"tensor '{name}' has shape {list(found)}, the config asks for {list(shape)}"
        return None

    def value(self, name: str, element: Type, weights: Weights, emit: Emit) -> Value:
        stored = weights.checkpoint.tensors[name]
        data = emit(weights.reference(name)).result
        if not stored.encoding:
            out = data if stored.type.element is element else emit(ty.Cast(data, element=element)).result
            return _deinterleaved(out, stored.interleaved, emit)
        if stored.encoding != "Q4_0":
            out = emit(quant.GgmlDequantize(data, format=stored.encoding, element=element)).result
            return _deinterleaved(out, stored.interleaved, emit)
        blocks = emit(quant.GgmlQ40(data))
        q, scales = (_deinterleaved(v, stored.interleaved, emit) for v in blocks.results)
        return emit_dequantized(q, scales, None, GGML_BLOCKS["Q4_0"][0], element, emit)


def _deinterleaved(value: Value, heads: int, emit: Emit) -> Value:
    """Rows (head, i, half) -> (head, half, i), for 0 heads the value itself."""
    type = value.type
    assert isinstance(type, TensorType)
    if not heads:
        return value
    rows, width = type.static_shape
    split = emit(ty.Reshape(value, shape=(heads, rows // heads // 2, 2, width))).result
    return emit(ty.Reshape(emit(ty.Transpose(split, perm=(0, 2, 1, 3))).result, shape=(rows, width))).result
