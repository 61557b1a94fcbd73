"""The ops of one function: which are lowered together with a later one, and what lowers each of the others.

A product of many tokens is lowered with what takes its columns (`columns`), a gated MLP with its last product
(`lower_mlp`, `lower_gated`).  The op at whose turn a group is lowered is its last, the group's *anchor*; the
others of the group are passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from tyir.backends.edge10.lowering.attention import attention_scratch, lower_attention
from tyir.backends.edge10.lowering.cache import lower_append, lower_embedding, lower_quantize_rows, lower_rows
from tyir.backends.edge10.lowering.collective import (
    lower_all_gather,
    lower_all_reduce,
    lower_recv,
    lower_send,
)
from tyir.backends.edge10.lowering.columns import (
    GatheredColumns,
    Gathering,
    StoredColumns,
    SummedColumns,
    Summing,
    gatherings,
    lower_nothing_to_sum,
    summings,
)
from tyir.backends.edge10.lowering.context import Area, Lowering, Place
from tyir.backends.edge10.lowering.gated import fused_products, lower_gated
from tyir.backends.edge10.lowering.linear import InputTiles, lower_linear, lower_product, product_scratch
from tyir.backends.edge10.lowering.mlp import Mlp, fused_mlps, fused_ops, lower_mlp
from tyir.backends.edge10.lowering.rowwise import lower_rowwise
from tyir.backends.edge10.lowering.top_k import (
    RankedColumns,
    Ranking,
    lower_merge_top_k,
    lower_top_k,
    lower_top_k_candidates,
    rankings,
)
from tyir.backends.edge10.memory.allocate import SramPlan
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects import dist, kv, ty
from tyir.dialects.func import Call, Func, Return
from tyir.edge10.vector_functions import function_of
from tyir.ir import Op, Value
from tyir.targets.machine import Machine
from tyir.traits import Gated

__all__ = ["Groups", "find_groups", "is_known"]

_LOWERINGS: Final[dict[type[Op], Callable[[Any, Lowering], None]]] = {
    ty.Embedding: lower_embedding,
    kv.Append: lower_append,
    kv.Rows: lower_rows,
    dist.AllReduce: lower_all_reduce,
    dist.AllGather: lower_all_gather,
    dist.Send: lower_send,
    dist.Recv: lower_recv,
    kv.QuantizeRows: lower_quantize_rows,
    ty.TopK: lower_top_k,
    ty.TopKCandidates: lower_top_k_candidates,
    ty.MergeTopK: lower_merge_top_k,
}
_OTHERS: Final = (ty.Linear, ty.QuantizedLinear, kv.CachedAttention, ty.GetGlobal, ty.Reshape, Call, Return)


def is_known(op: Op) -> bool:
    """Whether an op has a lowering, or needs none."""
    return type(op) in _LOWERINGS or function_of(op) is not None or isinstance(op, _OTHERS)


@dataclass(frozen=True)
class Groups:
    """The groups of a function by their anchors, MLPs by their last product, gated products by the silu_mul;
    and the scratch of single ops.
    """

    sums: Mapping[Op, Summing]
    gathers: Mapping[Op, Gathering]
    ranks: Mapping[Op, Ranking]
    mlps: Mapping[Op, Mlp]
    gated: Mapping[Op, Op]
    single: Mapping[Op, Scratch]

    @cached_property
    def anchors(self) -> dict[Op, Op]:
        """For every op that is passed over, the one with which it is lowered."""
        following = {**self.gated, **fused_ops(self.mlps)}
        following.update({op: add for add, summing in self.sums.items() for op in summing.ops})
        following.update({gathering.product: op for op, gathering in self.gathers.items()})
        following.update({ranking.product: op for op, ranking in self.ranks.items()})
        return {op: _last(op, following) for op in following}

    @cached_property
    def scratch(self) -> dict[Op, Scratch]:
        """What anchors, attentions and products of very many rows take of SRAM and DRAM while they run."""
        others = {op: scratch for op, scratch in self.single.items() if op not in self.anchors}
        return {**{self.anchors.get(op, op): mlp.scratch for op, mlp in self.mlps.items()}, **others}

    def lower(self, op: Op, low: Lowering, scratch: Mapping[Op, tuple[int, Place]]) -> None:
        """The commands of an op, with its group if it is an anchor; `scratch` says where `self.scratch`
        lies.
        """
        if op in self.anchors or isinstance(op, (ty.GetGlobal, ty.Reshape, Return)):
            return
        low.emitter.begin(op)
        if op in self.sums:
            self._lower_sum(self.sums[op], low, scratch.get(op))
        elif op in self.gathers:
            _lower_gathering(self.gathers[op], low)
        elif op in self.ranks:
            inputs = InputTiles(self.ranks[op].product.x, low)
            lower_product(
                self.ranks[op].product,
                low,
                inputs,
                RankedColumns(self.ranks[op], low, low.results_area(inputs.in_sram)),
            )
        elif op in self.mlps:
            lower_mlp(
                self.mlps[op],
                low,
                scratch[op],
                StoredColumns(self.mlps[op].down.out, low, low.results_area(True)),
            )
        elif isinstance(op, kv.CachedAttention):
            lower_attention(op, low, self._area(op, scratch))
        elif isinstance(op, (ty.Linear, ty.QuantizedLinear)):
            lower_linear(op, low, self._area(op, scratch))
        elif op.has_trait(Gated) and op in self.anchors.values():
            lower_gated(op, low)
        else:
            _LOWERINGS.get(type(op), lower_rowwise)(op, low)

    def _area(self, op: Op, scratch: Mapping[Op, tuple[int, Place]]) -> Area | None:
        return Area(scratch[op][0], self.single[op].sram_bytes) if op in scratch else None

    def _lower_sum(self, summing: Summing, low: Lowering, scratch: tuple[int, Place] | None) -> None:
        """A product, its all-reduce and the residual sum; `scratch` is that of the MLP whose last product it
        is, if it is one.
        """
        product = summing.product
        if product is None:
            lower_nothing_to_sum(SummedColumns(summing, low, low.results_area(True)))
        elif product in self.mlps:
            assert scratch is not None
            lower_mlp(self.mlps[product], low, scratch, SummedColumns(summing, low, low.results_area(True)))
        else:
            inputs = InputTiles(product.x, low)
            lower_product(product, low, inputs, SummedColumns(summing, low, low.results_area(inputs.in_sram)))


def find_groups(
    function: Func, arena: int, machine: Machine, plan: SramPlan, held: Collection[Value]
) -> Groups:
    """The groups of a function; `arena` is what it may use of SRAM for activations, beside those `held`
    there.
    """
    single = {
        op: (
            attention_scratch(op, arena, machine)
            if isinstance(op, kv.CachedAttention)
            else product_scratch(op, arena, machine)
        )
        for op in function.body
    }
    return Groups(
        summings(function, machine),
        gatherings(function, machine),
        rankings(function, machine),
        fused_mlps(function, arena, machine, plan, held),
        fused_products(function, arena),
        {op: scratch for op, scratch in single.items() if scratch is not None},
    )


def _last(op: Op, following: Mapping[Op, Op]) -> Op:
    while op in following:
        op = following[op]
    return op


def _lower_gathering(gathering: Gathering, low: Lowering) -> None:
    inputs = InputTiles(gathering.product.x, low)
    results = GatheredColumns(gathering, low, low.results_area(inputs.in_sram))
    lower_product(gathering.product, low, inputs, results)
    results.finish()
