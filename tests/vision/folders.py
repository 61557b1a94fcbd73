"""Files that say how pictures are prepared, as the hub has them for each family, and HF's own processors
of them.

The small models' folders are real ones; the others' values are those of the public checkpoints.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from tyir.vision.settings import Find, ImageSettings, image_settings

__all__ = [
    "CLIP",
    "FAMILIES",
    "LLAVA",
    "MODELS",
    "QWEN2",
    "QWEN3",
    "finder",
    "folder_finder",
    "hf_processor",
    "settings_of",
]

MODELS: Final = Path(__file__).resolve().parents[1] / "models"
CLIP: Final[dict[str, Any]] = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
QWEN2: Final[dict[str, Any]] = {
    **CLIP,
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_processor_type": "Qwen2VLImageProcessor",
}
QWEN3: Final[dict[str, Any]] = {
    "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "image_processor_type": "Qwen2VLImageProcessorFast",
}
LLAVA: Final[dict[str, Any]] = {
    **CLIP,
    "size": {"shortest_edge": 336},
    "crop_size": {"height": 336, "width": 336},
    "do_center_crop": True,
    "resample": 3,
    "image_processor_type": "CLIPImageProcessor",
}
_CLIP_TOWER: Final = {"vision_config": {"image_size": 336, "patch_size": 14}}

# preprocessor_config.json and config.json by family
FAMILIES: Final[dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "Qwen2-VL": (
        QWEN2,
        {"vision_config": {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}},
    ),
    "Qwen2.5-VL": ({**QWEN2, "max_pixels": 28 * 28 * 1280}, {"vision_config": {"patch_size": 14}}),
    "Qwen3-VL": (QWEN3, {"vision_config": {"patch_size": 16}}),
    "LLaVA-1.5": (LLAVA, _CLIP_TOWER),
    "LLaVA padded": (
        {**LLAVA, "image_processor_type": "LlavaImageProcessor", "do_pad": True},
        _CLIP_TOWER,
    ),
    "LLaVA v1": (
        {**CLIP, "size": 224, "crop_size": 224, "feature_extractor_type": "CLIPFeatureExtractor"},
        {"image_aspect_ratio": "pad", "vision_config": {"image_size": 224, "patch_size": 14}},
    ),
}


def finder(files: Mapping[str, Any]) -> Find:
    """A folder that holds these files; values that are not bytes are written as JSON."""
    data = {name: v if isinstance(v, bytes) else json.dumps(v).encode() for name, v in files.items()}
    return data.get


def folder_finder(folder: Path) -> Find:
    """A folder on disk."""

    def find(name: str) -> bytes | None:
        return (folder / name).read_bytes() if (folder / name).is_file() else None

    return find


def settings_of(family: str) -> ImageSettings:
    """What is read of a family's files, or of a folder of `tests/models`."""
    if (MODELS / family).is_dir():
        config = json.loads((MODELS / family / "config.json").read_text())
        return image_settings(folder_finder(MODELS / family), MODELS / family, config)
    files, config = FAMILIES[family]
    return image_settings(finder({"preprocessor_config.json": files}), Path(family), config)


def hf_processor(family: str) -> Any:
    """transformers' Pillow processor of the same files."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    if (MODELS / family).is_dir():
        whole = json.loads((MODELS / family / "processor_config.json").read_text())
        files, config = whole["image_processor"], {}
    else:
        files, config = FAMILIES[family]
    options = {k: v for k, v in files.items() if not k.endswith("_type")}
    if "merge_size" in files:
        return Qwen2VLImageProcessorPil(**options)
    if files.get("do_pad") or config.get("image_aspect_ratio") == "pad":
        return LlavaImageProcessorPil(**{**options, "do_pad": True})
    return CLIPImageProcessorPil(**options)
