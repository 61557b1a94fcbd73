"""The timing engine on silicon: its machine's figures are what the programs of one unit say, and what it says
of others is what was measured.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tyir.targets.machine import load_machine
from tyir.tools.silicon.measure import main as measure
from tyir.tools.silicon.programs import MACHINE, all_programs
from tyir.tools.silicon.validate import derive, engine_rows, main, read_measured

UNITS, WORDS = 9, 16


def mean_error(names: set[str]) -> float:
    """Per cent, over the programs of these names."""
    measured = {name: ns for name, ns in read_measured().items() if name in names}
    rows = engine_rows(measured, load_machine(MACHINE))
    assert {r.name for r in rows} == names
    return 100 * float(np.mean([abs(r.error) for r in rows]))


def of_kind(kind: str, start: str = "") -> set[str]:
    return {p.name for p in all_programs().values() if p.kind == kind and p.name.startswith(start)}


def test_every_program_was_measured() -> None:
    assert set(read_measured()) == set(all_programs())


def test_the_machine_is_read_off_the_programs_of_one_unit() -> None:
    """Within what one run differs from another; the file was made from an earlier run than the one that is
    kept.
    """
    constants = load_machine(MACHINE).constants
    for name, (value, _) in derive(read_measured()).items():
        assert constants[name].value == pytest.approx(value, rel=0.1, abs=0.02), name
        assert constants[name].label == "derived"


@pytest.mark.parametrize(
    ("names", "limit"), [(of_kind("unit"), 4.0), (of_kind("stream"), 3.0), (of_kind("model", "a "), 3.0)]
)
def test_within_limits(names: set[str], limit: float) -> None:
    assert mean_error(names) <= limit


@pytest.mark.slow
def test_all_compiled_steps() -> None:
    assert mean_error(of_kind("model")) <= 4.0
    assert mean_error(of_kind("blind")) <= 3.5


def test_export_holds_every_command_once_and_waits_for_earlier_ones(tmp_path: Path) -> None:
    """The file as die.cu reads it: on every unit as many commands as the program has, each waiting only for
    commands that exist.
    """
    name = "a int4 s16 at 0 on 2"
    assert measure(["--export", str(tmp_path / "p.bin"), "--only", name]) == 0
    words = np.fromfile(tmp_path / "p.bin", "<u4").tolist()
    assert words[:2] == [0x79746469, 1] and words[2] == len(name)
    at = 3 + -(-len(name) // 4)
    dies, outstanding = words[at : at + 2]
    assert (dies, outstanding) == (2, 4)
    at += 4
    base = load_machine(MACHINE)
    for program in all_programs()[name].programs(base):
        counts, needs = [], []
        for _ in range(UNITS):
            count = words[at]
            commands = np.array(words[at + 1 : at + 1 + count * WORDS]).reshape(count, WORDS)
            at += 1 + count * WORDS
            counts.append(count)
            needs.append(commands[:, :UNITS])
        assert sum(counts) == len(program.expand(0))
        for unit, wanted in enumerate(needs):
            assert (wanted <= counts).all()
            assert (wanted[:, unit] <= np.arange(len(wanted))).all(), (
                "a command waits for itself or for a later one of its unit"
            )
    assert at == len(words)


def test_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    few = tmp_path / "few.jsonl"
    few.write_text('{"device": "x"}\n{"name": "vector 64", "ns": 70000}\n')
    assert main(["--data", str(few), "--all"]) == 0
    out = capsys.readouterr().out
    assert "vector 64" in out and "| **one unit (read off)** | all | 1 |" in out
    assert main(["--data", str(tmp_path / "none.jsonl")]) == 1
    assert "cannot read" in capsys.readouterr().err


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert measure(["--export", str(tmp_path / "p.bin"), "--only", "modle"]) == 1
    assert "'modle'" in capsys.readouterr().err and not (tmp_path / "p.bin").exists()
    some = tmp_path / "some.jsonl"
    some.write_text('{"name": "vector 64", "ns": 68332}\n')
    assert main(["--data", str(some), "--derive"]) == 1
    assert "was not measured" in capsys.readouterr().err
    some.write_text('{"device": "a GPU"}\n')
    assert main(["--data", str(some)]) == 1
    assert "no measurement of a program" in capsys.readouterr().err
