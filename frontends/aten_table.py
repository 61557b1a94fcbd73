"""Which `aten` op of tyir stands for which node of an exported graph: one row per ATen overload.

A row accounts for every argument of the overload's schema: tensors (`operands`), numbers kept as properties,
arguments that do not change the result (`ignored`), arguments that must have one value (`required`).  Any
other argument must have its default value, otherwise the node is reported as unsupported.  Nothing here needs
torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from tyir.dialects import aten, ty
from tyir.opdef import DeclaredOp

__all__ = ["ANGLES", "PARTS", "ROWS", "UNBIND", "FromResult", "Row"]


class FromResult(Enum):
    """Properties that follow from the node's result instead of an argument (symbolic sizes become -1)."""

    SHAPE = "shape"
    ELEMENT = "element"


@dataclass(frozen=True)
class Row:
    """`op` None: the node is the identity on its first operand.  `scalar`: an operand that may be a number,
    kept in the property `scalar`.

    `required`: values that arguments must have for the row to hold.
    """

    op: type[DeclaredOp] | None
    operands: tuple[str, ...] = ("self",)
    properties: Mapping[str, str | FromResult] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    scalar: str | None = None
    required: Mapping[str, object] = field(default_factory=dict)


_COPY: Final = ("non_blocking", "copy", "memory_format")
_TO: Final = {"element": FromResult.ELEMENT}
_SHAPE: Final = {"shape": FromResult.SHAPE}
_CONV: Final = Row(aten.Conv, ("input", "weight", "bias"), {"stride": "stride"})

ROWS: Final[dict[str, Row]] = {
    "aten.add.Tensor": Row(aten.Add, ("self", "other"), scalar="other"),
    "aten.addmm.default": Row(aten.Addmm, ("self", "mat1", "mat2")),
    "aten.alias.default": Row(None),
    "aten.argsort.default": Row(aten.Argsort, properties={"dim": "dim"}),
    "aten.cat.default": Row(aten.Cat, ("tensors",), {"dim": "dim"}),
    "aten.clone.default": Row(None, ignored=("memory_format",)),
    **{f"aten.conv{n}d.{kind}": _CONV for n in (2, 3) for kind in ("default", "padding")},
    "aten.contiguous.default": Row(None, ignored=("memory_format",)),
    "aten.cos.default": Row(aten.Cos),
    "aten.detach.default": Row(None),
    "aten.div.Tensor": Row(aten.Div, ("self", "other"), scalar="other"),
    "aten.dropout.default": Row(None, ("input",), ignored=("p",), required={"train": False}),
    "aten.embedding.default": Row(
        aten.Embedding, ("weight", "indices"), ignored=("padding_idx", "scale_grad_by_freq", "sparse")
    ),
    "aten.expand.default": Row(aten.Expand, properties=_SHAPE, ignored=("size", "implicit")),
    "aten.gelu.default": Row(aten.Gelu, properties={"approximate": "approximate"}),
    "aten.layer_norm.default": Row(
        aten.LayerNorm,
        ("input", "weight", "bias"),
        {"normalized_shape": "normalized_shape", "eps": "eps"},
        ignored=("cudnn_enable",),
    ),
    "aten.index.Tensor": Row(aten.Index, ("self", "indices")),
    "aten.linear.default": Row(aten.Linear, ("input", "weight", "bias")),
    "aten.mean.dim": Row(aten.Mean, properties={"dim": "dim", "keepdim": "keepdim"}),
    "aten.mul.Tensor": Row(aten.Mul, ("self", "other"), scalar="other"),
    "aten.neg.default": Row(aten.Neg),
    "aten.permute.default": Row(aten.Permute, properties={"dims": "dims"}),
    "aten.pow.Tensor_Scalar": Row(aten.Pow, properties={"exponent": "exponent"}),
    "aten.reshape.default": Row(aten.Reshape, properties=_SHAPE, ignored=("shape",)),
    "aten.flatten.using_ints": Row(aten.Reshape, properties=_SHAPE, ignored=("start_dim", "end_dim")),
    "aten.repeat_interleave.self_int": Row(
        aten.RepeatInterleave, properties={"repeats": "repeats", "dim": "dim"}, ignored=("output_size",)
    ),
    "aten.relu.default": Row(aten.Relu),
    "aten.select.int": Row(aten.Select, properties={"dim": "dim", "index": "index"}),
    "aten.sigmoid.default": Row(aten.Sigmoid),
    "aten.stack.default": Row(aten.Stack, ("tensors",), {"dim": "dim"}),
    "aten.rsqrt.default": Row(aten.Rsqrt),
    "aten.silu.default": Row(aten.Silu),
    "aten.sin.default": Row(aten.Sin),
    "aten.slice.Tensor": Row(
        aten.Slice, properties={"dim": "dim", "start": "start", "end": "end", "step": "step"}
    ),
    "aten.sub.Tensor": Row(aten.Sub, ("self", "other"), scalar="other"),
    "aten.sum.dim_IntList": Row(aten.Sum, properties={"dim": "dim", "keepdim": "keepdim"}),
    "aten.tanh.default": Row(aten.Tanh),
    "aten.to.device": Row(aten.To, properties=_TO, ignored=("device", "dtype", *_COPY)),
    "aten.to.dtype": Row(aten.To, properties=_TO, ignored=("dtype", *_COPY)),
    "aten.to.dtype_layout": Row(
        aten.To, properties=_TO, ignored=("dtype", "layout", "device", "pin_memory", *_COPY)
    ),
    "aten.type_as.default": Row(aten.To, properties=_TO, ignored=("other",)),
    "aten.transpose.int": Row(aten.Transpose, properties={"dim0": "dim0", "dim1": "dim1"}),
    "aten.unsqueeze.default": Row(aten.Unsqueeze, properties={"dim": "dim"}),
    "aten.view.default": Row(aten.View, properties=_SHAPE, ignored=("size",)),
    "tyir.layer_begin.default": Row(None, ("x",), ignored=("path",)),
    "tyir.layer_end.default": Row(None, ("x",), ignored=("path",)),
    "tyir.attention.default": Row(
        ty.Attention,
        ("q", "k", "v"),
        {
            "scale": "scale",
            "window": "window",
            "softcap": "softcap",
            "causal": "causal",
            "segments": "segments",
        },
    ),
}

# Nodes that cut `self` along `dim` into parts, one after the other: each part that is used becomes a slice.
PARTS: Final = frozenset(
    ("aten.chunk.default", "aten.split.Tensor", "aten.split.default", "aten.split_with_sizes.default")
)
UNBIND: Final = "aten.unbind.int"  # the entries along `dim`, without that dimension: each becomes a select
ANGLES: Final = "tyir.rope_angles.default"  # cosines and sines: two results
