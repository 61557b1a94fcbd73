"""The machine file: consistent with what is published, every number sourced, mistakes in it explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from tyir.diagnostics import TyirError
from tyir.targets.machine import LABELS, load_machine

MACHINE = load_machine("edge10")
GPU = Path(__file__).parents[2] / "runtime_sim" / "gpu" / "h200.toml"


def test_peak_matches_the_published_figures() -> None:
    assert MACHINE.macs_per_cycle_int8 == 12288
    assert MACHINE.macs_per_cycle_fp16 == 6144
    assert MACHINE.peak_int8_tops == pytest.approx(12.288)  # headline: 12 TOPS a die
    assert 4 * MACHINE.peak_int8_tops == pytest.approx(49.2, abs=0.1)  # headline: 48 TOPS on 4 dies
    assert MACHINE.with_overrides({"cube.count": 2}).peak_int8_tops == pytest.approx(8.19, abs=0.01)


def test_one_die_holds_the_published_vision_language_build() -> None:
    # Qwen2.5-VL-7B on one die: W4 decoder 6.53e9 weights at 4.16 bit, f16 embedding and head 2 x 0.545e9, f16
    # vision tower 0.68e9, 4096 cached tokens
    needed = 6.53e9 * 4.16 / 8 + 2 * 0.545e9 * 2 + 0.68e9 * 2 + 28 * 4096 * 2 * 512 * 2
    assert needed < MACHINE.dram.capacity_bytes


def test_dequantisation_keeps_up_with_dram() -> None:
    weights_per_ns = MACHINE.dequant.weights_per_cycle / MACHINE.cycle_ns
    assert weights_per_ns * (4 + 20 / 128) / 8 > MACHINE.dram_bytes_per_ns


def test_every_constant_has_label_and_source_and_assumed_ones_bounds() -> None:
    for name, constant in MACHINE.constants.items():
        assert constant.label in LABELS and constant.source, name
        if constant.label == "assumed":
            assert (
                constant.low is not None
                and constant.high is not None
                and constant.low <= constant.value <= constant.high
            ), name
    assert not MACHINE.calibrated


def test_overrides_are_checked_together() -> None:
    with pytest.raises(TyirError) as caught:
        MACHINE.with_overrides({"dram.bandwith_gbps": 1, "cube.count": 0, "d2d.package_dies": 2.5})
    assert "did you mean 'dram.bandwidth_gbps'?" in str(caught.value) and "cube.count = 0" in str(
        caught.value
    )
    assert "d2d.package_dies = 2.5: this constant is a whole number" in str(caught.value)
    assert (
        MACHINE.with_overrides({"dram.bandwidth_gbps": 34.1}).constants["dram.bandwidth_gbps"].label
        == "override"
    )


BAD = """
name = "mine"
speed = 3
[clock]
frequency_mhz = { value = 1, label = "guessed", source = "?" }
[cube]
count = { value = 2.5, label = "assumed", low = 1, high = 4, source = "drawing" }
rows = 16
[dram]
bandwidth_mbps = { value = 30400, label = "published", source = "datasheet" }
efficiency = { value = 1.2, label = "published", source = "datasheet" }
latency_ns = { value = 150, label = "assumed", source = "a guess" }
[dma]
issue_ns = { value = 40, low = 50, high = 60, label = "assumed", source = "measured" }
outstanding = { value = -4, label = "published", source = "datasheet" }
[turbo]
boost = { value = 1, label = "published", source = "datasheet" }
"""


def test_a_bad_machine_file_lists_everything_wrong(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(BAD)
    with pytest.raises(TyirError) as caught:
        load_machine(path)
    text = str(caught.value)
    for said in (
        "unknown constant 'speed'", "clock.frequency_mhz: label 'guessed' is none of published, derived, assumed, fitted",  # noqa: E501
        "cube.count: value 2.5: this constant is a whole number, the nearest is 2", "cube.rows: needs value, label and source",  # noqa: E501
        "unknown constant 'dram.bandwidth_mbps'", "did you mean 'dram.bandwidth_gbps'?", "dram.efficiency: value 1.2: a share of the bandwidth is at most 1",  # noqa: E501
        "dram.latency_ns: an assumed constant needs low and high", "dma.issue_ns: value 40 lies outside its bounds 50..60",  # noqa: E501
        "dma.outstanding: value -4: rates, sizes, counts and times must be positive", "unknown constant 'turbo.boost'", "sections are clock, cube, vector",  # noqa: E501
        "constants are missing: c2c.bandwidth_gbps",
    ):  # fmt: skip
        assert said in text, said
    path.write_text("[clock\n")
    with pytest.raises(TyirError, match="not valid TOML"):
        load_machine(path)
    with pytest.raises(TyirError, match=r"cannot read the machine file .*none.toml: No such file"):
        load_machine(tmp_path / "none.toml")
    with pytest.raises(TyirError, match="describes no die that runs command programs"):
        load_machine(GPU)


def test_a_machine_may_stand_on_another(tmp_path: Path) -> None:
    path = tmp_path / "fast.toml"
    path.write_text(
        'name = "fast"\nbase = "edge10"\n[dram]\nbandwidth_gbps = { value = 60, label = "published", source ='
        ' "datasheet, page 3" }\n'
    )
    machine = load_machine(path)
    assert (machine.name, machine.dram.bandwidth_gbps, machine.cube) == ("fast", 60, MACHINE.cube)
    assert machine.constants["dram.bandwidth_gbps"].source == "datasheet, page 3"
    path.write_text('base = "other.toml"\n')
    with pytest.raises(TyirError, match="is no known machine's name"):
        load_machine(path)
    path.write_text('base = "edge11"\n')
    with pytest.raises(TyirError, match="there is no machine 'edge11'"):
        load_machine(path)


def test_the_documented_variant_loads(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "machines.md").read_text()
    path = tmp_path / "variant.toml"
    path.write_text(page.split("```toml file=mine.toml\n")[1].split("```")[0])
    machine = load_machine(path)
    assert machine.name == "edge10-lpddr5" and machine.dram_bytes_per_ns == pytest.approx(51.2 * 0.7)
    sections = {
        row.split("`")[1] for row in page.split("## The sections")[1].splitlines() if row.startswith("| `")
    }
    assert sections | {"c2c"} == {name.partition(".")[0] for name in machine.constants}


def test_unknown_machine_names_the_known_ones() -> None:
    with pytest.raises(TyirError, match=r"known machines: .*edge10"):
        load_machine("edge11")
