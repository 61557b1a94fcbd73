"""The session engines that walk the dies' IR, op by op.

Ops are executed by compiled kernels or by their reference meaning.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tyir.artifacts.agreement import check_ir
from tyir.artifacts.consistency import cache_inputs
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call
from tyir.dialects.ty import Global
from tyir.execution.artifacts import Artifacts, ArtifactWeights
from tyir.execution.processor import check_processor
from tyir.interpreter import Evaluator, Interpreter, evaluate_op, run_lockstep
from tyir.ir import Op
from tyir.manifest import DieProgram, TensorInfo
from tyir.parser import parse_bytes
from tyir.runtime_sim.session.chunks import Chunk

__all__ = ["CacheName", "ProgramEngine", "StepProbe", "check_inputs"]

Array = npt.NDArray[Any]
CacheName = tuple[int, str]  # die and argument name: (0, "k3")


class StepProbe(Protocol):
    """Sees every op of every die: the chunk, the die, and what `tyir.interpreter.Probe` sees."""

    def __call__(
        self, chunk: Chunk, die: int, stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]
    ) -> None: ...


@dataclass(frozen=True)
class _Loaded:
    program: DieProgram
    interpreter: Interpreter


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
    """All dies of all lengths; a die's programs share weights and caches."""

    def __init__(self, artifacts: Artifacts, *, compiled: bool, probe: StepProbe | None = None) -> None:
        self.artifacts = artifacts
        self.manifest = artifacts.manifest
        self.compiled = compiled
        self.probe = probe
        self._params: dict[tuple[int, str], Array] = {}
        self._programs: dict[tuple[int, int], _Loaded] = {}
        self._caches: dict[CacheName, Array] = {}
        if compiled:
            host = self.manifest.build["host"]
            check_processor(host["mcpu"], host["features"], artifacts.path)

    def reset(self) -> None:
        """Forget the caches."""
        self._caches.clear()

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> dict[str, Array]:
        """One step of all dies; the main die's outputs by name, each [1, seqlen, ...]."""
        loaded = [self._load(die, chunk.seqlen) for die in range(self.manifest.options.dies)]
        runs = []
        for die, (program, interpreter) in enumerate((item.program, item.interpreter) for item in loaded):
            self._watch(interpreter, die, chunk)
            check_inputs(program, inputs)
            caches = cache_inputs(program)
            args = [
                self._cache(die, t) if i in caches else inputs[t.name] for i, t in enumerate(program.inputs)
            ]
            runs.append(interpreter.run(program.function, args))
        outputs = run_lockstep(runs)
        for die, results in enumerate(outputs):
            program = loaded[die].program
            for info, array in zip(program.outputs, results):
                if info.alias is not None:
                    self._caches[die, program.inputs[info.alias].name] = array
        return {
            info.name: array
            for info, array in zip(self.manifest.program(0, chunk.seqlen).outputs, outputs[0])
            if info.alias is None
        }

    def caches(self) -> dict[CacheName, Array]:
        """The caches, each [1, heads, capacity, ...]; those of dies not used yet are missing."""
        return dict(self._caches)

    def load_caches(self, caches: dict[CacheName, Array]) -> None:
        """Take over caches as `caches` gave them."""
        self._caches = {name: np.array(array) for name, array in caches.items()}

    def _watch(self, interpreter: Interpreter, die: int, chunk: Chunk) -> None:
        probe = self.probe
        if probe is not None:
            interpreter.probe = lambda stack, op, results: probe(chunk, die, stack, op, results)

    def _cache(self, die: int, info: TensorInfo) -> Array:
        key = (die, info.name)
        if key not in self._caches:
            self._caches[key] = np.zeros(info.shape, info.storage_dtype)
        return self._caches[key]

    def _load(self, die: int, seqlen: int) -> _Loaded:
        key = (die, seqlen)
        if key not in self._programs:
            program = self.manifest.program(die, seqlen)
            path = self.artifacts.path / program.ir
            module = parse_bytes(self.artifacts.read(program.ir), str(path))
            check_ir(module, program, path, self.manifest.model.get("vocab_size"))
            constants = {str(g.sym_name): self._param(die, g) for g in module.body if isinstance(g, Global)}
            self._programs[key] = _Loaded(
                program, Interpreter(module, constants=constants, evaluator=self._evaluator(program))
            )
        return self._programs[key]

    def _evaluator(self, program: DieProgram) -> Evaluator:
        if not self.compiled:
            return evaluate_op
        from tyir.runtime_sim.session.host_runtime import HostLibrary

        name = program.library
        return HostLibrary(self.artifacts.path / name, self.artifacts.executable(name)).evaluate

    @cached_property
    def _reader(self) -> ArtifactWeights:
        return ArtifactWeights(self.artifacts)

    def _param(self, die: int, ref: Global) -> Array:
        """A parameter, once per die.

        Mapped and packed for compiled kernels, one element per entry for the reference.
        """
        key = (die, str(ref.sym_name))
        if key not in self._params:
            self._params[key] = self._reader.read_packed(ref) if self.compiled else self._reader.read(ref)
        return self._params[key]
