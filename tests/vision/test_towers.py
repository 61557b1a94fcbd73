"""Artifacts of towers: the tree of files, sizes that share weights, embeddings on dies and on engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

from tests.frontends.llava_folders import save_random_llava
from tests.frontends.pictures import drawn_patches, tower_outputs
from tests.vision.folders import MODELS
from tyir.execution.artifacts import Artifacts
from tyir.execution.weights import tensors_of
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.report.text import text_report
from tyir.runtime_sim.session.session import EngineName
from tyir.runtime_sim.timing.summary import Summary
from tyir.runtime_sim.vision.tower import Tower
from tyir.tools.api import compile_path
from tyir.tools.sim.sources import Choice, Lengths, open_source


def smallest_cosine(mine: npt.NDArray[np.floating], theirs: npt.NDArray[np.floating]) -> float:
    """Of rows, summed in f64."""
    a, b = mine.astype(np.float64), theirs.astype(np.float64)
    return float(((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))).min())


def check_embeddings(folder: Path, model: str, number: int, engine: EngineName, least: float) -> None:
    artifacts = Artifacts.open(folder)
    assert artifacts.manifest.vision is not None
    grid = artifacts.manifest.vision.sizes[number].image.grid
    patches = drawn_patches(MODELS / model, (grid[0], grid[1])).astype(np.float16).astype(np.float32)
    wanted = tower_outputs(MODELS / model, patches, (grid[0], grid[1]))
    found = Tower(artifacts, number, engine).run(patches)
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted):
        assert mine.shape == theirs.shape
        assert smallest_cosine(mine, theirs) >= least


@pytest.mark.parametrize("dies", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_embeddings_of_every_size(compiled: Callable[[str, int], Path], dies: int) -> None:
    folder = compiled("tiny-qwen2.5-vl", dies)
    vision = Manifest.load(folder).vision
    assert vision is not None and vision.dies == dies
    for number in range(len(vision.sizes)):
        check_embeddings(folder, "tiny-qwen2.5-vl", number, "host", 0.99999)


@pytest.mark.parametrize("engine", ["interpreter", "edge10"])
def test_engines_agree(compiled: Callable[[str, int], Path], engine: EngineName) -> None:
    check_embeddings(compiled("tiny-qwen2.5-vl", 1), "tiny-qwen2.5-vl", 0, engine, 0.99999)


@pytest.mark.parametrize("dies", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize(("layers", "strategy"), [([-2, -3], "default"), ([1, -1], "full"), (1, "default")])
def test_the_states_that_a_llava_takes(layers: Any, strategy: str, dies: int, tmp_path: Path) -> None:
    """Those of several layers, side by side, wait while the layers between them run; with the class token."""
    changes = {"vision_feature_layer": layers, "vision_feature_select_strategy": strategy}
    model = save_random_llava(tmp_path / "model", "gelu", **changes)
    options = BuildOptions(dies=dies, seqlens=(16,), max_kv=64)
    folder = compile_path(model, tmp_path / "out", options, images=[(56, 56)])
    vision = Manifest.load(folder).vision
    assert vision is not None and vision.sizes[0].image.tokens == 16 + (strategy == "full")
    engines: list[EngineName] = ["host", "interpreter", "edge10"]
    for engine in engines:
        check_embeddings(folder, str(model), 0, engine, 0.99999)


def test_the_simulator_times_towers(compiled: Callable[[str, int], Path]) -> None:
    """Each size's pass, and what a prompt with such a picture takes."""
    source = open_source([compiled("tiny-qwen2.5-vl", 1)], Choice(None, {}))
    summary = source.summary(Lengths(20, None), curves=False)
    vision = Manifest.load(Path(source.name)).vision
    assert vision is not None
    assert [(p.size, p.tokens) for p in summary.pictures] == [
        (s.image.name, s.image.tokens) for s in vision.sizes
    ]
    for picture in summary.pictures:
        tower, ttft = picture.tower_ms, picture.ttft_ms
        assert tower.fast < tower.point < tower.slow and picture.tower.device_ms == tower.point
        assert 0 < picture.cube_bound_ms < tower.point
        assert ttft is not None
        rest = source.predictor.ttft_ns(picture.tokens + 20) * 1e-6
        assert 0 < picture.tables_ms.point < tower.point
        assert ttft.point == pytest.approx(tower.point + picture.tables_ms.point + rest)
    by_size = sorted(summary.pictures, key=lambda p: p.tokens)
    assert by_size[0].tower_ms.point < by_size[-1].tower_ms.point
    assert Summary.from_json(json.loads(json.dumps(summary.as_json())), "a file") == summary
    text = text_report(summary, 3)
    assert f"tower, a picture of {summary.pictures[0].size}, device (ms)" in text
    assert f"the tower on 1 die, {summary.pictures[0].size}, {summary.pictures[0].tokens} tokens: " in text


