"""The model that sees pictures of docs/model-plugin.md: a class of one's own, imported and compared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from tests.frontends.pictures import LLAVA
from tyir.execution.weights import CheckpointReader
from tyir.frontends.huggingface import import_model
from tyir.frontends.plugin import load_plugin
from tyir.interpreter import run_function
from tyir.pipeline import run_pipeline

PAGE = Path(__file__).parents[2] / "docs" / "model-plugin.md"
NAMES = (
    ("model.vision_tower.", "eye."),
    ("model.multi_modal_projector.", "bridge."),
    ("model.language_model.", "speaker."),
)


def checkpoint(folder: Path, model_class: Any) -> Any:
    """A random model of the class, saved under names of its own; returns the model."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlavaConfig

    raw = json.loads((LLAVA / "config.json").read_text())
    raw["text_config"].update(num_hidden_layers=2, vocab_size=320)
    raw["vision_config"].update(num_hidden_layers=3, image_size=56)
    raw.update(image_token_index=300, architectures=["Seer"])
    for key in ("bos_token_id", "eos_token_id"):
        raw["text_config"][key] = 1
    torch.manual_seed(0)
    model = model_class(LlavaConfig.from_dict(raw)).eval()
    stored: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        prefix, own = next(((p, o) for p, o in NAMES if name.startswith(p)), ("", ""))
        stored[own + name.removeprefix(prefix)] = tensor.contiguous()
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(raw))
    pixels = json.loads((LLAVA / "processor_config.json").read_text())["image_processor"]
    pixels.update(crop_size={"height": 56, "width": 56}, size={"shortest_edge": 56})
    (folder / "preprocessor_config.json").write_text(json.dumps(pixels))
    return model


def test_the_page(tmp_path: Path) -> None:
    import torch

    code = next(c for c in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "Seer" in c)
    (tmp_path / "seer.py").write_text(code)
    plugin = load_plugin(tmp_path / "seer.py")
    folder = tmp_path / "model"
    folder.mkdir()
    model = checkpoint(folder, plugin.model_class)
    module = import_model(folder, dtype="f32", images=[(56, 56)], plugin=plugin)
    run_pipeline(module, "to-ty")
    patches = np.random.default_rng(0).standard_normal((16, 588)).astype(np.float32)
    rows = torch.tensor(patches).reshape(4, 4, 3, 14, 14).permute(2, 0, 3, 1, 4).reshape(1, 3, 56, 56)
    with torch.no_grad():
        wanted = model.model.get_image_features(rows, return_dict=True).pooler_output[0].numpy()
        ids = torch.arange(10, 17)[None]
        said = model(input_ids=ids).logits.numpy()
    reader = CheckpointReader(folder)
    (found,) = run_function(module, "visual_56x56", [patches], reader)
    np.testing.assert_allclose(found, wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)
    positions = np.arange(7, dtype=np.int64)[None]
    (logits,) = run_function(module, "main", [ids.numpy(), positions], reader)
    np.testing.assert_allclose(logits, said, atol=3e-5 * np.abs(said).max(), rtol=0)
