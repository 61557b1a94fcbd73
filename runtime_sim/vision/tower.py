"""The tower's programs: patches of one picture to rows of embeddings, on any engine.

    Tower(artifacts, 0).run(patches)    # [N, C * T * P * P] f32 -> (embeddings [tokens, H] f16, deepstack
    ...)

Patches come in the processor's order and rows go out in it; the programs' own order, which a windowed tower
has, stays inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from tyir.artifacts.vision import MAX_EXPONENT
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call
from tyir.execution.artifacts import Artifacts
from tyir.execution.finite import not_finite
from tyir.execution.lockstep import Links, OneProcess
from tyir.interpreter import Probe, run_lockstep
from tyir.ir import Op
from tyir.layers import path_in_calls
from tyir.runtime_sim.session.die_programs import DiePrograms
from tyir.runtime_sim.session.finite_steps import Origin
from tyir.runtime_sim.session.session import EngineGroup, EngineName
from tyir.runtime_sim.vision.pixels import Patches
from tyir.runtime_sim.vision.preprocessor import vision_of
from tyir.traits import Collective, InPlace, WeightReference

__all__ = ["Tower", "TowerProbe", "Towers"]

Array = npt.NDArray[Any]
TowerProbe = Callable[[int, tuple[Call, ...], Op, tuple[Array, ...]], None]  # die, calls, op, results
_MOST_SEEN: Final = 64  # parts of pictures and videos whose rows are kept
_MAIN: Final = 0  # the die that has the results


class TowerGroup(EngineGroup, Protocol):
    """Processes that the dies of a model that sees run in."""

    @property
    def tower_links(self) -> Links:
        """Which of a tower's dies run in this one."""

    def compute_tower(self, tower: Tower, patches: Array) -> dict[str, Array]:
        """`Tower.compute` in this process, while the others run their dies of the same tower."""


