"""Rotary pairs of keys far above the others become smaller by a power of two, those of queries larger.

    %q = ty.linear(%n, %wq, %bq)         %s = ty.pair_scales(%wk, %bk)
    %k = ty.linear(%n, %wk, %bk)   -->   %q = ty.linear(%n, %wq * s, %bq * s)
                                         %k = ty.linear(%n, %wk / s, %bk / s)

A token's keys of a head share one scale in an 8-bit cache, so one channel of 600 leaves the others of 2 a
few steps: Qwen2 and Qwen2.5 have biases of keys like that (ggml-org/llama.cpp #21385).  Scores are sums over
channels of q * k, and both channels of a rotary pair are turned together, so what is taken from a pair of
keys may be given to that of the queries (SmoothAttention of QServe, arXiv:2405.04532): nothing changes but
the rounding of the cache, and nothing is computed for it at run time.

Which pairs, and by how much, weights and biases decide when they are written (`ty.pair_scales`); of heads
whose pairs are alike all factors are 1.  Keys normalised by head (Qwen3) have that norm's weight scaled.
Attention whose queries and keys reach it another way (parts of heads turned, one packed product) stays.

Where the weights can be read, a remark names the layers whose keys' bias is far above that of the others.
With `dtype=int4` layers whose pairs are so far apart that 4 bits would not hold them get `tyir.keys =
"int8"`, by which `kv-materialize` stores their keys with 8 bits, and are named as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Final, Literal

import numpy as np

from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.ty import (
    Attention,
    Dequantize,
    GetGlobal,
    Global,
    Linear,
    MultiplyChannels,
    PairScales,
    QuantizedLinear,
    Reshape,
    RmsNorm,
    Rope,
    tensor_type,
)
from tyir.execution.constexpr import ConstantExpressions, expression_ops
from tyir.execution.weights import CheckpointReader, WeightSource, checkpoint_of
from tyir.ir import Op, Value
from tyir.layers import carry
from tyir.passes._key_spread import keep_spread_keys
from tyir.pipeline import Pass, PassContext

__all__ = ["ScaleKeys"]

_FAR: Final = 8.0  # times the median of the layers
# The operands whose rows are channels of the result.
_ROWS: Final[dict[type[Op], Sequence[int]]] = {Linear: (1, 2), QuantizedLinear: (2, 4), RmsNorm: (1,)}


@dataclass(frozen=True)
class ScaleKeys(Pass):
    """Pairs of keys and queries of attention with a cache are scaled against each other."""

    stage: ClassVar[tuple[str, ...]] = ("ty",)

    dtype: Literal["int8", "int4"] = "int8"

    def run(self, op: Op, context: PassContext) -> None:
        constants = ConstantExpressions()
        found = [a for a in op.walk_type(Attention) if a.causal]
        weights = context.weights
        if weights is None and isinstance(op, Module) and "tyir.checkpoint" in op.attributes:
            weights = CheckpointReader(checkpoint_of(op))
        if self.dtype == "int8":
            _name_spikes(op, found, weights, context)
        scaled = [(a, factors) for a in found if (factors := _scale(a, constants)) is not None]
        if self.dtype == "int4" and weights is not None:
            context.statistics["keys of 8 bits"] = keep_spread_keys(op, scaled, weights, context)
        context.statistics["attention scaled"] = len(scaled)
        context.statistics["attention left"] = len(found) - len(scaled)


def _name_spikes(
    op: Op, attentions: Sequence[Attention], weights: WeightSource | None, context: PassContext
) -> None:
    """Remark on layers whose keys' largest bias is far above the median of the layers'."""
    sizes: dict[Attention, float] = {}
    for attention in attentions if weights is not None else ():
        source = _source(attention.k)
        bias = source.bias if isinstance(source, (Linear, QuantizedLinear)) else None
        name = bias.op.symbol.leaf if bias is not None and isinstance(bias.op, GetGlobal) else None
        stored = op.lookup(name) if name is not None and isinstance(op, Module) else None
        if isinstance(stored, Global) and weights is not None:
            try:
                sizes[attention] = float(np.abs(weights.read(stored).astype(np.float32)).max())
            except TyirError:
                return  # there is no such file here; it is missed where weights are written
    usual = median(sizes.values()) if sizes else 0.0
    for attention, size in sizes.items():
        if size > _FAR * usual:
            context.remark(
                attention,
                f"the bias of the keys reaches {size:.4g}, {usual:.4g} in the layer in the middle: an 8-bit"
                " cache would keep little of its other channels, which is why pairs are scaled",
                help="compare --kv-dtype fp16 on prompts of your own",
            )


def _scale(attention: Attention, constants: ConstantExpressions) -> Value | None:
    """What an attention's keys are divided by (or what it is 1 over); None where they cannot be scaled."""
    q, k = (_source(value) for value in (attention.q, attention.k))
    if q is None or k is None or not _alike(q, k):
        return None
    given = [v for op in (q, k) for i in _ROWS[type(op)] for v in op.operands[i : i + 1]]
    if not all(constants.is_constant(v) for v in given):
        return None
    before = (op for v in given for op in expression_ops(v) if isinstance(op, PairScales))
    if (known := next(before, None)) is not None:
        return known.result  # of a run before
    *_, heads, dim = tensor_type(attention.q).dims
    groups = tensor_type(attention.k).dims[2]
    if heads is None or groups is None or dim is None or heads % groups:
        return None
    by_head = isinstance(k, RmsNorm) and tensor_type(k.weight).dims == (dim,)  # all heads share the weight
    repeats = 1 if by_head else heads // groups
    sizes = _sizes(k)  # of the keys as they were, for both
    for op, options in ((q, {"repeats": repeats}), (k, {"inverse": True})):
        weight, *bias = sizes if op is k else [_again(v, op) for v in sizes]
        factors = PairScales(weight, *bias, dim=dim, loc=op.loc, **options)
        _multiply(op, carry(factors, op).insert_before(op).result)
    return factors.result


