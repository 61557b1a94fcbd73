"""`tyir-verify` of vision-language models: what is right passes, what is broken is named by block and op."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vision.folders import MODELS
from tests.vision.scenes import draw
from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.runtime_sim.vision.pictures import Picture
from tyir.runtime_sim.vision.pixels import Patches, prepare
from tyir.runtime_sim.vision.preprocessor import Preprocessor
from tyir.runtime_sim.vision.tower import Tower
from tyir.tools.tyir_verify import main
from tyir.tools.verify.locate import locate_in_tower
from tyir.tools.verify.pictures import BlockRow, drawn_picture

Compiled = Callable[..., Path]
QWEN = "tiny-qwen2.5-vl"


def broken(folder: Path, copy: Path, name: str, change: Callable[[Any], Any]) -> Artifacts:
    """The folder with one tensor of the tower changed."""
    shutil.copytree(folder, copy)
    path = copy / "visual" / "constant_die0.params"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    (found,) = [key for key in header if key.endswith(name)]
    first, last = (8 + length + offset for offset in header[found]["data_offsets"])
    values = np.frombuffer(bytes(data[first:last]), np.float16).reshape(header[found]["shape"])
    data[first:last] = np.ascontiguousarray(change(values), np.float16).tobytes()
    path.write_bytes(data)
    return Artifacts.open(copy, check=False)


def patches_of(artifacts: Artifacts, seed: int = 1) -> Patches:
    size = Preprocessor(artifacts).sizes[0].given
    return prepare(Picture(draw(seed, (size[0], size[1])).picture), Preprocessor(artifacts).image_settings)


def set_one(value: float) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        made = values.copy()
        made.reshape(-1)[7] = value
        return made

    return change


@pytest.mark.parametrize(
    ("name", "change", "where"),
    [
        ("blocks.3.mlp.down_proj.bias", set_one(np.inf), r"weight .*blocks\.3\.mlp\.down_proj\.bias"),
        ("blocks.0.norm1.weight", set_one(np.nan), r"weight .*blocks\.0\.norm1\.weight"),
        ("blocks.4.mlp.down_proj.weight", lambda w: w * 64 * 3e4, r"first in layer 4: .*blocks\.4\.mlp"),
        ("merger.mlp.2.weight", lambda w: w * 3e4, r"first in .*merger\.mlp\.2"),
    ],
)
def test_rows_that_are_not_finite_stop_with_the_op(
    name: str, change: Callable[[Any], Any], where: str, compiled: Compiled, tmp_path: Path
) -> None:
    artifacts = broken(compiled(QWEN, 1), tmp_path / "1die", name, change)
    with pytest.raises(TyirError, match=rf"rows of the picture's embeddings are not finite; {where}"):
        Tower(artifacts).run(patches_of(artifacts).patches)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "block"),
    [("blocks.4.mlp.up_proj.weight", 4), ("blocks.1.attn.proj.weight", 1), ("merger.mlp.0.weight", None)],
)
def test_a_broken_weight_is_located(name: str, block: int | None, compiled: Compiled, tmp_path: Path) -> None:
    artifacts = broken(compiled(QWEN, 1), tmp_path / "1die", name, lambda values: values[::-1])
    found = locate_in_tower(Tower(artifacts), MODELS / QWEN, patches_of(artifacts).patches)
    assert found is not None
    assert found.layer == block
    assert found.path in f"model.visual.{name}".replace(".weight", "")


@pytest.mark.slow
def test_what_is_right_has_no_divergence(compiled: Compiled) -> None:
    artifacts = Artifacts.open(compiled(QWEN, 1))
    assert locate_in_tower(Tower(artifacts), MODELS / QWEN, patches_of(artifacts).patches) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [QWEN, "tiny-llava"])
def test_the_command(name: str, compiled: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(compiled(name, 1)), "--against", str(MODELS / name), "--prompts", "1", "--tokens", "6"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["min_logit_cosine"] >= 0.9999
    rows = {row["name"]: row for row in found["pictures"][0]["rows"]}
    assert {"block 0", "block 4", "embeddings"} <= rows.keys()
    assert rows["embeddings"]["min_cosine"] >= 0.99999
    assert all(row["not_finite"] == 0 and row["max"] > 0 for row in rows.values())


def test_a_row_counts_what_is_not_finite() -> None:
    wanted = np.ones((4, 3), np.float32)
    mine = wanted.copy()
    mine[1, 0], mine[2, 1] = np.inf, np.nan
    row = BlockRow.of("block 0", mine, wanted)
    assert (row.not_finite, row.cosine, row.largest, row.expected) == (2, 0.0, 1.0, 1.0)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (224, 168)])
def test_the_drawn_picture_is_the_same_every_time(size: tuple[int, int]) -> None:
    one, other = drawn_picture(*size), drawn_picture(*size)
    assert one.size == size
    assert one.sha256 == other.sha256


def test_text_only_artifacts_are_not_shown_pictures(
    text_only: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(text_only), "--against", str(MODELS / "tiny-qwen2"), "--image", "a.png"]) == 1
    assert "takes text only" in capsys.readouterr().err


@pytest.mark.parametrize("other", ["tiny-llava", "tiny-qwen2"])
def test_another_model_is_named(other: str, compiled: Compiled, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is compared: sizes stand deeper in a config that has a tower."""
    assert main([str(compiled(QWEN, 1)), "--against", str(MODELS / other)]) == 1
    error = capsys.readouterr().err
    assert f"{other} is not the model" in error and "the artifacts qwen2_5_vl; " in error
