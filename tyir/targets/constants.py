"""Files of sourced constants: what the description of a machine that runs command programs (`machine`) and
that of a GPU (`runtime_sim.gpu.accelerator`) have in common.

A file is TOML; a section is a frozen dataclass, a field one number:

    [dram]
    latency_ns = { value = 150, low = 100, high = 300, label = "assumed", source = "..." }

A field with `metadata={"each": names}` is a mapping, one number `<name>_<field>` for each of the names.
Everything wrong with a file is reported at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.process.files import read_regular

__all__ = [
    "LABELS",
    "Constant",
    "Form",
    "build_sections",
    "entries_of",
    "number_text",
    "parse_table",
    "read_file",
    "read_table",
    "shipped_names",
]

Label = Literal["published", "derived", "assumed", "fitted", "override"]
Kind = Literal["machine", "cluster"]
_PAGES: Final[dict[Kind, str]] = {"machine": "docs/machines.md", "cluster": "docs/processes.md"}
LABELS: Final = ("published", "derived", "assumed", "fitted", "override")
_MAX_BYTES: Final = 1 << 17  # of a machine file; the shipped ones have 7 kB
_MAX_LINE: Final = 2000
_IN_FILES: Final = LABELS[:-1]

_TAKE_FROM: Final = (
    'give them, or write base = "edge10" (of a GPU: like = "h200") at the top to take them from there'
)

# The least (but 0) and the most that a constant may be, by the unit that its name ends in; for others the
# last.  Within them no time is 0 or infinite, and no size is beyond an address of 64 bits.
_RANGES: Final = (
    ("_mhz", 1e-3, 1e6),
    ("_gbps", 1e-6, 1e6),
    ("_bytes", 1e-3, 2**50),
    ("_us", 1e-9, 1e9),
    ("_ns", 1e-9, 1e12),
    ("_cycles", 1e-6, 1e9),
    ("", 1e-9, 1e9),
)


@dataclass(frozen=True, slots=True)
class Constant:
    """One number of the machine file; `low` and `high` bound an assumed one."""

    value: float
    label: Label
    source: str
    low: float | None = None
    high: float | None = None


def shipped_names(package: str) -> list[str]:
    """The names of the files that come with a package."""
    names = (p.name for p in resources.files(package).iterdir())
    return sorted(n.removesuffix(".toml") for n in names if n.endswith(".toml"))


def read_table(name_or_path: str | Path, package: str) -> dict[str, Any]:
    """The contents of a file: one that comes with `package` by its name, or any by its path."""
    path = Path(name_or_path)
    known = shipped_names(package)
    others = f"known machines: {', '.join(known)}; or give the path of a .toml file"
    if path.suffix != ".toml" and str(name_or_path) not in known:
        near = did_you_mean(str(name_or_path), known)
        raise TyirError(f"there is no machine '{name_or_path}'", help=f"{near} {others}".strip())
    if path.suffix != ".toml":
        return parse_table((resources.files(package) / f"{name_or_path}.toml").read_bytes(), path)
    return read_file(path, "machine", others)


def read_file(path: Path, kind: Kind, help: str) -> dict[str, Any]:
    """The contents of a file of a kind; `help` says what else can be given when it cannot be read."""
    try:
        data = read_regular(path, _MAX_BYTES)
    except OSError as error:
        raise TyirError(f"cannot read the {kind} file {path}: {error.strerror or error}", help=help) from None
    return parse_table(data, path, kind)


def parse_table(data: bytes, path: Path, kind: Kind = "machine") -> dict[str, Any]:
    """The contents of a file of constants: UTF-8 text of TOML; `path` and `kind` are for messages."""
    described = f"a {kind} file is described in {_PAGES[kind]}"
    try:
        text = data.decode()
        for number, line in enumerate(text.splitlines(), 1):
            if len(line) > _MAX_LINE:  # of keys of keys: quadratic
                raise ValueError(f"line {number} is longer than {_MAX_LINE} characters")
        return tomllib.loads(text)
    except UnicodeDecodeError:
        raise TyirError(
            f"cannot read the {kind} file {path}: it is not UTF-8",
            help=described,
        ) from None
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits
        reason = "its lists or tables are nested too deeply" if isinstance(error, RecursionError) else error
        raise TyirError(
            f"not valid TOML: {reason}",
            where=str(path),
            help=described,
        ) from None


def entries_of(table: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of all sections by dotted name; what stands in no section by its own."""
    return {
        f"{section}.{key}" if key else section: entry
        for section, entries in table.items()
        for key, entry in (entries if isinstance(entries, dict) else {"": entries}).items()
    }


def _names(section: str, field: Field[Any]) -> dict[str, str]:
    """The constants of a field: dotted name by what it is called in the mapping ("" for a single number)."""
    each: Iterable[str] | None = field.metadata.get("each")
    if each is None:
        return {"": f"{section}.{field.name}"}
    return {name: f"{section}.{name}_{field.name}" for name in each}


def build_sections(sections: Mapping[str, Any], constants: Mapping[str, Constant]) -> dict[str, Any]:
    """Every section's dataclass with its numbers."""
    made: dict[str, Any] = {}
    for section, section_class in sections.items():
        hints = get_type_hints(section_class)
        values: dict[str, Any] = {}
        for field in fields(section_class):
            names = _names(section, field)
            if "" in names:
                values[field.name] = hints[field.name](constants[names[""]].value)
            else:
                values[field.name] = {short: float(constants[name].value) for short, name in names.items()}
        made[section] = section_class(**values)
    return made


