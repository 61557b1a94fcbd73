"""Vision-language models for tests: what Hugging Face computes of patches and of prompts with pictures, and
small random checkpoints of each family.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
MODELS = Path(__file__).parents[1] / "models"
QWEN, LLAVA = MODELS / "tiny-qwen2.5-vl", MODELS / "tiny-llava"


@cache
def reference(folder: Path) -> Any:
    """The model of a folder in fp32."""
    import torch
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def drawn_patches(folder: Path, grid: tuple[int, int], seed: int = 0) -> Array:
    """Patches [N, columns] f32 of the size of normalised pixels."""
    vision = reference(folder).config.vision_config
    channels = getattr(vision, "in_channels", 3)
    columns = channels * getattr(vision, "temporal_patch_size", 1) * vision.patch_size**2
    rng = np.random.default_rng(seed)
    smooth = rng.standard_normal((grid[0] * grid[1], 1)) + 0.5 * rng.standard_normal((1, columns))
    noise = 0.3 * rng.standard_normal((grid[0] * grid[1], columns))
    return np.asarray(smooth + noise, np.float32)


def tower_outputs(folder: Path, patches: Array, grid: tuple[int, int]) -> list[Array]:
    """Embeddings [tokens, hidden] and deepstack features of one picture's patches, by transformers in
    fp32.
    """
    import torch

    model = reference(folder)
    x = torch.tensor(patches)
    with torch.no_grad():
        if hasattr(model.model, "visual"):
            out = model.model.visual(x, grid_thw=torch.tensor([[1, *grid]]))
            return [t.numpy() for t in (out.pooler_output, *(getattr(out, "deepstack_features", None) or ()))]
        side = model.config.vision_config.patch_size
        rows, columns = grid
        picture = x.reshape(rows, columns, -1, side, side).permute(2, 0, 3, 1, 4)
        pixels = picture.reshape(1, -1, rows * side, columns * side)
        return [model.model.get_image_features(pixels, return_dict=True).pooler_output[0].numpy()]


@dataclass(frozen=True)
class Prompt:
    """A prompt with one picture in it: ids [1, s], which of them stand for the picture [s], and positions
    [3, 1, s], or [1, s] where each token has one.
    """

    ids: Array
    pictures: Array
    positions: Array


def prompt_with_picture(folder: Path, grid: tuple[int, int], tokens: int) -> Prompt:
    """Text, one picture, text; positions by transformers' own rule."""
    import torch

    model = reference(folder)
    config = model.config
    image = config.image_token_id
    rng = np.random.default_rng(1)
    before, after = (rng.integers(10, min(image, 4000), n) for n in (7, 9))
    marks = getattr(config, "vision_start_token_id", None), getattr(config, "vision_end_token_id", None)
    start, end = ([m] if m is not None else [] for m in marks)
    ids = np.concatenate([before, start, [image] * tokens, end, after]).astype(np.int64)[None]
    pictures = ids[0] == image
    positions = np.arange(ids.shape[1], dtype=np.int64)[None]
    if hasattr(model.model, "get_rope_index"):
        found, _ = model.model.get_rope_index(
            torch.tensor(ids),
            torch.tensor(pictures[None].astype(np.int32)),
            image_grid_thw=torch.tensor([[1, *grid]]),
        )
        positions = found.numpy()
    return Prompt(ids, pictures, positions)


def prompt_logits(folder: Path, prompt: Prompt, patches: Array, grid: tuple[int, int]) -> Array:
    """Logits [1, s, V] of the whole model in fp32."""
    import torch

    model = reference(folder)
    with torch.no_grad():
        features = [torch.tensor(t) for t in tower_outputs(folder, patches, grid)]
        embeddings = model.get_input_embeddings()(torch.tensor(prompt.ids))
        mask = torch.tensor(prompt.pictures)
        embeddings[0, mask] = features[0]
        others = {}
        if features[1:]:
            others = {"visual_pos_masks": mask[None], "deepstack_visual_embeds": features[1:]}
        hidden = model.model.language_model(
            inputs_embeds=embeddings,
            position_ids=torch.tensor(prompt.positions),
            attention_mask=torch.ones(prompt.ids.shape, dtype=torch.long),
            **others,
        ).last_hidden_state
        return np.asarray(model.lm_head(hidden).numpy())


# -------------------------------------------------------------------------------------- random checkpoints

_TEXT: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
_IDS: dict[str, int] = {
    "image_token_id": 300,
    "video_token_id": 301,
    "vision_start_token_id": 302,
    "vision_end_token_id": 303,
}
_GRID_PIXELS: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": 2,
    "temporal_patch_size": 2,
    "size": {"shortest_edge": 64, "longest_edge": 1 << 22},
}


def family(name: str) -> tuple[dict[str, Any], int]:
    """config.json of a small model of a family of grids, and its patch side."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if name == "qwen2_vl":
        text = {**_TEXT, "rope_parameters": {**rope, "mrope_section": [2, 3, 3]}}
        vision = {"depth": 3, "embed_dim": 48, "hidden_size": 64, "num_heads": 3, "mlp_ratio": 2}
        return {"text_config": text, "vision_config": {**vision, "patch_size": 14}}, 14
    if name == "qwen2_5_vl":
        text = {**_TEXT, "rope_parameters": {**rope, "mrope_section": [2, 3, 3]}}
        vision = {
            "depth": 4,
            "hidden_size": 48,
            "out_hidden_size": 64,
            "num_heads": 3,
            "intermediate_size": 80,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
            "patch_size": 14,
        }
        return {"text_config": text, "vision_config": vision}, 14
    assert name == "qwen3_vl"
    sections = {"mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {**_TEXT, "head_dim": 16, "rope_parameters": {**rope, **sections}}
    vision = {
        "depth": 4,
        "hidden_size": 48,
        "out_hidden_size": 64,
        "num_heads": 3,
        "intermediate_size": 80,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 2],
        "patch_size": 16,
    }
    return {"text_config": text, "vision_config": vision}, 16


def save_random(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A random checkpoint of a family as transformers saves it, in f16; returns the folder."""
    import json

    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    parts, patch = family(name)
    config = CONFIG_MAPPING[name](**parts, **_IDS, tie_word_embeddings=False, **changes)
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            spread = 0.3 if parameter.dim() == 1 else 1.2 * parameter[0].numel() ** -0.5
            centre = 1.0 if ("norm" in key and key.endswith("weight")) or "ln_q" in key else 0.0
            parameter.copy_(centre + spread * torch.randn_like(parameter))
    model.half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({**_GRID_PIXELS, "patch_size": patch}))
    return folder
