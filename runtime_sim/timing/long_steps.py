"""How long a step takes in a long context, without unrolling it: of the layers that are alike one is
simulated, and of the positions a few.

    step(pos) = step with one layer of each kind + (layers of the kind - 1) x what one more of it adds
    step(pos) between simulated positions, and beyond the last: on the line through the two nearest

A step of 28 layers at position 1,000,000 has ten million commands; here some hundred thousand are simulated,
whatever the position.  Both rules are checked by simulating what they predict: a third layer, a position
between and one twice as far as the last.  What is off by more than `TOLERANCE` is refused, not rounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Final

from tyir.attributes import IntegerAttr
from tyir.diagnostics import TyirError
from tyir.dialects.func import Call
from tyir.runtime_sim.timing.engine import simulate, simulate_chunks
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine

__all__ = ["LONG", "TOLERANCE", "LongSteps", "OverlappedChunks"]

LONG: Final = 1 << 15  # caches of more tokens than these are not simulated all over
TOLERANCE: Final = 0.005
_KNOTS: Final = (0, 1 << 12, 1 << 14, 1 << 16)
_CHECKS: Final = (1 << 15, 1 << 17)


class LongSteps:
    """The times of one program's steps at any position of a cache of `capacity` tokens.

    `standing_for`: how many layers a layer of the program stands for, one where it is not said.  `bends`:
    positions behind which other lines go on than before.  `wanted`: whether a row of the results is.
    """

    def __init__(
        self,
        programs: Sequence[EdgeProgram],
        machine: Machine,
        capacity: int,
        standing_for: Mapping[int, int] | None = None,
        bends: Sequence[int] = (),
        wanted: bool = True,
    ) -> None:
        self.bends, self.wanted = bends, wanted
        self.programs, self.machine, self.standing_for = programs, machine, standing_for or {}
        self._last = max(capacity - programs[0].seqlen, 0)
        self._known: dict[tuple[int, frozenset[int]], float] = {}
        self._added: dict[int, float] = {}

    def ns(self, pos: int) -> float:
        """A step's ns at a position; `TyirError` where the rules do not hold."""
        if pos in self._knots:
            return self._knots[pos]
        low, high = next(((a, b) for a, b in pairwise(self._knots) if a <= pos <= b), tuple(self._knots)[-2:])
        share = (pos - low) / (high - low)
        return self._knots[low] * (1 - share) + self._knots[high] * share

    @cached_property
    def kinds(self) -> list[list[int]]:
        """The layers' numbers, those together whose commands are the same on every die."""
        found: dict[int, list[tuple[int, str]]] = {}
        for die, program in enumerate(self.programs):
            for call in program.functions[program.entry].body:
                number = call.attributes.get("tyir.layer")
                if isinstance(call, Call) and isinstance(number, IntegerAttr):
                    found.setdefault(number.value, []).append((die, call.callee.leaf))
        kinds: dict[tuple[tuple[int, str], ...], list[int]] = {}
        for layer in sorted(found):
            kinds.setdefault(tuple(found[layer]), []).append(layer)
        return list(kinds.values())

    @cached_property
    def _knots(self) -> dict[int, float]:
        knots = sorted({*_KNOTS, *self.bends})
        inside = [pos for pos in knots if pos < self._last]
        ends = inside if len(inside) == len(knots) else [*inside, self._last]
        self._knots = {pos: self._of_all_layers(pos) for pos in dict.fromkeys(ends)}
        for pos in _CHECKS if len(self._knots) > 1 else ():
            if pos < self._last:
                self._check(f"at position {pos}", self.ns(pos), self._of_all_layers(pos))
        return self._knots

    def count(self, layers: Sequence[int]) -> int:
        """How many layers these stand for."""
        return sum(self.standing_for.get(layer, 1) for layer in layers)

    def _of_all_layers(self, pos: int) -> float:
        """From one layer of each kind, and one more; the first position is where a third is tried too."""
        one = frozenset(layers[0] for layers in self.kinds)
        total = base = self._simulated(pos, one)
        for layers in self.kinds:
            if len(layers) > 1:
                added = self._simulated(pos, one | {layers[1]}) - base
                total += (self.count(layers) - 1) * added
                if len(layers) > 2 and not self._added.get(layers[0]):
                    self._added[layers[0]] = added
                    third = self._simulated(pos, one | set(layers[1:3]))
                    self._check(f"with a third layer like layer {layers[0]}", base + 2 * added, third)
        return total

    def _simulated(self, pos: int, layers: Iterable[int]) -> float:
        key = pos, frozenset(layers)
        if key not in self._known:
            self._known[key] = simulate(self.programs, self.machine, pos, key[1], self.wanted).total_ns
        return self._known[key]

    @staticmethod
    def _check(where: str, predicted: float, simulated: float) -> None:
        if abs(predicted - simulated) > TOLERANCE * simulated:
            raise TyirError(
                f"a step {where} takes {simulated * 1e-6:.3f} ms, a straight line through others says"
                f" {predicted * 1e-6:.3f}: long contexts cannot be simulated from a few layers and positions",
                help="simulate a cache of at most 32768 tokens: tyir-compile --max-kv 32768",
            )


class OverlappedChunks(LongSteps):
    """How long one more chunk of a prompt takes when the pipeline stages work on several chunks at a time:
    the slowest stage's time, where nothing makes the first stage wait for the last.
    """

    def __init__(
        self,
        programs: Sequence[EdgeProgram],
        machine: Machine,
        capacity: int,
        standing_for: Mapping[int, int] | None = None,
        stages: int = 1,
        bends: Sequence[int] = (),
        wanted: bool = True,
    ) -> None:
        super().__init__(programs, machine, capacity, standing_for, bends, wanted)
        self._chunks = stages + 1  # so many are under way before one more costs as much as all that follow
        self._last = max(capacity - (self._chunks + 1) * programs[0].seqlen, 0)

    def _of_all_layers(self, pos: int) -> float:
        """One layer of each kind, and one more of each: stages have them at the same time."""
        at = [
            self._simulated(pos, {n for layers in self.kinds for n in layers[: more + 1]})
            for more in range(2)
        ]
        most = max(self.count(layers) for layers in self.kinds)
        return at[0] + (most - 1) * (at[1] - at[0])

    def _simulated(self, pos: int, layers: Iterable[int]) -> float:
        key = pos, frozenset(layers)
        if key not in self._known:
            chunks = [pos + number * self.programs[0].seqlen for number in range(self._chunks + 1)]
            all_but_one, all_of_them = (
                simulate_chunks(self.programs, self.machine, of, key[1], self.wanted)
                for of in (chunks[:-1], chunks)
            )
            self._known[key] = all_of_them - all_but_one + self.machine.sync.launch_us * 1000
        return self._known[key]
