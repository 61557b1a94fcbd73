"""The session engines that walk the dies' IR, op by op.

Ops are executed by compiled kernels or by their reference meaning.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tyir.artifacts.consistency import cache_inputs
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call, Func
from tyir.execution.artifacts import Artifacts
from tyir.execution.lockstep import Links, OneProcess
from tyir.execution.optional_tail import optional_tail, rows_wanted
from tyir.interpreter import Interpreter, run_lockstep
from tyir.ir import Op
from tyir.manifest import DieProgram, TensorInfo
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.die_programs import DiePrograms

__all__ = ["CacheName", "ProgramEngine", "StepProbe", "check_inputs"]

Array = npt.NDArray[Any]
CacheName = tuple[int, str]  # die and argument name: (0, "k3")


class StepProbe(Protocol):
    """Sees every op of every die: the chunk, the die, and what `tyir.interpreter.Probe` sees."""

    def __call__(
        self, chunk: Chunk, die: int, stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]
    ) -> None: ...


def check_inputs(program: DieProgram, given: Collection[str]) -> None:
    """`TyirError` unless a step is given exactly what its program takes besides the caches."""
    caches = cache_inputs(program)
    wanted = [t.name for i, t in enumerate(program.inputs) if i not in caches]
    missing, unknown = [n for n in wanted if n not in given], [n for n in given if n not in wanted]
    if missing or unknown:
        both = [
            f"{what} {', '.join(names)}" for what, names in (("lacks", missing), ("has", unknown)) if names
        ]
        raise TyirError(
            f"the program of die {program.die} takes {', '.join(wanted)}: the step {' and '.join(both)}",
            help="the manifest and the programs are of different builds; compile the model again",
        )


class ProgramEngine:
    """The dies of this process at all lengths; a die's programs share weights and caches."""

    def __init__(
        self,
        artifacts: Artifacts,
        *,
        compiled: bool,
        probe: StepProbe | None = None,
        links: Links | None = None,
    ) -> None:
        """`links`: which dies run here, None for all."""
        self.artifacts = artifacts
        self.manifest = artifacts.manifest
        self.compiled = compiled
        self.probe = probe
        self.links = links or OneProcess(self.manifest.options.dies)
        self._programs = DiePrograms(artifacts, compiled=compiled)
        self._caches: dict[CacheName, Array] = {}

    def reset(self) -> None:
        """Forget the caches."""
        self._caches.clear()

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> dict[str, Array]:
        """One step; the first die's outputs by name, each [1, seqlen, ...]."""
        programs = {die: self.manifest.program(die, chunk.seqlen) for die in self.links.dies}
        runs = []
        for die, program in programs.items():
            interpreter = self._programs.interpreter(program)
            self._watch(interpreter, die, chunk)
            main = interpreter.module.lookup(program.function)
            assert isinstance(main, Func)
            interpreter.skipped = frozenset(() if rows_wanted(inputs.get("row")) else optional_tail(main))
            check_inputs(program, inputs)
            caches = cache_inputs(program)
            args = [
                self._cache(die, t) if i in caches else inputs[t.name] for i, t in enumerate(program.inputs)
            ]
            runs.append(interpreter.run(program.function, args))
        outputs = run_lockstep(runs, self.links)
        for (die, program), results in zip(programs.items(), outputs):
            for info, array in zip(program.outputs, results):
                if info.alias is not None:
                    self._caches[die, program.inputs[info.alias].name] = array
        return {
            info.name: array
            for info, array in zip(programs[self.links.dies[0]].outputs, outputs[0])
            if info.alias is None
        }

    def begin(self, inputs: dict[str, Array], chunk: Chunk) -> Callable[[], dict[str, Array]]:
        """`step`, done when this returns; what is returned gives the outputs."""
        outputs = ProgramEngine.step(self, inputs, chunk)
        return lambda: outputs

    def caches(self) -> dict[CacheName, Array]:
        """The caches, each [1, heads, capacity, ...]; those of dies not used yet are missing."""
        return dict(self._caches)

    def load_caches(self, caches: dict[CacheName, Array]) -> None:
        """Take over caches as `caches` gave them, those of this process's dies."""
        self._caches = {name: np.array(array) for name, array in caches.items() if name[0] in self.links.dies}

    def copy_sequence(self, source: int, target: int) -> None:
        """In every cache, whose first axis is the batch."""
        for array in self._caches.values():
            array[target] = array[source]

    def _watch(self, interpreter: Interpreter, die: int, chunk: Chunk) -> None:
        probe = self.probe
        if probe is not None:
            interpreter.probe = lambda stack, op, results: probe(chunk, die, stack, op, results)

    def _cache(self, die: int, info: TensorInfo) -> Array:
        key = (die, info.name)
        if key not in self._caches:
            self._caches[key] = np.zeros(info.shape, info.storage_dtype)
        return self._caches[key]
