"""A tower's residual stream divided by a power of two: the same embeddings in f32, finite ones in f16 where
they were not.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.frontends.pictures import LLAVA, QWEN, drawn_patches, save_random
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.execution.weights import CheckpointReader
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.pipeline import run_pipeline
from tyir.tools.tyir_compile import main
from tyir.vision.graphs import VISION, graph_kind, graphs_of


def embeddings(folder: Path, module: Module, element: Any = np.float32) -> list[Any]:
    """Of drawn patches, whatever the order; all outputs of the only tower."""
    (name,) = (n for n, f in graphs_of(module).items() if graph_kind(f) == VISION)
    rows, columns = _grid(module, name)
    patches = drawn_patches(folder, (rows, columns)).astype(element)
    with np.errstate(all="ignore"):
        return list(run_function(module, name, [patches], CheckpointReader(folder)))


def _grid(module: Module, name: str) -> tuple[int, int]:
    from tyir.artifacts.json_attributes import to_json

    rows, columns = to_json(graphs_of(module)[name].attributes["tyir.graph"])["images"][0]["grid"]
    return rows, columns


def tower_of(folder: Path, size: tuple[int, int], dtype: str = "f32") -> Module:
    module = import_model(folder, dtype=dtype, images=[size])
    run_pipeline(module, "to-ty")
    return module


@pytest.mark.parametrize(("folder", "size"), [(QWEN, (84, 56)), (LLAVA, (126, 126))], ids=["qwen", "llava"])
def test_nothing_changes_in_f32(folder: Path, size: tuple[int, int]) -> None:
    """Powers of two only move exponents: equal bit by bit."""
    module = tower_of(folder, size)
    before = embeddings(folder, module)
    run_pipeline(module, "scale-residual{exponent=6}")
    for plain, scaled in zip(before, embeddings(folder, module), strict=True):
        assert np.array_equal(plain, scaled)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_every_family(name: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path / name, name)
    side = 128 if name == "qwen3_vl" else 112
    module = tower_of(folder, (side, side))
    before = embeddings(folder, module)
    run_pipeline(module, "scale-residual")
    for plain, scaled in zip(before, embeddings(folder, module), strict=True):
        assert np.array_equal(plain, scaled)


class Louder:
    """The checkpoint with the second linear of the last block's MLP, and its bias, many times as large: the
    stream then passes what f16 holds, as the last block of Qwen2.5-VL's tower does.
    """

    def __init__(self, folder: Path, factor: float) -> None:
        self.reader, self.factor = CheckpointReader(folder), factor

    def read(self, reference: Any) -> Any:
        array = self.reader.read(reference)
        loud = re.search(r"blocks\.3\.mlp\.down_proj", str(reference.sym_name))
        return (array * array.dtype.type(self.factor)) if loud else array


def test_a_stream_that_f16_does_not_hold() -> None:
    wide, narrow = tower_of(QWEN, (84, 56)), tower_of(QWEN, (84, 56), "f16")
    (name,) = (n for n, f in graphs_of(wide).items() if graph_kind(f) == VISION)
    patches = drawn_patches(QWEN, _grid(wide, name))
    reader = Louder(QWEN, 2.0**15)
    with np.errstate(all="ignore"):
        (wanted,) = run_function(wide, name, [patches], reader)
        (plain,) = run_function(narrow, name, [patches.astype(np.float16)], reader)
        run_pipeline(narrow, "scale-residual{exponent=12}")
        (scaled,) = run_function(narrow, name, [patches.astype(np.float16)], reader)
    assert np.isfinite(wanted).all() and not np.isfinite(plain).all()
    assert np.isfinite(scaled).all()
    a, b = wanted.astype(np.float64), scaled.astype(np.float64)
    assert ((a * b).sum(-1) / np.sqrt((a * a).sum(-1) * (b * b).sum(-1))).min() > 0.999


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny-qwen2", "--vision-exponent", "3"], "the module has none"),
        (["tiny-qwen2.5-vl", "--image", "84x56", "--vision-exponent", "13"], "exponent 13 is not in 0..12"),
        (["tiny-qwen2.5-vl", "--image", "84x56", "--vision-exponent", "-1"], "exponent -1 is not in 0..12"),
    ],
)
def test_exponents_that_cannot_be(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, *options = arguments
    words = [
        str(QWEN.with_name(model)),
        "-o",
        str(tmp_path / "out"),
        "--dies",
        "1",
        "--max-kv",
        "16",
        *options,
    ]
    assert main([*words, "--seqlens", "1"]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_what_cannot_be_scaled_is_refused() -> None:
    module = tower_of(QWEN, (84, 56))
    run_pipeline(module, "extract-graph{graph=main}")
    with pytest.raises(TyirError, match="no vision tower"):
        run_pipeline(module, "scale-residual")
