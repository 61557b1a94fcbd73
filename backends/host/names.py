"""Which ops of a program run as host kernels, and what these are called: known without TVM, which takes a
second to load and which a compile needs for kernels that are not in its cache only.

`KERNELS` are the ops that `tyir.backends.host.kernels` has an emitter for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Final

from tyir.attributes import StringAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects import func, kv, ty
from tyir.dialects.ty import tensor_type
from tyir.ir import Op

__all__ = ["KERNELS", "KERNEL_ATTRIBUTE", "LINKED_IN", "assign_kernels", "kernel_name", "meaning"]

KERNEL_ATTRIBUTE: Final = "tyir.kernel"
LINKED_IN: Final = ".host-"  # how the folder beside a library begins in which it is linked

_OF_CACHES: Final[tuple[type[Op], ...]] = (
    *(kv.Append, kv.BlockScores, kv.CachedAttention, kv.DualChunkAttention, kv.MergeAttention),
    *(kv.PickBlocks, kv.QuantizeGroups, kv.QuantizeRows, kv.Replace, kv.Rows, kv.SparseAttention),
    kv.TakeRows,
)
_OF_MODELS: Final[tuple[type[Op], ...]] = (
    *(ty.Add, ty.Attention, ty.Cast, ty.Concat, ty.Embedding, ty.Gelu, ty.GeluMul, ty.LayerNorm, ty.Linear),
    *(ty.MergeTopK, ty.Mul, ty.QuantizedLinear, ty.Relu, ty.Repeat, ty.RmsNorm, ty.Rope, ty.Scale),
    *(ty.SelectRow, ty.Silu, ty.SiluMul, ty.Slice, ty.Softcap, ty.TopK, ty.TopKCandidates, ty.Transpose),
)
KERNELS: Final[frozenset[type[Op]]] = frozenset((*_OF_CACHES, *_OF_MODELS))


def meaning(op: Op) -> str:
    """All that a kernel is made from."""
    return f"{op.name} {[str(tensor_type(v)) for v in (*op.operands, *op.results)]} {op.properties}"


def kernel_name(op: Op) -> str:
    """A name that equal ops share: `linear_1x8x256_128x256_f16`, ending in a hash of the properties when
    there are any.
    """
    types = [tensor_type(v) for v in (*op.operands, *op.results)]
    shapes = ["x".join(map(str, t.static_shape)) or "scalar" for t in types[: len(op.operands)]]
    elements = list(dict.fromkeys(str(t.element) for t in types))
    name = "_".join((op.name.partition(".")[2], *shapes, *elements))
    if len(elements) > 1 or op.properties.keys():
        name += "_" + hashlib.sha256(meaning(op).encode()).hexdigest()[:8]
    return name


def assign_kernels(functions: Iterable[func.Func]) -> dict[str, Op]:
    """Sets `tyir.kernel` on every op that runs as a kernel; returns one op for each name.

    Raises TyirError when a shape is not static.
    """
    kernels: dict[str, Op] = {}
    problems: list[Diagnostic] = []
    for function in functions:
        for op in function.walk():
            if type(op) not in KERNELS:
                continue
            dynamic = [v for v in (*op.operands, *op.results) if not tensor_type(v).is_static]
            if dynamic:
                problems.append(
                    Diagnostic(
                        f"'{op.name}' in @{function.sym_name} has the dynamic type {dynamic[0].type}",
                        help="run specialize-seqlen first",
                    )
                )
                continue
            name = kernel_name(op)
            op.set_attribute(KERNEL_ATTRIBUTE, StringAttr(name))
            kernels.setdefault(name, op)
    if problems:
        raise TyirError(problems)
    return kernels
