"""The engine `host`: a step is compiled code for each die (`host_steps.py` says in which threads).

With a probe, which wants to see every op, the programs are walked op by op instead, through the same kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.artifacts.consistency import cache_inputs
from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.execution.lockstep import Links
from tyir.manifest import TensorInfo
from tyir.process.cores import usable_cores
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.host_runtime import check_threads
from tyir.runtime_sim.session.host_steps import DieCode, HostSteps, NoThread, Workers, layout_of, steps_of
from tyir.runtime_sim.session.program_engine import CacheName, ProgramEngine, StepProbe, check_inputs

__all__ = ["HostEngine"]

Array = npt.NDArray[Any]


def _threads() -> int:
    """The cores that this process may use, or fewer where the environment says so."""
    asked = os.environ.get("TVM_NUM_THREADS", "")
    cores = usable_cores()
    return min(cores, int(asked)) if asked.isdecimal() and int(asked) else cores


class HostEngine(ProgramEngine):
    """Compiled dies, side by side."""

    def __init__(
        self,
        artifacts: Artifacts,
        *,
        probe: StepProbe | None = None,
        threads: int | None = None,
        links: Links | None = None,
    ) -> None:
        """`threads`: all that run at once, None for the cores that this process may use.  `links`: which dies
        run here, None for all.

        `TyirError` for more than there are cores.
        """
        if threads is not None:
            check_threads(threads)
        super().__init__(artifacts, compiled=True, probe=probe, links=links)
        options = self.manifest.options
        stages = {die * options.pp // options.dies for die in self.links.dies}
        count = _threads() if threads is None else threads
        self._workers = Workers(count, len(self.links.dies), len(stages))
        self._steps: dict[int, tuple[Sequence[DieCode], HostSteps]] = {}  # by length
        self._walks = False

    def reset(self) -> None:
        """Forget the caches."""
        super().reset()
        self._forget()

    def load_caches(self, caches: dict[CacheName, Array]) -> None:
        """Take over caches as `caches` gave them, those of this process's dies."""
        super().load_caches(caches)
        self._forget()

    def _forget(self) -> None:
        self._workers.idle()
        for _, steps in self._steps.values():
            for call in steps.calls:
                call.forget()

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> dict[str, Array]:
        """One step; the first die's outputs by name, each [1, seqlen, ...]."""
        return self.begin(inputs, chunk)()

    def begin(self, inputs: dict[str, Array], chunk: Chunk) -> Callable[[], dict[str, Array]]:
        """Begin a step behind those that were begun before; what is returned waits for its end.

        Dies in threads of their own take it up as soon as they are done with their part of those before, and
        meet the others in each step by itself: stages of a pipeline work on several steps at a time, with the
        same bits.
        """
        if self.probe is not None or self._walks:
            return self._walked(inputs, chunk)
        codes, steps = self._loaded(chunk.seqlen)
        given: list[list[Array]] = []
        made: list[dict[str, Array]] = []
        for code in codes:
            program = code.program
            check_inputs(program, inputs)
            caches = cache_inputs(program)
            own = {
                t.name: made[0][t.name] if made and t.name in steps.common else np.empty(*layout_of(t))
                for t in program.outputs
                if t.alias is None
            }
            taken = [
                self._cache(program.die, t) if i in caches else _taken(inputs[t.name], t)
                for i, t in enumerate(program.inputs)
            ]
            given.append([*taken, *own.values()])
            made.append(own)
        try:
            end = steps.begin(given)
        except BaseException as error:
            self._steps.pop(chunk.seqlen, None)  # where dies meet is as they left it
            if not isinstance(error, NoThread):
                raise
            self._walks = True  # the dies can still be walked side by side in this thread
            return self._walked(inputs, chunk)
        return _Begun(end, made[0])

    def _walked(self, inputs: dict[str, Array], chunk: Chunk) -> Callable[[], dict[str, Array]]:
        """A step op by op, when those before it have ended."""
        self._workers.idle()
        return super().begin(inputs, chunk)

    def _loaded(self, seqlen: int) -> tuple[Sequence[DieCode], HostSteps]:
        if seqlen not in self._steps:
            programs = [self.manifest.program(die, seqlen) for die in self.links.dies]
            codes = [
                DieCode.of(p, self._programs.library(p), self._programs.interpreter(p)) for p in programs
            ]
            self._steps[seqlen] = codes, steps_of(codes, self._workers, self.links)
        return self._steps[seqlen]


@dataclass(frozen=True, eq=False)
class _Begun:
    """A step under way: what waits for its end, and the first die's outputs by name."""

    end: Callable[[], None]
    outputs: dict[str, Array]

    def __call__(self) -> dict[str, Array]:
        """Wait for its end; raises what a die has failed of."""
        self.end()
        return self.outputs


def _taken(array: Array, info: TensorInfo) -> Array:
    """An input as a step takes it; `TyirError` for one of another shape."""
    if array.shape != info.shape:
        raise TyirError(f"{info.name} {list(array.shape)} is given, the program takes {list(info.shape)}")
    return np.ascontiguousarray(array, info.storage_dtype)
