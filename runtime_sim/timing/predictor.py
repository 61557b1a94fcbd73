"""What a user wants to know from the timing engine: time to first token, time per output token, what bounds
them, and how sure that is.

Times are simulated device time plus the machine's host constant per step; the device's part is told by
itself.  Figures that hang on assumed
constants come as an interval: every assumed constant at its faster bound, as the file has it, at its slower
bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tyir.artifacts.sparse_prefill import BlockChoice
from tyir.runtime_sim.session.chunks import Chunk, plan_chunks
from tyir.runtime_sim.timing.engine import Timing, simulate
from tyir.runtime_sim.timing.long_steps import LONG, LongSteps, OverlappedChunks
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Constant, Machine

__all__ = ["Interval", "Pictures", "Predictor", "Sensitivity"]

_EXACT_STEPS: Final = 8  # a prompt of more steps is interpolated between simulated positions
_GRID_STEPS: Final = 8  # ... so many of them, at most, over the whole cache
_GRID: Final = 64  # ... at multiples of this


@dataclass(frozen=True)
class Interval:
    """A figure with all assumed constants at their faster bound, as given, and at their slower bound."""

    fast: float
    point: float
    slow: float

    def map(self, change: Callable[[float], float]) -> Interval:
        """The interval of something computed from the figure."""
        return Interval(change(self.fast), change(self.point), change(self.slow))

    def plus(self, other: Interval, times: int = 1) -> Interval:
        """The interval of a sum with `times` another figure, end by end: what hurts one hurts both."""
        return Interval(
            self.fast + times * other.fast, self.point + times * other.point, self.slow + times * other.slow
        )


@dataclass(frozen=True)
class Sensitivity:
    """How far one assumed constant, moved alone between its bounds, moves a figure."""

    name: str
    constant: Constant
    at_low: float
    at_high: float

    @property
    def swing(self) -> float:
        return abs(self.at_high - self.at_low)


@dataclass(frozen=True)
class Pictures:
    """Pictures of one compiled size, `960x540`: their tokens, and the programs of the tower's dies."""

    size: str
    tokens: int
    programs: Callable[[], Sequence[EdgeProgram]]


