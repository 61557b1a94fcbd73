"""Measures the constants of this computer's processor for `tyir.runtime_sim.host`: builds libraries of the points'
kernels as a compile does, times them in turn, and solves for what one of each thing takes.
"""  # noqa: E501

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.consistency import cache_inputs
from tyir.artifacts.programs import DieProgram, TensorInfo
from tyir.diagnostics import TyirError
from tyir.dialects import dist
from tyir.dialects.func import Func, Return
from tyir.dialects.ty import tensor_type
from tyir.execution.lockstep import OneProcess
from tyir.execution.storage import packed_shape
from tyir.process.cores import usable_cores
from tyir.runtime_sim.host.kernels import Work, work_of
from tyir.runtime_sim.host.machine import (
    FOOTPRINTS,
    HostMachine,
    Processor,
    host_machine,
    sections_of_kernels,
)
from tyir.runtime_sim.session.program_engine import check_inputs
from tyir.targets.constants import Constant
from tyir.tools.sim.host_fit import least_squares
from tyir.tools.sim.host_points import Point, function_of, points
from tyir.tools.sim.host_reads import read_rates
from tyir.types import TensorType, f16, storage_dtype

__all__ = ["probe"]

Array = npt.NDArray[Any]
_PATTERN: Final = 0x2C  # a byte of everything: f16 0.065, codes of 12 and 2, i8 44
_ROUNDS: Final = 6
_CACHE_SIZE: Final = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_CACHE_BYTES: Final = 1 << 20  # where the system does not say
_LEAST: Final = 2e-3  # seconds that a measurement takes at least: a pass is repeated until it does


@dataclass
class _Timed:
    """A point, built; `seconds` of one kernel by position and threads, one for each round."""

    point: Point
    work: dict[int, Work]
    run: Callable[[], None]
    place: Callable[[int], None]
    copies: int
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    repeats: dict[tuple[int, int], int] = field(default_factory=dict)

    def ns(self, position: int, threads: int = 1) -> float:
        """The median of the rounds."""
        return 1e9 * statistics.median(self.seconds[position, threads])

    def measure(self, position: int, threads: int, clock: Callable[[], float]) -> None:
        """One round; the first is not counted, and says how often a pass is to be repeated."""
        key = (position, threads)
        self.place(position)
        first = key not in self.repeats
        if first:
            self.run()
        count = self.repeats.get(key, 1)
        start = clock()
        for _ in range(count):
            self.run()
        took = clock() - start
        if first:
            self.repeats[key] = max(1, round(_LEAST / max(took, 1e-9)))
        else:
            self.seconds.setdefault(key, []).append(took / count / self.copies)


def probe(name: str, clock: str, threads: int | None, report: Callable[[str], None]) -> HostMachine:
    """This computer with 1 to `threads` threads (all cores), by the wall's `clock` or the processor's, which
    counts one thread.  Takes about a minute; `report` is told of its parts.

    `TyirError` where there is no compiler, or TVM is not installed, or not so many cores.
    """
    from tyir.backends.host.kernels import decided
    from tyir.backends.host.tvm_host import HostTarget, linker
    from tyir.runtime_sim.session.host_runtime import check_threads

    if linker() is None:
        raise TyirError(
            "there is no C++ compiler to build the kernels with that are measured",
            help="install g++ or clang++, or name one in CXX",
        )
    target = HostTarget()
    if not target.cpu().byte_products:
        raise TyirError(
            f"a {target.mcpu} processor has neither AVX2 nor VNNI: there is no model of kernels without them",
            help="measure on a processor that has, as every x86 server since 2015",
        )
    most = (1 if clock == "processor" else usable_cores()) if threads is None else threads
    check_threads(most)
    if clock == "processor" and most > 1:
        raise TyirError(
            f"{most} threads cannot be measured by the processor's clock: those that wait take its time too",
            help="use --clock wall, or --threads 1",
        )
    now = time.perf_counter if clock == "wall" else time.process_time
    processor = Processor(
        most, decided.FEW_TOKENS, decided.ATTENTION_QUERIES, decided.INTEGER_GROUP, _cache_bytes()
    )
    source = (
        f"measured on {target.mcpu}, median of {_ROUNDS - 1} rounds"
        f" by the {'wall' if clock == 'wall' else 'processor'}'s clock"
    )
    found: dict[str, float] = {
        **{f"processor.{what}": value for what, value in asdict(processor).items()},
        "parallel.least_operations": decided.WORTH_THREADS,
    }
    with tempfile.TemporaryDirectory(prefix="tyir-probe-") as folder:
        report("reading memory")
        found.update(read_rates(most, clock, Path(folder)))
        report("building kernels")
        pool = np.full(max(FOOTPRINTS.values()) + (64 << 20), _PATTERN, np.uint8)
        timed = [*_built(target, processor, pool, Path(folder))]
        report(f"measuring {len(timed)} kernels")
        _measure(timed, most, now)
        found.update(_meeting(target, Path(folder), now))
    found.update(_step(now))
    found.update(_constants(timed, most))
    return host_machine(name, clock, {n: Constant(v, "fitted", source) for n, v in found.items()})


