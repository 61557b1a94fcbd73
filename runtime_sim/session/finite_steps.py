"""A step whose logits are not finite ends the generation, with the first op that was not: f16 ends at 65504.

Such a row has no most likely token: `argmax` of NaN is token 0, which is the end of the text for many models,
and an empty answer says nothing.  The step is walked again, op by op, to say where it began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects.func import Call
from tyir.execution.finite import F16_LARGEST, not_finite
from tyir.ir import Op
from tyir.layers import layer_in, path_in_calls
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.program_engine import ProgramEngine
from tyir.traits import Collective, InPlace, WeightReference

if TYPE_CHECKING:
    from tyir.runtime_sim.session.session import Engine

__all__ = ["FiniteSteps", "NotFinite", "Origin"]

Array = npt.NDArray[Any]
_LOWEST: Final = float(np.finfo(np.float32).min)  # what `ty.top_k` counts NaN and -inf as


class NotFinite(TyirError):
    """A step's numbers are not finite, of one sequence at least; the first such is `sequence`."""

    def __init__(self, sequence: int, message: str, help: str) -> None:
        super().__init__(message, help=help)
        self.sequence = sequence


@dataclass
class FiniteSteps:
    """Steps of an engine whose results are checked."""

    engine: Engine
    done: int = field(default=0, init=False)  # steps, from 1 on in messages

    def __call__(self, inputs: dict[str, Array], chunk: Chunk, counts: Sequence[int]) -> dict[str, Array]:
        """One step, of which the first `counts[i]` rows of sequence i are used.

        A program that returns one row of each sequence is told the last of those; its outputs are [b, 1, ..].

        `NotFinite` when one of them is not finite: step, position, and where it began.
        """
        self.done += 1
        one = self.engine.artifacts.manifest.options.takes_row(chunk.seqlen)
        if one:
            inputs = {**inputs, "row": np.array([max(count - 1, 0) for count in counts], np.int32)}
        with np.errstate(all="ignore"):  # what is not finite is reported below, by its place
            outputs = self.engine.step(inputs, chunk)
        for sequence, count in enumerate(counts):
            for name, array in outputs.items():
                row = _first_bad(array[sequence, :count], _LOWEST if name == "top_values" else -np.inf)
                if row is not None:
                    place = (sequence, count - 1 if one else row)
                    raise self._error(name, array[sequence, row], inputs, chunk, counts, place)
        return outputs

    def _error(
        self,
        name: str,
        values: Array,
        inputs: dict[str, Array],
        chunk: Chunk,
        counts: Sequence[int],
        place: tuple[int, int],
    ) -> NotFinite:
        origin = self._origin(inputs, chunk, counts)
        # where it began: within a step, masked products carry NaN to earlier rows too (0 * NaN)
        sequence, row = origin.place if origin is not None and origin.place is not None else place
        position = int(inputs["pos"][sequence]) + row
        of = f" of sequence {sequence}" if len(counts) > 1 else ""
        found = not_finite(values) or "no finite value"
        what = {"logits": "logits", "top_values": "best logits", "logsumexp": "logits"}.get(name, name)
        message = f"the {what} of step {self.done} are not finite ({found}), from position {position}{of} on"
        if origin is None:
            help = (
                "the reference computes this step without: tyir-verify --against the checkpoint names the op"
                " that differs; compile the model again"
            )
            return NotFinite(place[0], message, help)
        return NotFinite(place[0], f"{message}; {origin}", origin.help)

    def _origin(self, inputs: dict[str, Array], chunk: Chunk, counts: Sequence[int]) -> Origin | None:
        """The first op whose result is not finite, by walking the step again.

        It writes the same rows of the caches again, and later rows are not read.
        """
        walker = self.engine
        if not isinstance(walker, ProgramEngine):
            walker = ProgramEngine(self.engine.artifacts, compiled=False)
            walker.load_caches(self.engine.caches())
        watch, before = _Watch(counts, "row" in inputs), walker.probe
        walker.probe = watch
        try:
            with np.errstate(all="ignore"):
                walker.step(inputs, chunk)
        finally:
            walker.probe = before
        return watch.origin


def _first_bad(rows: Array, lowest: float = -np.inf) -> int | None:
    """The first of rows [n, ..] that holds something which is not finite, or nothing above `lowest`."""
    if rows.dtype.kind != "f":
        return None
    good = np.isfinite(rows) if lowest == -np.inf else np.isfinite(rows) & (rows > lowest)
    return None if good.all() else int(np.argmin(good.reshape(len(rows), -1).all(axis=1)))


@dataclass(frozen=True)
class Origin:
    """The first op that gave something not finite: of which module, on which die, what."""

    op: str
    path: str
    die: int
    found: str
    place: tuple[int, int] | None  # sequence and row of the step; None of a weight

    def __str__(self) -> str:
        if self.place is None:
            return f"weight {self.path} of die {self.die} holds {self.found}"
        layer = layer_in(self.path)
        where = f"layer {layer}: " if layer is not None else ""
        return f"first in {where}{self.op} at {self.path} on die {self.die} ({self.found})"

    @property
    def help(self) -> str:
        if self.place is None:
            return "the artifacts are damaged; compile the model again"
        if "infinite" in self.found:
            return (
                f"f16 ends at {F16_LARGEST:.0f} and this result lies beyond: divide the weights it is made of"
                " by a power of two that a later linear takes back, or use a model that was trained in f16"
            )
        return "tyir-verify --against the checkpoint compares every op with Hugging Face's"


class _Watch:
    """A `StepProbe` that keeps the first result with something not finite in the rows that are used.

    All that an op reads has been seen before, so what is seen first is where it began.
    """

    def __init__(self, counts: Sequence[int], selects: bool) -> None:
        self.counts = counts
        self.selects = selects  # the last row of each sequence, before the last norm
        self.origin: Origin | None = None

    def __call__(
        self, chunk: Chunk, die: int, stack: tuple[Call, ...], op: Op, results: tuple[Array, ...]
    ) -> None:
        if (
            self.origin is not None
            or isinstance(op, Call)
            or op.has_trait(InPlace)
            or op.has_trait(Collective)
        ):
            return
        weight = op.has_trait(WeightReference)
        for array in results:
            for sequence, first, part in [(None, 0, array)] if weight else self._used(array, chunk):
                if found := not_finite(part):
                    path = str(op.properties["symbol"]) if weight else path_in_calls(op, stack) or "an op"
                    place = None if sequence is None else (sequence, first + (_first_bad(part) or 0))
                    self.origin = Origin(op.name, path, die, found, place)
                    return

    def _used(self, array: Array, chunk: Chunk) -> list[tuple[int | None, int, Array]]:
        """The rows of [b, s, ..] that are no padding, by sequence, with the number of the first; nothing of
        arrays not so laid out.
        """
        batch, counted = len(self.counts), [(i, count) for i, count in enumerate(self.counts) if count]
        if array.shape[:2] == (batch, chunk.seqlen):
            return [(i, 0, array[i, :count]) for i, count in counted]
        if self.selects and array.ndim >= 3 and array.shape[:2] == (batch, 1):
            return [(i, count - 1, array[i]) for i, count in counted]
        return []
