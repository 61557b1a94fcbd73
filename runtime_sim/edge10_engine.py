"""The `edge10` engine of a session: every die's command program on modelled memories, fed from an artifact folder.

All sequence lengths of a die share its weights and caches; what a length has of its own are its input, output and spill buffers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.manifest import DieProgram, Manifest
from tyir.parser import parse_file
from tyir.runtime_sim.chunks import Chunk
from tyir.runtime_sim.functional import FunctionalDie, run_step
from tyir.runtime_sim.program import EdgeProgram
from tyir.targets.machine import Machine, load_machine
from tyir.weights import read_safetensors

__all__ = ["Edge10Engine", "load_programs"]

Array = npt.NDArray[Any]


def load_programs(folder: Path, manifest: Manifest, seqlen: int) -> list[EdgeProgram]:
    """The command programs of all dies for one sequence length."""
    return [EdgeProgram(parse_file(folder / manifest.program(die, seqlen).program)) for die in range(manifest.options.dies)]


class Edge10Engine:
    """Executes steps by the command programs; with `check` races and reads of unwritten bytes are errors (about three times slower)."""

    def __init__(self, folder: Path, manifest: Manifest, *, check: bool = False) -> None:
        self.folder = folder
        self.manifest = manifest
        self.check = check
        self.machine: Machine = load_machine(str(manifest.build.get("machine", "edge10")))
        self._dies: dict[int, list[FunctionalDie]] = {}
        self._weights: dict[str, dict[str, Array]] = {}

    def step(self, inputs: dict[str, Array], chunk: Chunk) -> Array:
        """The step's logits [1, seqlen, V]."""
        pos = int(inputs["pos"][0])
        given = {name: array for name, array in inputs.items() if name != "pos"}
        outputs = run_step(self._programs(chunk.seqlen), given, pos)
        return next(iter(outputs.values()))

    def reset(self) -> None:
        """Forget the caches."""
        self._dies.clear()

    def _programs(self, seqlen: int) -> list[FunctionalDie]:
        if seqlen not in self._dies:
            others = next(iter(self._dies.values()), None)
            dies = []
            for number, program in enumerate(load_programs(self.folder, self.manifest, seqlen)):
                weights = self._die_weights(self.manifest.program(number, seqlen))
                die = FunctionalDie(program, weights, self.machine, check=self.check)
                if others is not None:
                    die.share_memory(others[number])
                dies.append(die)
            self._dies[seqlen] = dies
        return self._dies[seqlen]

    def _die_weights(self, program: DieProgram) -> dict[str, Array]:
        """Packed arrays by name, from the die's parameters of all lengths and of this one; mapped, not read."""
        found: dict[str, Array] = {}
        for name in (program.params, program.constants):
            if name not in self._weights:
                self._weights[name] = {k: np.asarray(a) for k, a in read_safetensors(self.folder / name).items()}
            found.update(self._weights[name])
        return found
