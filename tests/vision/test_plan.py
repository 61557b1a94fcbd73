"""What `--plan` says of towers and pictures: transformers' numbers of parameters, operations by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.vision.folders import MODELS as TINY
from tests.vision.real_models import _PREPARED, MODELS
from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions
from tyir.tools.estimate.plan import make_plan
from tyir.tools.estimate.shape import read_shape
from tyir.tools.estimate.tower import read_tower


def folder_of(name: str, path: Path, **changes: Any) -> Path:
    """A folder of a real model's settings, without weights."""
    path.mkdir(exist_ok=True)
    config = {**MODELS[name], **changes}
    (path / "config.json").write_text(json.dumps(config))
    (path / "preprocessor_config.json").write_text(json.dumps(_PREPARED[config["model_type"]]))
    return path


@pytest.mark.parametrize("name", ["Qwen2-VL-7B", "Qwen2.5-VL-7B", "Qwen3-VL-4B", "LLaVA-1.5-13B"])
def test_parameters_are_transformers(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = MODELS[name]
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**config))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    tower = sum(v for n, v in sizes.items() if "language_model" not in n and not n.startswith("lm_head"))
    if config["model_type"] == "llava":  # the last block and the norm after it are not used
        dead = ("encoder.layers.23.", "post_layernorm")
        tower -= sum(v for n, v in sizes.items() if any(d in n for d in dead) and "language" not in n)
    found = read_tower(config, tmp_path)
    assert found is not None
    assert found.parameters == tower
    text = sum(v for n, v in sizes.items() if "language_model" in n or n.startswith("lm_head"))
    assert read_shape(folder_of(name, tmp_path)).parameters == text


# TFLOP of one picture of 960x540, worked out by hand
OPERATIONS = {"Qwen2-VL-7B": 4.41, "Qwen2.5-VL-7B": 3.48, "Qwen3-VL-4B": 1.76, "Qwen3-VL-8B": 2.37}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_of_a_picture(name: str, tmp_path: Path) -> None:
    options = BuildOptions(dies=4, max_kv=4096, weights="int4", seqlens=(1, 96))
    plan = make_plan(folder_of(name, tmp_path), options, images=[(960, 540), (950, 536)])
    (picture,) = plan.pictures
    assert round(picture.operations / 1e12, 2) == OPERATIONS[name]
    assert picture.seconds == pytest.approx(picture.operations / (4 * 6.144e12))
    text = plan.text()
    assert f"{picture.size.tokens} tokens" in text
    assert "M parameters in fp16" in text


def test_llava_at_its_one_size(tmp_path: Path) -> None:
    plan = make_plan(
        folder_of("LLaVA-1.5-7B", tmp_path), BuildOptions(dies=1, weights="int4"), images=[(960, 540)]
    )
    assert round(plan.pictures[0].operations / 1e12, 2) == pytest.approx(0.39, abs=0.011)
    assert plan.pictures[0].size.tokens == 576


def test_a_picture_larger_than_the_cache_is_a_problem(tmp_path: Path) -> None:
    folder = folder_of("Qwen2.5-VL-7B", tmp_path)
    plan = make_plan(
        folder, BuildOptions(dies=4, max_kv=512, weights="int4"), images=[(960, 540), (336, 336)]
    )
    (problem,) = plan.problems
    assert "a picture of 960x540 takes 646 tokens, the cache holds 512" in problem.message
    assert "--max-kv 1024" in problem.help


def test_the_tower_counts_where_memory_is_short(tmp_path: Path) -> None:
    """A die of 8 GiB holds the language model of a 7B in four bits, and the tower too."""
    plan = make_plan(folder_of("Qwen2.5-VL-7B", tmp_path), BuildOptions(dies=1, max_kv=4096, weights="int4"))
    assert plan.dies[0].tower == 2 * 676_550_144
    assert plan.dies[0].total - plan.dies[0].tower > 3 * 2**30


def test_what_cannot_be_planned(tmp_path: Path) -> None:
    with pytest.raises(TyirError, match="takes text only"):
        make_plan(TINY / "tiny-qwen2", BuildOptions(), images=[(9, 9)])
    vision = {**MODELS["Qwen2.5-VL-7B"]["vision_config"], "depth": "32", "window_size": None}
    with pytest.raises(
        TyirError, match=r"(?s)vision_config.depth is '32'.*vision_config.window_size is None"
    ):
        make_plan(folder_of("Qwen2.5-VL-7B", tmp_path, vision_config=vision), BuildOptions())
    folder = folder_of("Qwen2.5-VL-7B", tmp_path)
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(TyirError, match="does not say how its pictures are prepared"):
        make_plan(folder, BuildOptions(weights="int4"), images=[(960, 540)])


@pytest.mark.parametrize("name", ["tiny-qwen2.5-vl", "tiny-llava"])
def test_the_small_models(name: str) -> None:
    plan = make_plan(TINY / name, BuildOptions(dies=1, max_kv=512), images=[(224, 224)])
    assert plan.pictures[0].size.tokens == {"tiny-qwen2.5-vl": 64, "tiny-llava": 81}[name]
    assert not plan.problems
