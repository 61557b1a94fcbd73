"""Measures the constants of this computer's processor for `tyir.runtime_sim.host`: builds libraries of the points'
kernels as a compile does, times them in turn, and solves for what one of each thing takes.
"""  # noqa: E501

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields, replace
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
    by_footprint,
    host_machine,
    sections_of_kernels,
)
from tyir.runtime_sim.session.program_engine import check_inputs
from tyir.targets.constants import Constant
from tyir.tools.sim.host_fit import least_squares
from tyir.tools.sim.host_points import Point, function_of, points
from tyir.types import TensorType, f16, storage_dtype

__all__ = ["Timed", "constants_of", "probe"]

Array = npt.NDArray[Any]
_PATTERN: Final = 0x2C  # a byte of everything: f16 0.065, codes of 12 and 2, i8 44
_ROUNDS: Final = 24
_BLOCKS: Final = 3  # of rounds, between which kernels on one thread and on all take turns
_CACHE_SIZE: Final = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
_CACHE_BYTES: Final = 1 << 20  # where the system does not say
_SETTLE: Final = 2.0  # seconds
_LEAST: Final = 2e-3  # seconds that a measurement takes at least: a pass is repeated until it does


@dataclass
class Timed:
    """A point, built; `seconds` of one kernel by position and threads, one for each round."""

    point: Point
    work: dict[int, Work]
    run: Callable[[], None]
    place: Callable[[int], None]
    copies: int
    seconds: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    repeats: dict[tuple[int, int], int] = field(default_factory=dict)

    def ns(self, position: int, threads: int = 1) -> float:
        """What the quickest quarter of the rounds take at most."""
        return 1e9 * _undisturbed(self.seconds[position, threads])

    def quickest_ns(self, position: int, threads: int) -> float:
        """The quickest round: of several threads the one in which they had most of the cores they need."""
        return 1e9 * min(self.seconds[position, threads])

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


def _undisturbed(seconds: Sequence[float]) -> float:
    """Of several times what the quickest quarter take at most: others that use the same cores, of this
    computer or of another virtual one, only add to them, and do for seconds.
    """
    return float(np.quantile(seconds, 0.25))


def probe(name: str, clock: str, threads: int | None, report: Callable[[str], None]) -> HostMachine:
    """This computer with 1 to `threads` threads (all cores), by the wall's `clock` or the processor's, which
    counts one thread.  Takes more than a minute; `report` is told of its parts.

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
        f"measured on {target.mcpu}, the quickest quarter of {_ROUNDS - 1} rounds"
        f" by the {'wall' if clock == 'wall' else 'processor'}'s clock"
    )
    found: dict[str, float] = {
        **{f"processor.{what}": value for what, value in asdict(processor).items()},
        "parallel.least_operations": decided.WORTH_THREADS,
    }
    with tempfile.TemporaryDirectory(prefix="tyir-probe-") as folder:
        report("building kernels")
        pool = np.full(max(FOOTPRINTS.values()) + (64 << 20), _PATTERN, np.uint8)
        timed = [*_built(target, processor, pool, Path(folder))]
        report(f"measuring {len(timed)} kernels")
        _measure(timed, most, now)
        found.update(_meeting(target, Path(folder), now))
    found.update(_step(now))
    found.update(constants_of(timed, processor, decided.WORTH_THREADS))
    return host_machine(name, clock, {n: Constant(v, "fitted", source) for n, v in found.items()})


def _cache_bytes() -> int:
    """Of a core's second-level cache."""
    try:
        said = _CACHE_SIZE.read_text().strip()
        return int(said.rstrip("KM")) * {"K": 1 << 10, "M": 1 << 20}.get(said[-1], 1)
    except (OSError, ValueError):
        return _CACHE_BYTES


# -------------------------------------------------------------------------------------------------- building


def _built(target: Any, processor: Processor, pool: Array, folder: Path) -> Iterator[Timed]:
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
        yield Timed(point, works, run, place, point.copies())


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


