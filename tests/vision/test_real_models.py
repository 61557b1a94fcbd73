"""Random checkpoints of real shapes are what transformers loads: no tensor is missing, none is left over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.vision.folders import folder_finder
from tests.vision.real_models import MODELS, write_vision_checkpoint
from tyir.vision.settings import image_settings

SMALL = ("Qwen2-VL-2B", "Qwen2.5-VL-3B", "Qwen3-VL-2B", "LLaVA-1.5-7B")


@pytest.mark.slow
@pytest.mark.parametrize("name", SMALL)
def test_transformers_finds_every_tensor(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    write_vision_checkpoint(tmp_path / "model", name, layers=1, blocks=2, vocabulary=1024)
    _, report = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float16, output_loading_info=True
    )
    assert not report["missing_keys"], report["missing_keys"]
    assert not report["unexpected_keys"], report["unexpected_keys"]
    assert not report["mismatched_keys"]


@pytest.mark.slow
def test_a_quantised_checkpoint_leaves_the_tower_alone(tmp_path: Path) -> None:
    write_vision_checkpoint(tmp_path / "model", "Qwen2.5-VL-3B", "awq", layers=1, blocks=1, vocabulary=1024)
    with (tmp_path / "model" / "model.safetensors").open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    packed = {name for name in header if name.endswith(".qweight")}
    assert len(packed) == 7
    assert all(name.startswith("model.layers.0.") for name in packed)


@pytest.mark.parametrize("name", MODELS)
def test_the_settings_are_those_of_the_tower(name: str) -> None:
    from tests.vision.real_models import _PREPARED

    config = MODELS[name]
    files = {"preprocessor_config.json": json.dumps(_PREPARED[config["model_type"]]).encode()}
    settings = image_settings(files.get, Path(name), config)
    tokens = {"qwen3_vl": 510, "llava": 576}.get(config["model_type"], 646)
    assert settings.size(960, 540).tokens == tokens
    assert folder_finder(Path(name))("config.json") is None
