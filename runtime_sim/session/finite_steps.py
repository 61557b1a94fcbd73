"""A step whose logits are not finite ends the generation, with the first op that was not: f16 ends at 65504.

Such a row has no most likely token: `argmax` of NaN is token 0, which is the end of the text for many models,
and an empty answer says nothing.  The step is walked again, op by op, to say where it began.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from tyir.artifacts.cache_layout import position_axis
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
_CACHE: Final = re.compile(r"[kv](?:_scales)?(\d+)")
_LOWEST: Final = float(np.finfo(np.float32).min)  # what `ty.top_k` counts NaN and -inf as


class NotFinite(TyirError):
    """A step's numbers are not finite, of one sequence at least; the first such is `sequence`."""

    def __init__(self, sequence: int, message: str, help: str) -> None:
        super().__init__(message, help=help)
        self.sequence = sequence


@dataclass
class FiniteSteps:
    """Steps of an engine whose results are checked.

    Of a step that computes no results the rows of the last layer's caches are, which nothing goes past that
    later tokens see; not where `sees_caches` is False, since dies are elsewhere.
    """

    engine: Engine
    sees_caches: bool = True
    done: int = field(default=0, init=False)  # steps, from 1 on in messages

    def __call__(
        self,
        inputs: dict[str, Array],
        chunk: Chunk,
        counts: Sequence[int],
        fed: Sequence[int] | None = None,
    ) -> dict[str, Array]:
        """One step, of which the first `counts[i]` rows of sequence i are used; `fed`: rows that are no
        padding, None for those that are used.

        A program that returns one row of each sequence is told the last of those, or a negative number where
        none is used; its outputs are [b, 1, ..], and mean nothing where none is used of any sequence.

        `NotFinite` when one of them is not finite: step, position, and where it began.
        """
        inputs = self._numbered(inputs, chunk, counts)
        with np.errstate(all="ignore"):  # what is not finite is reported, by its place
            outputs = self.engine.step(inputs, chunk)
        return self._checked(self.done, outputs, inputs, chunk, counts, fed or counts)

    def begin(
        self, inputs: dict[str, Array], chunk: Chunk, counts: Sequence[int], fed: Sequence[int]
    ) -> Callable[[], dict[str, Array]]:
        """The same, begun behind those that were begun before; what is returned waits for its end."""
        inputs = self._numbered(inputs, chunk, counts)
        number = self.done
        with np.errstate(all="ignore"):
            end = self.engine.begin(inputs, chunk)
        return lambda: self._checked(number, end(), inputs, chunk, counts, fed)

    def _numbered(self, inputs: dict[str, Array], chunk: Chunk, counts: Sequence[int]) -> dict[str, Array]:
        """What the next step is given, with the rows that are used of it."""
        self.done += 1
        if not self._returns_one(chunk):
            return inputs
        return {**inputs, "row": np.array(counts, np.int32) - 1}

    def _returns_one(self, chunk: Chunk) -> bool:
        return self.engine.artifacts.manifest.options.takes_row(chunk.seqlen)

    def _checked(
        self,
        number: int,
        outputs: dict[str, Array],
        inputs: dict[str, Array],
        chunk: Chunk,
        counts: Sequence[int],
        fed: Sequence[int],
    ) -> dict[str, Array]:
        """The outputs of the step of that number; `NotFinite` as above."""
        one = self._returns_one(chunk)
        if not any(counts) and self.sees_caches:
            for name, sequence, rows in self._cached(inputs, fed):
                if (row := _first_bad(rows)) is not None:
                    raise self._error(number, name, rows[row], inputs, chunk, fed, (sequence, row))
        for sequence, count in enumerate(counts):
            for name, array in outputs.items():
                row = _first_bad(array[sequence, :count], _LOWEST if name == "top_values" else -np.inf)
                if row is not None:
                    place = (sequence, count - 1 if one else row)
                    raise self._error(number, name, array[sequence, row], inputs, chunk, counts, place)
        return outputs

    def _cached(self, inputs: dict[str, Array], fed: Sequence[int]) -> Iterator[tuple[str, int, Array]]:
        """What a step has written to the last layer's caches: keys or values, of which sequence, and the rows
        [n, ..].  Nothing of caches that are cut by tokens, whose rows do not follow each other.
        """
        options = self.engine.artifacts.manifest.options
        caches = self.engine.caches() if options.kv_parts == 1 else {}
        numbered = {key: int(found[1]) for key in caches if (found := _CACHE.fullmatch(key[1])) is not None}
        last, axis = max(numbered.values(), default=0), position_axis(options.kv_layout)
        for key in (key for key, layer in numbered.items() if layer == last):
            name = "keys" if key[1].startswith("k") else "values"
            stored = caches[key]
            if stored.dtype == np.uint16:  # scales of 4-bit groups, whose last bits are no part of the number
                stored = stored.view(np.float16)
            for sequence, count in enumerate(fed):
                start = int(inputs["pos"][sequence])
                yield name, sequence, np.moveaxis(stored[sequence], axis - 1, 0)[start : start + count]

    def _error(
        self,
        number: int,
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
        message = f"the {what} of step {number} are not finite ({found}), from position {position}{of} on"
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
