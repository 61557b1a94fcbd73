"""Host kernels as TensorIR, one emitter per op: `EMITTERS[op class](op, buffers, cpu)` writes the body
between a function's parameters.  Each file lists its own.

Parameters are the op's operands and then its results, row major, in the stored layout of
`tyir.execution.storage` (ui4 packed two to a byte); `kv.append` has no result parameter because it writes the
cache it is given.  Every kernel accumulates in f32 and rounds once, like the op's `evaluate`.
"""

from __future__ import annotations

from typing import Final

from tyir.backends.host.kernels import (
    attention,
    elementwise,
    linear,
    movement,
    norm,
    quantize_groups,
    quantize_rows,
    quantized_linear,
    top_k,
)
from tyir.backends.host.kernels.tir import Emitters

__all__ = ["EMITTERS"]

EMITTERS: Final[Emitters] = {
    **attention.EMITTERS,
    **elementwise.EMITTERS,
    **linear.EMITTERS,
    **movement.EMITTERS,
    **norm.EMITTERS,
    **quantize_groups.EMITTERS,
    **quantize_rows.EMITTERS,
    **quantized_linear.EMITTERS,
    **top_k.EMITTERS,
}
