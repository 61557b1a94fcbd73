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
from tyir.tools.silicon.validate import GPUS, derive, engine_rows, main, read_measured

UNITS, WORDS = 9, 16
DATA = Path(__file__).parents[1] / "data"


def errors(names: set[str], gpu: str = GPUS[0]) -> list[float]:
    """Per cent, of the programs of these names."""
    measured = {name: ns for name, ns in read_measured(DATA / gpu).items() if name in names}
    rows = engine_rows(measured, load_machine(MACHINE))
    assert {r.name for r in rows} == names
    return [100 * r.error for r in rows]


def mean_error(names: set[str], gpu: str = GPUS[0]) -> float:
    """Per cent, over the programs of these names."""
    return float(np.mean(np.abs(errors(names, gpu))))


def of_kind(kind: str, start: str = "") -> set[str]:
    return {p.name for p in all_programs().values() if p.kind == kind and p.name.startswith(start)}


def test_every_program_was_measured() -> None:
    assert set(read_measured(DATA / GPUS[0])) == set(all_programs())
    assert set(read_measured(DATA / GPUS[1])) < set(all_programs())


def test_the_machine_is_read_off_the_programs_of_one_unit() -> None:
    """`--derive` of the kept measurements is what the file says, to its digits."""
    constants = load_machine(MACHINE).constants
    for name, (value, _) in derive(read_measured()).items():
        assert constants[name].value == pytest.approx(value, rel=1e-4), name
        assert constants[name].label == "derived"


@pytest.mark.parametrize(
    ("names", "limit"), [(of_kind("unit"), 4.0), (of_kind("stream"), 3.0), (of_kind("model", "a "), 3.0)]
)
def test_within_limits(names: set[str], limit: float) -> None:
    assert mean_error(names) <= limit


def test_four_bit_steps_of_one_and_two_dies() -> None:
    """Dequantisation is slowed by the queue that waits beside it, and on several dies by the links."""
    names = {"a int4 s1 at 0 on 1", "a int4 s8 at 100 on 1", "c int4 s16 at 0 on 2", "d int4 s16 at 0 on 4"}
    assert max(map(abs, errors(names))) <= 4.0


def test_times_are_told_at_one_clock(tmp_path: Path) -> None:
    """A GPU's clock rises and falls from program to program; the same cycles are the same time."""
    lines = tmp_path / "two.jsonl"
    lines.write_text(
        '{"name": "at 1968", "ns": 1000, "mhz": 1968}\n{"name": "at 2083", "ns": 944.8, "mhz": 2083}\n'
    )
    told = read_measured(lines)
    assert told["at 1968"] == 1000 and told["at 2083"] == pytest.approx(1000, rel=1e-3)


@pytest.mark.slow
def test_all_compiled_steps() -> None:
    assert mean_error(of_kind("model")) <= 3.0
    assert mean_error(of_kind("blind")) <= 3.0


def test_another_gpu() -> None:
    """Programs of one unit, and overlaps by hand, on an H100 by the H200's figures."""
    known = set(read_measured(DATA / GPUS[1]))
    assert mean_error(of_kind("unit") & known, GPUS[1]) <= 4.5
    assert mean_error(of_kind("stream") & known, GPUS[1]) <= 3.0


@pytest.mark.slow
def test_four_bit_steps_measured_last() -> None:
    found = errors({p.name for p in all_programs().values() if p.group == "int4, last"})
    assert np.mean(np.abs(found)) <= 3.0 and abs(np.mean(found)) <= 1.5


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
