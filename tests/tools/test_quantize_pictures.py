"""tyir-quantize on models that see pictures: their language part is quantised, all else stays, and the
answers for the sample pictures stay right.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

import transformers  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from tests.frontends.awq_tables import random_table  # noqa: E402
from tests.frontends.quantized import unpack_awq  # noqa: E402
from tests.vision.folders import hf_processor  # noqa: E402
from tests.vision.reference import HuggingFace  # noqa: E402
from tests.vision.test_answers import Talk  # noqa: E402
from tyir.execution.awq_table import AwqSettings  # noqa: E402
from tyir.execution.weights import CheckpointReader  # noqa: E402
from tyir.frontends.dense_state import dense_state  # noqa: E402
from tyir.frontends.huggingface import import_model  # noqa: E402
from tyir.frontends.torch_export import build_plain_model  # noqa: E402
from tyir.interpreter import run_function  # noqa: E402
from tyir.manifest import BuildOptions  # noqa: E402
from tyir.pipeline import run_pipeline  # noqa: E402
from tyir.tools.api import compile_path  # noqa: E402
from tyir.tools.quantize.quantize import Text, perplexity_of, quantize  # noqa: E402
from tyir.tools.quantize.settings import QuantizeSettings  # noqa: E402

MODELS = Path(__file__).parents[1] / "models"
TEXT = "There are two shapes. A blue circle is at the top left, and the old house stood on the right. " * 20
LIMITS = {"f32": 1e-5, "f16": 4e-3}
# of each model: what the tensors of its language model and of its tower begin with in its files, and what a
# loader is told to leave alone
CASES = {
    "tiny-qwen2.5-vl": ("model.", ("visual.",), ["visual", "model.visual"]),
    "tiny-llava": (
        "language_model.model.",
        ("vision_tower.", "multi_modal_projector."),
        ["multi_modal_projector", "vision_tower", "model.multi_modal_projector", "model.vision_tower"],
    ),
}


def quantised(name: str, folder: Path, **settings: Any) -> Any:
    text = folder / "text.txt"
    text.write_text(TEXT)
    asked = QuantizeSettings(**{"group_size": 64, "window": 64, "samples": 4, "quick": True, **settings})
    return quantize(MODELS / name, folder / "out", asked, calibration=text, evaluate=Text(text, 600))


def tensors_of(folder: Path) -> dict[str, npt.NDArray[Any]]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


class OnTheseWeights(HuggingFace):
    """transformers' model in fp32 with the weights that a quantised checkpoint holds."""

    def __init__(self, weights: Path, name: str) -> None:
        self.folder = MODELS / name
        self.model = build_plain_model(self.folder)
        with torch.no_grad():
            for parameter, array in dense_state(weights):
                self.model.get_parameter(parameter).copy_(torch.tensor(array))
        self.model.tie_weights()
        self.processor = hf_processor(name)


def check_answers(name: str, folder: Path, out: Path) -> None:
    """Compiled, the checkpoint gives the answers for the sample pictures that the model itself gives in f16,
    and those are transformers' own on the same weights.
    """
    from PIL import Image

    samples = json.loads((MODELS / name / "training.json").read_text())["samples"]
    pictures = [np.asarray(Image.open(MODELS / name / s["image"]).convert("RGB")) for s in samples]
    sizes = sorted({(p.shape[1], p.shape[0]) for p in pictures})
    options = BuildOptions(seqlens=(16,), max_kv=256)
    talk = Talk(compile_path(folder, out, options, images=sizes))
    reference = OnTheseWeights(folder, name)
    for sample, picture in zip(samples, pictures, strict=True):
        talk.forget()
        prompt, made = talk.ask(sample["question"], MODELS / name / sample["image"])
        assert talk.said(made) == sample["greedy_fp16"]
        answer = reference.compare(prompt, made, [picture])
        assert answer.same or answer.tied