class Form:
    """What the constants of a kind of machine are, from its sections' dataclasses.

    Unless `zeros` allows every constant to be 0, only times and overheads may be; with `bounds`, what is
    assumed needs its bounds.
    """

    def __init__(
        self, sections: Mapping[str, Any], *, zeros: bool, bounds: bool, missing: str = _TAKE_FROM
    ) -> None:
        """`missing`: what to do about constants that a file lacks."""
        self.sections = sections
        self.missing = missing
        self.zeros = zeros
        self.bounds = bounds
        self.whole: dict[str, bool] = {}  # by dotted name: whether it is a whole number
        for section, section_class in sections.items():
            hints = get_type_hints(section_class)
            for field in fields(section_class):
                for name in _names(section, field).values():
                    self.whole[name] = hints[field.name] is int

    def read(
        self, entries: Mapping[str, Any], where: str, base: Mapping[str, Constant] | None = None
    ) -> tuple[dict[str, Constant], list[Diagnostic]]:
        """The constants of a file, what it does not give from `base`; and everything wrong with it."""
        constants = dict(base or {})
        problems: list[Diagnostic] = []
        for name, entry in entries.items():
            if name not in self.whole:
                help = did_you_mean(name, self.whole) or self._where(name)
                problems.append(Diagnostic(f"unknown constant '{name}'", where=where, help=help))
            elif (problem := self.entry_problem(name, entry)) is not None:
                problems.append(Diagnostic(f"{name}: {problem}", where=where, help=self._example))
            else:
                constants[name] = Constant(
                    entry["value"], entry["label"], entry["source"], entry.get("low"), entry.get("high")
                )
        problems += self._missing([n for n in self.whole if n not in constants and n not in entries], where)
        return constants, problems

    def _missing(self, names: list[str], where: str) -> Iterator[Diagnostic]:
        if names:
            what = "1 constant is" if len(names) == 1 else f"{len(names)} constants are"
            yield Diagnostic(
                f"{what} missing: {', '.join(sorted(names))}",
                where=where,
                help=self.missing,
            )

    @property
    def _example(self) -> str:
        bounds = "low = 0.5, high = 2, " if self.bounds else ""
        return f'write {{ value = 1, label = "assumed", {bounds}source = "..." }}'

    def _where(self, name: str) -> str:
        """Where an unknown constant of a known section could belong."""
        section = name.partition(".")[0]
        known = [n.partition(".")[2] for n in self.whole if n.startswith(f"{section}.")]
        return f"[{section}] has {', '.join(known)}" if known else f"sections are {', '.join(self.sections)}"

    def value_problem(self, name: str, value: float) -> str | None:
        """What is wrong with a value: times, shares and overheads may be 0, nothing may be negative, counts
        and sizes are whole.
        """
        if not 0 <= value < float("inf"):
            return "rates, sizes, counts and times must be positive numbers"
        low, high = next((low, high) for ending, low, high in _RANGES if name.endswith(ending))
        if value != 0 and not low <= value <= high:
            return f"a constant of this unit lies between {low:g} and {high:g}"
        if value == 0 and not (
            self.zeros or name.endswith(("_ns", "_us", "_cycles", "_share", "_overhead", "overhead_bytes"))
        ):
            return "rates, sizes and counts must be positive"
        if name == "dram.efficiency" and value > 1:
            return "a share of the bandwidth is at most 1"
        if self.whole[name] and value != int(value):
            return f"this constant is a whole number, the nearest is {round(value)}"
        return None

    def entry_problem(self, name: str, entry: object) -> str | None:
        """What is wrong with an entry of a file."""
        if not isinstance(entry, dict) or not {"value", "label", "source"} <= set(entry):
            return "needs value, label and source"
        fields = ("value", "label", "source", "low", "high")
        if unknown := sorted(set(entry) - set(fields)):
            near = did_you_mean(unknown[0], fields)
            return f"has no field {', '.join(unknown)}{f', {near}' if near else ''}"
        if entry["label"] not in _IN_FILES:
            return f"label '{entry['label']}' is none of {', '.join(_IN_FILES)}"
        if not isinstance(entry["source"], str) or not entry["source"].strip():
            return "the source is empty: say where the number comes from"
        for field in ("value", "low", "high"):
            value = entry.get(field, entry["value"])
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                return f"{field} {value!r} is not a number"
            if problem := self.value_problem(name, value):
                return f"{field} {number_text(value)}: {problem}"
        low, high = entry.get("low", entry["value"]), entry.get("high", entry["value"])
        if not low <= entry["value"] <= high:
            return f"value {entry['value']} lies outside its bounds {low}..{high}"
        if self.bounds and entry["label"] == "assumed" and not {"low", "high"} <= set(entry):
            return "an assumed constant needs low and high: results are reported as an interval"
        return None


def number_text(value: float) -> str:
    """A number as a message shows it; whole numbers may be too large for a float."""
    return f"{value:g}" if isinstance(value, float) or abs(value) < 2**53 else f"about 2^{value.bit_length()}"