class Predictor:
    """Figures of a compiled model on a machine.

    `programs(seqlen)` gives all dies' programs; `seqlens` are the compiled lengths, `capacity` the cache's;
    `pictures` the sizes that a vision tower was compiled for; `tables` the program that fills a request's
    rotary tables, None where there is none.  `choice`: what steps of the longest length see of the cache, if
    not all (`tyir.artifacts.sparse_prefill`).  `stages`: of a pipeline that works on as many of a prompt's
    chunks at a time (`BuildOptions.steps_ahead`); 0 where chunks follow one another.
    """

    def __init__(
        self,
        programs: Callable[[int], Sequence[EdgeProgram]],
        seqlens: Sequence[int],
        capacity: int,
        machine: Machine,
        pictures: Sequence[Pictures] = (),
        tables: Callable[[], EdgeProgram] | None = None,
        choice: BlockChoice | None = None,
        stages: int = 0,
    ) -> None:
        self.programs = programs
        self.choice = choice
        self.stages = stages
        self.pictures = tuple(pictures)
        self.tables = tables
        self.seqlens = tuple(seqlens)
        self.capacity = capacity
        self.machine = machine
        self._steps: dict[tuple[int, int, bool], Timing] = {}
        self._towers: dict[str, Timing] = {}
        self._tables: Timing | None = None
        self._long_steps: dict[tuple[int, bool], LongSteps] = {}
        self._overlapped: dict[int, OverlappedChunks] = {}

    def on(self, machine: Machine) -> Predictor:
        """The same programs on another machine."""
        return Predictor(
            self.programs,
            self.seqlens,
            self.capacity,
            machine,
            self.pictures,
            self.tables,
            self.choice,
            self.stages,
        )

    def step(self, seqlen: int, pos: int, wanted: bool = True) -> Timing:
        """One step, simulated once; `wanted`: whether a row of its results is, which the chunks of a prompt
        before the last one are not asked for.
        """
        key = (seqlen, pos, wanted or not self._has_tail(seqlen))
        if key not in self._steps:
            self._steps[key] = simulate(self.programs(seqlen), self.machine, pos, wanted=key[2])
        return self._steps[key]

    def _has_tail(self, seqlen: int) -> bool:
        """Whether steps of a length leave something out where no row is wanted."""
        return any(program.has_tail for program in self.programs(seqlen))

    def tower(self, pictures: Pictures) -> Timing:
        """The tower's pass over a picture, simulated once."""
        if pictures.size not in self._towers:
            self._towers[pictures.size] = simulate(pictures.programs(), self.machine, 0)
        return self._towers[pictures.size]

    def tables_ns(self) -> float:
        """The rotary tables of a request with pictures: one program on one die, before the first step."""
        if self.tables is None:
            return 0.0
        if self._tables is None:
            self._tables = simulate([self.tables()], self.machine, 0)
        return self._tables.total_ns

    @property
    def dies(self) -> int:
        return len(self.programs(min(self.seqlens)))

    @property
    def host_ns(self) -> float:
        """What the host is assumed to add to a step: a constant of the machine file, never simulated."""
        return self.machine.host.step_us * 1000

    def tpot_ns(self, pos: int, *, exact: bool = True) -> float:
        """Time per output token when `pos` tokens are cached: `decode_device_ns`, and the host's constant."""
        return self.decode_device_ns(pos, exact=exact) + self.host_ns

    def decode_device_ns(self, pos: int, *, exact: bool = True) -> float:
        """The device's part of the time per output token: one step of the shortest length at `pos`.

        Not `exact`, or so far that a step has millions of commands: see `between`.
        """
        seqlen = min(self.seqlens)
        return self.step(seqlen, pos).total_ns if exact and pos <= LONG else self.between(seqlen, pos)

    def ttft_ns(self, tokens: int, *, exact: bool = True) -> float:
        """Time to first token of a prompt: `prefill_device_ns`, and the host's constant for each step."""
        return self.prefill_device_ns(tokens, exact=exact) + self.prefill_steps(tokens) * self.host_ns

    def prefill_steps(self, tokens: int) -> int:
        """How many steps a prompt takes."""
        return len(self._chunks(tokens))

    def _chunks(self, tokens: int) -> list[Chunk]:
        """The steps of a prompt; the last tokens of one with sparse steps see all of it."""
        longest = max(self.seqlens)
        if self.choice is None:
            return list(plan_chunks(tokens, 0, self.seqlens, self.capacity))
        dense = [length for length in self.seqlens if length != longest]
        return list(plan_chunks(tokens, 0, dense, self.capacity, sparse=longest))

    def prefill_device_ns(self, tokens: int, *, exact: bool = True) -> float:
        """The device's part of the time to first token: the prompt's chunks (`plan_chunks`) one after the
        other, or, where the stages of a pipeline work on several, the last one's step behind what each chunk
        before it takes in the slowest stage.

        Steps of one length differ only in the cached rows they read; when there are more than eight, or when
        not `exact`, see `between`.
        """
        chunks = self._chunks(tokens)
        exact = exact and len(chunks) <= _EXACT_STEPS
        if self.stages and len(chunks) > 1:
            *before, last = chunks
            end = (
                self.step(last.seqlen, last.start).total_ns
                if exact
                else self.between(last.seqlen, last.start)
            )
            return sum(self._in_slowest_stage(c) for c in before) + end
        return sum(
            self.step(c.seqlen, c.start, c is chunks[-1]).total_ns
            if exact
            else self.between(c.seqlen, c.start, c is chunks[-1])
            for c in chunks
        )

    def _in_slowest_stage(self, chunk: Chunk) -> float:
        """What one more chunk costs when the stages are all at work."""
        if chunk.seqlen not in self._overlapped:
            self._overlapped[chunk.seqlen] = OverlappedChunks(
                self.programs(chunk.seqlen),
                self.machine,
                self.capacity,
                stages=self.stages,
                bends=self._bends(chunk.seqlen),
                wanted=False,
            )
        return self._overlapped[chunk.seqlen].ns(chunk.start)

    def _bends(self, seqlen: int) -> tuple[int, ...]:
        """Positions behind which a step's time goes on along another line."""
        return (self.choice.bend,) if self.choice is not None and seqlen == max(self.seqlens) else ()

    def between(self, seqlen: int, pos: int, wanted: bool = True) -> float:
        """A step's ns at a position, between those simulated at the nearest of a few positions below and
        above.

        What is read of the cache grows in proportion to `pos`, by whole blocks: Qwen2.5-7B on 4 dies is
        within 0.1 % of the simulated step everywhere.  In a cache of more than 32,768 tokens few layers are
        simulated as well (`LongSteps`).
        """
        if self.capacity > LONG:
            key = (seqlen, wanted or not self._has_tail(seqlen))
            if key not in self._long_steps:
                self._long_steps[key] = LongSteps(
                    self.programs(seqlen),
                    self.machine,
                    self.capacity,
                    bends=self._bends(seqlen),
                    wanted=key[1],
                )
            return self._long_steps[key].ns(pos)
        spacing = -(-self.capacity // (_GRID_STEPS * _GRID)) * _GRID
        low = pos // spacing * spacing
        high = min(low + spacing, self.capacity - seqlen)
        if pos in (low, high) or high <= low:
            return self.step(seqlen, pos, wanted).total_ns
        share = (pos - low) / (high - low)
        ends = [self.step(seqlen, end, wanted).total_ns for end in (low, high)]
        return ends[0] * (1 - share) + ends[1] * share

    def interval(self, figure: Callable[[Predictor], float]) -> Interval:
        """A figure of this predictor with its bounds: `interval(lambda p: p.tpot_ns(100))`."""
        bounds = {name for name, _ in self.machine.assumed()}
        fast = self.machine.with_bounds({n: _high_is_fast(n) for n in bounds})
        slow = self.machine.with_bounds({n: not _high_is_fast(n) for n in bounds})
        ends = [figure(self.on(fast)), figure(self), figure(self.on(slow))]
        return Interval(*ends)

    def sensitivities(self, figure: Callable[[Predictor], float]) -> list[Sensitivity]:
        """Which assumed constant moves a figure how far, the most important first."""
        found = []
        for name, constant in self.machine.assumed():
            low, high = (figure(self.on(self.machine.with_bounds({name: end}))) for end in (False, True))
            found.append(Sensitivity(name, constant, low, high))
        return sorted(found, key=lambda s: -s.swing)


def _high_is_fast(name: str) -> bool:
    """Rates, efficiencies and counts help; times, cycles and overheads hurt."""
    return not name.endswith(("_ns", "_us", "_cycles", "overhead_bytes"))
