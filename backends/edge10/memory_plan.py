"""What a command program needs of memory: the figures for `buffer_config.json`."""

from __future__ import annotations

from typing import Final

from tyir.attributes import Attribute
from tyir.dialects import edge10
from tyir.dialects.builtin import Module
from tyir.ir import Op
from tyir.types import Type, bit_width, f16

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
    """One past the last SRAM byte that a command may write.

    A size that a register gives counts as what is set aside for it: the stride to the next plane or row.
    """
    if isinstance(op, edge10.Load):
        planes, rows, row = op.shape
        outer, inner = op.sram_strides
        if edge10.DYNAMIC in op.shape:
            return op.sram + planes * outer
        return op.sram + (planes - 1) * outer + (rows - 1) * inner + row
    if isinstance(op, edge10.Gather):
        return op.sram + op.rows * op.row_bytes
    if isinstance(op, edge10.Dequant):
        return op.out + op.n * op.k * 2
    if isinstance(op, edge10.DequantRows):
        return op.out + op.planes * op.plane_rows * op.k * 2
    if isinstance(op, edge10.Drain):
        row = max(op.sram_strides) if op.n == edge10.DYNAMIC else op.n * _bytes(op.element)
        return op.sram + (op.m[0] - 1) * op.sram_strides[0] + (op.m[1] - 1) * op.sram_strides[1] + row
    if isinstance(op, edge10.VectorOp):
        return max(_vector_end(op, offset, element) for offset, element in zip(op.outputs, op.output_types))
    if isinstance(op, edge10.SoftmaxBlock):
        return max(op.probabilities + op.rows * op.probability_stride, max(op.maximum, op.total, op.alpha) + op.rows * 4)
    if isinstance(op, edge10.TopK):
        return max(offset + (op.rows - 1) * stride + op.k * 4 for offset, stride in zip(op.best, op.best_strides))
    if isinstance(op, (edge10.AllReduce, edge10.Recv)) and op.destination_memory == "sram":
        return op.destination + op.nbytes
    if isinstance(op, edge10.AllGather) and op.destination_memory == "sram":
        if op.displacements is None:
            return op.destination + op.rows * sum(op.sizes)
        return op.destination + (op.rows - 1) * op.stride + max(d + s for d, s in zip(op.displacements, op.sizes))
    return 0


def _vector_end(op: edge10.VectorOp, offset: int, element: Attribute) -> int:
    assert isinstance(element, Type)
    row = op.cols * _bytes(element)
    if op.function == "quantize_rows" and element is f16:  # one scale a row
        return offset + op.rows * 2
    if op.output_strides is None:
        return offset + op.rows * row
    outer, inner = op.output_strides
    return offset + (op.rows // op.group - 1) * outer + (op.group - 1) * inner + row


def _bytes(element: Type) -> int:
    return bit_width(element) // 8
