"""Models that see pictures and cannot be imported as they are: refused by name, with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.frontends.pictures import LLAVA, MODELS, QWEN
from tyir.diagnostics import TyirError
from tyir.frontends.huggingface import import_model
from tyir.frontends.torch_export import build_meta_model

REMOTE = {"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
OWN: dict[str, dict[str, Any]] = {
    "CogVLMForCausalLM": {**REMOTE, "vision_config": {"hidden_size": 1792}},
    "QWenLMHeadModel": {**REMOTE, "model_type": "qwen", "visual": {"width": 1664}},
}


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(TyirError) as raised:
        import_model(folder, **options)
    return str(raised.value)


@pytest.mark.parametrize("name", OWN)
def test_a_format_of_its_own(name: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"architectures": [name], "hidden_size": 64, **OWN[name]})
    )
    said = refusal(tmp_path, images=[(336, 336)])
    assert name in said
    assert "--model-plugin" in said


def test_a_model_of_text_has_no_sizes_of_pictures() -> None:
    assert "sees no pictures" in refusal(MODELS / "tiny-qwen2", images=[(112, 112)])


@pytest.mark.parametrize("folder", [QWEN, LLAVA], ids=["qwen", "llava"])
def test_a_folder_that_does_not_say_how_pictures_are_prepared(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        if path.is_file() and path.name != "processor_config.json":
            (tmp_path / path.name).symlink_to(path)
    assert "preprocessor_config.json" in refusal(tmp_path, images=[(126, 126)])


def test_the_hubs_word_for_rotary_axes_is_known(tmp_path: Path) -> None:
    """Qwen2-VL's and Qwen2.5-VL's config.json say "mrope", which transformers lists among no kinds."""
    config = json.loads((MODELS / QWEN / "config.json").read_text())
    for kind in ("mrope", "mrope2"):
        raw = {**config, "rope_scaling": {"type": kind, "mrope_section": [8, 12, 12]}}
        (tmp_path / "config.json").write_text(json.dumps(raw))
        if kind == "mrope":
            assert build_meta_model(tmp_path, raw, "f16").sees
        else:
            with pytest.raises(TyirError, match="asks for rope_scaling of type 'mrope2'"):
                build_meta_model(tmp_path, raw, "f16")
