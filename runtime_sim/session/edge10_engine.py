"""The session engine that executes command programs on modelled memories, with every check on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy.typing as npt

from tyir.artifacts.agreement import check_ir
from tyir.dialects.ty import Global
from tyir.execution.artifacts import Artifacts, ArtifactWeights
from tyir.execution.lockstep import Links, OneProcess
from tyir.manifest import DieProgram
from tyir.parser import parse_bytes
from tyir.runtime_sim.execution.command_trace import Observer
from tyir.runtime_sim.execution.functional import FunctionalDie, run_step
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.program_engine import CacheName, check_inputs
from tyir.runtime_sim.timing.program import load_program, machine_of
from tyir.targets.machine import Machine
from tyir.types import storage_dtype

__all__ = ["Edge10Engine", "functional_die"]

Array = npt.NDArray[Any]


class Edge10Engine:
    """The dies of this process at all lengths.

    The programs of one die share weights and caches, which stay in its DRAM between steps.  `observer` sees
    every command.
    """

    observer: Observer | None = None

    def __init__(self, artifacts: Artifacts, links: Links | None = None) -> None:
        """`links`: which dies run here, None for all."""
        self.artifacts = artifacts
        self.manifest = artifacts.manifest
        self.machine = machine_of(artifacts)
        self.links = links or OneProcess(self.manifest.options.dies)
        self._dies: dict[int, list[FunctionalDie]] = {}

    def reset(self) -> None:
        """Forget the caches (and the weights, which are read again)."""
        self._dies.clear()

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> dict[str, Array]:
        """One step; the first die's outputs by name."""
        given = {
            name: array for name, array in inputs.items() if name != "pos"
        }  # registers of the command processor, not a buffer
        for number in self.links.dies:
            check_inputs(self.manifest.program(number, chunk.seqlen), inputs)
        dies = self._programs(chunk.seqlen)
        for die in dies:
            die.observer = self.observer
        return run_step(dies, given, tuple(inputs["pos"].tolist()), self.links)

    def begin(self, inputs: dict[str, Array], chunk: Chunk) -> Callable[[], dict[str, Array]]:
        """`step`, done when this returns; what is returned gives the outputs."""
        outputs = self.step(inputs, chunk)
        return lambda: outputs

    def caches(self) -> dict[CacheName, Array]:
        """The `kv` buffers of every die."""
        found: dict[CacheName, Array] = {}
        for dies in self._dies.values():
            for number, die in zip(self.links.dies, dies):
                for buffer in die.program.buffers.values():
                    if buffer.kind == "kv":
                        stored = die.memory.dram.buffer(buffer.sym_name)
                        found[number, buffer.sym_name] = (
                            stored.view(storage_dtype(buffer.type.element))
                            .reshape(buffer.type.static_shape)
                            .copy()
                        )
        return found

    def load_caches(self, caches: dict[CacheName, Array]) -> None:
        """Write the `kv` buffers of every die."""
        dies = self._programs(min(self.manifest.options.seqlens))
        here = dict(zip(self.links.dies, dies))
        for (number, name), array in caches.items():
            if number in here:
                here[number].memory.dram.write_buffer(name, array)

    def copy_sequence(self, source: int, target: int) -> None:
        """In every `kv` buffer, whose first axis is the batch."""
        caches = self.caches()
        for array in caches.values():
            array[target] = array[source]
        self.load_caches(caches)

    def _programs(self, seqlen: int) -> list[FunctionalDie]:
        if seqlen not in self._dies:
            dies = [self._load(die, seqlen) for die in self.links.dies]
            for others in self._dies.values():
                for die, other in zip(dies, others):
                    die.share_memory(other)
            self._dies[seqlen] = dies
        return self._dies[seqlen]

    def _load(self, die: int, seqlen: int) -> FunctionalDie:
        return functional_die(self.artifacts, self.manifest.program(die, seqlen), self.machine)


def functional_die(artifacts: Artifacts, program: DieProgram, machine: Machine) -> FunctionalDie:
    """A die with a program and its weights; `TyirError` unless both are what the manifest says."""
    path = artifacts.path / program.ir
    module = parse_bytes(artifacts.read(program.ir), str(path))
    check_ir(module, program, path, artifacts.manifest.model.get("vocab_size"))
    reader = ArtifactWeights(artifacts)
    weights = {str(g.sym_name): reader.read_packed(g) for g in module.body if isinstance(g, Global)}
    return FunctionalDie(load_program(artifacts, program), weights, machine)
