"""What a command program needs of memory: the figures for `buffer_config.json`."""

from __future__ import annotations

from typing import Final

from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.ir import Op
from tyir.types import bit_width

__all__ = ["memory_summary"]

_NAMES: Final = {"weight": "weights", "kv": "kv", "activation": "activations", "input": "inputs", "output": "outputs"}


def memory_summary(module: Module) -> dict[str, int]:
    """Bytes of one die's program (stage `edge10`): by kind of DRAM buffer, `dram` from address 0 to the last byte, `sram` up to the last byte written.

    Keys: weights, kv, activations, inputs, outputs, dram, sram.  Buffers do not share addresses, so sums are peaks.
    """
    totals = dict.fromkeys(_NAMES.values(), 0)
    end = 0
    for buffer in module.walk_type(edge10.Buffer):
        totals[_NAMES[buffer.kind]] += buffer.nbytes
        end = max(end, buffer.address + buffer.nbytes)
    return {**totals, "dram": end, "sram": max((_sram_end(op) for op in module.walk()), default=0)}


def _sram_end(op: Op) -> int:
    """One past the last SRAM byte that a command writes; dynamic sizes count as nothing (they lie in temporaries sized for their largest)."""
    if isinstance(op, edge10.Load):
        planes, rows, row = op.shape
        return (
            op.sram + (planes - 1) * op.sram_strides[0] + (rows - 1) * op.sram_strides[1] + row
            if edge10.DYNAMIC not in op.shape
            else op.sram
        )
    if isinstance(op, edge10.Gather):
        return op.sram + op.rows * op.row_bytes
    if isinstance(op, edge10.Dequant):
        return op.out + op.n * op.k * 2
    if isinstance(op, edge10.Drain):
        if op.n == edge10.DYNAMIC:
            return op.sram
        return op.sram + (op.m[0] - 1) * op.sram_strides[0] + (op.m[1] - 1) * op.sram_strides[1] + op.n * bit_width(op.element) // 8
    if isinstance(op, edge10.VectorOp):
        return max(op.outputs) + (op.rows * op.cols if op.output_strides is None else 0)
    return 0
