"""Collectives: one command per die, from where the operand lies to where the result shall lie."""

from __future__ import annotations

import math

from tyir.backends.edge10.lowering.context import Lowering, Place, element_bytes
from tyir.dialects import edge10
from tyir.dialects.dist import AllGather, AllReduce, Recv, Send
from tyir.dialects.ty import tensor_type
from tyir.ir import Value

__all__ = ["lower_all_gather", "lower_all_reduce", "lower_recv", "lower_send"]


def _addresses(lowering: Lowering, *places: Place | None) -> list[Value]:
    return [lowering.address(p) for p in places if p is not None and not p.in_sram]


def _source(place: Place | None) -> tuple[int, str]:
    """Offset and memory of the operand; a die that has nothing to give takes part all the same."""
    return (0, "none") if place is None else (place.offset, place.memory)


def lower_all_reduce(op: AllReduce, lowering: Lowering) -> None:
    """`dist.all_reduce`."""
    source, target, t = (
        None if op.x is None else lowering.place(op.x),
        lowering.place(op.out),
        tensor_type(op.out),
    )
    offset, memory = _source(source)
    lowering.emitter.emit(
        edge10.AllReduce,
        *_addresses(lowering, source, target),
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


def lower_all_gather(op: AllGather, lowering: Lowering) -> None:
    """`dist.all_gather`: rows are everything before the axis, the pieces everything from it on."""
    source, target, t = (
        None if op.x is None else lowering.place(op.x),
        lowering.place(op.out),
        tensor_type(op.out),
    )
    shape = t.static_shape
    rows, inner = math.prod(shape[: op.axis]), math.prod(shape[op.axis + 1 :]) * element_bytes(op.out)
    sizes = tuple(s * inner for s in op.sizes)
    offset, memory = _source(source)
    die = lowering.die if op.dies is None else op.dies.index(lowering.die)
    lowering.emitter.emit(
        edge10.AllGather,
        *_addresses(lowering, source, target),
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


def lower_send(op: Send, lowering: Lowering) -> None:
    """`dist.send`."""
    place, nbytes = lowering.place(op.x), tensor_type(op.x).nbytes
    lowering.emitter.emit(
        edge10.Send,
        *_addresses(lowering, place),
        source=place.offset,
        source_memory=place.memory,
        nbytes=nbytes,
        targets=op.targets,
        tag=op.tag,
        reads=place.access(nbytes, write=False),
    )


def lower_recv(op: Recv, lowering: Lowering) -> None:
    """`dist.recv`."""
    place, nbytes = lowering.place(op.out), tensor_type(op.out).nbytes
    lowering.emitter.emit(
        edge10.Recv,
        *_addresses(lowering, place),
        destination=place.offset,
        destination_memory=place.memory,
        nbytes=nbytes,
        peer=op.source,
        tag=op.tag,
        writes=place.access(nbytes, write=True),
    )
