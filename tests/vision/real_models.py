"""Checkpoints of real vision-language models' shapes with random weights, as the hub stores them.

    python -m tests.vision.real_models Qwen2.5-VL-7B out/model --layout awq --layers 28 --blocks 32

`MODELS` holds the public config.json values (https://huggingface.co), keys in the places where those files
have them; names of tensors are the hub's.  Quantised layouts leave the tower in fp16, as published ones do.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
from pathlib import Path
from typing import Any, Final

from tests.frontends.real_models import write_folder
from tests.vision.folders import LLAVA, QWEN2, QWEN3

__all__ = ["MODELS", "write_vision_checkpoint"]

_QWEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}


def _text(hidden: int, width: int, layers: int, heads: int, kv_heads: int, vocabulary: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "hidden_act": "silu",
        "torch_dtype": "float16",
    }


def _qwen2(version: str, text: dict[str, Any], tied: bool, vision: dict[str, Any]) -> dict[str, Any]:
    """Qwen2-VL and Qwen2.5-VL: the text's keys at the top."""
    return {
        "architectures": [f"{version}ForConditionalGeneration"],
        "model_type": {"Qwen2VL": "qwen2_vl", "Qwen2_5_VL": "qwen2_5_vl"}[version],
        **text,
        **_QWEN_IDS,
        **_MROPE,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": tied,
        "vision_config": {**vision, "in_chans": 3, "spatial_patch_size": 14},
    }


def _tower2(out: int) -> dict[str, Any]:
    return {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "hidden_size": out,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }


def _tower25(out: int) -> dict[str, Any]:
    return {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "hidden_act": "silu",
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": out,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
    }


def _qwen3(
    text: dict[str, Any], tied: bool, tower: tuple[int, int, int], deepstack: list[int]
) -> dict[str, Any]:
    depth, hidden, width = tower
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        **_QWEN_IDS,
        "tie_word_embeddings": tied,
        "text_config": {
            **text,
            "model_type": "qwen3_vl_text",
            "head_dim": 128,
            "rms_norm_eps": 1e-6,
            "rope_theta": 5e6,
            "attention_bias": False,
            "max_position_embeddings": 262144,
            "tie_word_embeddings": tied,
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "rope_scaling": {
                "rope_type": "default",
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20],
            },
        },
        "vision_config": {
            "depth": depth,
            "hidden_size": hidden,
            "intermediate_size": width,
            "num_heads": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "in_channels": 3,
            "model_type": "qwen3_vl",
            "patch_size": 16,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 2304,
            "out_hidden_size": text["hidden_size"],
            "deepstack_visual_indexes": deepstack,
        },
    }


def _llava(text: dict[str, Any]) -> dict[str, Any]:
    """LLaVA-1.5 as converted: what Llama's class has by default is left out of the 7B's."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "vocab_size": 32064,
            "torch_dtype": "float16",
            **text,
        },
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "model_type": "clip_vision_model",
        },
    }


_QWEN3_SMALL, _QWEN3_LARGE = (24, 1024, 4096), (27, 1152, 4304)
MODELS: Final[dict[str, dict[str, Any]]] = {
    "Qwen2-VL-2B": _qwen2("Qwen2VL", _text(1536, 8960, 28, 12, 2, 151936), True, _tower2(1536)),
    "Qwen2-VL-7B": _qwen2("Qwen2VL", _text(3584, 18944, 28, 28, 4, 152064), False, _tower2(3584)),
    "Qwen2.5-VL-3B": _qwen2("Qwen2_5_VL", _text(2048, 11008, 36, 16, 2, 151936), True, _tower25(2048)),
    "Qwen2.5-VL-7B": _qwen2("Qwen2_5_VL", _text(3584, 18944, 28, 28, 4, 152064), False, _tower25(3584)),
    "Qwen3-VL-2B": _qwen3(_text(2048, 6144, 28, 16, 8, 151936), True, _QWEN3_SMALL, [5, 11, 17]),
    "Qwen3-VL-4B": _qwen3(_text(2560, 9728, 36, 32, 8, 151936), True, _QWEN3_SMALL, [5, 11, 17]),
    "Qwen3-VL-8B": _qwen3(_text(4096, 12288, 36, 32, 8, 151936), False, _QWEN3_LARGE, [8, 16, 24]),
    "LLaVA-1.5-7B": _llava({}),
    "LLaVA-1.5-13B": _llava(_text(5120, 13824, 40, 40, 40, 32064)),
}

# The hub's names of tensors: what comes first in a module's name, by family.
_STORED: Final = {
    "qwen2_vl": (("model.visual.", "visual."), ("model.language_model.", "model.")),
    "qwen2_5_vl": (("model.visual.", "visual."), ("model.language_model.", "model.")),
    "qwen3_vl": (),
    "llava": (
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("model.language_model.", "language_model.model."),
        ("lm_head.", "language_model.lm_head."),
    ),
}
_PREPARED: Final = {"qwen2_vl": QWEN2, "qwen2_5_vl": QWEN2, "qwen3_vl": QWEN3, "llava": LLAVA}


def _config(name: str, layers: int | None, blocks: int | None, vocabulary: int | None) -> dict[str, Any]:
    """The config of a model with fewer layers and blocks: of its kinds of block, the last ones."""
    config = copy.deepcopy(MODELS[name])
    text, vision = config.get("text_config", config), config["vision_config"]
    if layers is not None:
        text["num_hidden_layers"] = layers
    if vocabulary is not None:
        text["vocab_size"] = vocabulary
        special = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        config |= {key: vocabulary - 1 - i for i, key in enumerate(special) if key in config}
        config |= {"image_token_index": vocabulary - 1} if "image_token_index" in config else {}
    if blocks is not None:
        vision["depth" if "depth" in vision else "num_hidden_layers"] = blocks
        for key in ("fullatt_block_indexes", "deepstack_visual_indexes"):
            if key in vision:
                vision[key] = (
                    [blocks - 1] if key.startswith("full") else list(range(min(blocks, len(vision[key]))))
                )
    return config


def _tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter by its stored name, from transformers' own model of the config."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("meta"):
        # A copy: config classes write into what they are given, and the folder's is to be as published.
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**copy.deepcopy(config)))
    found = {}
    for name, parameter in model.named_parameters():
        stored = name
        for first, kept in _STORED[config["model_type"]]:
            if name.startswith(first):
                stored = kept + name.removeprefix(first).removeprefix("vision_model.")
                break
        found[stored] = tuple(parameter.shape)
    return found


def write_vision_checkpoint(
    folder: Path,
    name: str,
    layout: str = "fp16",
    layers: int | None = 2,
    blocks: int | None = 2,
    seed: int = 0,
    vocabulary: int | None = None,
) -> dict[str, Any]:
    """A folder of model `name` with `layers` decoder layers and `blocks` of the tower (None: all of them),
    stored as "fp16", "awq" (AutoAWQ GEMM) or "gptq" (v1); its config.
    """
    config = _config(name, layers, blocks, vocabulary)
    text = re.compile(r"(^|language_model\.)(model\.)?(language_model\.)?layers\.\d+\.")
    write_folder(folder, config, _tensors(config), layout, seed, lambda key: text.search(key) is not None)
    (folder / "preprocessor_config.json").write_text(json.dumps(_PREPARED[config["model_type"]], indent=2))
    return config


def main() -> None:
    """Write one folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layout", choices=("fp16", "awq", "gptq"), default="fp16")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_vision_checkpoint(args.out, args.name, args.layout, args.layers, args.blocks, args.seed)


if __name__ == "__main__":
    main()
