"""LLaVA's own layout, written from a checkpoint that transformers has: what haotian-liu/LLaVA saves of the
same model (`llava/model/llava_arch.py`, `apply_delta.py`), its tower in a second folder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.frontends.pictures import LLAVA

PATCH, START, END = 271, 272, 273
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Folders:
    """A model in LLaVA's own layout, its tower, and what it is in transformers'."""

    own: Path
    tower: Path
    hf: Path


def tensors_of(folder: Path) -> dict[str, Any]:
    """Every stored tensor of a folder by name."""
    from safetensors.torch import load_file

    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def save_random_llava(folder: Path, projector: str, marks: bool = False, **changes: Any) -> Path:
    """A small random LLaVA as transformers saves it, in f16.

    `projector`: "gelu", or "linear", which transformers' own class does not have: the second layer of the
    saved model is the identity.  `marks`: its tokens of the begin and end of a picture.
    """
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    raw = json.loads((LLAVA / "config.json").read_text())
    raw["text_config"].update(num_hidden_layers=2, hidden_size=96, intermediate_size=128, vocab_size=320)
    raw["text_config"].update(num_attention_heads=3, num_key_value_heads=3, head_dim=32)
    raw["vision_config"].update(num_hidden_layers=3, image_size=56, hidden_size=64, intermediate_size=96)
    raw["vision_config"].update(num_attention_heads=2)
    raw.update(image_token_index=PATCH if marks else 0, projector_hidden_act=projector)
    if marks:
        raw.update(vision_start_token_id=START, vision_end_token_id=END)
    raw.update(changes)
    for key in ("bos_token_id", "eos_token_id"):
        raw["text_config"][key] = 1
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(raw)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else 1.2 * parameter[0].numel() ** -0.5
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
        if projector == "linear":
            second = model.model.multi_modal_projector.linear_2
            second.weight.copy_(torch.eye(len(second.weight)))
            second.bias.zero_()
    model.half().save_pretrained(folder)
    pixels = json.loads((LLAVA / "processor_config.json").read_text())["image_processor"]
    pixels.update(crop_size={"height": 56, "width": 56}, size={"shortest_edge": 56})
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    save_tokenizer(folder, ("<im_patch>", "<im_start>", "<im_end>") if marks else ())
    return folder


def save_tokenizer(folder: Path, added: Sequence[str]) -> None:
    """A small tokenizer of Llama's kind: letters of a few words, all bytes, and `added` from PATCH on."""
    from transformers import LlamaTokenizer

    pieces = ["\u2581", "t", "h", "e", "o", "l", "d", "s", "u", "th", "\u2581th", "\u2581the"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *pieces]
    merges = [("t", "h"), ("\u2581", "th"), ("\u2581th", "e")]
    tokenizer = LlamaTokenizer(vocab={text: number for number, text in enumerate(tokens)}, merges=merges)
    tokenizer.add_tokens(list(added), special_tokens=True)
    tokenizer.save_pretrained(folder)


def in_own_layout(hf: Path, out: Path, *, whole_clip: bool = False, **changes: Any) -> Folders:
    """The model of `hf` in LLaVA's own layout, in folders below `out`; `changes` of its config.json, None for
    keys that it lacks.
    """
    from safetensors.torch import save_file

    own, tower = out / "llava", out / "clip"
    raw = json.loads((hf / "config.json").read_text())
    text, vision = raw["text_config"], raw["vision_config"]
    linear = raw["projector_hidden_act"] == "linear"
    whole = raw["vision_feature_select_strategy"] == "full"
    for folder in (own, tower):
        folder.mkdir(parents=True)
    config = {
        **{k: v for k, v in text.items() if k != "model_type"},
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava" if linear else "llava_llama",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": None if linear else "mlp2x_gelu",
        "mm_vision_select_layer": raw["vision_feature_layer"],
        "mm_vision_select_feature": "cls_patch" if whole else None if linear else "patch",
        "mm_use_im_start_end": "vision_start_token_id" in raw,
        "tune_mm_mlp_adapter": False,
        "freeze_mm_mlp_adapter": False,
        "use_mm_proj": True,
        **changes,
    }
    config = {key: value for key, value in config.items() if value is not None}
    (own / "config.json").write_text(json.dumps(config))
    clip = {**vision, "architectures": ["CLIPVisionModel"]}
    if whole_clip:
        clip = {"architectures": ["CLIPModel"], "model_type": "clip", "vision_config": vision}
    (tower / "config.json").write_text(json.dumps(clip))
    stored: dict[Path, dict[str, Any]] = {own: {}, tower: {}}
    for name, tensor in tensors_of(hf).items():
        if name.startswith("vision_tower."):
            stored[tower][f"vision_model.{name.removeprefix('vision_tower.')}"] = tensor
        elif name.startswith("multi_modal_projector."):
            number, kind = name.removeprefix("multi_modal_projector.linear_").split(".")
            if not linear:
                stored[own][f"model.mm_projector.{2 * int(number) - 2}.{kind}"] = tensor
            elif number == "1":
                stored[own][f"model.mm_projector.{kind}"] = tensor
        else:
            stored[own][name.removeprefix("language_model.")] = tensor
    if whole_clip:
        extra = {"text_model.final_layer_norm.bias", "logit_scale"}
        first = next(iter(stored[tower].values()))
        stored[tower] |= {name: first.flatten()[:1].clone() for name in extra}
    for folder, tensors in stored.items():
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for name in _TOKENIZER:
        if (hf / name).is_file():
            (own / name).write_bytes((hf / name).read_bytes())
    if (hf / "preprocessor_config.json").is_file():
        pixels = json.loads((hf / "preprocessor_config.json").read_text())
    else:
        pixels = json.loads((hf / "processor_config.json").read_text())["image_processor"]
    (tower / "preprocessor_config.json").write_text(json.dumps(pixels))
    return Folders(own, tower, hf)
