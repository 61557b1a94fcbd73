"""Checkpoints of real models' shapes with random weights, written in a stream: memory stays at a block of
rows whatever the model's size.

`MODELS` holds the public config.json values of the models (https://huggingface.co).  Weights are drawn so
that activations stay of order one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt

__all__ = ["MODELS", "write_checkpoint", "write_folder"]

Array = npt.NDArray[Any]
GROUP: Final = 128
AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
_ROWS_AT_ONCE: Final = 1 << 24  # numbers drawn at once

_QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "use_sliding_window": False,
}
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "head_dim": 128,
}
_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "attention_bias": False,
    "mlp_bias": False,
}
_MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "rms_norm_eps": 1e-5}


def _sizes(
    hidden: int,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    theta: float,
    positions: int = 32768,
    tied: bool = False,
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "rope_theta": theta,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }


def _llama3_rope(factor: float) -> dict[str, Any]:
    return {
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    }


_CHUNKS = {"chunk_size": 262144, "local_size": 8192, "original_max_position_embeddings": 262144}
MODELS: Final[dict[str, dict[str, Any]]] = {
    "Qwen1.5-1.8B": {**_QWEN2, **_sizes(2048, 5504, 24, 16, 16, 151936, 1e6)},
    "Qwen2-1.5B": {**_QWEN2, **_sizes(1536, 8960, 28, 12, 2, 151936, 1e6, 131072, tied=True)},
    "Qwen2-7B": {**_QWEN2, **_sizes(3584, 18944, 28, 28, 4, 152064, 1e6)},
    "Qwen2.5-0.5B": {**_QWEN2, **_sizes(896, 4864, 24, 14, 2, 151936, 1e6, tied=True)},
    "Qwen2.5-1.5B": {**_QWEN2, **_sizes(1536, 8960, 28, 12, 2, 151936, 1e6, tied=True)},
    "Qwen2.5-3B": {**_QWEN2, **_sizes(2048, 11008, 36, 16, 2, 151936, 1e6, tied=True)},
    "Qwen2.5-7B": {**_QWEN2, **_sizes(3584, 18944, 28, 28, 4, 152064, 1e6)},
    "Qwen2.5-14B": {**_QWEN2, **_sizes(5120, 13824, 48, 40, 8, 152064, 1e6)},
    "Qwen2.5-14B-Instruct-1M": {
        **_QWEN2,
        **_sizes(5120, 13824, 48, 40, 8, 152064, 1e7, 1010000),
        "dual_chunk_attention_config": _CHUNKS,
    },
    "Qwen2.5-32B": {**_QWEN2, **_sizes(5120, 27648, 64, 40, 8, 152064, 1e6)},
    "Qwen2.5-72B": {**_QWEN2, **_sizes(8192, 29568, 80, 64, 8, 152064, 1e6)},
    "Qwen3-0.6B": {**_QWEN3, **_sizes(1024, 3072, 28, 16, 8, 151936, 1e6, 40960, tied=True)},
    "Qwen3-1.7B": {**_QWEN3, **_sizes(2048, 6144, 28, 16, 8, 151936, 1e6, 40960, tied=True)},
    "Qwen3-4B": {**_QWEN3, **_sizes(2560, 9728, 36, 32, 8, 151936, 1e6, 40960, tied=True)},
    "Qwen3-8B": {**_QWEN3, **_sizes(4096, 12288, 36, 32, 8, 151936, 1e6, 40960)},
    "Qwen3-14B": {**_QWEN3, **_sizes(5120, 17408, 40, 40, 8, 151936, 1e6, 40960)},
    "Qwen3-32B": {**_QWEN3, **_sizes(5120, 25600, 64, 64, 8, 151936, 1e6, 40960)},
    "Llama2-7B": {**_LLAMA, **_sizes(4096, 11008, 32, 32, 32, 32000, 1e4, 4096)},
    "Llama3-8B": {**_LLAMA, **_sizes(4096, 14336, 32, 32, 8, 128256, 5e5, 8192)},
    "Llama3.1-8B": {**_LLAMA, **_sizes(4096, 14336, 32, 32, 8, 128256, 5e5, 131072), **_llama3_rope(8.0)},
    "Llama3.2-1B": {
        **_LLAMA,
        **_sizes(2048, 8192, 16, 32, 8, 128256, 5e5, 131072, tied=True),
        **_llama3_rope(32.0),
    },
    "Llama3.2-3B": {
        **_LLAMA,
        **_sizes(3072, 8192, 28, 24, 8, 128256, 5e5, 131072, tied=True),
        **_llama3_rope(32.0),
    },
    "Llama3.3-70B": {**_LLAMA, **_sizes(8192, 28672, 80, 64, 8, 128256, 5e5, 131072), **_llama3_rope(8.0)},
    "Mistral-7B-v0.1": {**_MISTRAL, **_sizes(4096, 14336, 32, 32, 8, 32000, 1e4), "sliding_window": 4096},
    "Mistral-7B-v0.3": {**_MISTRAL, **_sizes(4096, 14336, 32, 32, 8, 32768, 1e6), "sliding_window": None},
    "DeepSeek-R1-Distill-Qwen-1.5B": {**_QWEN2, **_sizes(1536, 8960, 28, 12, 2, 151936, 1e4, 131072)},
    "DeepSeek-R1-Distill-Qwen-7B": {**_QWEN2, **_sizes(3584, 18944, 28, 28, 4, 152064, 1e4, 131072)},
    "DeepSeek-R1-Distill-Qwen-14B": {**_QWEN2, **_sizes(5120, 13824, 48, 40, 8, 152064, 1e6, 131072)},
    "DeepSeek-R1-Distill-Qwen-32B": {**_QWEN2, **_sizes(5120, 27648, 64, 40, 8, 152064, 1e6, 131072)},
    "DeepSeek-R1-Distill-Llama-8B": {
        **_LLAMA,
        **_sizes(4096, 14336, 32, 32, 8, 128256, 5e5, 131072),
        **_llama3_rope(8.0),
    },
    "DeepSeek-R1-Distill-Llama-70B": {
        **_LLAMA,
        **_sizes(8192, 28672, 80, 64, 8, 128256, 5e5, 131072),
        **_llama3_rope(8.0),
    },
}

_QUANTIZATION: Final = {
    "awq": {
        "quant_method": "awq",
        "zero_point": True,
        "group_size": GROUP,
        "bits": 4,
        "version": "gemm",
        "modules_to_not_convert": None,
    },
    "gptq": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": GROUP,
        "desc_act": False,
        "sym": True,
        "checkpoint_format": "gptq",
    },
}


Shapes = dict[str, tuple[int, ...]]


def _plain_tensors(config: dict[str, Any]) -> Shapes:
    """Every parameter's name and shape, from transformers' own model of the config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    return {name: tuple(p.shape) for name, p in model.named_parameters()}  # tied ones once


