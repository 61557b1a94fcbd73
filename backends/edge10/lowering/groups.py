"""The ops of one function: which are lowered together (`fusions`), and what lowers each of the others."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

from tyir.backends.edge10.lowering.context import Area, Lowering
from tyir.backends.edge10.lowering.fused.fusion import Fusion, Room, ScratchPlace
from tyir.backends.edge10.lowering.fused.halved import Halved
from tyir.backends.edge10.lowering.fusions import FUSIONS
from tyir.backends.edge10.lowering.ops.attention import (
    attention_scratch,
    lower_attention,
    lower_merge_attention,
)
from tyir.backends.edge10.lowering.ops.block_scores import (
    lower_block_scores,
    lower_pick_blocks,
    lower_replace,
    pick_scratch,
    score_scratch,
)
from tyir.backends.edge10.lowering.ops.cache import (
    lower_append,
    lower_embedding,
    lower_quantize_rows,
    lower_rows,
    lower_select_row,
    lower_take_rows,
    selection_scratch,
)
from tyir.backends.edge10.lowering.ops.collective import (
    lower_all_gather,
    lower_all_reduce,
    lower_recv,
    lower_send,
)
from tyir.backends.edge10.lowering.ops.linear import lower_linear, product_scratch
from tyir.backends.edge10.lowering.ops.rows import lower_concat, lower_slice
from tyir.backends.edge10.lowering.ops.rowwise import lower_rowwise
from tyir.backends.edge10.lowering.ops.top_k import lower_merge_top_k, lower_top_k
from tyir.backends.edge10.memory.allocate import SramPlan
from tyir.backends.edge10.memory.places import Scratch
from tyir.dialects import dist, kv, ty
from tyir.dialects.func import Call, Func, Return
from tyir.edge10.vector_functions import function_of
from tyir.ir import Op, Value
from tyir.targets.machine import Machine

__all__ = ["Groups", "find_groups", "is_known"]

# What computes no vector function of its own name; the others are `lower_rowwise`'s.
_LOWERINGS: Final[dict[type[Op], Callable[[Any, Lowering], None]]] = {
    ty.Embedding: lower_embedding,
    kv.Append: lower_append,
    kv.Rows: lower_rows,
    kv.TakeRows: lower_take_rows,
    dist.AllReduce: lower_all_reduce,
    dist.AllGather: lower_all_gather,
    dist.Send: lower_send,
    dist.Recv: lower_recv,
    kv.Replace: lower_replace,
    kv.QuantizeGroups: lower_quantize_rows,
    kv.QuantizeRows: lower_quantize_rows,
    kv.MergeAttention: lower_merge_attention,
    ty.Concat: lower_concat,
    ty.Slice: lower_slice,
    ty.TopK: lower_top_k,
    ty.TopKCandidates: lower_top_k,
    ty.MergeTopK: lower_merge_top_k,
}

_Ask = Callable[[Any, int, Machine, SramPlan, Collection[Value]], Scratch | None]
# Ops that may ask for scratch when they are alone: how much, and what lowers them with it or without.
_WITH_SCRATCH: Final[dict[type[Op], tuple[_Ask, Callable[[Any, Lowering, Area | None], None]]]] = {
    kv.CachedAttention: (attention_scratch, lower_attention),
    kv.DualChunkAttention: (attention_scratch, lower_attention),
    kv.SparseAttention: (attention_scratch, lower_attention),
    kv.BlockScores: (score_scratch, lower_block_scores),
    kv.PickBlocks: (pick_scratch, lower_pick_blocks),
    ty.Attention: (attention_scratch, lower_attention),
    ty.Linear: (product_scratch, lower_linear),
    ty.QuantizedLinear: (product_scratch, lower_linear),
}
# Ops that always need scratch, in DRAM too.
_WITH_COPY: Final[dict[type[Op], tuple[_Ask, Callable[[Any, Lowering, ScratchPlace], None]]]] = {
    ty.SelectRow: (selection_scratch, lower_select_row)
}
_WITHOUT_COMMANDS: Final = (ty.GetGlobal, ty.Reshape, Return)


def is_known(op: Op) -> bool:
    """Whether an op has a lowering, or needs none."""
    return (
        type(op) in _LOWERINGS
        or type(op) in _WITH_SCRATCH
        or type(op) in _WITH_COPY
        or function_of(op) is not None
        or isinstance(op, (*_WITHOUT_COMMANDS, Call))
    )


@dataclass(frozen=True)
class Groups:
    """The fusions of a function by their anchors, for every op that is passed over its anchor, and the
    scratch of ops that are lowered alone.
    """

    fusions: Mapping[Op, Fusion]
    anchors: Mapping[Op, Op]
    alone: Mapping[Op, Scratch]

    @cached_property
    def scratch(self) -> dict[Op, Scratch]:
        """What fusions (by their anchors) and ops take of SRAM and DRAM while they run."""
        fused = {op: s for op, fusion in self.fusions.items() if (s := fusion.scratch) is not None}
        return {**fused, **self.alone}

    @cached_property
    def halved(self) -> dict[Op, Op]:
        """The products that begin with the first half of a norm's rows, and that norm."""
        return {f.product: f.norm for f in self.fusions.values() if isinstance(f, Halved)}

    def lower(self, op: Op, lowering: Lowering, scratch: Mapping[Op, ScratchPlace]) -> None:
        """The commands of an op, with its fusion if it is an anchor; `scratch` says where `self.scratch`
        lies.
        """
        if op in self.anchors or isinstance(op, _WITHOUT_COMMANDS):
            return
        lowering.emitter.begin(op)
        if op in self.fusions:
            self.fusions[op].lower(lowering, scratch.get(op))
        elif type(op) in _WITH_SCRATCH:
            area = Area(scratch[op][0], self.alone[op].sram_bytes) if op in scratch else None
            _WITH_SCRATCH[type(op)][1](op, lowering, area)
        elif type(op) in _WITH_COPY:
            _WITH_COPY[type(op)][1](op, lowering, scratch[op])
        else:
            _LOWERINGS.get(type(op), lower_rowwise)(op, lowering)


def find_groups(
    function: Func, arena: int, machine: Machine, plan: SramPlan, held: Collection[Value]
) -> Groups:
    """The groups of a function; `arena` is what it may use of SRAM for activations, beside those `held`
    there.
    """
    room = Room(function, machine, plan, arena, held)
    for kind in FUSIONS:
        for op in function.body:
            if (fusion := kind.match(op, room)) is not None:
                room.add(fusion)
    asked: dict[type[Op], _Ask] = {
        **{kind: ask for kind, (ask, _) in _WITH_SCRATCH.items()},
        **{kind: ask for kind, (ask, _) in _WITH_COPY.items()},
    }
    alone = {
        op: scratch
        for op in function.body
        if op not in room.anchors
        and op not in room.fusions
        and type(op) in asked
        and (scratch := asked[type(op)](op, arena, machine, plan, held)) is not None
    }
    return Groups(room.fusions, room.anchors, alone)