class Tower:
    """The programs of one compiled size; `probe` sees every op of engines that walk IR."""

    def __init__(
        self,
        artifacts: Artifacts,
        size: int = 0,
        engine: EngineName = "host",
        programs: DiePrograms | None = None,
        probe: TowerProbe | None = None,
        links: Links | None = None,
        group: TowerGroup | None = None,
    ) -> None:
        """`size`: its number in the manifest.  `programs`: those of other sizes, to share weights with.
        `links`: which dies run here, None for all; `group`: the processes of the others.
        """
        self.artifacts = artifacts
        self.vision = vision_of(artifacts)
        self.size = self.vision.sizes[size]
        self.engine = engine
        self.probe = probe
        self.group = group
        if group is not None:
            links = group.tower_links
        self.links = links or OneProcess(self.vision.dies)
        self._all = [self.vision.program(size, die) for die in range(self.vision.dies)]
        self._programs = programs
        self._dies: list[Any] = []  # of the edge10 engine

    def run(self, patches: npt.NDArray[np.floating[Any]]) -> tuple[Array, ...]:
        """Embeddings [tokens, H] f16, then deepstack features of the same shape.

        `TyirError` for patches of another size, and where the result is not finite: with the first op that
        was not.
        """
        wanted = (self.size.image.patches, self.vision.pixels.columns)
        if patches.shape != wanted:
            raise TyirError(
                f"patches {list(patches.shape)} are given, the tower for {self.size.image.name} takes"
                f" {list(wanted)}",
                help="prepare pictures with the settings of the artifacts",
            )
        given = self.ordered(patches.astype(np.float16))
        outputs = self.compute(given) if self.group is None else self.group.compute_tower(self, given)
        if bad := next((name for name, array in outputs.items() if not np.isfinite(array).all()), None):
            raise self._not_finite(bad, outputs[bad], given)
        return tuple(self._restored(array) for array in outputs.values())

    def ordered(self, patches: Array) -> Array:
        """In the programs' order of groups of merged patches."""
        order = self.size.order
        if not order:
            return patches
        groups = patches.reshape(len(order), -1, patches.shape[1])
        return np.ascontiguousarray(groups[list(order)].reshape(patches.shape))

    def _restored(self, rows: Array) -> Array:
        if not self.size.order:
            return rows
        found = np.empty_like(rows)
        found[list(self.size.order)] = rows
        return found

    def compute(self, patches: Array) -> dict[str, Array]:
        """What the first of the dies that run here makes of patches in the programs' order."""
        if self.engine == "edge10":
            return self._commands(patches)
        return self._walk(patches, self.probe, self.links)

    def _walk(
        self,
        patches: Array,
        probe: TowerProbe | None,
        links: Links | None = None,
        *,
        compiled: bool | None = None,
    ) -> dict[str, Array]:
        walked = self.engine == "host" if compiled is None else compiled
        if self._programs is None or self._programs.compiled != walked:
            self._programs = DiePrograms(self.artifacts, compiled=walked)
        here = self._all if links is None else [self._all[die] for die in links.dies]
        runs = []
        for program in here:
            interpreter = self._programs.interpreter(program)
            interpreter.probe = None if probe is None else _for_die(probe, program.die)
            runs.append(interpreter.run(program.function, [patches]))
        with np.errstate(all="ignore"):  # what is not finite is told by its place
            results = run_lockstep(runs, links)[0]
        return {info.name: array for info, array in zip(here[0].outputs, results)}

    def _commands(self, patches: Array) -> dict[str, Array]:
        from tyir.runtime_sim.execution.functional import run_step
        from tyir.runtime_sim.session.edge10_engine import functional_die
        from tyir.runtime_sim.timing.program import machine_of

        if not self._dies:
            machine = machine_of(self.artifacts)
            here = [self._all[die] for die in self.links.dies]
            self._dies = [functional_die(self.artifacts, program, machine) for program in here]
        found = run_step(self._dies, {"patches": patches}, (0,), self.links)
        return {info.name: found[info.name] for info in self._all[self.links.dies[0]].outputs}

    def _not_finite(self, name: str, values: Array, patches: Array) -> TyirError:
        """What to say of a picture that left f16: where it began."""
        first: list[Origin] = []

        def watch(die: int, stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]) -> None:
            if first or isinstance(op, Call) or op.has_trait(InPlace) or op.has_trait(Collective):
                return
            found = next((f for array in results if (f := not_finite(array))), None)
            if found is not None:
                weight = op.has_trait(WeightReference)
                path = str(op.properties["symbol"]) if weight else path_in_calls(op, stack) or "an op"
                first.append(Origin(op.name, path, die, found, None if weight else (0, 0)))

        self._walk(patches, watch, compiled=False if self.engine == "edge10" else None)
        rows = int((~np.isfinite(values)).reshape(len(values), -1).any(axis=1).sum())
        message = f"{rows} of {len(values)} rows of the picture's {name} are not finite"
        if not first:
            return TyirError(f"{message} ({not_finite(values)})", help="compile the model again")
        help = first[0].help
        if self.vision.exponent < MAX_EXPONENT:
            help += f"; or divide the tower's stream further: tyir-compile --vision-exponent {MAX_EXPONENT}"
        return TyirError(f"{message}; {first[0]}", help=help)


def _for_die(probe: TowerProbe, die: int) -> Probe:
    def watch(stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]) -> None:
        probe(die, stack, op, results)

    return watch


class Towers:
    """The towers of all sizes of a folder; what they gave for the last pictures is kept."""

    def __init__(
        self, artifacts: Artifacts, engine: EngineName = "host", group: TowerGroup | None = None
    ) -> None:
        """`group`: the processes that the dies run in, None for this one alone."""
        self.artifacts, self.engine, self.group = artifacts, engine, group
        self.vision = vision_of(artifacts)
        self._towers: dict[int, Tower] = {}
        self._seen: dict[str, tuple[Array, ...]] = {}
        self._programs = DiePrograms(artifacts, compiled=engine == "host") if engine != "edge10" else None

    def tower(self, grid: tuple[int, ...]) -> Tower:
        """The tower of a grid; `TyirError` when it was not compiled."""
        number = next((i for i, s in enumerate(self.vision.sizes) if s.image.grid == tuple(grid)), None)
        if number is None:
            raise TyirError(
                f"no tower was compiled for {grid[0]} rows of {grid[1]} patches",
                help=f"compiled are {', '.join(s.image.name for s in self.vision.sizes)}",
            )
        if number not in self._towers:
            self._towers[number] = Tower(
                self.artifacts, number, self.engine, self._programs, group=self.group
            )
        return self._towers[number]

    def run(self, patches: Patches) -> tuple[Array, ...]:
        """As `Tower.run`; a picture that was among the last ones is not run again."""
        found = self._seen.pop(patches.sha256, None)
        if found is None:
            found = self.tower(patches.size.grid).run(patches.patches)
        self._seen[patches.sha256] = found  # again as the last
        if len(self._seen) > _MOST_SEEN:
            del self._seen[next(iter(self._seen))]
        return found
