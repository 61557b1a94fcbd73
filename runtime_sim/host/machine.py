"""The description of a processor: what the kernels of the host's libraries cost on it, one section for each kind of
kernel.  A file of the form of `tyir.targets.constants`, which `tyir-sim --probe-host` writes.

A kernel's time on one thread is a sum of products: `<what>_ns` of its section times how many of that it has, as
`kernels.py` counts them.  `speedup` is how many times faster it is on `processor.threads`; between one thread and
these a straight line.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Final

from tyir.diagnostics import Diagnostic, TyirError, did_you_mean
from tyir.targets.constants import Constant, Form, build_sections, entries_of, number_text, read_table

__all__ = [
    "CACHES",
    "FOOTPRINTS",
    "MODES",
    "ROWWISE",
    "Attention",
    "ChunkProduct",
    "HostMachine",
    "Meeting",
    "Memory",
    "Parallel",
    "Processor",
    "Rowwise",
    "Step",
    "TokenProduct",
    "is_host_machine",
    "load_host_machine",
    "sections_of_kernels",
]

# Bytes that a step reads all of, weights and caches: what was read so long ago is in the caches or is not.
FOOTPRINTS: Final = {"16mb": 16 << 20, "256mb": 256 << 20, "1gb": 1 << 30}
READS: Final = {"256kb": 256 << 10, "16mb": 16 << 20, "1gb": 1 << 30}
# What weights are multiplied as: 4-bit ones by `--host-activations`, f16 ones.
MODES: Final = ("fp32", "int16", "int8", "f16")
CACHES: Final = ("f16", "i8")  # elements of caches
# Kernels that take a time for each element: the ops of each kind.
ROWWISE: Final = {
    "norm": ("ty.rms_norm", "ty.layer_norm"),
    "rope": ("ty.rope",),
    "elementwise": ("ty.add", "ty.mul", "ty.scale", "ty.relu", "ty.cast"),
    "activation": ("ty.silu", "ty.silu_mul", "ty.gelu", "ty.gelu_mul", "ty.softcap"),
    "movement": (
        "ty.embedding",
        "ty.select_row",
        "ty.transpose",
        "ty.slice",
        "ty.concat",
        "ty.repeat",
        "kv.append",
        "kv.replace",
        "kv.rows",
        "kv.take_rows",
    ),
    "quantize_rows": ("kv.quantize_rows",),
    "top_k": ("ty.top_k", "ty.top_k_candidates", "ty.merge_top_k"),
    "merge_attention": ("kv.merge_attention",),
}


@dataclass(frozen=True)
class Processor:
    """`threads`: the most that were measured.  What the kernels decide by: `few_tokens` up to which rows of a
    weight are read as they lie, `attention_queries` that meet a key together at most, and what number divides
    the groups of columns whose activations are rounded.  `cache_bytes`: of a core's own.
    """

    threads: int
    few_tokens: int
    attention_queries: int
    integer_group: int
    cache_bytes: int


@dataclass(frozen=True)
class Parallel:
    """Starting a kernel on several threads, which those of so many operations are."""

    start_us: float
    least_operations: int


@dataclass(frozen=True)
class Step:
    """The call of a step, in Python: its own part, and that of each input and output of each die."""

    call_us: float
    tensor_us: float


@dataclass(frozen=True)
class Memory:
    """A plain read, by bytes that are read again and again: on one thread and on all."""

    one_thread_gbps: Mapping[str, float] = field(metadata={"each": tuple(READS)})
    all_threads_gbps: Mapping[str, float] = field(metadata={"each": tuple(READS)})


@dataclass(frozen=True)
class TokenProduct:
    """Up to `few_tokens` tokens with a weight: each row of it, a byte of it by the step's footprint, and each
    multiplication for tokens after the first.
    """

    call_ns: float
    row_ns: float
    more_mac_ns: float
    byte_ns: Mapping[str, float] = field(metadata={"each": tuple(FOOTPRINTS)})
    speedup: float


@dataclass(frozen=True)
class ChunkProduct:
    """More tokens with a weight [n, k]: each of its n k numbers, of the m n k multiplications and of their
    sums of a group of columns, and of the m k activations; what a multiplication takes more where these do
    not stay in the core's cache (`spill`).
    """

    call_ns: float
    weight_ns: float
    mac_ns: float
    sum_ns: float
    input_ns: float
    spill_ns: float
    speedup: float


@dataclass(frozen=True)
class Attention:
    """Tiles of queries over a cache: each tile, an element of a row of keys or values that a tile meets, a
    multiplication, a score.
    """

    call_ns: float
    tile_ns: float
    element_ns: float
    mac_ns: float
    score_ns: float
    speedup: float


@dataclass(frozen=True)
class Rowwise:
    """A kernel with so much work for each element."""

    call_ns: float
    element_ns: float
    speedup: float


@dataclass(frozen=True)
class Meeting:
    """Dies of one process meet: each die that comes, and an element of each die's part."""

    call_ns: float
    element_ns: float


def sections_of_kernels() -> dict[str, type]:
    """The section of each kind of kernel."""
    return {
        **{f"product_{mode}_token": TokenProduct for mode in MODES},
        **{f"product_{mode}_chunk": ChunkProduct for mode in MODES},
        **{f"attention_{cache}_token": Attention for cache in CACHES},
        **{f"attention_{cache}_chunk": Attention for cache in CACHES},
        **dict.fromkeys(ROWWISE, Rowwise),
        "meeting": Meeting,
    }


