"""The description of a machine: every constant with its value, unit (in its name), label and source, read
from `tyir/targets/<name>.toml`.

The backend sizes tiles with these numbers and the timing engine turns commands into nanoseconds with the same
ones.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, Self, get_type_hints

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean

__all__ = ["LABELS", "Constant", "Machine", "load_machine"]

Label = Literal["published", "derived", "assumed", "fitted", "override"]
LABELS: Final = ("published", "derived", "assumed", "fitted", "override")


@dataclass(frozen=True, slots=True)
class Constant:
    """One number of the machine file; `low` and `high` bound an assumed one."""

    value: float
    label: Label
    source: str
    low: float | None = None
    high: float | None = None


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
    """`units` vector units of `lanes` elements; `<function>_cycles` is cycles per element and lane."""

    units: int
    lanes: int
    startup_cycles: float
    add_cycles: float
    mul_cycles: float
    cast_cycles: float
    copy_cycles: float
    fill_value_cycles: float
    silu_cycles: float
    silu_mul_cycles: float
    rms_norm_cycles: float
    rope_cycles: float
    softmax_cycles: float
    rescale_add_cycles: float
    divide_rows_cycles: float


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
            elif problem := _value_problem(name, value):
                problems.append(
                    Diagnostic(
                        f"{name} = {value:g}: {problem}", help=f"the file has {self.constants[name].value:g}"
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

    @classmethod
    def _from_constants(cls, name: str, constants: Mapping[str, Constant]) -> Self:
        sections: dict[str, Any] = {}
        for section, section_class in _sections().items():
            hints = get_type_hints(section_class)
            sections[section] = section_class(
                **{
                    f.name: hints[f.name](constants[f"{section}.{f.name}"].value)
                    for f in fields(section_class)
                }
            )
        return cls(name=name, constants=dict(constants), **sections)


def _value_problem(name: str, value: float) -> str | None:
    """What is wrong with a value: times and overheads may be 0, nothing may be negative, counts and sizes are
    whole.
    """
    if not 0 <= value < float("inf"):
        return "rates, sizes, counts and times must be positive numbers"
    if value == 0 and not name.endswith(("_ns", "_us", "_cycles", "overhead_bytes")):
        return "rates, sizes and counts must be positive"
    if name == "dram.efficiency" and value > 1:
        return "a share of the bandwidth is at most 1"
    section, _, key = name.partition(".")
    if get_type_hints(_sections()[section])[key] is int and value != int(value):
        return f"this constant is a whole number, the nearest is {round(value)}"
    return None


def _sections() -> dict[str, Any]:
    return {n: t for n, t in get_type_hints(Machine).items() if n not in ("name", "constants")}


def load_machine(name_or_path: str | Path = "edge10") -> Machine:
    """A machine by name (`tyir/targets/<name>.toml`) or by the path of a machine file.

    Everything wrong with the file is reported at once.
    """
    path = Path(name_or_path)
    own = path.suffix == ".toml"
    try:
        table = tomllib.loads(
            path.read_text()
            if own
            else (resources.files("tyir.targets") / f"{name_or_path}.toml").read_text()
        )
    except (OSError, UnicodeDecodeError) as error:
        reason = f": {error.strerror}" if isinstance(error, OSError) and error.strerror else ""
        raise TyirError(
            (
                f"cannot read the machine file {path}{reason}"
                if own
                else f"there is no machine '{name_or_path}'"
            ),
            help=f"known machines: {', '.join(_known_machines())}; or give the path of a .toml file",
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise TyirError(
            f"not valid TOML: {error}",
            where=str(path),
            help="a machine file is described in docs/machines.md",
        ) from None
    if "sm" in table or "like" in table:
        raise TyirError(
            f"{name_or_path} describes no die that runs command programs: it describes a GPU, for the kernel"
            " models (python -m tyir.tools.gpu.validate)",
            help=f"machines that do: {', '.join(_known_machines())}; or give the path of a .toml file",
        )
    return _machine_from_table(table, str(path))


def _known_machines() -> list[str]:
    """The names of the shipped machine files."""
    names = (p.name for p in resources.files("tyir.targets").iterdir())
    return sorted(n.removesuffix(".toml") for n in names if n.endswith(".toml"))


def _machine_from_table(table: dict[str, Any], where: str) -> Machine:
    """`base = "edge10"` takes every constant that the file does not give from that machine."""
    name, base = table.pop("name", Path(where).stem), table.pop("base", None)
    known = {f"{s}.{f.name}" for s, c in _sections().items() for f in fields(c)}
    named = isinstance(base, str) and not base.endswith(
        ".toml"
    )  # a file would be missing beside the artifacts that this one goes to
    constants = dict(load_machine(base).constants) if named else {}
    problems = (
        []
        if named or base is None
        else [
            Diagnostic(
                f"base = {base!r} is no known machine's name", where=where, help='write base = "edge10"'
            )
        ]
    )
    given: set[str] = set()
    for section, entries in table.items():
        for key, entry in (entries if isinstance(entries, dict) else {"": entries}).items():
            dotted = f"{section}.{key}" if key else section
            given.add(dotted)
            if dotted not in known:
                problems.append(
                    Diagnostic(
                        f"unknown constant '{dotted}'",
                        where=where,
                        help=did_you_mean(dotted, known) or _help_for(dotted),
                    )
                )
            elif (problem := _entry_problem(dotted, entry)) is not None:
                problems.append(Diagnostic(f"{dotted}: {problem}", where=where, help=_FORM))
            else:
                constants[dotted] = Constant(
                    entry["value"], entry["label"], entry["source"], entry.get("low"), entry.get("high")
                )
    if missing := sorted(known - set(constants) - given):
        plural = "constant is" if len(missing) == 1 else "constants are"
        what = f"{len(missing)} {plural} missing: {', '.join(missing)}"
        problems.append(
            Diagnostic(
                what,
                where=where,
                help='give them, or write base = "edge10" at the top to take them from there',
            )
        )
    if problems:
        raise TyirError(problems)
    return Machine._from_constants(str(name), constants)


_FORM: Final = 'write { value = 1, label = "assumed", low = 0.5, high = 2, source = "..." }'


def _help_for(dotted: str) -> str:
    """Where an unknown constant of a known section could belong."""
    section = dotted.partition(".")[0]
    if section in _sections():
        return f"[{section}] has {', '.join(f.name for f in fields(_sections()[section]))}"
    return f"sections are {', '.join(_sections())}"


def _entry_problem(name: str, entry: object) -> str | None:
    if not isinstance(entry, dict) or not {"value", "label", "source"} <= set(entry):
        return "needs value, label and source"
    if unknown := sorted(set(entry) - {"value", "label", "source", "low", "high"}):
        return f"has no field {', '.join(unknown)}"
    if entry["label"] not in LABELS[:-1]:
        return f"label '{entry['label']}' is none of {', '.join(LABELS[:-1])}"
    if not isinstance(entry["source"], str) or not entry["source"].strip():
        return "the source is empty: say where the number comes from"
    for field in ("value", "low", "high"):
        value = entry.get(field, entry["value"])
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return f"{field} {value!r} is not a number"
        if problem := _value_problem(name, value):
            return f"{field} {value:g}: {problem}"
    low, high = entry.get("low", entry["value"]), entry.get("high", entry["value"])
    if not low <= entry["value"] <= high:
        return f"value {entry['value']} lies outside its bounds {low}..{high}"
    if entry["label"] == "assumed" and not {"low", "high"} <= set(entry):
        return "an assumed constant needs low and high: results are reported as an interval"
    return None
