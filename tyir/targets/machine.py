"""The description of a machine: every constant with its value, unit (in its name), label and source, read
from `tyir/targets/<name>.toml`.

The backend sizes tiles with these numbers and the timing engine turns commands into nanoseconds with the same
ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Final, Self, get_type_hints

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.edge10.vector_functions import VECTOR_PASSES
from tyir.targets.constants import (
    LABELS,
    Constant,
    Form,
    build_sections,
    entries_of,
    number_text,
    parse_table,
    read_table,
    shipped_names,
)

__all__ = ["LABELS", "Constant", "Machine", "load_machine", "machine_from"]

_PACKAGE: Final = "tyir.targets"


@dataclass(frozen=True)
class Clock:
    frequency_mhz: float


@dataclass(frozen=True)
class Cube:
    """`count` matrix units; each does rows x columns x depth multiply-accumulates a cycle."""

    count: int
    rows: int
    columns: int
    depth_int8: int
    depth_fp16: int
    max_k: int
    accumulator_bytes: int
    fill_cycles: float
    drain_bytes_per_cycle: float


@dataclass(frozen=True)
class Vector:
    """`units` vector units of `lanes` elements; `cycles` an element and lane by function, `<function>_cycles`
    of the file (`tyir.edge10.vector_functions`).
    """

    units: int
    lanes: int
    startup_cycles: float
    cycles: Mapping[str, float] = field(metadata={"each": tuple(VECTOR_PASSES)})


@dataclass(frozen=True)
class DequantPipe:
    weights_per_cycle: float
    startup_cycles: float


@dataclass(frozen=True)
class Sram:
    capacity_bytes: int
    port_bytes_per_cycle: float


@dataclass(frozen=True)
class Dram:
    bandwidth_gbps: float
    efficiency: float
    latency_ns: float
    run_overhead_bytes: float
    capacity_bytes: int


@dataclass(frozen=True)
class Dma:
    issue_ns: float
    run_ns: float
    outstanding: int


@dataclass(frozen=True)
class DieLink:
    bandwidth_gbps: float
    hop_us: float
    collective_us: float
    package_dies: int


@dataclass(frozen=True)
class PackageLink:
    bandwidth_gbps: float
    hop_us: float


@dataclass(frozen=True)
class Sync:
    fetch_ns: float
    command_ns: float
    launch_us: float
    controls: int
    waiting_overhead: float

    @property
    def dispatch_ns(self) -> float:
        """Of a command that waits for nothing but the one before it on its unit."""
        return self.fetch_ns + self.command_ns


@dataclass(frozen=True)
class Host:
    step_us: float


@dataclass(frozen=True)
class Machine:
    """One die of a machine and its links.

    `constants` holds every number's provenance by dotted name (`dram.bandwidth_gbps`).
    """

    name: str
    clock: Clock
    cube: Cube
    vector: Vector
    dequant: DequantPipe
    sram: Sram
    dram: Dram
    dma: Dma
    d2d: DieLink
    c2c: PackageLink
    sync: Sync
    host: Host
    constants: Mapping[str, Constant]

    def __hash__(self) -> int:
        """Equal machines have equal names; its constants are no key of a dictionary."""
        return hash(self.name)

    @property
    def cycle_ns(self) -> float:
        return 1000.0 / self.clock.frequency_mhz

    @property
    def macs_per_cycle_int8(self) -> int:
        return self.cube.count * self.cube.rows * self.cube.columns * self.cube.depth_int8

    @property
    def macs_per_cycle_fp16(self) -> int:
        return self.cube.count * self.cube.rows * self.cube.columns * self.cube.depth_fp16

    @property
    def peak_int8_tops(self) -> float:
        """Two operations per multiply-accumulate."""
        return self.macs_per_cycle_int8 * 2 * self.clock.frequency_mhz * 1e-6

    @property
    def peak_fp16_tflops(self) -> float:
        """Two operations per multiply-accumulate."""
        return self.macs_per_cycle_fp16 * 2 * self.clock.frequency_mhz * 1e-6

    @property
    def dram_bytes_per_ns(self) -> float:
        """Sustained DRAM bandwidth: GB/s is bytes per nanosecond."""
        return self.dram.bandwidth_gbps * self.dram.efficiency

    @property
    def accumulator_bytes(self) -> int:
        """Accumulators of all cubes together."""
        return self.cube.accumulator_bytes * self.cube.count

    def assumed(self) -> Iterator[tuple[str, Constant]]:
        """The constants that have bounds instead of a source that settles them, by dotted name."""
        for name, constant in self.constants.items():
            if (
                constant.low is not None
                and constant.high is not None
                and constant.low < constant.high
                and constant.label == "assumed"
            ):
                yield name, constant

    @property
    def calibrated(self) -> bool:
        """Whether no constant is merely assumed."""
        return not any(c.label == "assumed" for c in self.constants.values())

    def with_overrides(self, values: Mapping[str, float]) -> Machine:
        """The machine with some constants replaced: `{"dram.bandwidth_gbps": 34.1}`.

        Unknown names and values that are not positive are refused together.
        """
        problems = []
        for name, value in values.items():
            if name not in self.constants:
                problems.append(
                    Diagnostic(
                        f"{self.name} has no constant '{name}'",
                        help=did_you_mean(name, self.constants) or "names are section.constant",
                    )
                )
            elif problem := _form().value_problem(name, value):
                problems.append(
                    Diagnostic(
                        f"{name} = {number_text(value)}: {problem}",
                        help=f"the file has {self.constants[name].value:g}",
                    )
                )
        if problems:
            raise TyirError(problems)
        changed = {
            n: Constant(float(v), "override", "given on the command line or by the caller")
            for n, v in values.items()
        }
        return self._from_constants(self.name, {**self.constants, **changed})

    def with_bounds(self, high: Mapping[str, bool]) -> Machine:
        """The machine with assumed constants at their `high` (True) or `low` (False) bound; their label
        stays.
        """
        changed = dict(self.constants)
        for name, take_high in high.items():
            old = changed[name]
            bound = old.high if take_high else old.low
            assert bound is not None, f"{name} has no bounds"
            changed[name] = Constant(bound, old.label, old.source, old.low, old.high)
        return self._from_constants(self.name, changed)

    def with_constants(self, name: str, changed: Mapping[str, Constant]) -> Machine:
        """The machine under another name, with some constants of other provenance."""
        return self._from_constants(name, {**self.constants, **changed})

    def as_toml(self) -> str:
        """What a machine file says that `load_machine` reads this machine from."""
        lines, sections = [f"name = {json.dumps(self.name)}"], dict[str, list[str]]()
        for dotted, c in self.constants.items():
            section, _, name = dotted.partition(".")
            bounds = "" if c.low is None else f", low = {c.low!r}, high = {c.high!r}"
            sections.setdefault(section, []).append(
                f"{name} = {{ value = {c.value!r}{bounds}, label = {json.dumps(c.label)},"
                f" source = {json.dumps(c.source)} }}"
            )
        for section, entries in sections.items():
            lines += ["", f"[{section}]", *entries]
        return "\n".join(lines) + "\n"

    @classmethod
    def _from_constants(cls, name: str, constants: Mapping[str, Constant]) -> Self:
        return cls(name=name, constants=dict(constants), **build_sections(_sections(), constants))


def _sections() -> dict[str, Any]:
    return {n: t for n, t in get_type_hints(Machine).items() if n not in ("name", "constants")}


@cache
def _form() -> Form:
    return Form(_sections(), zeros=False, bounds=True)


def load_machine(name_or_path: str | Path = "edge10") -> Machine:
    """A machine by name (`tyir/targets/<name>.toml`) or by the path of a machine file.

    Everything wrong with the file is reported at once.
    """
    return _machine_of(read_table(name_or_path, _PACKAGE), name_or_path)


def machine_from(data: bytes, path: Path) -> Machine:
    """A machine from what its file holds; `path` is for messages."""
    return _machine_of(parse_table(data, path), path)


def _machine_of(table: dict[str, Any], name_or_path: str | Path) -> Machine:
    if "sm" in table or "like" in table:
        raise TyirError(
            f"{name_or_path} describes no die that runs command programs: it describes a GPU, for the kernel"
            " models (python -m tyir.tools.gpu.validate)",
            help=f"machines that do: {', '.join(shipped_names(_PACKAGE))}; or give the path of a .toml file",
        )
    if table.get("kind") == "processor":
        raise TyirError(
            f"{name_or_path} describes a processor, which runs the host's code and no command programs",
            help=f"tyir-sim predicts with it; machines of dies: {', '.join(shipped_names(_PACKAGE))}",
        )
    return _machine_from_table(table, str(Path(name_or_path)))


def _machine_from_table(table: dict[str, Any], where: str) -> Machine:
    """`base = "edge10"` takes every constant that the file does not give from that machine."""
    name, base = table.pop("name", Path(where).stem), table.pop("base", None)
    # a base that is a file would be missing beside the artifacts that this one goes to
    named = isinstance(base, str) and not base.endswith(".toml")
    problems = []
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 80:
        problems.append(Diagnostic(f"name = {str(name)[:80]!r} is not a name", help='write name = "mine"'))
    if base is not None and not named:
        problems.append(
            Diagnostic(f"base = {str(base)[:80]!r} is no known machine's name", help='write base = "edge10"')
        )
    problems = [replace(problem, where=where) for problem in problems]
    constants, others = _form().read(
        entries_of(table), where, load_machine(base).constants if named else None
    )
    if problems := [*problems, *others]:
        raise TyirError(problems)
    return Machine._from_constants(str(name), constants)
