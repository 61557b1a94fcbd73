"""Writing commands into a block: the emitter adds the tokens a command must wait for, the location of the op
it comes from, and that op's name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from tyir.attributes import DictAttr, StringAttr, SymbolRefAttr
from tyir.backends.edge10.lowering.dependences import Access, Tracker
from tyir.dialects import edge10
from tyir.ir import Block, Op, Region, Value
from tyir.layers import path_of
from tyir.location import UNKNOWN, Location
from tyir.types import i64

__all__ = ["Emitter"]


@functools.lru_cache(maxsize=256)
def source_attribute(source: str) -> DictAttr:
    """What a command says of the op that it implements."""
    return DictAttr({"tyir.source": StringAttr(source)}) if source else DictAttr()


class Emitter:
    """Appends to one block.

    `source` and `loc` describe the op being lowered and are put on every command.
    """

    def __init__(self, block: Block, tracker: Tracker, entry: Emitter | None = None) -> None:
        self.block = block
        self.tracker = tracker
        self.loc: Location = UNKNOWN if entry is None else entry.loc
        self.source: str = "" if entry is None else entry.source
        self.path: str = "" if entry is None else entry.path
        self._paths: dict[Op, str] = {} if entry is None else entry._paths
        self._outer = entry
        self._addresses: dict[str, Value] = {}
        self._positions: dict[int, Value] = {}
        self._head: Op | None = None  # the last of the values at the block's beginning

    def begin(self, op: Op, beside: Op | None = None) -> None:
        """The op that the next commands implement, and the op whose commands they run beside: their times are
        not added up.
        """
        leader = beside or op
        if leader not in self._paths:
            self._paths[leader] = f"{path_of(leader)} {len(self._paths)}"
        self.loc, self.source, self.path = op.loc, op.name, self._paths[leader]

    def nested(self, block: Block, tracker: Tracker, turns: int = 1) -> Emitter:
        """An emitter for the body of a loop, of about so many turns where that is a matter of a price."""
        return Emitter(block, tracker, self)

    # -- values that cost nothing
    # ---------------------------------------------------------------------------------
    def address_of(self, symbol: str) -> Value:
        """The address of a buffer, one value per function."""
        if self._outer is not None:
            return self._outer.address_of(symbol)
        if symbol not in self._addresses:
            self._addresses[symbol] = self._first(edge10.AddressOf(symbol=SymbolRefAttr(symbol)))
        return self._addresses[symbol]

    def position(self, sequence: int = 0) -> Value:
        """The register `pos` of a sequence."""
        if self._outer is not None:
            return self._outer.position(sequence)
        if sequence not in self._positions:
            self._positions[sequence] = self._first(edge10.Register(register="pos", sequence=sequence))
        return self._positions[sequence]

    def wanted(self) -> Value:
        """The register `wanted`."""
        return self._first(edge10.Register(register="wanted"))

    def _first(self, op: Op) -> Value:
        self.block.insert(op, before=self.block.first_op if self._head is None else self._head.next_op)
        self._head = op
        return op.result

    def affine(
        self,
        inputs: Sequence[Value],
        coefficients: Sequence[int],
        constant: int = 0,
        divisor: int = 1,
        low: int = 0,
        high: int | None = None,
    ) -> Value:
        op = edge10.Affine(
            inputs=tuple(inputs),
            coefficients=tuple(coefficients),
            constant=constant,
            divisor=divisor,
            low=low,
            high=high,
        )
        return self.block.append(op).result

    def offset(self, base: Value, index: Value, scale: int) -> Value:
        return self.block.append(edge10.Offset(base, index, scale=scale)).result

    def join(self, tokens: Iterable[Value]) -> Value:
        """One token for several."""
        unique = list(dict.fromkeys(tokens))
        if len(unique) == 1:
            return unique[0]
        return self.block.append(edge10.Join(tokens=tuple(unique))).result

    # -- commands
    # -------------------------------------------------------------------------------------------------
    def emit(
        self,
        command: type[edge10.Command],
        *operands: Value,
        reads: Sequence[Access] = (),
        writes: Sequence[Access] = (),
        **properties: Any,
    ) -> Value:
        """Append a command after everything it depends on; returns its token."""
        attributes = source_attribute(self.source)
        make: Callable[..., edge10.Command] = command  # each command has properties of its own
        unit = command.unit_with(properties)
        accesses = [*reads, *writes]
        tokens = self.tracker.waits(accesses, unit)
        token = self.block.append(
            make(args=(*operands, *tokens), loc=self.loc, attributes=attributes, **properties)
        ).result
        self.tracker.record(accesses, token, unit)
        return token

    def repeated(self, key: Hashable, write: Callable[[], None]) -> None:
        """Commands that are as those of the same key before, but for where what they touch lies; nothing but
        a price is saved by that.
        """
        write()

    def loop(self, low: Value, high: Value, body: Block, inner: Tracker) -> None:
        """Append a loop whose body has been written under `inner`; the loop stands in this block for all the
        accesses of its body.
        """
        log = list(dict.fromkeys(inner.log))
        slot_accesses = [[a for a in log if slot.holds(a)] for slot in inner.slots]
        given = [a for a in log if a.space in inner.given]
        others = [a for a in log if a not in given and not any(a in group for group in slot_accesses)]
        initial = [
            self.join(self.tracker.waits(accesses, None) or self._nothing())
            for accesses in (*slot_accesses, others)
        ]
        op = edge10.For(
            args=(low, high, *initial),
            body_region=Region([body]),
            result_types=[edge10.TOKEN] * len(initial),
            loc=self.loc,
        )
        self.block.append(op)
        for accesses, token in zip((*slot_accesses, [*others, *given]), op.results):
            self.tracker.record(accesses, token, None)

    def optional(self, body: Block, inner: Tracker) -> None:
        """Append a body that has been written under `inner`, which runs where a row is wanted.  Its slots of
        the weight stream and everything else begin and end with tokens, as those of a called function.
        """
        tokens = self._all_tokens(self.tracker)
        op = edge10.For(
            args=(self.affine((), ()), self.wanted(), *tokens),
            body_region=Region([body]),
            result_types=[edge10.TOKEN] * len(tokens),
            loc=self.loc,
        )
        self.block.append(op)
        self.tracker.reset(op.results[:-1], op.results[-1])

    def end_optional(self) -> None:
        """End the body of `optional`: its tokens for what follows."""
        self.block.append(edge10.Yield(tokens=tuple(self._all_tokens(self.tracker))))

    def _all_tokens(self, tracker: Tracker) -> list[Value]:
        slots, rest = tracker.finish()
        return [self.join(tokens) for tokens in (*slots, rest)]

    def _nothing(self) -> list[Value]:
        return [self.block.append(edge10.Join(tokens=())).result]

    @staticmethod
    def body(count: int) -> Block:
        """A loop body's block: the index and `count` carried tokens."""
        return Block([i64, *[edge10.TOKEN] * count], ["i", *[f"t{n}" for n in range(count)]])