def _measure(timed: Sequence[Timed], most: int, clock: Callable[[], float]) -> None:
    """All in turn, round by round, so that what disturbs meets all of them: some rounds of the kernels on one
    thread, some of what threads are asked about, each on one and on all, and so on.

    A virtual processor that was idle may share a core with another one for a second or so, until its host
    moves it: all threads work for longer before they are measured.
    """
    from tyir.runtime_sim.session.host_runtime import use_threads

    kernels = [one for one in timed if not one.point.about]
    about_threads = [one for one in timed if one.point.about]
    with ThreadPoolExecutor(1) as alone, ThreadPoolExecutor(1) as all_of_them:
        pools = {most: all_of_them, 1: alone}  # each thread has threads of its own for its kernels
        for threads, pool in pools.items():
            pool.submit(use_threads, threads).result()

        def measure(one: Timed, threads: int) -> None:
            for position in one.point.positions:
                one.measure(position, threads, clock)

        for _ in range(_BLOCKS):
            for _ in range(_ROUNDS // _BLOCKS):
                for one in kernels:
                    alone.submit(measure, one, 1).result()
            if most > 1:
                all_of_them.submit(_busy, about_threads).result()
            for _ in range(_ROUNDS // _BLOCKS):
                for one in about_threads:
                    for threads in sorted(pools):
                        pools[threads].submit(measure, one, threads).result()


def _busy(timed: Sequence[Timed]) -> None:
    """Has the threads work for some seconds."""
    end = time.perf_counter() + _SETTLE
    while time.perf_counter() < end:
        for one in timed:
            one.run()


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
        for _ in range(_ROUNDS):
            start = clock()
            for _ in range(10):
                steps.begin(given)()
            seconds.append((clock() - start) / 10 / times / dies)
        rows.append(({"call": 1, "element": size}, 1e9 * _undisturbed(seconds)))
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
        rows.append(({"call": 1, "tensor": len(inputs) + 1}, 1e6 * _undisturbed(seconds)))
    return {f"step.{what}_us": value for what, value in least_squares(rows).items()}


# --------------------------------------------------------------------------------------------------- solving


def constants_of(timed: Sequence[Timed], processor: Processor, least: int) -> Mapping[str, float]:
    """Those of kinds of kernels that were timed, of memory and of threads; loops of `least` operations have
    several.
    """
    most = processor.threads
    start = _start_ns([one for one in timed if one.point.about == "start"], most)
    beside = _beside([one for one in timed if one.point.about == "beside"], most, least, start)
    found = {"parallel.start_us": 1e-3 * start, "parallel.beside": beside}
    (first,) = (one for one in timed if one.point.about == "first")
    found.update(_memory([one for one in timed if one.point.about == "memory"], first, most, start))
    for kind in sections_of_kernels():
        own = [one for one in timed if one.point.kind == kind and one.point.about in ("", "beside", "memory")]
        rows = [(_counts(one, p, processor, found), one.ns(p)) for one in own for p in one.point.positions]
        if rows:
            solved = least_squares(rows)
            found.update((f"{kind}.{name}", value) for name, value in solved.items())
    return found


def _counts(
    timed: Timed, position: int, processor: Processor, memory: Mapping[str, float]
) -> dict[str, float]:
    """How many a kernel has of each constant of its section; `wait_share`'s is memory's time."""
    work = timed.work[position]
    counts = {f"{what}_ns": count for what, count in work.counts.items() if count}
    if "wait_share" in {f.name for f in fields(sections_of_kernels()[work.kind])}:
        shares = by_footprint(timed.copies * work.read_bytes, processor.cache_bytes)
        byte = sum(part * memory[f"memory.{label}_one_thread_byte_ns"] for label, part in shares.items())
        if byte:
            counts["wait_share"] = memory["memory.first_ns"] + work.read_bytes * byte
    return counts


def _start_ns(timed: Sequence[Timed], most: int) -> float:
    """What all threads take for loops over empty caches, beyond the part of the busiest."""
    found = [
        one.quickest_ns(p, most) - one.quickest_ns(p, 1) * one.work[p].loops[0].share(most)
        for one in timed
        for p in one.point.positions
    ]
    return max(0.0, statistics.median(found)) if most > 1 else 0.0


def _beside(timed: Sequence[Timed], most: int, least: int, start: float) -> float:
    """How many times longer than its share all threads take for kernels that compute, each on a core of its
    own: virtual processors that share one for a while take half as long again, so that quickest rounds count.
    """
    found = []
    for one in timed:
        for p in one.point.positions:
            loops = [loop for loop in one.work[p].loops if loop.threads(most, least) > 1]
            share = loops[-1].share(most) if loops else 1.0
            together = one.quickest_ns(p, most) - start * len(loops)
            found.append(together / (one.quickest_ns(p, 1) * share))
    return max(1.0, statistics.median(found)) if most > 1 else 1.0


def _memory(timed: Sequence[Timed], small: Timed, most: int, start: float) -> Mapping[str, float]:
    """Of kernels that do little but wait for memory: of a large weight what each byte of it takes, of a small
    one what passes before.
    """
    found: dict[str, float] = {}
    labels = {size: label for label, size in FOOTPRINTS.items()}
    size, before = small.work[0].read_bytes, 0.0
    for _ in range(3):  # which each is of the other a small part
        for one in timed:
            label, read = labels[one.point.footprint], one.work[0].read_bytes
            found[f"memory.{label}_one_thread_byte_ns"] = (one.ns(0) - before) / read
            together = one.quickest_ns(0, most) if most > 1 else one.ns(0)
            found[f"memory.{label}_all_threads_byte_ns"] = (together - before - start) / read
        label = labels[small.point.footprint]
        before = max(0.0, small.ns(0) - size * found[f"memory.{label}_one_thread_byte_ns"])
    return {**found, "memory.first_ns": before}
