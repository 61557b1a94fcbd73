"""A line for each command that the functional engine executes: what it read and wrote, where, and between
which values.

session.engine.observer = CommandTrace(file)          # or tyir-run --engine edge10 --trace-commands FILE
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TextIO

import numpy as np
import numpy.typing as npt

from tyir.runtime_sim.timing.unroll import Command

__all__ = ["Access", "CommandTrace", "Observer"]


class Access(NamedTuple):
    """A part of a memory that a command touches, as the array it takes it for; what is written is seen as it
    is afterwards.
    """

    memory: str
    offset: int
    data: npt.NDArray[Any]
    write: bool

    def __str__(self) -> str:
        shape = "x".join(map(str, self.data.shape))
        values = (
            f", {self.data.min():.4g} to {self.data.max():.4g}"
            if self.data.size and self.data.dtype != np.uint8
            else ""
        )
        return (
            f"{'writes' if self.write else 'reads'} {self.memory} at {self.offset} ({shape}"
            f" {self.data.dtype}{values})"
        )


Observer = Callable[[int, Command, Sequence[Access]], None]
"""Called with the die, a command that has been executed, and its accesses in order."""


class CommandTrace:
    """An `Observer` that writes lines to a file."""

    def __init__(self, file: TextIO) -> None:
        self.file = file

    def __call__(self, die: int, command: Command, accesses: Sequence[Access]) -> None:
        self.file.write(
            f"die {die} {command.describe()}: {'; '.join(map(str, accesses)) or 'nothing to do'}\n"
        )
