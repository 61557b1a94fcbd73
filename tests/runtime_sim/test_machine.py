"""The machine file: consistent with what is published, every number sourced, mistakes in it explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from tyir.diagnostics import TyirError
from tyir.targets.machine import LABELS, load_machine

MACHINE = load_machine("edge10")


def test_peak_matches_the_published_figures() -> None:
    assert MACHINE.macs_per_cycle_int8 == 12288
    assert MACHINE.macs_per_cycle_fp16 == 6144
    assert MACHINE.peak_int8_tops == pytest.approx(12.288)  # headline: 12 TOPS a die
    assert 4 * MACHINE.peak_int8_tops == pytest.approx(49.2, abs=0.1)  # headline: 48 TOPS on 4 dies
    assert MACHINE.with_overrides({"cube.count": 2}).peak_int8_tops == pytest.approx(8.19, abs=0.01)


def test_one_die_holds_the_published_vision_language_build() -> None:
    # Qwen2.5-VL-7B on one die: W4 decoder 6.53e9 weights at 4.16 bit, f16 embedding and head 2 x 0.545e9, f16 vision tower 0.68e9, 4096 cached tokens
    needed = 6.53e9 * 4.16 / 8 + 2 * 0.545e9 * 2 + 0.68e9 * 2 + 28 * 4096 * 2 * 512 * 2
    assert needed < MACHINE.dram.capacity_bytes


def test_dequantisation_keeps_up_with_dram() -> None:
    weights_per_ns = MACHINE.dequant.weights_per_cycle / MACHINE.cycle_ns
    assert weights_per_ns * (4 + 20 / 128) / 8 > MACHINE.dram_bytes_per_ns


def test_every_constant_has_label_and_source_and_assumed_ones_bounds() -> None:
    for name, constant in MACHINE.constants.items():
        assert constant.label in LABELS and constant.source, name
        if constant.label == "assumed":
            assert constant.low is not None and constant.high is not None and constant.low <= constant.value <= constant.high, name
    assert not MACHINE.calibrated


def test_overrides_are_checked_together() -> None:
    with pytest.raises(TyirError) as caught:
        MACHINE.with_overrides({"dram.bandwith_gbps": 1, "cube.count": 0, "d2d.package_dies": 2.5})
    assert "did you mean 'dram.bandwidth_gbps'?" in str(caught.value) and "cube.count = 0" in str(caught.value)
    assert "d2d.package_dies = 2.5: this constant is a whole number" in str(caught.value)
    assert MACHINE.with_overrides({"dram.bandwidth_gbps": 34.1}).constants["dram.bandwidth_gbps"].label == "override"


def test_a_bad_machine_file_lists_everything_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('[clock]\nfrequency_mhz = { value = 1, label = "guessed", source = "?" }\nspeed = 3\n')
    with pytest.raises(TyirError) as caught:
        load_machine(path)
    text = str(caught.value)
    assert "label 'guessed'" in text and "unknown constant 'clock.speed'" in text and "'dram.efficiency' is missing" in text


def test_unknown_machine_names_the_known_ones() -> None:
    with pytest.raises(TyirError, match=r"known machines: .*edge10"):
        load_machine("edge11")
