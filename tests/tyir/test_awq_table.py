"""The AWQ table as a file: written and read, by whom it may be edited, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tyir.diagnostics import TyirError
from tyir.execution.awq_table import AwqSettings, AwqTable

SETTINGS = AwqSettings(
    group_size=32, model_type="llama", modules_to_not_convert=("visual", "layers.0"), lm_head=True
)
SCALE = np.array([0.25, 1, 4], np.float32)
RANGE = np.stack([np.full((4, 2), -0.5), np.full((4, 2), 0.25)]).astype(np.float32)
METADATA = {"tyir.awq": '{"version": 1}'}


def test_what_is_saved_is_opened(tmp_path: Path) -> None:
    table = AwqTable(SETTINGS, {"a.norm": SCALE}, {"a.up": RANGE})
    table.save(tmp_path / "t.safetensors")
    found = AwqTable.open(tmp_path / "t.safetensors")
    assert found.settings == SETTINGS
    assert np.array_equal(found.scales["a.norm"], SCALE) and np.array_equal(found.ranges["a.up"], RANGE)
    entry = found.entries["a.up.range"]
    raw = (tmp_path / "t.safetensors").read_bytes()
    assert raw[entry.start : entry.end] == RANGE.tobytes()
    assert sorted(load_file(tmp_path / "t.safetensors")) == ["a.norm.scale", "a.up.range"]  # anybody's reader


def test_equal_tables_are_equal_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    AwqTable(SETTINGS, {"a": SCALE, "b": SCALE}).save(one)
    AwqTable(SETTINGS, {"b": SCALE.copy(), "a": SCALE.copy()}).save(other)
    AwqTable(SETTINGS, {"a": SCALE * 2}).save(other)  # in place of what was there
    AwqTable(SETTINGS, {"b": SCALE.copy(), "a": SCALE.copy()}).save(other)
    assert one.read_bytes() == other.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.safetensors", "2.safetensors"]


def test_a_file_that_another_program_wrote(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"a.scale": SCALE}, path, {"tyir.awq": '{"version": 1, "group_size": 64, "zero_point": false}'})
    found = AwqTable.open(path).settings
    assert (found.group_size, found.zero_point, found.bits) == (64, False, 4)


def array(*values: float) -> Any:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        ({"a.scale": array(1, np.nan)}, METADATA, r"'a.scale' holds nan at \[1\]"),
        ({"a.scale": array(np.inf, 1)}, METADATA, r"'a.scale' holds inf at \[0\]"),
        ({"a.scale": array(1, 0)}, METADATA, r"'a.scale' holds 0 at \[1\]; scales are positive"),
        ({"a.scale": array(-2)}, METADATA, "'a.scale' holds -2"),
        ({"a.scale": array(1)[None]}, METADATA, r"has shape \[1, 1\], \[channels\] is needed"),
        ({"a.range": array(1, 2)}, METADATA, r"\[2, rows, groups\] is needed"),
        ({"a.range": np.ones((3, 1, 1), np.float32)}, METADATA, r"\[2, rows, groups\] is needed"),
        ({"a.range": RANGE[::-1].copy()}, METADATA, "lowest value 0.25 above its highest -0.5"),
        (
            {"a.range": RANGE},
            {"tyir.awq": '{"version": 1, "zero_point": false}'},
            "the table is symmetric",
        ),
        ({"a.scale": np.ones(2, np.float16)}, METADATA, "has dtype F16, F32 is needed"),
        ({"a.scales": array(1)}, METADATA, "'a.scales' is neither a scale nor a range"),
        ({".scale": array(1)}, METADATA, "neither a scale nor a range"),
        ({"a.scale": array(1)}, {}, "is not an AWQ table"),
        ({"a.scale": array(1)}, {"tyir.awq": "{"}, "is not JSON"),
        ({"a.scale": array(1)}, {"tyir.awq": '{"version": 2}'}, "version is 2"),
        ({"a.scale": array(1)}, {"tyir.awq": '{"bits": 9}'}, "bits is 9"),
        ({"a.scale": array(1)}, {"tyir.awq": '{"group_sizes": 9}'}, "group_sizes is an unknown key"),
    ],
)
def test_what_is_refused(
    tmp_path: Path, tensors: dict[str, Any], metadata: dict[str, str], message: str
) -> None:
    save_file(tensors, tmp_path / "t.safetensors", metadata)
    with pytest.raises(TyirError, match=message) as caught:
        AwqTable.open(tmp_path / "t.safetensors")
    assert "help: " in str(caught.value)


def test_a_wrong_table_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(TyirError, match="scales are positive"):
        AwqTable(SETTINGS, {"a": array(0)}).save(tmp_path / "t.safetensors")
    with pytest.raises(TyirError, match="float64"):
        AwqTable(SETTINGS, {"a": np.ones(2)}).save(tmp_path / "t.safetensors")  # type: ignore[dict-item]
    assert not list(tmp_path.iterdir())


def test_what_is_no_file_of_tensors(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").write_bytes(b"nothing of the kind")
    with pytest.raises(TyirError, match="not one of safetensors"):
        AwqTable.open(tmp_path / "t.safetensors")
