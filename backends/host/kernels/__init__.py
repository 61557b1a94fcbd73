"""Host kernels as TensorIR, one emitter per op: `EMITTERS[op class](op, buffers, cpu)` writes the body
between a function's parameters.

Parameters are the op's operands and then its results, row major, in the stored layout of
`tyir.execution.storage` (ui4 packed two to a byte); `kv.append` has no result parameter because it writes the
cache it is given.  Every kernel accumulates in f32 and rounds once, like the op's `evaluate`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

from tyir.backends.host.kernels.attention import attention
from tyir.backends.host.kernels.elementwise import add, cast, mul, scale, silu, silu_mul
from tyir.backends.host.kernels.linear import linear
from tyir.backends.host.kernels.movement import append, embedding, repeat, rows, slice_, transpose
from tyir.backends.host.kernels.norm import rms_norm, rope
from tyir.backends.host.kernels.quantize_rows import quantize_rows
from tyir.backends.host.kernels.quantized_linear import quantized_linear
from tyir.backends.host.kernels.tir import Cpu
from tyir.backends.host.kernels.top_k import merge_top_k, top_k, top_k_candidates
from tyir.dialects import kv, ty
from tyir.ir import Op

__all__ = ["EMITTERS", "Emitter"]

Emitter = Callable[[Any, Sequence[Any], Cpu], None]

EMITTERS: Final[dict[type[Op], Emitter]] = {
    ty.Embedding: embedding,
    ty.RmsNorm: rms_norm,
    ty.Linear: linear,
    ty.QuantizedLinear: quantized_linear,
    ty.Rope: rope,
    ty.Scale: scale,
    ty.Silu: silu,
    ty.SiluMul: silu_mul,
    ty.Add: add,
    ty.Mul: mul,
    ty.Cast: cast,
    ty.Transpose: transpose,
    ty.Slice: slice_,
    ty.Repeat: repeat,
    ty.TopK: top_k,
    ty.TopKCandidates: top_k_candidates,
    ty.MergeTopK: merge_top_k,
    kv.QuantizeRows: quantize_rows,
    kv.Append: append,
    kv.CachedAttention: attention,
    kv.Rows: rows,
}
