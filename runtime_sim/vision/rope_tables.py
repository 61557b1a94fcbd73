"""A request's rotary tables, `rope_cos` and `rope_sin` [max_kv, D/2] f16, a row for each slot of the cache.

    tables = RopeTables(artifacts, "host")
    tables.filled(request.positions)    # {"rope_cos": ..., "rope_sin": ...}, what the language programs take

The artifacts' own program makes them, on the engine that runs the rest, as a board would.  Where a position
lies beyond its tables (a video of few tokens that lasts long), and for artifacts of older compilers, which
have no such program, it is the plain routine `rope_rows`: the same rows, bit by bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.execution.artifacts import Artifacts
from tyir.interpreter import run_lockstep
from tyir.runtime_sim.session.die_programs import DiePrograms
from tyir.runtime_sim.session.session import EngineName
from tyir.runtime_sim.vision.positions import RopePositions, rope_rows
from tyir.runtime_sim.vision.preprocessor import vision_of

__all__ = ["RopeTables"]

Array = npt.NDArray[Any]


class RopeTables:
    """What fills the tables of requests, one after the other."""

    def __init__(self, artifacts: Artifacts, engine: EngineName = "host") -> None:
        self.artifacts, self.engine = artifacts, engine
        self.rope = vision_of(artifacts).rope
        self.slots = artifacts.manifest.options.max_kv
        self._programs: DiePrograms | None = None
        self._die: Any = None  # of the edge10 engine

    def filled(self, positions: RopePositions) -> dict[str, Array]:
        """The tables of all slots by the names of the programs' arguments; none for plain positions."""
        if self.rope is None:
            return {}
        at = positions.at(0, self.slots)
        if self.rope.program is None or int(at.max()) >= self.slots:
            return dict(zip(("rope_cos", "rope_sin"), rope_rows(at, self.rope)))
        given = np.ascontiguousarray(at.astype(np.int32))
        return self._commands(given) if self.engine == "edge10" else self._walk(given)

    def _walk(self, positions: Array) -> dict[str, Array]:
        assert self.rope is not None and self.rope.program is not None
        program = self.rope.program
        if self._programs is None:
            self._programs = DiePrograms(self.artifacts, compiled=self.engine == "host")
        run = self._programs.interpreter(program).run(program.function, [positions])
        (results,) = run_lockstep([run])
        return {info.name: array for info, array in zip(program.outputs, results)}

    def _commands(self, positions: Array) -> dict[str, Array]:
        from tyir.runtime_sim.execution.functional import run_step
        from tyir.runtime_sim.session.edge10_engine import functional_die
        from tyir.runtime_sim.timing.program import machine_of

        assert self.rope is not None and self.rope.program is not None
        program = self.rope.program
        if self._die is None:
            self._die = functional_die(self.artifacts, program, machine_of(self.artifacts))
        found = run_step([self._die], {"positions": positions}, (0,))
        return {info.name: found[info.name] for info in program.outputs}