def _sections() -> dict[str, type]:
    return {
        "processor": Processor,
        "parallel": Parallel,
        "step": Step,
        "memory": Memory,
        **sections_of_kernels(),
    }


@cache
def _form() -> Form:
    return Form(
        _sections(), zeros=False, bounds=False, missing="measure the file again: tyir-sim --probe-host FILE"
    )


@dataclass(frozen=True)
class HostMachine:
    """A processor; `constants` holds every number's provenance by dotted name, `kernels` the sections of
    kinds of kernels.
    """

    name: str
    clock: str
    processor: Processor
    parallel: Parallel
    step: Step
    memory: Memory
    kernels: Mapping[str, Any]
    constants: Mapping[str, Constant]

    def speedup(self, kind: str, threads: int) -> float:
        """How many times faster than on one thread a kind of kernels is; `TyirError` for more threads than
        were measured.
        """
        most = self.processor.threads
        if not 1 <= threads <= most:
            raise TyirError(
                f"{self.name} was measured with 1 to {most} threads, {threads} are asked about",
                help=f"use --threads {min(max(threads, 1), most)}, or measure the machine with more",
            )
        if threads == 1:
            return 1.0
        measured = float(self.kernels[kind].speedup)
        return 1 + (measured - 1) * (threads - 1) / (most - 1)

    def with_overrides(self, values: Mapping[str, float]) -> HostMachine:
        """With some constants replaced: `{"parallel.start_us": 3}`; wrong ones are refused together."""
        problems = []
        for name, value in values.items():
            if name not in self.constants:
                help = did_you_mean(name, self.constants) or "names are section.constant"
                problems.append(Diagnostic(f"{self.name} has no constant '{name}'", help=help))
            elif problem := _form().value_problem(name, value):
                help = f"the file has {self.constants[name].value:g}"
                problems.append(Diagnostic(f"{name} = {number_text(value)}: {problem}", help=help))
        if problems:
            raise TyirError(problems)
        changed = {n: Constant(float(v), "override", "given on the command line") for n, v in values.items()}
        return host_machine(self.name, self.clock, {**self.constants, **changed})

    def as_toml(self) -> str:
        """What a file says that `load_host_machine` reads this machine from."""
        lines = [f"name = {json.dumps(self.name)}", 'kind = "processor"', f"clock = {json.dumps(self.clock)}"]
        before = ""
        for dotted, c in self.constants.items():
            section, _, name = dotted.partition(".")
            if section != before:
                lines += ["", f"[{section}]"]
            before = section
            value = c.value if isinstance(c.value, int) else float(f"{c.value:.5g}")
            known = f"label = {json.dumps(c.label)}, source = {json.dumps(c.source)}"
            lines.append(f"{name} = {{ value = {value!r}, {known} }}")
        return "\n".join(lines) + "\n"


CLOCKS: Final = ("wall", "processor")


def host_machine(name: str, clock: str, constants: Mapping[str, Constant]) -> HostMachine:
    """A machine of its constants, all of them, in any order."""
    made = build_sections(_sections(), constants)
    own = {f.name for f in fields(HostMachine)}
    kernels = {n: s for n, s in made.items() if n not in own}
    return HostMachine(
        name=name,
        clock=clock,
        kernels=kernels,
        constants={n: constants[n] for n in _form().whole},
        **{n: s for n, s in made.items() if n in own},
    )


def is_host_machine(table: Mapping[str, Any]) -> bool:
    """Whether the contents of a machine file are a processor's."""
    return table.get("kind") == "processor" or "processor" in table


def load_host_machine(path: str | Path) -> HostMachine:
    """A processor by the path of its file; `TyirError` with everything that is wrong with that."""
    table, where = read_table(path, "tyir.targets"), str(path)
    if not is_host_machine(table):
        raise TyirError(
            f"{where} describes no processor",
            help="tyir-sim --probe-host FILE measures this computer and writes such a file",
        )
    name, kind = table.pop("name", Path(path).stem), table.pop("kind", None)
    clock = table.pop("clock", None)
    problems = []
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name) <= 80:
        problems.append(
            Diagnostic(f"name = {str(name)[:80]!r} is not a name", where=where, help='write name = "mine"')
        )
    if kind != "processor":
        problems.append(
            Diagnostic(
                f"kind = {str(kind)[:80]!r} is not that of a processor",
                where=where,
                help='write kind = "processor"',
            )
        )
    if clock not in CLOCKS:
        problems.append(
            Diagnostic(
                f"clock = {str(clock)[:80]!r} is none of wall, processor",
                where=where,
                help='write clock = "wall"',
            )
        )
    constants, others = _form().read(entries_of(table), where)
    problems += others
    count = constants.get("processor.threads")
    if clock == "processor" and count is not None and count.value != 1:
        problems.append(
            Diagnostic(
                f"processor.threads: {count.value:g} threads by the processor's clock",
                where=where,
                help="threads that wait take processor time too: measure one thread, or by the wall's clock",
            )
        )
    if problems:
        raise TyirError(problems)
    return host_machine(str(name), str(clock), constants)
