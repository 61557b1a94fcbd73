"""`ty`: the tensor dataflow of a language model, between the imported graph and a die's program.

Shapes use b = batch, s = tokens of this step, H = query heads, G = key/value heads, D = head dimension.
Activations are f16; every reduction accumulates in f32 and rounds once, at the result.
"""

from __future__ import annotations

from tyir.dialects.ty.attention import Attention, attend, default_kv_heads, softmax
from tyir.dialects.ty.choice import MergeTopK, TopK, TopKCandidates, comparable, select_best
from tyir.dialects.ty.elementwise import Add, Cast, Mul, Reshape, Scale, Silu, SiluMul, Slice, Transpose, silu
from tyir.dialects.ty.layers import (
    Embedding,
    Linear,
    QuantizedLinear,
    RmsNorm,
    Rope,
    RopeAngles,
    RopeTable,
    rope_tables,
)
from tyir.dialects.ty.tensors import (
    Array,
    as_type,
    axis_in,
    bf16_to_f32,
    static_shape,
    stored_bytes,
    tensor_type,
)
from tyir.dialects.ty.weights import (
    Constant,
    Dequantize,
    GetGlobal,
    Global,
    Param,
    QuantizeGroups,
    Repeat,
    Take,
    Yield,
    dequantize,
)

__all__ = [
    "Add",
    "Array",
    "Attention",
    "Cast",
    "Constant",
    "Dequantize",
    "Embedding",
    "GetGlobal",
    "Global",
    "Linear",
    "MergeTopK",
    "Mul",
    "Param",
    "QuantizeGroups",
    "QuantizedLinear",
    "Repeat",
    "Reshape",
    "RmsNorm",
    "Rope",
    "RopeAngles",
    "RopeTable",
    "Scale",
    "Silu",
    "SiluMul",
    "Slice",
    "Take",
    "TopK",
    "TopKCandidates",
    "Transpose",
    "Yield",
    "as_type",
    "attend",
    "axis_in",
    "bf16_to_f32",
    "comparable",
    "default_kv_heads",
    "dequantize",
    "rope_tables",
    "select_best",
    "silu",
    "softmax",
    "static_shape",
    "stored_bytes",
    "tensor_type",
]