def _cache_bytes() -> int:
    """Of a core's second-level cache."""
    try:
        said = _CACHE_SIZE.read_text().strip()
        return int(said.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(said[-1], 1)
    except (OSError, ValueError):
        return _CACHE_BYTES


# -------------------------------------------------------------------------------------------------- building


def _built(target: Any, processor: Processor, pool: Array, folder: Path) -> Iterator[_Timed]:
    from tyir.backends.host.step import Program
    from tyir.backends.host.tvm_host import assign_kernels, build_library
    from tyir.runtime_sim.session.host_runtime import CompiledStep, HostLibrary

    for number, point in enumerate(points(("int16", "int8", "fp32"))):
        function, weights = function_of(point)
        program = Program((function,), weights)
        path = folder / f"{number}.so"
        own = replace(target, activations=point.activations)
        build_library(assign_kernels([function]), own, path, program)
        library = HostLibrary(path)
        kinds = [tensor_type(a) for a in function.args]
        arrays = [_filled(kind) for kind in kinds]
        layouts = [(a.shape, a.dtype) for a in arrays]
        step = CompiledStep(
            library.function("step"),
            layouts,
            _stored([kind for _, kind in weights], pool),
            _aligned(program.workspace_bytes),
        )
        ints = [a for a in arrays if a.dtype == np.int32]

        def place(position: int, ints: Sequence[Array] = ints) -> None:
            for array in ints:
                array[...] = position

        works = {p: work_of(point.op(), p, point.activations, processor) for p in point.positions}
        run = _calling(step, arrays)
        yield _Timed(point, works, run, place, point.copies())


def _calling(step: Callable[[Sequence[Array]], None], arrays: Sequence[Array]) -> Callable[[], None]:
    return lambda: step(arrays)


def _filled(kind: TensorType) -> Array:
    array = np.zeros(packed_shape(kind), storage_dtype(kind.element))
    if array.dtype != np.int32:
        array.view(np.uint8)[...] = _PATTERN
    return array


def _stored(kinds: Sequence[TensorType], pool: Array) -> list[Array]:
    """Tensors one after the other, as in a file."""
    made, offset = [], 0
    for kind in kinds:
        shape, dtype = packed_shape(kind), storage_dtype(kind.element)
        size = int(np.prod(shape)) * dtype.itemsize
        if offset + size > pool.size:
            offset = 0
        made.append(pool[offset : offset + size].view(dtype).reshape(shape))
        offset += -(-size // 64) * 64
    return made


def _aligned(size: int) -> Array:
    space = np.zeros(size + 64, np.uint8)
    first = -int(space.__array_interface__["data"][0]) % 64
    return space[first : first + size]


# ------------------------------------------------------------------------------------------------- measuring


def _measure(timed: Sequence[_Timed], most: int, clock: Callable[[], float]) -> None:
    """All in turn, round by round, so that what disturbs meets all of them; on one thread, then on all."""
    from tyir.runtime_sim.session.host_runtime import use_threads

    for threads in (1, most) if most > 1 else (1,):
        chosen = [t for t in timed if threads == 1 or t.point.threaded]

        def rounds(threads: int = threads, chosen: Sequence[_Timed] = chosen) -> None:
            use_threads(threads)
            for _ in range(_ROUNDS):
                for one in chosen:
                    for position in one.point.positions:
                        one.measure(position, threads, clock)

        with ThreadPoolExecutor(1) as pool:  # each has threads of its own for its kernels
            pool.submit(rounds).result()


def _meeting(target: Any, folder: Path, clock: Callable[[], float]) -> Mapping[str, float]:
    """Four dies that do nothing but meet, in a row of collectives of one size, and of another."""
    from tyir.backends.host.step import Program
    from tyir.backends.host.tvm_host import assign_kernels, build_library
    from tyir.runtime_sim.session.host_runtime import HostLibrary
    from tyir.runtime_sim.session.host_steps import DieCode, Workers, steps_of

    dies, times = 4, 24
    rows: list[tuple[dict[str, float], float]] = []
    for size in (1280, 96 * 1280):
        kind = TensorType((1, size), f16)
        function = Func.make("main", [kind])
        for _ in range(times):
            function.body.append(dist.AllReduce(function.args[0], result_types=[kind]))
        function.body.append(Return(values=()))
        program, path = Program((function,), ()), folder / f"meeting{size}.so"
        build_library(assign_kernels([function]), target, path, program)
        info = TensorInfo("x", (1, size), "f16")
        names = ("main", "main.so", "main.edge10", "main.ir", "main.params", "common.params")
        codes = [
            DieCode(DieProgram(die, 1, *names, (info,), ()), HostLibrary(path), (function,), ())
            for die in range(dies)
        ]
        steps = steps_of(codes, Workers(1, dies), OneProcess(dies))
        given = [[_filled(kind)] for _ in range(dies)]
        steps.begin(given)()
        seconds = []
        for _ in range(_ROUNDS * 3):
            start = clock()
            for _ in range(10):
                steps.begin(given)()
            seconds.append((clock() - start) / 10 / times / dies)
        rows.append(({"call": 1, "element": size}, 1e9 * statistics.median(seconds)))
    return {f"meeting.{what}_ns": value for what, value in least_squares(rows).items()}


def _step(clock: Callable[[], float]) -> Mapping[str, float]:
    """What a step takes in Python: looking at its inputs, and at each of its tensors."""
    rows: list[tuple[dict[str, float], float]] = []
    for layers in (4, 60):
        caches = [TensorInfo(f"{what}{n}", (1, 2, 16, 8), "f16") for n in range(layers) for what in "kv"]
        inputs = (TensorInfo("ids", (1, 1), "i32"), TensorInfo("pos", (1,), "i32"), *caches)
        outputs = (
            TensorInfo("logits", (1, 1, 8), "f32"),
            *(replace(c, alias=2 + n) for n, c in enumerate(caches)),
        )
        program = DieProgram(
            0, 1, "main", "m.so", "m.edge10", "m.ir", "m.params", "c.params", inputs, outputs
        )
        held = {t.name: np.zeros(t.shape, t.storage_dtype) for t in inputs}
        given = {n: held[n] for n in ("ids", "pos")}
        seconds = []
        for _ in range(_ROUNDS):
            start = clock()
            for _ in range(50):
                check_inputs(program, given)
                known = cache_inputs(program)
                taken = [held[t.name] if i in known else given[t.name] for i, t in enumerate(inputs)]
                for info, array in zip(inputs, taken, strict=True):
                    assert array.shape == info.shape
            seconds.append((clock() - start) / 50)
        rows.append(({"call": 1, "tensor": len(inputs) + 1}, 1e6 * statistics.median(seconds)))
    return {f"step.{what}_us": value for what, value in least_squares(rows).items()}


# --------------------------------------------------------------------------------------------------- solving


def _constants(timed: Sequence[_Timed], most: int) -> Mapping[str, float]:
    found: dict[str, float] = {}
    for kind in sections_of_kernels():
        own = [t for t in timed if t.point.kind == kind]
        if not own:
            continue
        rows = [(_counts(t, t.work[p]), t.ns(p)) for t in own for p in t.point.positions]
        names = list(dict.fromkeys(n for counts, _ in rows for n in counts))
        solved = least_squares(rows)
        for name in names:
            what = "_byte_ns" if name in FOOTPRINTS else "_ns"
            found[f"{kind}.{name}{what}"] = solved[name]
    start = _start_ns(timed, most)
    found["parallel.start_us"] = start * 1e-3
    for kind in sections_of_kernels():
        if kind != "meeting":
            own = [t for t in timed if t.point.kind == kind and t.point.threaded]
            found[f"{kind}.speedup"] = _speedup(own, most, start)
    return found


def _counts(timed: _Timed, work: Work) -> dict[str, float]:
    """A kernel's counts, its bytes by their footprint."""
    counts = dict(work.counts)
    if "byte" in counts:
        label = min(FOOTPRINTS, key=lambda n: abs(np.log(FOOTPRINTS[n] / timed.point.footprint)))
        counts[label] = counts.pop("byte")
    return {n: v for n, v in counts.items() if v}


def _start_ns(timed: Sequence[_Timed], most: int) -> float:
    """What all threads take beyond their share, of the row-wise kernels that take least."""
    if most == 1:
        return 0.0
    small = [t for t in timed if t.point.threaded and t.point.kind in ("elementwise", "norm", "rope")]
    beyond = [t.ns(p, most) - t.ns(p) / most for t in small for p in t.point.positions]
    return max(0.0, statistics.median(beyond))


def _speedup(timed: Sequence[_Timed], most: int, start: float) -> float:
    if most == 1:
        return 1.0
    found = []
    for one in timed:
        for p in one.point.positions:
            work, both = one.work[p], one.ns(p, most)
            if work.operations and both > 2 * start:
                found.append(one.ns(p) * work.shared(most) / (both - start))
    return min(float(most), max(1.0, statistics.median(found))) if found else 1.0
