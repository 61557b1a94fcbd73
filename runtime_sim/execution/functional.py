"""What the commands compute, on modelled memories; no time in it.

f16 data, f32 accumulation, exactly as the commands of `tyir.dialects.edge10` say.  Dies run in turn from
collective to collective; a collective combines the operands of all dies in die order.  The caches stay in
each die's DRAM between steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.diagnostics import TyirError
from tyir.dialects import edge10
from tyir.dialects.kv import rows_of
from tyir.edge10.memory import KEPT, shared_problems
from tyir.execution.lockstep import Layout, Links, Meet, Recv, Request, Send, drive
from tyir.execution.optional_tail import rows_wanted
from tyir.runtime_sim.execution.command_trace import Access, Observer
from tyir.runtime_sim.execution.memory import DieMemory, Dram, RaceDetector
from tyir.runtime_sim.execution.vector_functions import (
    block_weights,
    score_block,
    softmax_block,
    top_k,
    vector_function,
)
from tyir.runtime_sim.timing.program import Command, EdgeProgram
from tyir.runtime_sim.timing.unroll import Position, position_of
from tyir.targets.machine import Machine
from tyir.types import storage_dtype

__all__ = ["FunctionalDie", "method_of", "run_step"]

Array = npt.NDArray[Any]


class FunctionalDie:
    """One die: its program and memories.

    `weights` maps buffer names to packed arrays (`tyir.execution.storage.pack`).  With `check`, bytes never
    written and races are errors (bounds always are). `observer` is told of every command after it
    (`command_trace`).
    """

    observer: Observer | None = None

    def __init__(
        self, program: EdgeProgram, weights: Mapping[str, Array], machine: Machine, *, check: bool = True
    ) -> None:
        self.program = program
        self.machine = machine
        self.check = check
        self.memory = DieMemory(
            Dram(program.buffers.values(), weights),
            int(machine.sram.capacity_bytes),
            machine.accumulator_bytes,
        )
        self._races = RaceDetector()
        self.loaded_bytes = 0
        self.macs = 0
        self.pos: Position = 0
        self._accesses: list[Access] = []

    def share_memory(self, other: FunctionalDie) -> None:
        """Use another program's caches and weights (another sequence length of the same die).

        `TyirError` where the two would not find them at the same place.
        """
        if problems := list(
            shared_problems(list(self.program.buffers.values()), list(other.program.buffers.values()))
        ):
            raise TyirError(problems)
        theirs = {b.sym_name: i for i, b in enumerate(other.memory.dram.buffers)}
        mine = self.memory.dram
        for number, buffer in enumerate(mine.buffers):
            if buffer.kind in KEPT and buffer.sym_name in theirs:
                source = theirs[buffer.sym_name]
                mine.stored[number] = other.memory.dram.stored[source]

    def step(self, pos: Position, wanted: bool = True) -> Generator[tuple[Command, Array], Array, None]:
        """Run one step: yields (collective, the die's operand as bytes) and is sent what the collective
        gives, as bytes.  `wanted`: whether a row of its results is.
        """
        self.pos = pos
        self._races = RaceDetector()
        self.memory.sram.written[:] = False
        self.memory.acc.written[:] = False
        for command in self.program.expand(pos, wanted=wanted):
            if self.check:
                self._races.begin(command)
            if command.unit == "d2d":
                operand = self._collective_operand(command)
                combined = yield command, operand
                self._collective_result(command, combined)
            else:
                getattr(self, method_of(command.op))(command)
            if self.observer is not None:
                self.observer(self.program.die, command, self._accesses)
                self._accesses = []

    # -- memory access: every byte a command touches goes through these
    # -------------------------------------------
    def sram(
        self,
        command: Command,
        offset: int,
        shape: Sequence[int],
        dtype: Any,
        strides: Sequence[int] | None = None,
        write: bool = False,
    ) -> Array:
        """A view of SRAM as an array of `shape`, C-contiguous unless byte `strides` are given."""
        return self._array(self.memory.sram, "SRAM", command, offset, shape, np.dtype(dtype), strides, write)

    def acc(
        self, command: Command, offset: int, shape: Sequence[int], strides: Sequence[int], write: bool = False
    ) -> Array:
        return self._array(
            self.memory.acc, "the accumulators", command, offset, shape, np.dtype(np.float32), strides, write
        )

    def _array(
        self,
        memory: Any,
        name: str,
        command: Command,
        offset: int,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        strides: Sequence[int] | None,
        write: bool,
    ) -> Array:
        strides = _dense(shape, dtype.itemsize) if strides is None else strides
        extent = _extent(shape, strides, dtype.itemsize)
        data = memory.view(offset, extent, command)
        if self.check and extent:
            self._note(
                command,
                name,
                memory.written[offset : offset + extent],
                shape,
                strides,
                dtype.itemsize,
                offset,
                write,
            )
        array = (
            np.ndarray(tuple(shape), dtype, buffer=data, strides=tuple(strides))
            if extent
            else np.zeros(tuple(shape), dtype)
        )
        return self._observed(name, offset, array, write)

    def dram(
        self,
        command: Command,
        address: int,
        shape: Sequence[int],
        strides: Sequence[int],
        write: bool = False,
    ) -> Array:
        """A view of DRAM as bytes [.., row bytes]; it must lie in one buffer."""
        extent = _extent(shape, strides, 1)
        number, offset = self.memory.dram.find(address, extent, command)
        buffer = self.memory.dram.buffers[number]
        if write and buffer.kind in ("weight", "input"):
            raise TyirError(
                f"{command.describe()} writes @{buffer.sym_name}, which is a {buffer.kind} buffer"
            )
        stored = self.memory.dram.stored[number]
        data, written = stored.data[offset : offset + extent], stored.written
        if self.check and buffer.kind != "weight" and extent:
            marks = written[offset : offset + extent] if written is not None else None
            self._note(command, f"DRAM buffer @{buffer.sym_name}", marks, shape, strides, 1, offset, write)
        elif write and written is not None:
            written[offset : offset + extent] = True
        array = (
            np.ndarray(tuple(shape), np.uint8, buffer=data, strides=tuple(strides))
            if extent
            else np.zeros(tuple(shape), np.uint8)
        )
        return self._observed(f"@{buffer.sym_name}", offset, array, write)

    def _observed(self, memory: str, offset: int, array: Array, write: bool) -> Array:
        if self.observer is not None:
            self._accesses.append(Access(memory, offset, array, write))
        return array

    def _note(
        self,
        command: Command,
        name: str,
        marks: npt.NDArray[np.bool_] | None,
        shape: Sequence[int],
        strides: Sequence[int],
        itemsize: int,
        offset: int,
        write: bool,
    ) -> None:
        """Check that what is read has been written, mark what is written, and look for races, row by row of
        the innermost contiguous run.
        """
        extent = _extent(shape, strides, itemsize)
        self._races.access(name, offset, offset + extent, write, command)
        if marks is None:
            return
        run = shape[-1] * strides[-1] if strides[-1] == itemsize else itemsize
        inner = (*shape[:-1], run) if strides[-1] == itemsize else (*shape, itemsize)
        inner_strides = (*strides[:-1], 1) if strides[-1] == itemsize else (*strides, 1)
        touched = np.ndarray(inner, np.bool_, buffer=marks, strides=inner_strides)
        if write:
            touched[...] = True
        elif not touched.all():
            raise TyirError(
                f"{command.describe()} reads bytes {offset}..{offset + extent} of {name}, not all of which"
                " have been written"
            )

    def put(self, target: Array, make: Callable[[], Array]) -> None:
        """Write what a command that moves or multiplies much data makes; `check_accesses` makes nothing."""
        target[...] = make()

    # -- transfers
    # ------------------------------------------------------------------------------------------------
    def load(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.Load)
        shape = op.sizes_with(command.scalars)
        if 0 in shape:
            return
        source = self.dram(command, command.addresses[0] + op.offset, shape, (*op.dram_strides, 1))
        target = self.sram(command, op.sram, shape, np.uint8, (*op.sram_strides, 1), write=True)
        self.put(target, lambda: source)
        self.loaded_bytes += source.size

    def store(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.Store)
        shape = op.sizes_with(command.scalars)
        if 0 in shape:
            return
        source = self.sram(command, op.sram, shape, np.uint8, (*op.sram_strides, 1))
        address = command.addresses[0] + op.offset
        target = self.dram(command, address, shape, (*op.dram_strides, 1), write=True)
        self.put(target, lambda: source)

    def gather(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.Gather)
        count, entry = op.sizes_with(command.scalars)
        if count == 0:
            return
        if op.index == "ids":
            ids = self.sram(command, op.ids + entry * 4, (count,), np.int32)
            rows = ids.astype(np.int64) - op.first
        else:
            rows = position_of(self.pos, op.sequence) + op.first + np.arange(count)
            rows = rows if op.modulo is None else rows % op.modulo + (op.shift or 0)
            rows = np.minimum(rows, op.table_rows - 1)
        target = self.sram(command, op.sram, (count, op.row_bytes), np.uint8, write=True)
        target[...] = 0
        for number, row in enumerate(rows.tolist()):
            if 0 <= row < op.table_rows:
                address = command.addresses[0] + op.offset + row * op.row_bytes
                target[number] = self.dram(command, address, (1, op.row_bytes), (op.row_bytes, 1))[0]
                self.loaded_bytes += op.row_bytes

    # -- compute
    # --------------------------------------------------------------------------------------------------
    def dequant(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.Dequant)
        n, k, group = op.n, op.k, op.group_size
        packed = self.sram(command, op.q, (n, (k + 1) // 2), np.uint8, (op.q_stride, 1))
        scales = self.sram(command, op.scales, (n, op.scale_stride // 2), np.float16)[
            :, op.first_group : op.first_group + k // group
        ]
        zeros = self.sram(command, op.zeros, (n, op.zero_stride), np.uint8)

        def weight() -> Array:
            q = _nibbles(packed).reshape(n, k // group, group).astype(np.float32)
            zero = _nibbles(zeros)[:, op.first_group : op.first_group + k // group, None]
            scaled = (q - zero.astype(np.float32)) * scales[:, :, None].astype(np.float32)
            return scaled.reshape(n, k)

        self.put(self.sram(command, op.out, (n, k), np.float16, write=True), weight)

    def dequant_rows(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.DequantRows)
        (rows,) = op.sizes_with(command.scalars)
        if rows == 0:
            return
        size, dtype, planes = op.k // 2 if op.groups else op.k, np.uint8 if op.groups else np.int8, op.planes

        def strides(row: int, *inner: int) -> tuple[int, ...]:
            return (op.plane_rows * row, row, *inner)

        q = self.sram(command, op.q, (planes, rows, size), dtype, strides(size, 1))
        if op.groups:
            shape, inner = (planes, rows, op.groups), strides(op.groups * 2, 2)
            scales = self.sram(command, op.scales, shape, np.uint16, inner)
        else:
            scales = self.sram(command, op.scales, (planes, rows), np.float16, strides(2))
        out = self.sram(command, op.out, (planes, rows, op.k), np.float16, strides(op.k * 2, 2), write=True)
        self.put(out, lambda: rows_of(q, scales))

    def matmul(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.Matmul)
        n, k = op.sizes_with(command.scalars)
        if n == 0 or (k == 0 and op.accumulate):
            return
        outer, inner = op.m
        if k == 0:  # an empty sum
            self.acc(command, op.acc, (outer * inner, n), (op.acc_stride, 4), write=True)[...] = 0
            return
        lhs = self.sram(command, op.lhs, (outer, inner, k), np.float16, (*op.lhs_strides, 2))
        shape = (n, k) if op.transposed else (k, n)
        rhs = self.sram(command, op.rhs, shape, np.float16, (op.rhs_stride, 2))
        sums = self.acc(command, op.acc, (outer * inner, n), (op.acc_stride, 4)) if op.accumulate else None

        def total() -> Array:
            product = _product(lhs, rhs.T if op.transposed else rhs)
            return product if sums is None else product + sums

        self.put(self.acc(command, op.acc, (outer * inner, n), (op.acc_stride, 4), write=True), total)
        self.macs += outer * inner * n * k

    def drain(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.Drain)
        (n,) = op.sizes_with(command.scalars)
        if n == 0:
            return
        outer, inner = op.m
        value = self.acc(command, op.acc, (outer * inner, n), (op.acc_stride, 4))
        if op.bias is not None:
            value = value + self.sram(command, op.bias, (n,), np.float16).astype(np.float32)
        dtype = storage_dtype(op.element)
        target = self.sram(
            command, op.sram, (outer, inner, n), dtype, (*op.sram_strides, dtype.itemsize), write=True
        )
        with np.errstate(over="ignore"):
            target[...] = value.reshape(outer, inner, n)

    def vector(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.VectorOp)
        vector_function(op, lambda *a, **k: self.sram(command, *a, **k))

    def softmax_block(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.SoftmaxBlock)
        cols, first_key = op.sizes_with(command.scalars)
        softmax_block(
            op,
            cols,
            first_key,
            position_of(self.pos, op.sequence),
            lambda *a, **k: self.sram(command, *a, **k),
        )

    def score_block(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.ScoreBlock)
        cols, first_key = op.sizes_with(command.scalars)
        pos = position_of(self.pos, op.sequence)
        score_block(op, cols, first_key, pos, lambda *a, **k: self.sram(command, *a, **k))

    def block_weights(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.BlockWeights)
        block_weights(op, op.sizes_with(command.scalars), lambda *a, **k: self.sram(command, *a, **k))

    def top_k(self, command: Command) -> None:
        op = command.op
        assert isinstance(op, edge10.TopK)
        top_k(op, lambda *a, **k: self.sram(command, *a, **k))

    # -- collectives
    # ----------------------------------------------------------------------------------------------
    def _side(
        self, command: Command, memory: str, offset: int, nbytes: int, addresses: list[int], write: bool
    ) -> Array:
        if memory == "sram":
            return self.sram(command, offset, (nbytes,), np.uint8, write=write)
        return self.dram(command, addresses.pop(0) + offset, (nbytes,), (1,), write=write)

    def _collective_operand(self, command: Command) -> Array:
        op = command.op
        assert isinstance(op, edge10.Exchange)
        if op.source_in() == "none":
            return np.empty(0, np.uint8)
        assert isinstance(op, (edge10.AllReduce, edge10.AllGather, edge10.Send))
        return self._side(
            command, op.source_memory, op.source, op.given_bytes(), list(command.addresses), write=False
        ).copy()

    def _collective_result(self, command: Command, combined: Array) -> None:
        op = command.op
        if isinstance(op, edge10.Send):
            return
        assert isinstance(op, (edge10.AllReduce, edge10.AllGather, edge10.Recv))
        addresses = list(command.addresses)
        if op.source_in() == "dram":
            addresses = addresses[1:]
        if isinstance(op, edge10.AllGather) and op.displacements is not None:
            pieces = np.split(combined.reshape(op.rows, -1), np.cumsum(op.sizes)[:-1], axis=1)
            for piece, displacement in zip(pieces, op.displacements):
                start, strides = op.destination + displacement, (op.stride, 1)
                if piece.size and op.destination_memory == "sram":
                    self.sram(command, start, piece.shape, np.uint8, strides, write=True)[...] = piece
                elif piece.size:
                    self.dram(command, addresses[0] + start, piece.shape, strides, write=True)[...] = piece
            return
        self._side(command, op.destination_memory, op.destination, len(combined), addresses, write=True)[
            ...
        ] = combined


def method_of(op: edge10.Command) -> str:
    """The method of `FunctionalDie` that executes a command: named as the op is."""
    return op.name.partition(".")[2]


def _product(lhs: Array, rhs: Array) -> Array:
    """[outer, inner, k] x [k, n] in f32, rows [outer * inner]."""
    return np.asarray(lhs.reshape(-1, lhs.shape[-1]).astype(np.float32) @ rhs.astype(np.float32))


def _dense(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _extent(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> int:
    return 0 if 0 in shape else sum((n - 1) * s for n, s in zip(shape, strides)) + itemsize


def _nibbles(packed: Array) -> Array:
    """Two 4-bit elements to a byte, the first in the low nibble."""
    out = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    out[..., 0::2] = packed & 15
    out[..., 1::2] = packed >> 4
    return out


def _combine(command: Command, parts: Sequence[Array | None]) -> Array:
    """What a collective gives every die, from the dies' operands in die order."""
    op, operands = command.op, [p for p in parts if p is not None]
    if isinstance(op, edge10.AllReduce):
        dtype = storage_dtype(op.element)
        present = [p for p in operands if len(p)]
        total = present[0].view(dtype).astype(np.float32)
        for part in present[1:]:
            total = total + part.view(dtype).astype(np.float32)
        with np.errstate(over="ignore"):
            return total.astype(dtype).view(np.uint8)
    assert isinstance(op, edge10.AllGather)
    if len(op.sizes) != len(operands):
        raise TyirError(f"{command.describe()} is for {len(op.sizes)} dies, {len(operands)} are running")
    return np.concatenate([p.reshape(op.rows, -1) for p in operands], axis=1).reshape(-1)


def _requests(step: Generator[tuple[Command, Array], Array, None]) -> Generator[Request, Array | None, None]:
    """A die's step as what it asks of the other dies."""
    message: Array | None = None
    while True:
        try:
            command, operand = next(step) if message is None else step.send(message)
        except StopIteration:
            return
        message = yield _request(command, operand)


def _request(command: Command, operand: Array) -> Request:
    op = command.op
    if isinstance(op, edge10.Send):
        return Send(op.targets, op.tag, operand, command.describe())
    if isinstance(op, edge10.Recv):
        return Recv(op.peer, op.tag, lambda: _bytes(op.nbytes), command.describe())
    assert isinstance(op, (edge10.AllReduce, edge10.AllGather))

    def given(number: int) -> Layout:
        return _bytes(op.nbytes if isinstance(op, edge10.AllReduce) else op.rows * op.sizes[number])

    return Meet(
        op.name, op.dies or (), operand, lambda parts: _combine(command, parts), given, command.describe()
    )


def _bytes(count: int) -> Layout:
    return Layout((count,), np.dtype(np.uint8))


def run_step(
    dies: Sequence[FunctionalDie], inputs: Mapping[str, Array], pos: Position, links: Links | None = None
) -> dict[str, Array]:
    """One step of all dies, or of those that `links` has here (`tyir.execution.lockstep`): fills the input
    buffers, runs the programs, returns the output buffers of the first by name (zeros in what was never
    written, where no row is wanted).
    """
    wanted = rows_wanted(inputs.get("row"))
    for die in dies:
        for name, array in inputs.items():
            die.memory.dram.write_buffer(name, array)
    drive([_requests(die.step(pos, wanted)) for die in dies], links)
    return _outputs(dies[0])


def _outputs(die: FunctionalDie) -> dict[str, Array]:
    found = {}
    for buffer in die.program.buffers.values():
        if buffer.kind == "output":
            found[buffer.sym_name] = (
                die.memory.dram.buffer(buffer.sym_name)
                .view(storage_dtype(buffer.type.element))
                .reshape(buffer.type.static_shape)
                .copy()
            )
    return found
