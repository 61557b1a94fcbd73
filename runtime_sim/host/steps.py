"""A step of the host's code as the sum of its kernels: those that a die's IR names, which is what the tables of its
library call.  Nothing is fitted here.

Dies of one process take turns: with T threads and D dies, as many threads as divide both take their dies through the
step side by side, and each has its part of T for the kernels of these.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

from tyir.diagnostics import TyirError
from tyir.dialects.func import Call, Func, Return
from tyir.dialects.ty import Constant, GetGlobal, Reshape
from tyir.execution.artifacts import Artifacts
from tyir.execution.meetings import workers_of
from tyir.execution.optional_tail import optional_tail
from tyir.ir import Op
from tyir.parser import parse_bytes
from tyir.runtime_sim.host.kernels import Work, work_of
from tyir.runtime_sim.host.machine import HostMachine
from tyir.runtime_sim.session.chunks import plan_chunks
from tyir.traits import Collective

__all__ = ["HostPrediction", "HostPredictor", "Part", "StepTime", "executed", "kernel_ns", "predict_step"]

_NO_KERNEL = (Call, Return, Reshape, GetGlobal, Constant)


@dataclass(frozen=True)
class Part:
    """All kernels of a kind in a step."""

    kind: Annotated[str, "of kernels: a section of the processor's file; step: the call of the step"]
    kernels: Annotated[int, "how many are called, of all dies"]
    ms: Annotated[float, "of the step's time"]


@dataclass(frozen=True)
class StepTime:
    """One step of the host's code, predicted."""

    tokens: Annotated[int, "of the step"]
    pos: Annotated[int, "tokens before it"]
    ms: Annotated[float, "its time"]
    read_bytes: Annotated[int, "weights and caches that it reads"]
    parts: Annotated[tuple[Part, ...], "by kind of kernel, the longest first"]


@dataclass(frozen=True)
class HostPrediction:
    """`--machine` with the file of a processor: what the compiled host code takes there."""

    artifacts: str
    machine: str
    clock: Annotated[str, "by which the processor was measured: wall or processor"]
    threads: int
    activations: Annotated[str, "what 4-bit weights are multiplied with"]
    overrides: Annotated[dict[str, float], "constants that --set has changed"]
    prompt_tokens: int
    pos: int
    ttft_ms: float
    tpot_ms: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_step: StepTime
    prefill_step: StepTime


def executed(functions: Sequence[Func], *, wanted: bool = True) -> Iterator[Op]:
    """The ops of a die's step that are kernels or meetings, as often as it comes to them; the entry is the
    last of the functions.  `wanted`: whether a row of its results is.
    """
    by_name = {str(f.sym_name): f for f in functions}

    def inside(function: Func, left_out: Sequence[Op]) -> Iterator[Op]:
        for op in function.body:
            if isinstance(op, Call):
                yield from inside(by_name[op.callee.leaf], ())
            elif not isinstance(op, _NO_KERNEL) and op not in left_out:
                yield op

    entry = functions[-1]
    return inside(entry, () if wanted else optional_tail(entry))


def kernel_ns(machine: HostMachine, work: Work, footprint: float, workers: int, inner: int) -> float:
    """A kernel's time in ns on `inner` threads while as many work on each of other dies, `workers` in all, in
    a step that reads `footprint` bytes.
    """
    section, total = machine.kernels[work.kind], 0.0
    for loop in work.loops:
        threads = loop.threads(inner, machine.parallel.least_operations)
        working = workers * threads
        alone = sum(n * float(getattr(section, f"{what}_ns")) for what, n in loop.counts.items())
        memory = machine.read_ns(workers * loop.read_bytes, footprint, working)
        waited = memory * float(getattr(section, "wait_share", 0))
        total += max(alone * loop.share(threads) * machine.beside(working) + waited, memory)
        if threads > 1:
            total += 1e3 * machine.parallel.start_us
    return total


def predict_step(
    dies: Sequence[Sequence[Func]],
    machine: HostMachine,
    *,
    tokens: int,
    position: int,
    activations: str,
    threads: int = 1,
    stages: int = 1,
    tensors: int = 0,
    wanted: bool = True,
) -> StepTime:
    """One step of so many tokens at a position, of dies in one process, each with its functions, entry last.

    `stages` of a pipeline work one after the other; `tensors`: inputs and outputs of all dies.  `TyirError`
    for a kernel without a model, and for more threads than were measured.
    """
    machine.beside(threads)
    each = [
        [(op, work_of(op, position, activations, machine.processor)) for op in executed(f, wanted=wanted)]
        for f in dies
    ]
    read = sum(w.read_bytes for works in each for _, w in works)
    side_by_side = workers_of(threads, len(dies), stages)
    inner = threads // side_by_side
    times: dict[str, tuple[int, float]] = {}
    for works in each:
        for op, work in works:
            ns = kernel_ns(machine, work, read, side_by_side, inner) / side_by_side
            if op.has_trait(Collective) and len(dies) == 1:
                ns = 0.0
            count, total = times.get(work.kind, (0, 0.0))
            times[work.kind] = count + 1, total + ns
    call = 1e3 * (machine.step.call_us + tensors * machine.step.tensor_us)
    parts = [Part(kind, count, ns * 1e-6) for kind, (count, ns) in times.items()]
    parts.append(Part("step", 1, call * 1e-6))
    total = call + sum(ns for _, ns in times.values())
    return StepTime(tokens, position, total * 1e-6, round(read), tuple(sorted(parts, key=lambda p: -p.ms)))


class HostPredictor:
    """Times of compiled artifacts on a processor, from the IR beside their libraries."""

    def __init__(self, artifacts: Artifacts, machine: HostMachine, threads: int) -> None:
        """`TyirError` for more threads than were measured."""
        self.artifacts, self.machine, self.threads = artifacts, machine, threads
        self.options = artifacts.manifest.options
        self.activations = str(artifacts.manifest.build["host"]["activations"])
        self._dies: dict[int, tuple[list[list[Func]], int]] = {}
        machine.beside(threads)

    def step(self, tokens: int, position: int, *, wanted: bool = True) -> StepTime:
        """A step of a compiled length."""
        dies, tensors = self._functions(tokens)
        return predict_step(
            dies,
            self.machine,
            tokens=tokens,
            position=position,
            activations=self.activations,
            threads=self.threads,
            stages=self.options.pp,
            tensors=tensors,
            wanted=wanted,
        )

    def prompt_ms(self, tokens: int) -> float:
        """A prompt, in the compiled lengths; of chunks before the last no row is wanted."""
        chunks = list(plan_chunks(tokens, 0, self.options.seqlens, self.options.max_kv))
        return sum(self.step(c.seqlen, c.start, wanted=c is chunks[-1]).ms for c in chunks)

    def _functions(self, tokens: int) -> tuple[list[list[Func]], int]:
        """Of each die, and how many inputs and outputs they have."""
        if tokens not in self._dies:
            manifest = self.artifacts.manifest
            dies, tensors = [], 0
            for die in range(self.options.dies):
                program = manifest.program(die, tokens)
                path = self.artifacts.path / program.ir
                module = parse_bytes(self.artifacts.read(program.ir), str(path))
                dies.append([op for op in module.body if isinstance(op, Func)])
                tensors += len(program.inputs) + sum(o.alias is None for o in program.outputs)
            if not all(dies):
                raise TyirError(f"{self.artifacts.path} has a die without a function")
            self._dies[tokens] = dies, tensors
        return self._dies[tokens]
