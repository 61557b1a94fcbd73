"""GGUF files as llama.cpp's converter writes them, with the gguf package's writer, names and quantiser.

Nothing here comes from the front end.  What the converter does to values: convert_hf_to_gguf.py (permute of
LlamaModel; norms of GemmaModel plus 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
PERMUTED = ("llama", "granite")
PLUS_ONE = ("gemma", "gemma2", "gemma3")


def interleave(w: Array, heads: int) -> Array:
    """Rows (head, half, i) -> (head, i, half)."""
    return np.ascontiguousarray(
        w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)
    )


def deinterleave(w: Array, heads: int) -> Array:
    return np.ascontiguousarray(w.reshape(heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape))


def blocks(w: Array, kind: str, seed: int = 0) -> Array:
    """The tensor as rows of bytes; types that the package cannot write get random contents with f16 scales
    that keep values small.
    """
    block_type = gguf.GGMLQuantizationType[kind]
    try:
        return np.asarray(gguf.quantize(w.astype(np.float32), block_type))
    except NotImplementedError:
        pass
    elements, size = gguf.GGML_QUANT_SIZES[block_type]
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 256, (w.size // elements, size), dtype=np.uint8)
    for at in SCALES.get(kind, (0,)):
        out[:, at : at + 2] = np.full((len(out), 1), 3e-4, np.float16).view(np.uint8)
    if kind == "IQ1_M":  # its f16 scale lies in the upper bits of four words
        bits = int(np.float16(3e-4).view(np.uint16))
        out[:, 49:56:2] = (out[:, 49:56:2] & 15) | np.array([bits >> s & 15 for s in (0, 4, 8, 12)]) << 4
    return out.reshape(w.shape[0], -1)


# Where the f16 scales lie in a block of ggml-common.h.
SCALES = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ1_M": (),
    "NVFP4": (),
}


def values_of(data: Array, kind: str, shape: tuple[int, ...]) -> Array:
    return np.asarray(gguf.dequantize(data, gguf.GGMLQuantizationType[kind]), np.float32).reshape(shape)


def write(
    path: Path,
    architecture: str,
    config: Mapping[str, Any],
    state: Mapping[str, Array],
    kind: Callable[[str], str] = lambda name: "F16",
    extra: Callable[[Any], None] = lambda writer: None,
    **options: Any,
) -> dict[str, Array]:
    """A model's parameters (transformers' names) as a GGUF file, matrices of layers as `kind` says; returns
    the parameters that it then holds, in f32 and transformers' order.
    """
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == architecture), config["num_hidden_layers"]
    )
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(str(path), architecture, **options)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(10000.0)
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
    extra(writer)
    held = {}
    for name, w in state.items():
        module, _, ending = name.rpartition(".")
        target = f"{names.get_name(module)}.{ending}"
        count = {"q_proj": heads, "k_proj": kv_heads}.get(module.rpartition(".")[2], 0)
        count = count if architecture in PERMUTED else 0
        plus = architecture in PLUS_ONE and name.endswith("norm.weight")
        stored = interleave(w, count) if count else w.astype(np.float32) + 1 if plus else w
        chosen = kind(name) if w.ndim == 2 else "F32"
        if chosen in ("F16", "F32"):
            data = stored.astype(np.float32 if chosen == "F32" else np.float16)
            writer.add_tensor(target, data)
            dense = data.astype(np.float32)
        else:
            data = blocks(stored, chosen, len(held))
            writer.add_tensor(target, data, raw_dtype=gguf.GGMLQuantizationType[chosen])
            dense = values_of(data, chosen, w.shape)
        held[name] = deinterleave(dense, count) if count else dense - 1 if plus else dense
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held
