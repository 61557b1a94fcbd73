"""The memory plan of command programs, checked without data: what a compile can do before anybody runs the
result.

First the buffers (`tyir.edge10.memory`).  Then, replayed at the given positions, every command's accesses, in
order, on the memories of the functional engine: addresses in range, nothing read that was not written, no
race; products and de-quantisation are not computed, so a step of a model of billions of parameters takes
seconds.  Collectives are checked for their own die's side; that the dies meet is the timing engine's check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.edge10.memory import buffer_problems, shared_problems
from tyir.runtime_sim.execution.functional import FunctionalDie
from tyir.runtime_sim.timing.program import Command, EdgeProgram, alike_programs
from tyir.runtime_sim.timing.unroll import Position
from tyir.targets.machine import Machine

__all__ = ["check_lengths", "check_plan", "check_programs"]

Array = npt.NDArray[Any]


def check_plan(module: Module, machine: Machine, positions: Sequence[Position] = (0,)) -> None:
    """Raise `TyirError` with everything wrong with the buffers of one die's program, or with the first bad
    access of a step at one of `positions`.
    """
    check_programs([EdgeProgram(module)], machine, positions)


def check_programs(
    programs: Sequence[EdgeProgram], machine: Machine, positions: Sequence[Position] = (0,)
) -> None:
    """`check_plan` for several dies; dies with equal programs differ only in data and are replayed once."""
    for program in programs:
        if problems := list(buffer_problems(program.buffers.values(), machine)):
            raise TyirError(problems)
    for program in (programs[group[0]] for group in alike_programs(programs)):
        for pos in positions:
            _Replay(program, machine).replay(pos)


def check_lengths(programs: Mapping[int, Sequence[EdgeProgram]], machine: Machine, capacity: int) -> int:
    """All programs of a board, by sequence length and die: what they share, and a step of each over an empty
    and into a full cache of `capacity` tokens.

    Returns how many commands were replayed; raises as `check_programs`.
    """
    for one, other in combinations(programs.values(), 2):
        for mine, theirs in zip(one, other):
            if problems := list(shared_problems(list(mine.buffers.values()), list(theirs.buffers.values()))):
                raise TyirError(problems)
    commands = 0
    for length, dies in programs.items():
        positions = sorted({0, capacity - length})
        check_programs(dies, machine, positions)
        commands += sum(
            len(dies[group[0]].expand(pos)) for group in alike_programs(dies) for pos in positions
        )
    return commands


class _Replay(FunctionalDie):
    """A die that touches what its commands touch; weights are zeros that take no memory until they are
    read.
    """

    def __init__(self, program: EdgeProgram, machine: Machine) -> None:
        weights = {
            b.sym_name: np.zeros(b.type.nbytes, np.uint8)
            for b in program.buffers.values()
            if b.kind == "weight"
        }
        super().__init__(program, weights, machine)
        for buffer in program.buffers.values():
            if buffer.kind in ("input", "kv"):  # the host's, and the tokens before `pos`
                self.memory.dram.write_buffer(buffer.sym_name, np.zeros(buffer.nbytes, np.uint8))

    def replay(self, pos: Position) -> None:
        run = self.step(pos)
        try:
            command, _ = next(run)
            while True:
                command, _ = run.send(_received(command))
        except StopIteration:
            pass

    def put(self, target: Array, make: Callable[[], Array]) -> None:
        """Nothing: nobody looks at the data."""


def _received(command: Command) -> Array:
    """What a collective gives this die, in size."""
    op = command.op
    assert isinstance(op, edge10.Exchange)
    return np.zeros(op.taken_bytes(), np.uint8)
