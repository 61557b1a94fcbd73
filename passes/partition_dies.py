"""Tensor parallelism over the dies of a board, in four steps that are passes of their own.

    annotate-sharding     what is cut how, and why (heads, MLP groups, vocabulary)
    propagate-sharding    every value's placement
    insert-collectives    all-reduces and gathers where the dies must meet
    localize-dies         one module per die, local shapes, sliced weights

Any number of dies works for any number of heads, groups and vocabulary rows.  Runs on the step with dynamic
length, before specialize-seqlen.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from tyir.artifacts.token_blocks import BLOCK
from tyir.ir import Op
from tyir.passes.annotate_sharding import AnnotateSharding
from tyir.passes.insert_collectives import InsertCollectives
from tyir.passes.localize_dies import LocalizeDies
from tyir.passes.propagate_sharding import PropagateSharding
from tyir.pipeline import Pass, PassContext, run_at_stage

__all__ = ["PartitionDies"]


@dataclass(frozen=True)
class PartitionDies(Pass):
    """All steps; the options are those of annotate-sharding."""

    stage: ClassVar[tuple[str, ...]] = ("kv",)
    to_stage: ClassVar[str | None] = "dist"

    dies: int = 4
    remap: tuple[int, ...] = ()
    machine: str = "edge10"
    strategy: Literal["cost", "split", "rows"] = "cost"
    pp: int = 1
    mesh: tuple[int, ...] = ()
    kv_split: Literal["auto", "heads", "tokens"] = "auto"
    kv_block: int = BLOCK

    def run(self, op: Op, context: PassContext) -> None:
        cut = AnnotateSharding(**{option.name: getattr(self, option.name) for option in fields(self)})
        for step in (cut, PropagateSharding(), InsertCollectives(), LocalizeDies()):
            run_at_stage(step, op, context)