def _layout(
    plain: Shapes, layout: str, quantized: Callable[[str], bool]
) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name, dtype, shape) of each stored tensor."""
    for name, shape in plain.items():
        if layout == "fp16" or not quantized(name) or len(shape) != 2:
            yield name, "F16", shape
            continue
        base, (n, k) = name.removesuffix(".weight"), shape
        yield f"{base}.qweight", "I32", (k, n // 8) if layout == "awq" else (k // 8, n)
        yield f"{base}.qzeros", "I32", (k // GROUP, n // 8)
        yield f"{base}.scales", "F16", (k // GROUP, n)
        if layout == "gptq":
            yield f"{base}.g_idx", "I32", (k,)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], layout: str) -> Array:
    """Values of one block of rows."""
    if name.endswith(".qweight"):
        return rng.integers(-(2**31), 2**31, shape, dtype=np.int32)
    if name.endswith(".qzeros"):
        if layout == "gptq":
            return np.full(shape, 0x77777777, np.int32)
        zeros = rng.integers(6, 10, (*shape, 8)).astype(np.uint32)
        words = sum(
            (zeros[..., column] << np.uint32(4 * i) for i, column in enumerate(AWQ_ORDER)),
            np.zeros(shape, np.uint32),
        )
        return words.view(np.int32)
    if name.endswith(".scales"):
        return ((shape[0] * GROUP) ** -0.5 / 4.6 * rng.uniform(0.8, 1.2, shape)).astype(np.float16)
    if name.endswith(".g_idx"):
        return (np.arange(shape[0]) // GROUP).astype(np.int32)
    normal = rng.standard_normal(shape, dtype=np.float32)
    if name.endswith("norm.weight") or (len(shape) == 1 and name.endswith(".weight")):
        return (1 + 0.05 * normal).astype(np.float16)
    spread = 0.02 if name.endswith((".bias", "embed_tokens.weight")) else math.prod(shape[1:]) ** -0.5
    normal *= np.float32(spread)
    return normal.astype(np.float16)


def _write(file: BinaryIO, rng: np.random.Generator, name: str, shape: tuple[int, ...], layout: str) -> None:
    rows = max(1, _ROWS_AT_ONCE // max(math.prod(shape[1:]), 1)) if name.endswith(".weight") else shape[0]
    for first in range(0, shape[0], rows):
        file.write(_draw(rng, name, (min(rows, shape[0] - first), *shape[1:]), layout).tobytes())


def write_checkpoint(
    folder: Path,
    name: str,
    layout: str = "fp16",
    layers: int = 2,
    seed: int = 0,
    vocabulary: int | None = None,
) -> None:
    """A checkpoint of model `name` with `layers` layers, stored as "fp16", "awq" (AutoAWQ GEMM) or "gptq"
    (v1), in one safetensors file.

    `vocabulary`: other than the model's own, to keep the logits of many runs in memory.
    """
    config = {
        **MODELS[name],
        "num_hidden_layers": layers,
        **({} if vocabulary is None else {"vocab_size": vocabulary}),
    }
    write_folder(folder, config, _plain_tensors(config), layout, seed)


def write_folder(
    folder: Path,
    config: dict[str, Any],
    plain: Shapes,
    layout: str = "fp16",
    seed: int = 0,
    quantized: Callable[[str], bool] = lambda name: ".layers." in name,
) -> None:
    """A folder with `config.json` and the tensors of `plain`, by their stored names, drawn from `seed`.

    Matrices of which `quantized` holds are stored in `layout`.
    """
    folder.mkdir(parents=True)
    extra = {"quantization_config": _QUANTIZATION[layout]} if layout in _QUANTIZATION else {}
    (folder / "config.json").write_text(json.dumps({**config, **extra}, indent=2))
    tensors, header, position = list(_layout(plain, layout, quantized)), {}, 0
    for key, dtype, shape in tensors:
        size = math.prod(shape) * (2 if dtype == "F16" else 4)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size
    rng, text = np.random.default_rng(seed), json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, _, shape in tensors:
            _write(file, rng, key, shape, layout)