@pytest.mark.slow
def test_a_tower_cut_by_rows(tmp_path: Path) -> None:
    """Windows stay whole on each die, keys and values of full attention are gathered; products of few rows
    with large weights are cut by channels and summed; the larger picture's rows are taken in blocks on each
    die.
    """
    options = BuildOptions(dies=2, seqlens=(16,), max_kv=512)
    sizes = [(168, 112), (336, 224)]
    model = "tiny-qwen2.5-vl"
    folder = compile_path(MODELS / model, tmp_path, options, images=sizes, vision_split="rows")
    text = (folder / "visual/vit_die1.ir").read_text()
    assert "dist.all_gather" in text
    summed = [line for line in text.splitlines() if "dist.all_reduce" in line]
    assert summed and not [line for line in summed if ".attn" in line]
    check_embeddings(folder, model, 0, "host", 0.99999)
    check_embeddings(folder, model, 1, "interpreter", 0.99999)
    for number in range(len(sizes)):
        check_embeddings(folder, model, number, "edge10", 0.99999)


def test_sizes_share_weights(compiled: Callable[[str, int], Path]) -> None:
    folder = compiled("tiny-qwen2.5-vl", 1)
    manifest = Manifest.load(folder)
    assert manifest.vision is not None and len(manifest.vision.sizes) > 1
    own = {p.params for s in manifest.vision.sizes for p in s.programs}
    assert own == {"visual/constant_die0.params"}
    shared = tensors_of(np.fromfile(folder / "visual/constant_die0.params", np.uint8), folder)
    stored = _tower_tensors(MODELS / "tiny-qwen2.5-vl")
    assert sum(t.nbytes for t in shared.values()) == sum(stored.values())  # each once, in f16 as stored
    for size in manifest.vision.sizes:
        (program,) = size.programs
        tables = tensors_of(np.fromfile(folder / program.constants, np.uint8), folder)
        assert set(tables) == {"rope.cos", "rope.sin"}
        assert tables["rope.cos"].shape[-2] == size.image.patches


def _tower_tensors(checkpoint: Path) -> dict[str, int]:
    """Bytes of each tensor of a checkpoint's tower."""
    found = {}
    for file in checkpoint.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            names = tensors.keys()
            found.update({n: tensors.get_tensor(n).nbytes for n in names if "visual." in n})
    return found


def test_the_tree_is_complete(compiled: Callable[[str, int], Path]) -> None:
    folder = compiled("tiny-qwen2.5-vl", 1)
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    vision = Manifest.load(folder).vision
    assert vision is not None
    first = vision.sizes[0].programs[0]
    assert {first.library, first.program, first.ir} <= {
        f"visual/vit_die0.{s}" for s in ("so", "edge10", "ir")
    }
    others = [s for s in vision.sizes if s.programs[0] != first]
    assert all(f"visual/size_{s.image.name}/vit_die0.so" in names for s in others)
    assert {
        "visual/aot_config.json",
        "visual/buffer_config.json",
        "embedding.params",
        "processor_config.json",
        "chat_template.jinja",
    } <= names
