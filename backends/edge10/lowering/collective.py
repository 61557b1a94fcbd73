"""Collectives: one command per die, from where the operand lies to where the result shall lie."""

from __future__ import annotations

import math

from tyir.backends.edge10.lowering.context import Lowering, Place, element_bytes
from tyir.dialects import edge10
from tyir.dialects.dist import AllGather, AllReduce, Recv, Send
from tyir.dialects.ty import tensor_type
from tyir.ir import Value

__all__ = ["lower_all_gather", "lower_all_reduce", "lower_recv", "lower_send"]


def _addresses(low: Lowering, *places: Place | None) -> list[Value]:
    return [low.address(p) for p in places if p is not None and not p.in_sram]


def _source(place: Place | None) -> tuple[int, str]:
    """Offset and memory of the operand; a die that has nothing to give takes part all the same."""
    return (0, "none") if place is None else (place.offset, place.memory)


def lower_all_reduce(op: AllReduce, low: Lowering) -> None:
    """`dist.all_reduce`."""
    source, target, t = None if op.x is None else low.place(op.x), low.place(op.out), tensor_type(op.out)
    offset, memory = _source(source)
    low.emitter.emit(
        edge10.AllReduce,
        *_addresses(low, source, target),
        source=offset,
        source_memory=memory,
        destination=target.offset,
        destination_memory=target.memory,
        nbytes=t.nbytes,
        element=t.element,
        dies=op.dies,
        group=op.group,
        reads=source.access(t.nbytes, write=False) if source else [],
        writes=target.access(t.nbytes, write=True),
    )


def lower_all_gather(op: AllGather, low: Lowering) -> None:
    """`dist.all_gather`: rows are everything before the axis, the pieces everything from it on."""
    source, target, t = None if op.x is None else low.place(op.x), low.place(op.out), tensor_type(op.out)
    shape = t.static_shape
    rows, inner = math.prod(shape[: op.axis]), math.prod(shape[op.axis + 1 :]) * element_bytes(op.out)
    sizes = tuple(s * inner for s in op.sizes)
    offset, memory = _source(source)
    die = low.die if op.dies is None else op.dies.index(low.die)
    low.emitter.emit(
        edge10.AllGather,
        *_addresses(low, source, target),
        source=offset,
        source_memory=memory,
        destination=target.offset,
        destination_memory=target.memory,
        rows=rows,
        sizes=sizes,
        die=die,
        dies=op.dies,
        writes=target.access(t.nbytes, write=True),
        reads=source.access(rows * sizes[die], write=False) if source else [],
    )


def lower_send(op: Send, low: Lowering) -> None:
    """`dist.send`."""
    place, nbytes = low.place(op.x), tensor_type(op.x).nbytes
    low.emitter.emit(
        edge10.Send,
        *_addresses(low, place),
        source=place.offset,
        source_memory=place.memory,
        nbytes=nbytes,
        targets=op.targets,
        tag=op.tag,
        reads=place.access(nbytes, write=False),
    )


def lower_recv(op: Recv, low: Lowering) -> None:
    """`dist.recv`."""
    place, nbytes = low.place(op.out), tensor_type(op.out).nbytes
    low.emitter.emit(
        edge10.Recv,
        *_addresses(low, place),
        destination=place.offset,
        destination_memory=place.memory,
        nbytes=nbytes,
        peer=op.source,
        tag=op.tag,
        writes=place.access(nbytes, write=True),
    )