def check(name: str, outcome: Any) -> None:
    inside, towers, apart = CASES[name]
    before, after = tensors_of(MODELS / name), tensors_of(outcome.out)
    for key, array in before.items():
        if key.startswith(towers):
            assert np.array_equal(after.pop(key), array), key
    packed = [key.removesuffix(".qweight") for key in after if key.endswith(".qweight")]
    assert len(packed) == 4 * 7 and all(path.startswith(f"{inside}layers.") for path in packed)
    assert not any(key.startswith(towers) for key in after)
    path = f"{inside}layers.1.mlp.down_proj"
    n, k = before[f"{path}.weight"].shape
    parts = {part: after[f"{path}.{part}"] for part in ("qweight", "qzeros", "scales")}
    assert unpack_awq(parts, n, k).shape == (n, k)
    config = json.loads((outcome.out / "config.json").read_text())
    assert sorted(config["quantization_config"]["modules_to_not_convert"]) == sorted(apart)
    assert {p.name for p in outcome.out.iterdir()} >= {"processor_config.json", "chat_template.jinja"}
    assert outcome.after.value == pytest.approx(outcome.before.value, rel=0.25)
    measured = perplexity_of(outcome.out, Text(outcome.out.parent / "text.txt", 600), 64)
    assert outcome.after.value == pytest.approx(measured.value)


def test_the_language_part_is_quantised(tmp_path: Path) -> None:
    check("tiny-qwen2.5-vl", quantised("tiny-qwen2.5-vl", tmp_path, method="awq", samples=2))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_answers_for_all_sample_pictures(name: str, tmp_path: Path) -> None:
    outcome = quantised(name, tmp_path)
    check(name, outcome)
    check_answers(name, outcome.out, tmp_path / "build")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("tiny-qwen2.5-vl", "f16"),
        pytest.param("tiny-qwen2.5-vl", "f32", marks=pytest.mark.slow),
        pytest.param("tiny-llava", "f16", marks=pytest.mark.slow),
        pytest.param("tiny-llava", "f32", marks=pytest.mark.slow),
    ],
)
def test_folding_changes_nothing(name: str, dtype: str, tmp_path: Path) -> None:
    """Random scales on all groups of the language model: the same logits, but for rounding."""
    module = import_model(MODELS / name, dtype=dtype)
    run_pipeline(module, "to-ty")
    table = random_table(module, AwqSettings(group_size=64))
    assert len(table.scales) == 4 * 4
    table.save(tmp_path / "table.safetensors")
    positions = np.arange(7)[None]
    if name == "tiny-qwen2.5-vl":
        positions = np.stack([positions, positions + 1, positions // 2])
    reader = CheckpointReader(MODELS / name)

    def logits() -> npt.NDArray[np.float32]:
        (out, *_) = run_function(module, "main", (np.arange(5, 12)[None], positions), reader)
        return np.asarray(out, np.float32)

    wanted = logits()
    run_pipeline(module, f"awq-fold{{table={tmp_path / 'table.safetensors'}}}")
    found = logits()
    assert 0 < np.linalg.norm(found - wanted) < LIMITS[dtype] * np.linalg.norm(wanted)


@pytest.mark.slow
def test_in_one_step_it_is_the_same_artifacts(tmp_path: Path) -> None:
    """tyir-compile --weights awq with sizes of pictures."""
    name, options = "tiny-qwen2.5-vl", {"seqlens": (16,), "max_kv": 64}
    text = tmp_path / "text.txt"
    text.write_text(TEXT * 30)
    sizes = [(112, 112)]
    out = quantize(MODELS / name, tmp_path / name, QuantizeSettings(), calibration=text).out
    two = compile_path(out, tmp_path / "two", options, images=sizes)
    asked = {**options, "weights": "awq"}
    one = compile_path(MODELS / name, tmp_path / "one", asked, images=sizes, calibration=text)
    files = {p.relative_to(two) for p in two.rglob("*") if p.is_file()}
    assert files == {p.relative_to(one) for p in one.rglob("*") if p.is_file()}
    for file in files:
        if file.name != "manifest.json":
            assert (one / file).read_bytes() == (two / file).read_bytes(), file


@pytest.mark.slow
@pytest.mark.parametrize("zero_point", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_transformers_loads_it(name: str, zero_point: bool, tmp_path: Path) -> None:
    """Its own loader of compressed-tensors, whose `ignore` has to name the tower: the logits are those of our
    import, but for the rounding of weights to f16.
    """
    pytest.importorskip("compressed_tensors")
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    settings = QuantizeSettings("awq", group_size=64, zero_point=zero_point, window=64, samples=2, quick=True)
    out = quantize(
        MODELS / name, tmp_path / "out", settings, calibration=text, format="compressed-tensors"
    ).out
    model = transformers.AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        found = model(input_ids=ids).logits
        wanted = OnTheseWeights(out, name).model(input_ids=ids).logits
    assert float((found - wanted).norm()) < 2e-3 * float(wanted.norm())
