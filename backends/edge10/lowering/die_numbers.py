"""What programs of dies with equal shares differ by: which rows of the embedding a die holds, which logits
are its own, whom it meets or hands its rows on to, its number.

    die 0: ty.embedding {offset = 0}       -->  edge10.gather {first = 0}, ...
    die 1: ty.embedding {offset = 38016}   -->  the same commands with {first = 38016}

The lowering hands these numbers on and decides nothing by them.  So where two sources are the same without
them (`without_numbers`), the program of one becomes the other's by writing its numbers in (`renumber`): most
boards have dies of one kind, or two.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Final

from tyir.attributes import IntegerAttr
from tyir.backends.edge10.lowering.layers import reached
from tyir.dialects import dist, edge10, ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func
from tyir.execution.entry_points import entry_point
from tyir.ir import Op
from tyir.printer import print_op
from tyir.types import i64

__all__ = ["DieNumbers", "renumber", "without_numbers"]

_DIE: Final = "tyir.die"
# Which part of a whole a result is, and the host's code for an op: for others than the lowering.
_NOTES: Final = ("tyir.shard", "tyir.kernel")
# Ops that have such a number, and the property of it.
_NUMBERS: Final[dict[type[Op], str]] = {
    ty.Embedding: "offset",
    ty.TopKCandidates: "offset",
    dist.AllReduce: "dies",
    dist.AllGather: "dies",
    dist.Send: "targets",
    dist.Recv: "source",
}
# The commands that have the same number, and the property of it; those of `edge10.top_k` count from there.
_HANDED_ON: Final[dict[type[edge10.Command], tuple[type[Op], str]]] = {
    edge10.Gather: (ty.Embedding, "first"),
    edge10.TopK: (ty.TopKCandidates, "first"),
    edge10.AllReduce: (dist.AllReduce, "dies"),
    edge10.AllGather: (dist.AllGather, "dies"),
    edge10.Send: (dist.Send, "targets"),
    edge10.Recv: (dist.Recv, "peer"),
}
_COUNTS: Final = edge10.TopK
_OF_OTHERS_TOO: Final = (edge10.Gather, edge10.TopK)  # made of ops without such a number as well


@dataclass(frozen=True)
class DieNumbers:
    """A die's name and number, and the numbers of its program's ops in their order."""

    name: str
    die: int
    of_ops: tuple[tuple[type[Op], Any], ...]

    @classmethod
    def of(cls, die: Module, seqlen: int) -> DieNumbers:
        """Those of a die's program of `seqlen` tokens."""
        found = [
            (type(op), getattr(op, _NUMBERS[type(op)]))
            for function in _functions(die, seqlen)
            for op in function.walk()
            if type(op) in _NUMBERS
        ]
        number = die.attributes.get(_DIE)
        return cls(str(die.sym_name), number.value if isinstance(number, IntegerAttr) else 0, tuple(found))


def without_numbers(die: Module, seqlen: int) -> Hashable:
    """All else that the lowering of a die's program sees, as a key; its `repr` is another's only if it is
    the same.
    """
    texts = []
    for function in _functions(die, seqlen):
        copy = function.clone()
        for op in copy.walk():
            if isinstance(op, (dist.AllReduce, dist.AllGather)) and op.dies is not None:
                op.dies = (len(op.dies),)  # that there are some is no number
            elif type(op) in _NUMBERS:
                op.properties = op.properties.without(_NUMBERS[type(op)])
            if not isinstance(op, Call):  # whose attributes its command has
                op.attributes = op.attributes.without(*_NOTES)
        texts.append(print_op(copy))
    others = [
        f"{op.sym_name} {op.type} {op.attributes}" if isinstance(op, ty.Param) else print_op(op)
        for op in die.body
        if not isinstance(op, Func)
    ]  # of parameters: what their bytes are made from is the die's own matter
    return (seqlen, str(die.attributes.without(_DIE)), *texts, *others)


def renumber(program: Module, old: DieNumbers, new: DieNumbers) -> bool:
    """Make the program of one die that of another whose source is the same `without_numbers`; False, and
    nothing changed, where which command has which number cannot be told.
    """
    replaced: dict[type[Op], dict[Any, Any]] = {kind: {} for kind in _NUMBERS}
    for (kind, before), (_, after) in zip(old.of_ops, new.of_ops, strict=True):
        if replaced[kind].setdefault(before, after) != after:
            return False
    ranked = replaced[_HANDED_ON[_COUNTS][0]]
    if len(ranked) > 1:
        return False
    distance = sum(after - before for before, after in ranked.items())
    for op in program.walk():
        if not isinstance(op, edge10.Command) or type(op) not in _HANDED_ON:
            continue
        kind, name = _HANDED_ON[type(op)]
        if (
            isinstance(op, _OF_OTHERS_TOO)
            and getattr(op.attributes.get("tyir.source"), "value", "") != kind.name
        ):
            continue
        value = getattr(op, name)
        setattr(op, name, value + distance if isinstance(op, _COUNTS) else replaced[kind][value])
        if isinstance(op, edge10.AllGather):
            op.die = new.die if op.dies is None else op.dies.index(new.die)
    program.sym_name = new.name
    program.set_attribute(_DIE, IntegerAttr(new.die, i64))
    return True


def _functions(die: Module, seqlen: int) -> list[Func]:
    return reached(die, entry_point(die, seqlen))
