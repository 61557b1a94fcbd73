"""The description of a processor: what the kernels of the host's libraries cost on it, one section for each kind of
kernel.  A file of the form of `tyir.targets.constants`, which `tyir-sim --probe-host` writes.

A kernel's time on one thread is a sum of products: `<what>_ns` of its section times how many of that it has, as
`kernels.py` counts them.  What threads change is said once for all kernels, in `parallel`.
"""  # noqa: E501

from __future__ import annotations

import itertools
import json
import math
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
    "ChunkAttention",
    "ChunkProduct",
    "HostMachine",
    "Meeting",
    "Memory",
    "Parallel",
    "Processor",
    "Rowwise",
    "Step",
    "TokenAttention",
    "TokenProduct",
    "by_footprint",
    "is_host_machine",
    "load_host_machine",
    "sections_of_kernels",
]

# Bytes that a step reads all of, weights and caches: what was read so long ago is in the caches or is not.
FOOTPRINTS: Final = {"16mb": 16 << 20, "256mb": 256 << 20, "1gb": 1 << 30}
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
    """Loops of `least_operations` are cut in equal parts, one for each thread: what it takes to start a loop
    and to learn that all parts are done (`start_us`), and how many times longer a part takes while all of
    `processor.threads` work and the slowest is waited for (`beside`).
    """

    least_operations: int
    start_us: float
    beside: float


@dataclass(frozen=True)
class Step:
    """The call of a step, in Python: its own part, and that of each input and output of each die."""

    call_us: float
    tensor_us: float


@dataclass(frozen=True)
class Memory:
    """Weights and caches that a core's cache does not hold: what passes until they begin to come, and a byte
    as fast as memory gives it, on one thread and on all together, by the step's footprint.  No loop that
    reads them is faster.
    """

    first_ns: float
    one_thread_byte_ns: Mapping[str, float] = field(metadata={"each": tuple(FOOTPRINTS)})
    all_threads_byte_ns: Mapping[str, float] = field(metadata={"each": tuple(FOOTPRINTS)})


@dataclass(frozen=True)
class TokenProduct:
    """Up to `few_tokens` tokens with a weight that the core's cache holds: each activation, each row and byte
    of the weight, and each multiplication for tokens after the first.  `wait_share`: how much of memory's
    time comes on top where the weight is read from there.
    """

    input_ns: float
    row_ns: float
    byte_ns: float
    more_mac_ns: float
    wait_share: float


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


@dataclass(frozen=True)
class TokenAttention:
    """A token's heads over a cache that the core's holds: each of them, an element of a row of keys or values
    that heads meet together, a multiplication; `wait_share` as of a product.
    """

    query_ns: float
    element_ns: float
    mac_ns: float
    wait_share: float


@dataclass(frozen=True)
class ChunkAttention:
    """Tokens' heads over a cache: each of them, an element of a row of keys or values that a tile of tokens
    meets, a score.
    """

    query_ns: float
    element_ns: float
    score_ns: float


@dataclass(frozen=True)
class Rowwise:
    """A kernel with so much work for each element."""

    call_ns: float
    element_ns: float


@dataclass(frozen=True)
class Meeting:
    """Dies of one process meet: each die that comes, and an element of each die's part."""

    call_ns: float
    element_ns: float


def by_footprint(size: float, cache_bytes: float) -> dict[str, float]:
    """What is known by footprint, at one of `size` bytes: the shares of the nearest measured ones, whose
    logarithms a straight line lies between; none where a core's cache holds them.
    """
    if size <= cache_bytes:
        return {}
    known = [(label, math.log(at)) for label, at in FOOTPRINTS.items()]
    at = min(max(math.log(size), known[0][1]), known[-1][1])
    (low, first), (high, second) = next(pair for pair in itertools.pairwise(known) if at <= pair[1][1])
    share = (at - first) / (second - first)
    return {low: 1 - share, high: share}


def sections_of_kernels() -> dict[str, type]:
    """The section of each kind of kernel."""
    return {
        **{f"product_{mode}_token": TokenProduct for mode in MODES},
        **{f"product_{mode}_chunk": ChunkProduct for mode in MODES},
        **{f"attention_{cache}_token": TokenAttention for cache in CACHES},
        **{f"attention_{cache}_chunk": ChunkAttention for cache in CACHES},
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

    def _share(self, threads: int) -> float:
        """Where so many lie on a straight line from one thread, 0, to all, 1; `TyirError` for more than were
        measured.
        """
        most = self.processor.threads
        if not 1 <= threads <= most:
            raise TyirError(
                f"{self.name} was measured with 1 to {most} threads, {threads} are asked about",
                help=f"use --threads {min(max(threads, 1), most)}, or measure the machine with more",
            )
        return (threads - 1) / max(most - 1, 1)

    def beside(self, threads: int) -> float:
        """How many times longer a thread takes for its part while so many work; `TyirError` for more than
        were measured.
        """
        return 1 + (self.parallel.beside - 1) * self._share(threads)

    def read_ns(self, size: float, footprint: float, threads: int) -> float:
        """`size` bytes that so many threads read together, in a step that reads `footprint` bytes."""
        shares = by_footprint(footprint, self.processor.cache_bytes)
        if not size or not shares:
            return 0.0
        return self.memory.first_ns + size * self._byte_ns(shares, self._share(threads))

    def _byte_ns(self, shares: Mapping[str, float], most: float) -> float:
        """A byte, `most` of the way from one thread to all."""
        one, all_of_them = (
            sum(part * known[label] for label, part in shares.items())
            for known in (self.memory.one_thread_byte_ns, self.memory.all_threads_byte_ns)
        )
        if not most or not one * all_of_them:
            return all_of_them if most else one
        return 1 / (1 / one + (1 / all_of_them - 1 / one) * most)  # between rates a straight line

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
        lines = [
            f"name = {json.dumps(self.name)}",
            'kind = "processor"',
            f"model = {MODEL}",
            f"clock = {json.dumps(self.clock)}",
        ]
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
# What constants there are and mean; 1 had a `speedup` of each kind of kernel, and said no number.
MODEL: Final = 2


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
    if (model := table.pop("model", 1)) != MODEL:
        raise TyirError(
            f"{where} was measured for model {str(model)[:80]} of how long kernels take, not for {MODEL}",
            help=f"measure the processor again: tyir-sim --probe-host {where}",
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
