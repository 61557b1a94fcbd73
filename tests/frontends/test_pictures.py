"""Imported vision towers and language models compute what Hugging Face computes, at stage aten and at ty."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.frontends.pictures import (
    LLAVA,
    QWEN,
    drawn_patches,
    prompt_logits,
    prompt_with_picture,
    save_random,
    tower_outputs,
)
from tests.frontends.quantized import KINDS, write_quantized
from tyir.artifacts.json_attributes import to_json
from tyir.dialects.builtin import Module
from tyir.execution.weights import CheckpointReader
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.pipeline import run_pipeline
from tyir.vision.graphs import graphs_of

# whole windows (4 tokens of 56 px a side), partial ones, one window, portrait, one row of tokens
SLOW = pytest.mark.slow
SIZES = ((224, 112), (252, 168), (56, 56), (84, 224), (196, 28))


@cache
def module_of(folder: Path, sizes: tuple[tuple[int, int], ...], raised: bool = True) -> Module:
    module = import_model(folder, dtype="f32", images=sizes)
    if raised:
        run_pipeline(module, "to-ty")
    return module


def size_of(module: Module, name: str) -> tuple[tuple[int, int], list[int]]:
    """Grid and order of a tower."""
    said = to_json(graphs_of(module)[name].attributes["tyir.graph"])
    rows, columns = said["images"][0]["grid"]
    return (rows, columns), said["order"]


def in_order(patches: Any, order: list[int]) -> Any:
    """Patches as the program takes them, from those of the processor."""
    if not order:
        return patches
    return patches.reshape(len(order), -1, patches.shape[-1])[order].reshape(patches.shape)


def back(embeddings: Any, order: list[int]) -> Any:
    """Embeddings in the processor's order, from those of the program."""
    return embeddings[np.argsort(order)] if order else embeddings


def check_tower(folder: Path, module: Module, name: str) -> None:
    grid, order = size_of(module, name)
    patches = drawn_patches(folder, grid)
    wanted = tower_outputs(folder, patches, grid)
    found = run_function(module, name, [in_order(patches, order)], CheckpointReader(folder))
    assert len(found) == len(wanted)
    for mine, theirs in zip(found, wanted):
        np.testing.assert_allclose(back(mine, order), theirs, atol=2e-5 * np.abs(theirs).max(), rtol=0)


def check_language(folder: Path, module: Module, name: str) -> None:
    grid, _ = size_of(module, name)
    patches = drawn_patches(folder, grid)
    features = tower_outputs(folder, patches, grid)
    prompt = prompt_with_picture(folder, grid, len(features[0]))
    wanted = prompt_logits(folder, prompt, patches, grid)
    main = graphs_of(module)["main"]
    assert [a.name for a in main.args[:2]] == ["input_ids", "position_ids"]
    # the picture's rows enter as rows of the embedding table, beyond the vocabulary
    reader = CheckpointReader(folder)
    lookup = next(op for op in main.body if op.name in ("ty.embedding", "aten.embedding"))
    symbols = [op for op in main.body if op.name == "ty.get_global"]
    table = lookup.operands[0].op
    while table is not None and table.name != "ty.get_global":
        table = table.operands[0].op
    assert table is not None and table in symbols
    key = str(table.properties["symbol"]).removeprefix("@").strip('"')
    extended = module.clone()
    stored = next(g for g in module.body if g.sym_name == key)
    rows = reader.read(stored).astype(np.float32)
    ids = prompt.ids.copy()
    ids[0, prompt.pictures] = len(rows) + np.arange(len(features[0]))
    addends = []
    for feature in features[1:]:
        dense = np.zeros((1, ids.shape[1], rows.shape[1]), np.float32)
        dense[0, prompt.pictures] = feature
        addends.append(dense)
    from tyir.interpreter import Interpreter, run_lockstep

    interpreter = Interpreter(
        extended, reader, constants={key: np.concatenate([rows, features[0]]).astype(np.float32)}
    )
    (logits,) = run_lockstep([interpreter.run("main", [ids, prompt.positions, *addends])])[0]
    np.testing.assert_allclose(
        logits[..., : wanted.shape[-1]], wanted, atol=3e-5 * np.abs(wanted).max(), rtol=0
    )


@pytest.mark.parametrize("raised", [pytest.param(False, marks=SLOW), True], ids=["aten", "ty"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_windows_of_every_kind(size: tuple[int, int], raised: bool) -> None:
    check_tower(QWEN, module_of(QWEN, SIZES, raised), f"visual_{size[0]}x{size[1]}")


def test_three_positions_a_token() -> None:
    check_language(QWEN, module_of(QWEN, SIZES), "visual_252x168")


def test_llava() -> None:
    module = module_of(LLAVA, ((126, 126),))
    check_tower(LLAVA, module, "visual_126x126")
    names = {str(op.attributes.get("tyir.path")) for op in module.walk()}
    assert not any("encoder.layers.5" in n or "post_layernorm" in n for n in names)


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=SLOW) for kind in ("awq-head", "gptq")])
def test_quantised_weights_leave_the_tower_as_it_is(kind: str, families: Any, tmp_path: Path) -> None:
    source = families("qwen2_5_vl")
    write_quantized(source, tmp_path / kind, KINDS[kind])
    module = module_of(tmp_path / kind, ((84, 56),))
    kinds = {name: [op.name for op in f.body] for name, f in graphs_of(module).items()}
    assert kinds["main"].count("ty.quantized_linear") == 3 * 7 + (kind == "awq-head")
    assert "ty.quantized_linear" not in kinds["visual_84x56"]
    grid, order = size_of(module, "visual_84x56")
    patches = drawn_patches(source, grid)
    (wanted,) = tower_outputs(source, patches, grid)
    reader = CheckpointReader(tmp_path / kind)
    (found,) = run_function(module, "visual_84x56", [in_order(patches, order)], reader)
    np.testing.assert_allclose(back(found, order), wanted, atol=2e-5 * np.abs(wanted).max(), rtol=0)


def test_int4_is_for_decoder_layers() -> None:
    module = module_of(QWEN, SIZES).clone()
    run_pipeline(module, "quantize-weights{group-size=64}")
    kinds = {name: [op.name for op in f.body] for name, f in graphs_of(module).items()}
    assert kinds["main"].count("ty.quantized_linear") == 4 * 7
    assert not any("ty.quantized_linear" in ops for name, ops in kinds.items() if name != "main")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda name: save_random(tmp_path_factory.mktemp(name), name))


@pytest.mark.parametrize(
    "name", [*(pytest.param(n, marks=SLOW) for n in ("qwen2_vl", "qwen2_5_vl")), "qwen3_vl"]
)
def test_random_weights_of_each_family(name: str, families: Any) -> None:
    folder = families(name)
    side = 32 if name == "qwen3_vl" else 28
    sizes = ((side * 5, side * 3), (side * 2, side * 7))
    module = module_of(folder, sizes)
    for width, height in sizes:
        check_tower(folder, module, f"visual_{width}x{height}")
    check_language(folder, module, f"visual_{sizes[0][0]}x{sizes[0][1]}")
