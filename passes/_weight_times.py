"""How long a product's weights take: what choices between cuts compare."""

from __future__ import annotations

from tyir.dialects.ty import Embedding, tensor_type
from tyir.ir import Op
from tyir.targets.machine import Machine

__all__ = ["weight_bytes", "weight_ns"]


def weight_bytes(op: Op) -> int:
    """Bytes of the weights of a linear, or of an embedding's table."""
    values = op.operands[:1] if isinstance(op, Embedding) else op.operands[1:]
    return sum(tensor_type(v).nbytes for v in values)


def weight_ns(nbytes: float, rows: int, machine: Machine) -> float:
    """How long weights take: to be read or, of many rows, to be multiplied with (as f16)."""
    products = nbytes / 2 * rows / machine.macs_per_cycle_fp16 * machine.cycle_ns
    return max(nbytes / machine.dram_bytes_per_ns, products)
