"""Accelerator files: what is shipped loads and says where its numbers come from; what is wrong with a file is
said, all of it at once.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest

from tyir.diagnostics import TyirError
from tyir.runtime_sim.gpu.accelerator import MAX_FITTED, Accelerator, load_accelerator


def shipped(name: str) -> str:
    return (resources.files("tyir.runtime_sim.gpu") / f"{name}.toml").read_text()


def load_text(text: str, folder: Path) -> Accelerator:
    file = folder / "mine.toml"
    file.write_text(text)
    return load_accelerator(file)


@pytest.mark.parametrize(("name", "peak"), [("h200", 1070), ("h100", 1070), ("a100", 312), ("orin", 42.6)])
def test_shipped_files(name: str, peak: float) -> None:
    """Peaks: 132 * 4096 * 1.98 GHz; 108 * 2048 * 1.41 GHz; 16 * 2048 * 1.301 GHz."""
    machine = load_accelerator(name)
    assert machine.peak_tflops == pytest.approx(peak, rel=0.005)
    assert 0 < len(machine.fitted) <= MAX_FITTED
    assert all(c.source for c in machine.constants.values())
    assert not any("model" in c.source for c in machine.fitted.values()), "whole models are never fitted"


def test_like_another_machine(tmp_path: Path) -> None:
    """Only what differs is written; the rest is the other machine's and no longer fitted or published."""
    mine = load_text(
        'like = "h200"\n[sm]\ncount = { value = 66, label = "published", source = "half" }\n', tmp_path
    )
    whole = load_accelerator("h200")
    assert mine.peak_tflops == pytest.approx(whole.peak_tflops / 2)
    assert mine.launch == whole.launch and not mine.fitted
    assert mine.constants["sm.count"].label == "published"
    assert mine.constants["launch.ramp_us"].label == "assumed" and mine.constants[
        "launch.ramp_us"
    ].source.startswith("as h200: ")
    faster = load_text(
        'like = "h200"\n[dram]\nbandwidth_gbps = { value = 3350, label = "published", source = "its data'
        ' sheet" }\n',
        tmp_path,
    )
    assert (
        faster.dram_bytes_per_ns == pytest.approx(3350 / 4800 * whole.dram_bytes_per_ns)
        and faster.sm == whole.sm
    )
    assert load_accelerator("h100").sm == whole.sm


def test_like_is_checked(tmp_path: Path) -> None:
    with pytest.raises(TyirError, match="there is no machine 'h300'"):
        load_text('like = "h300"\n', tmp_path)
    with pytest.raises(TyirError, match="'h100' is itself like 'h200'"):
        load_text('like = "h100"\n', tmp_path)
    with pytest.raises(TyirError, match=r"unknown constant 'sm\.cont'"):
        load_text(
            'like = "h200"\n[sm]\ncont = { value = 66, label = "published", source = "half" }\n', tmp_path
        )


def test_everything_wrong_is_reported_at_once(tmp_path: Path) -> None:
    text = (
        shipped("orin")
        .replace("frequency_mhz", "frequenzy_mhz")
        .replace("write_cost = { value = 1.0", "write_cost = { value = -1.0")
    )
    text = text.replace(
        'label = "published", source = "LLMCompassPlus, Orin_hw.json"', 'label = "guess", source = "x"', 1
    )
    with pytest.raises(TyirError) as caught:
        load_text(text + "\n[nonsense]\nx = 1\n", tmp_path)
    message = caught.value.render()
    for part in (
        "unknown constant 'clock.frequenzy_mhz'",
        "clock.frequency_mhz",
        "1 constant is missing: clock.frequency_mhz",
        "dram.write_cost: value -1: rates, sizes, counts and times must be positive numbers",
        "nonsense.x",
    ):
        assert part in message


def test_label_is_checked(tmp_path: Path) -> None:
    with pytest.raises(TyirError, match="label 'guess' is none of"):
        load_text(shipped("a100").replace('label = "published"', 'label = "guess"', 1), tmp_path)


def test_too_many_fitted(tmp_path: Path) -> None:
    with pytest.raises(TyirError, match="at most 8 may be"):
        load_text(shipped("a100").replace('"assumed"', '"fitted"'), tmp_path)


def test_tiles_are_checked(tmp_path: Path) -> None:
    with pytest.raises(TyirError, match="needs the library's tile shapes"):
        load_text(shipped("a100").replace("[[64, 64],", "[[64],"), tmp_path)


def test_not_toml_and_not_there(tmp_path: Path) -> None:
    with pytest.raises(TyirError, match="not valid TOML"):
        load_text("name = ", tmp_path)
    with pytest.raises(TyirError, match="there is no machine 'h300'"):
        load_accelerator("h300")


def test_unknown_override() -> None:
    with pytest.raises(TyirError, match=r"has no constant 'dram.bandwith_gbps'"):
        load_accelerator("h200").with_values({"dram.bandwith_gbps": 1})


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            'value = 3, label = "published", source = " "',
            "the source is empty: say where",
        ),
        ('value = 2.5, label = "published", source = "x"', "this constant is a whole number"),
        ('value = 3, low = 4, high = 5, label = "assumed", source = "x"', "lies outside its bounds 4..5"),
        ('value = 3, label = "published", source = "x", page = 2', "has no field page"),
        ('value = 3, label = "override", source = "x"', "label 'override' is none of"),
    ],
)
def test_a_constant_says_what_those_of_other_machines_say(entry: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(TyirError, match=f"sm.count: .*{said}"):
        load_text(f'like = "h200"\n[sm]\ncount = {{ {entry} }}\n', tmp_path)
