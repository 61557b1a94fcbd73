"""Which schedule a processor is fastest with, measured on the model's own products: `tyir-compile --tune SECONDS`.

    schedule = tuned(functions, target, seconds)

The products that read the most weights for one token are compiled with one setting of the schedule changed at a time.
Each runs in turn with the best so far, on more weights than the caches hold; what is faster in nearly all rounds is the
best from then on, until no change is or the seconds are over.  Results are the same bits with every schedule, so that
only speed hangs on what else the processor did meanwhile; it is recorded in the manifest (`build.host.schedule`).
"""  # noqa: E501

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import tvm
from tvm_ffi import get_global_func, load_module

from tyir.backends.host.kernels.streams import Schedule
from tyir.backends.host.names import assign_kernels
from tyir.backends.host.tvm_host import HostTarget, build_library, detected_cpu
from tyir.diagnostics import TyirError
from tyir.dialects.func import Func
from tyir.dialects.ty import Linear, QuantizedLinear, tensor_type
from tyir.execution.storage import packed_shape
from tyir.ir import Op
from tyir.process.cores import usable_cores
from tyir.types import storage_dtype

__all__ = ["candidates", "fastest", "tuned"]

_PRODUCTS: Final = 2  # that are measured
_COLD: Final = 128 << 20  # bytes of weights of each, at least: what a core's caches do not hold
_ROUNDS: Final = 9
_WINS: Final = 8  # of these, for a change to be taken
_MANY_REGISTERS: Final = 32
_SHARE_ALL_CORES: Final = -3  # tvm::runtime::threading::ThreadGroup::AffinityMode::kSpecifyThreadShareAllCore


def candidates(schedule: Schedule, wide: bool) -> Iterator[Schedule]:
    """Schedules that differ from one in a single setting; `wide`: of a processor with 32 registers, which
    reads 8 rows side by side by itself, others 4.
    """
    yield replace(schedule, streams=4 if wide else 2)
    for block in (1 << 16, 1 << 18, 1 << 19, 1 << 20, 1 << 22):
        yield replace(schedule, block_bytes=block)


def tuned(
    functions: Sequence[Func], target: HostTarget, seconds: float, say: Callable[[str], None]
) -> Schedule:
    """The best schedule that so many seconds find for the products of these functions.

    `TyirError` where the target is another processor than this one.
    """
    if target.mcpu != detected_cpu():
        raise TyirError(
            f"--tune measures on this processor, {detected_cpu()}; the code is for {target.mcpu}",
            help="leave --tune or --mcpu out",
        )
    if seconds <= 0:
        raise TyirError(f"--tune {seconds:g} leaves no time to measure", help="give 10 seconds or more")
    products = _largest(functions)
    if not products:
        say("no product of one token reads weights: there is nothing to tune")
        return target.schedule
    cores = sorted(os.sched_getaffinity(0))
    get_global_func("runtime.config_threadpool")(_SHARE_ALL_CORES, usable_cores(), [str(c) for c in cores])
    assign_kernels(functions)
    wide = target.cpu().registers >= _MANY_REGISTERS
    with tempfile.TemporaryDirectory(prefix="tyir-tune-") as folder:
        trial = _Trial(products, target, Path(folder))
        best, gain = fastest(target.schedule, lambda s: candidates(s, wide), trial.made, seconds)
    say(f"tuned: {best}, {100 * gain:.0f} % faster than the default on {len(products)} products of one token")
    return best


Run = Callable[[], float]  # gives seconds


def fastest(
    default: Schedule,
    near: Callable[[Schedule], Iterable[Schedule]],
    made: Callable[[Schedule], Run],
    seconds: float,
) -> tuple[Schedule, float]:
    """The best of what is `near` the default, then near that and so on, and by which share it is faster."""
    ends = time.perf_counter() + seconds
    best, first = default, made(default)
    run, tried = first, {default}
    while time.perf_counter() < ends:
        schedule = next((s for s in near(best) if s not in tried), None)
        if schedule is None:
            break
        tried.add(schedule)
        other = made(schedule)
        if sum(before > now for before, now in _in_turn(run, other)) >= _WINS:
            best, run = schedule, other
    if run is first:
        return best, 0.0
    return best, float(np.median([before / now for before, now in _in_turn(first, run)])) - 1


def _in_turn(first: Run, second: Run) -> list[tuple[float, float]]:
    return [(first(), second()) for _ in range(_ROUNDS)]


class _Trial:
    """Products with weights of random numbers, whatever schedule they are compiled with."""

    def __init__(self, products: Sequence[Op], target: HostTarget, folder: Path) -> None:
        self.target, self.folder = target, folder
        self.products = {str(op.attributes["tyir.kernel"].value): op for op in products}
        rng = np.random.default_rng(0)
        self.given = {name: [*_operands(op, rng)] for name, op in self.products.items()}
        self.count = 0

    def made(self, schedule: Schedule) -> Run:
        """Runs every product on all of its weights."""
        self.count += 1
        path = self.folder / f"{self.count}.so"
        build_library(self.products, replace(self.target, schedule=schedule), path)
        module = load_module(str(path))
        calls = [(module[name], tensors) for name, sets in self.given.items() for tensors in sets]

        def run() -> float:
            began = time.perf_counter()
            for function, tensors in calls:
                function(*tensors)
            return time.perf_counter() - began

        run()  # threads and pages
        return run


def _largest(functions: Sequence[Func]) -> list[Op]:
    """One product of one row for each shape, those that read most."""
    found: dict[str, Op] = {}
    for function in functions:
        for op in (*function.walk_type(QuantizedLinear), *function.walk_type(Linear)):
            x, out = (tensor_type(v) for v in (op.operands[0], op.results[0]))
            if x.is_static and x.size == x.static_shape[-1]:
                found.setdefault(f"{op.name} {x} {tensor_type(op.operands[1])} {out} {op.properties}", op)
    return sorted(found.values(), key=lambda op: -_bytes_of(op))[:_PRODUCTS]


def _bytes_of(op: Op) -> int:
    return sum(int(np.prod(packed_shape(t))) * storage_dtype(t.element).itemsize for t in _types(op)[1:-1])


def _types(op: Op) -> list[Any]:
    return [tensor_type(v) for v in (*op.operands, *op.results)]


def _operands(op: Op, rng: np.random.Generator) -> Iterator[list[Any]]:
    """Tensors of a product, several times: operands of random bytes that are numbers, and its result."""
    for _ in range(max(2, -(-_COLD // _bytes_of(op)))):
        tensors = []
        for t in _types(op):
            shape, dtype = packed_shape(t), storage_dtype(t.element)
            if dtype.kind == "f":
                data = rng.random(shape, np.float32).astype(dtype)
            else:
                data = rng.integers(0, 100, shape).astype(dtype)
            tensors.append(tvm.runtime.tensor(data))
        yield tensors
