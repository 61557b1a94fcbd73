"""`python -m tyir.tools.silicon.validate`: the timing engine against silicon.

Command programs that a multiprocessor of a GPU executed (`tools/silicon/die.cu`).

Programs of kind `unit` use one unit alone and give the machine its figures (`--derive` prints them); the
others (`engine_programs`) judge the engine and have no part in any figure.  `measure_engine` says how to
measure afresh.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.edge10.vector_functions import VECTOR_PASSES
from tyir.text.json_files import json_lines
from tyir.tools.cli import ToolParser, run_tool

if TYPE_CHECKING:
    from tyir.targets.machine import Machine
    from tyir.tools.silicon.programs import EnginePrograms

__all__ = [
    "GPUS",
    "EngineRow",
    "derive",
    "engine_rows",
    "main",
    "page_lines",
    "read_measured",
    "summary_lines",
]

_DATA: Final = Path(__file__).resolve().parents[2] / "tests" / "data"
# Folders of `_DATA`; the first is the one that the machine file describes.
GPUS: Final = ("h200_sm", "h100_sm")
# The clock that all times are told at.  A GPU changes its own from program to program (an H100 between 1,975
# and 2,090 MHz while these ran), and a multiprocessor's commands take cycles.
_CLOCK_MHZ: Final = 1968
_HOW: Final = "python -m tyir.tools.silicon.measure says how it is made"


@dataclass(frozen=True)
class EngineRow:
    """A program: what was measured and what the engine says, ns."""

    name: str
    kind: str
    group: str
    commands: int
    measured: float
    predicted: float
    bound_by: str

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


@run_tool
def main(argv: Sequence[str]) -> int:
    """Entry point."""
    from tyir.targets.machine import load_machine
    from tyir.tools.silicon.programs import MACHINE

    args = _parser().parse_args(argv)
    if args.derive:
        for name, (value, source) in derive(read_measured(args.data or _DATA / GPUS[0])).items():
            print(f"{name} = {value:.5g}  # {source}")
        return 0
    sets = [args.data] if args.data else [_DATA / gpu for gpu in GPUS]
    rows_of = {path: engine_rows(read_measured(path), load_machine(MACHINE)) for path in sets}
    for path, rows in rows_of.items():
        if not rows:
            raise TyirError(
                f"{path} has no measurement of a program",
                help=_HOW,
            )
    if args.json:
        found = {str(path): [{**vars(r), "error": r.error} for r in rows] for path, rows in rows_of.items()}
        print(json.dumps(found if len(found) > 1 else next(iter(found.values())), indent=1))
        return 0
    for path, rows in rows_of.items():
        if len(rows_of) > 1:
            print(f"{path.name}:")
        for row in rows if args.all else []:
            print(
                f"{row.name:<40}{row.commands:>7} commands {row.measured / 1000:>10.1f} us measured"
                f" {row.predicted / 1000:>10.1f} predicted {row.error:>+7.1%}  {row.bound_by}"
            )
        print("\n".join(summary_lines(rows)))
    return 0


def read_measured(path: Path = _DATA / GPUS[0]) -> dict[str, float]:
    """ns by program at a clock of `_CLOCK_MHZ`, from the lines that `die` printed: a file, or all of a
    folder's.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    found: dict[str, float] = {}
    for file in files:
        for where, row in json_lines(file, _HOW):
            if "name" not in row:
                continue
            name: Any = row["name"]
            ns: Any = row.get("ns")
            mhz: Any = row.get("mhz", _CLOCK_MHZ)
            if not isinstance(name, str) or not all(type(n) in (int, float) and n > 0 for n in (ns, mhz)):
                message = (
                    f"name {str(name)[:40]!r} with ns {str(ns)[:40]} at mhz {str(mhz)[:40]}: a name, a time"
                    " above 0 and a clock above 0 are needed"
                )
                raise TyirError(message, where=where, help=_HOW)
            found[name] = float(ns) * float(mhz) / _CLOCK_MHZ
    return found