def _source(value: Value) -> Op | None:
    """What gives the channels of queries or keys, where nothing else reads them on their way."""
    if not isinstance(value.op, Rope) or len(value.uses) != 1:
        return None
    value = value.op.x
    while isinstance(value.op, Reshape) and len(value.uses) == 1:
        value = value.op.x
    return value.op if type(value.op) in _ROWS and len(value.uses) == 1 else None


def _alike(q: Op, k: Op) -> bool:
    """Whether queries are made as keys are: both by products, or both by norms of the same kind."""
    if isinstance(q, RmsNorm) and isinstance(k, RmsNorm):
        one = {tensor_type(op.x).dims[-1] == tensor_type(op.weight).dims[-1] for op in (q, k)}
        ranks = {len(tensor_type(op.x).dims) for op in (q, k)}
        return one == {True} and len(ranks) == 1
    return not isinstance(q, RmsNorm) and not isinstance(k, RmsNorm)


def _sizes(op: Op) -> list[Value]:
    """The weight and the bias, if there is one, that `ty.pair_scales` takes for the keys of an op."""
    if isinstance(op, RmsNorm):
        return [op.weight]
    assert isinstance(op, (Linear, QuantizedLinear))
    if isinstance(op, Linear):
        weight: Value = op.weight
    else:
        made = Dequantize(op.q, op.scales, op.zeros, group_size=op.group_size, loc=op.loc)
        weight = carry(made, op).insert_before(op).result
    norm = op.x.op
    if isinstance(norm, RmsNorm):  # rows of mean square 1 come out of it, times its weight
        gained = MultiplyChannels(weight, norm.weight, axis=1, loc=op.loc)
        weight = carry(gained, op).insert_before(op).result
    return [weight, *([op.bias] if op.bias is not None else [])]


def _again(value: Value, before: Op) -> Value:
    """A weight expression once more, before an op that may stand before the first."""
    mapping: dict[Value, Value] = {}
    for op in expression_ops(value):
        op.clone(mapping).insert_before(before)
    return mapping[value]


def _multiply(op: Op, factors: Value) -> None:
    operands = list(op.operands)
    for index in _ROWS[type(op)]:
        if index < len(operands):
            made = MultiplyChannels(operands[index], factors, axis=0, loc=op.loc)
            operands[index] = carry(made, op).insert_before(op).result
    op.operands = operands
