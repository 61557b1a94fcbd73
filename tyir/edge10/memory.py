"""The memory of a command program: that its DRAM buffers lie inside the die's DRAM, apart from each other
and, if they are kept between steps, where every program of the die expects them; and how much of SRAM its
commands write."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from tyir.diagnostics import Diagnostic, did_you_mean
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.targets.machine import Machine

__all__ = ["KEPT", "buffer_problems", "program_problems", "shared_problems", "sram_bytes"]

KEPT: Final = (
    "weight",
    "kv",
)  # kinds of buffers that outlive a step: the programs of all sequence lengths share them


def program_problems(module: Module, machine: Machine) -> Iterator[Diagnostic]:
    """`buffer_problems`, and addresses taken of buffers that the program does not have."""
    buffers = {b.sym_name: b for b in module.body if isinstance(b, edge10.Buffer)}
    yield from buffer_problems(buffers.values(), machine)
    for op in module.walk_type(edge10.AddressOf):
        if op.symbol.leaf not in buffers:
            yield Diagnostic(
                f"there is no buffer @{op.symbol.leaf}",
                where=str(op.loc),
                help=did_you_mean(op.symbol.leaf, buffers),
            )


def buffer_problems(buffers: Iterable[edge10.Buffer], machine: Machine) -> Iterator[Diagnostic]:
    """Buffers outside the die's DRAM, and buffers that share bytes; every buffer lives for the whole step."""
    ordered = sorted(buffers, key=lambda b: (b.address, b.nbytes))
    last: edge10.Buffer | None = None
    for buffer in ordered:
        end = buffer.address + buffer.nbytes
        if buffer.address < 0 or end > machine.dram.capacity_bytes:
            yield Diagnostic(
                f"buffer @{buffer.sym_name} at {buffer.address}..{end} lies outside the die's"
                f" {machine.dram.capacity_bytes} bytes of DRAM",
                help="use more dies, a smaller max_kv, or quantised weights",
            )
        if last is not None and buffer.nbytes and buffer.address < last.address + last.nbytes:
            yield Diagnostic(
                f"buffers @{last.sym_name} at {last.address}..{last.address + last.nbytes} and"
                f" @{buffer.sym_name} at {buffer.address}..{end} overlap",
                help="every buffer of a program needs its own addresses",
            )
        if last is None or end > last.address + last.nbytes:
            last = buffer


def shared_problems(first: Sequence[edge10.Buffer], second: Sequence[edge10.Buffer]) -> Iterator[Diagnostic]:
    """What is kept between the steps of two programs of one die (two sequence lengths) but lies elsewhere in
    the other, or under a buffer of the other.
    """
    theirs = {b.sym_name: b for b in second}
    for buffer in first:
        other = theirs.get(buffer.sym_name)
        if buffer.kind in KEPT and other is not None and other.address != buffer.address:
            yield Diagnostic(
                f"buffer @{buffer.sym_name} is kept between steps, but lies at {buffer.address} in one"
                f" program and at {other.address} in another of the same die",
                help="compile all sequence lengths together",
            )
    for mine, others in ((first, second), (second, first)):
        yield from _overwritten(
            [b for b in mine if b.kind in KEPT and b.nbytes], [b for b in others if b.nbytes]
        )


def _overwritten(kept: Sequence[edge10.Buffer], others: Sequence[edge10.Buffer]) -> Iterator[Diagnostic]:
    """Buffers of another program that share bytes with one that is kept, and are not that one; neither list
    has overlaps of its own.
    """
    ordered = sorted(others, key=lambda b: b.address)
    ends = [b.address + b.nbytes for b in ordered]
    for buffer in kept:
        for over in ordered[bisect_left(ends, buffer.address + 1) :]:
            if over.address >= buffer.address + buffer.nbytes:
                break
            if over.sym_name != buffer.sym_name:
                yield Diagnostic(
                    f"buffer @{over.sym_name} of one program lies over @{buffer.sym_name}, which another"
                    " program of the die keeps between steps",
                    help="compile all sequence lengths together",
                )


def sram_bytes(module: Module) -> int:
    """SRAM that a program needs: up to the last byte that one of its commands may write."""
    commands = (op for op in module.walk() if isinstance(op, edge10.Command))
    return max((end for op in commands for _, end in op.sram_writes()), default=0)