def engine_rows(measured: Mapping[str, float], machine: Machine) -> list[EngineRow]:
    """What the engine says of every program that was measured."""
    from tyir.runtime_sim.timing.engine import simulate
    from tyir.tools.silicon.programs import all_programs

    rows = []
    for entry in all_programs().values():
        if entry.name in measured:
            timing = simulate(entry.programs(machine), entry.machine(machine), entry.pos)
            commands = sum(len(die.commands) for die in timing.dies)
            rows.append(
                EngineRow(
                    entry.name,
                    entry.kind,
                    entry.group,
                    commands,
                    measured[entry.name],
                    timing.total_ns,
                    timing.bound_by,
                )
            )
    return rows


def page_lines(machine: Machine) -> list[str]:
    """The tables of the project's measurements, in Markdown, each under its GPU's name."""
    lines: list[str] = []
    for gpu in GPUS:
        lines += [f"### {gpu.removesuffix('_sm').upper()}", ""]
        lines += [*summary_lines(engine_rows(read_measured(_DATA / gpu), machine)), ""]
    return lines[:-1]


def summary_lines(rows: Sequence[EngineRow]) -> list[str]:
    """A table of the errors by kind and group, in Markdown."""
    lines = [
        "| programs | | n | MAPE | median | p90 | max | bias |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    kinds = {
        "unit": "one unit (read off)",
        "waiting": "one unit, others wait (read off)",
        "stream": "overlaps by hand",
        "model": "compiled steps",
        "blind": "compiled steps, blind",
    }
    for kind, title in kinds.items():
        own = [r for r in rows if r.kind == kind]
        groups = [
            ("all", own),
            *((g, [r for r in own if r.group == g]) for g in dict.fromkeys(r.group for r in own) if g),
        ]
        for group, members in groups:
            if not members:
                continue
            errors = 100 * np.array([r.error for r in members])
            size = np.abs(errors)
            lines.append(
                f"| {f'**{title}**' if group == 'all' else ''} | {group} | {len(members)} | {size.mean():.1f}"
                f" | {np.median(size):.1f} | {np.percentile(size, 90):.1f} | {size.max():.0f} |"
                f" {errors.mean():+.1f} |"
            )
    return lines


def derive(measured: Mapping[str, float]) -> dict[str, tuple[float, str]]:
    """The figures of `hopper_sm.toml` from the programs of one unit.

    Each by arithmetic on two or three of them; `TyirError` when one was not measured.
    """
    from tyir.tools.silicon.programs import all_programs

    programs = all_programs()

    def each(name: str) -> float:
        """ns of one command."""
        if name not in measured:
            raise TyirError(
                f"'{name}' was not measured", help="a machine's figures need all programs of kind unit"
            )
        return measured[name] / programs[name].count

    product = (each("cube 16x16x4096") - each("cube 16x16x512")) / 224
    row = (each("vector 16384") - each("vector 1024")) / 240
    wide = (each("dequant 128x256") - each("dequant 16x256")) / 112
    line = (each("drain 1x16384") - each("drain 1x2048")) / 112
    dispatch = each("drain 1x128") - line
    command = each("vector then drain") - (row + line) / 2
    run = (each("load 16384 in 64 runs") - each("load 16384")) / 63
    rate = 98304 / each("load 98304")
    waits = [
        each(f"load {n}, one in flight") - each("load 1024") + dispatch - command - n / rate
        for n in (1024, 4096, 16384)
    ]
    meet = (
        each("all-gather 64 on 2") + each("all-gather 64 on 4") + each("all-gather 64 on 8") - 3 * dispatch
    ) / 6
    apart = each("all-gather 16384 on 4") - each("all-gather 64 on 4")
    found: dict[str, tuple[float, str]] = {
        "clock.frequency_mhz": (1000 / product, "a 16 x 16 x 16 product is a cycle: k of 4096 less k of 512"),
        "cube.fill_cycles": (
            (each("cube 16x16x16") - product - dispatch) / product,
            "one product less its cycle, fetch and command",
        ),
        "cube.drain_bytes_per_cycle": (512 * product / line, "16384 sums less 2048"),
        "vector.startup_cycles": (
            max(each("vector 64") - row - dispatch, 0) / product,
            "64 elements less their time, fetch and command: nothing is left",
        ),
        "dequant.weights_per_cycle": (256 * product / wide, "128 rows of 256 less 16"),
        "dequant.startup_cycles": (
            max(each("dequant 1x256") - wide - dispatch, 0) / product,
            "256 weights less their time, fetch and command: nothing is left",
        ),
        "sram.port_bytes_per_cycle": (rate * product, "one queue has all of the bandwidth"),
        "dram.bandwidth_gbps": (rate, "loads of 98,304 bytes"),
        "dram.latency_ns": (
            sum(waits) / len(waits),
            "loads of 1 to 16 KB one at a time less their bytes and what they take when four are in flight",
        ),
        "dma.issue_ns": (
            each("load 1024") - dispatch - run,
            "loads of 1024 bytes less fetch, command and their run",
        ),
        "dma.run_ns": (run, "16 KB in 64 runs less in one"),
        "d2d.hop_us": (meet / 1000, "all-gathers of 64 bytes on 2, 4 and 8: two meetings each"),
        "d2d.collective_us": (meet / 1000, "as the hop: one meeting more"),
        "d2d.bandwidth_gbps": (3 * 16320 / apart, "all-gathers of 16 KiB less 64 bytes from each of 4"),
        "sync.fetch_ns": (
            dispatch - command,
            "drains of 512 bytes after each other less their time and the command",
        ),
        "sync.command_ns": (command, "an addition and a drain that wait for each other, less their time"),
    }
    found["sync.waiting_overhead"] = (
        _waiting_overhead(measured, programs),
        "one unit while others wait, less alone, for each unit of the same control",
    )
    found.update(
        {
            f"vector.{name}_cycles": (count * row / product, f"16,384 elements less 1024, {count} times over")
            for name, count in VECTOR_PASSES.items()
        }
    )
    return found


def _waiting_overhead(measured: Mapping[str, float], programs: Mapping[str, EnginePrograms]) -> float:
    """What a unit that waits adds to the work of another of its control: the mean over programs of one unit
    with the others waiting.
    """
    from tyir.targets.machine import load_machine
    from tyir.tools.silicon.programs import MACHINE

    shares, controls = [], int(load_machine(MACHINE).sync.controls)
    for program in programs.values():
        if program.kind == "waiting":
            alone, _, where = program.name.partition(", others wait")
            if not {alone, program.name} <= measured.keys():
                raise TyirError(
                    f"'{program.name}' was not measured",
                    help="a machine's figures need all programs of kind waiting",
                )
            unit = edge10.UNITS.index(program.unit)
            used = edge10.UNITS if where else edge10.UNITS[:-1]  # the links only where there are several dies
            others = sum(number % controls == unit % controls for number in range(len(used))) - 1
            shares.append((measured[program.name] / measured[alone] - 1) / others)
    return sum(shares) / len(shares)


def _parser() -> argparse.ArgumentParser:
    parser = ToolParser(
        prog="tyir-validate-engine",
        description="Compare the timing engine with command programs executed on a multiprocessor of a GPU.",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE|DIR",
        help="lines that `die` printed (default: those of the project, GPU by GPU)",
    )
    parser.add_argument(
        "--derive",
        action="store_true",
        help="print the machine's figures as the programs of one unit give them",
    )
    parser.add_argument("--all", action="store_true", help="a line for each program")
    parser.add_argument("--json", action="store_true", help="all programs as JSON")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
