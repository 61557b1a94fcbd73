"""What is cut how: heads for attention, whole quantisation groups for the MLP, rows for the vocabulary.
The first step of partition-dies.

    %q = ty.linear(%x, %wq)        -->     %q = ty.linear(%x, %wq) {tyir.sharding = {axis = 2 : i64, offsets = ..., sizes = ...},
                                                                    tyir.choice = "split: 3.1 us against 9.6 us replicated"}

A block (attention, MLP, embedding or head of the model) is split or left replicated, whichever the machine
file says is faster for one token: a split block reads the largest die's share of the weights and pays for
a collective, a replicated one reads everything on every die.  For a vision tower it is all patches of a
picture instead, and products count where they take longer than their weights; and the tower as a whole is cut
by rows of patches instead where that is faster (`_rows_cut`).  `strategy=split` always splits blocks; `tyir.pin =
"split"` or `"replicated"` on any linear or embedding of a block decides for that block, `"rows"` for a tower.

`pp=K` cuts the decoder into K stages beside that: the dies form K groups of neighbours, each executes (and
caches) its own share of the layers, named by `tyir.dies`; its all-reduces stay within the group, and the
residual stream is handed from group to group.  Embedding and head are cut over all dies.

Dies beyond the key/value heads would cache copies of them: `kv-split=tokens` gives each die of a head's every
n-th block of `kv-block` positions instead (`_tokens_cut`), `auto` where a token is then faster, over a cache that
is half full.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from tyir.artifacts.token_blocks import BLOCK, TokenBlocks
from tyir.attributes import Attribute, DenseArrayAttr, StringAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.kv import Append
from tyir.dialects.sdy import Mesh
from tyir.dialects.ty import (
    Attention,
)
from tyir.execution.constexpr import ConstantExpressions
from tyir.ir import Op, Value
from tyir.layers import path_of
from tyir.manifest import MAX_DIES, record, recorded
from tyir.passes._placement import LINEAR
from tyir.passes._rows_cut import RowsCut, rows_cut
from tyir.passes._sharding_blocks import Block, DieGroup, attention_block, blocks_of, rows_of, stages_of
from tyir.passes._tokens_cut import TokenGroups, cache_ns, refusal, write_blocks
from tyir.passes._weight_times import weight_bytes, weight_ns
from tyir.pipeline import Pass, PassContext
from tyir.sharding import (
    Placement,
    Split,
    to_attribute,
)
from tyir.targets.machine import Machine, load_machine

__all__ = ["MAX_DIES", "AnnotateSharding", "check_dies", "check_mesh", "check_stages"]


def check_dies(dies: int) -> None:
    """`TyirError` unless the number of dies is in 1..16."""
    if not 1 <= dies <= MAX_DIES:
        raise TyirError(
            f"{dies} dies: a board has 1 to {MAX_DIES}", help=f"use {min(max(dies, 1), MAX_DIES)}"
        )


def check_stages(dies: int, stages: int) -> None:
    """`TyirError` unless the pipeline stages divide the dies."""
    if stages < 1 or dies % stages:
        fitting = [k for k in range(1, dies + 1) if dies % k == 0]
        raise TyirError(
            f"pp={stages} stages of {dies} dies",
            help=f"the number of stages must divide the dies: {', '.join(map(str, fitting))}",
        )


def check_remap(devices: tuple[int, ...], dies: int, said: str = "remap=") -> None:
    """`TyirError` unless `devices` are as many different physical dies; `said`: what gives them, in the
    user's words.
    """
    if len(set(devices)) != dies or len(devices) != dies or min(devices) < 0:
        known = list(dict.fromkeys(d for d in devices if d >= 0))[:dies]
        filled = [*known, *(d for d in range(MAX_DIES + dies) if d not in known)][:dies]
        raise TyirError(
            f"{said}{','.join(map(str, devices))} must name {dies} different dies, the main one first",
            help=f"use {said}{','.join(map(str, filled))}",
        )


def check_mesh(mesh: tuple[int, ...], dies: int) -> None:
    """`TyirError` unless the mesh is empty, a number of dies, or groups and dies of a group, and counts the
    dies (of a stage).
    """
    if mesh and (len(mesh) > 2 or min(mesh) < 1 or math.prod(mesh) != dies):
        pairs = [f"{dies // n},{n}" for n in range(2, dies) if dies % n == 0]
        raise TyirError(
            f"mesh={','.join(map(str, mesh))} is no arrangement of {dies} dies",
            help=f"use mesh={' or mesh='.join([str(dies), *pairs])}",
        )


@dataclass(frozen=True)
class AnnotateSharding(Pass):
    """The mesh and the cuts that are a matter of choice.

    `remap` lists the physical dies, the main one first; `machine` is the machine file the choice is made
    with; `strategy` is `cost`, `split` (blocks, always) or `rows` (a tower, always).  `mesh` says how the
    dies (of one stage) are grouped, `mesh=2,3` being 2 groups of 3: sums then go first within a group and
    then between them.  Without it whole packages are groups.  `kv_split`: what dies have of a cache whose
    heads are fewer, `heads` (copies), `tokens` (blocks of `kv_block` positions in turn) or `auto`: as is
    faster, with the strategy `cost`, else by heads.
    """

    stage: ClassVar[tuple[str, ...]] = ("kv",)
    to_stage: ClassVar[str | None] = "sharded"

    dies: int = 4
    remap: tuple[int, ...] = ()
    machine: str = "edge10"
    strategy: Literal["cost", "split", "rows"] = "cost"
    pp: int = 1
    mesh: tuple[int, ...] = ()
    kv_split: Literal["auto", "heads", "tokens"] = "auto"
    kv_block: int = BLOCK

    def run(self, op: Op, context: PassContext) -> None:
        check_dies(self.dies)
        devices = self.remap or tuple(range(self.dies))
        check_remap(devices, self.dies)
        check_stages(self.dies, self.pp)
        assert isinstance(op, Module)
        machine = load_machine(self.machine)
        check_mesh(self.mesh, self.dies // self.pp)
        axes = _axes(self.dies // self.pp, self.pp, int(machine.d2d.package_dies), self.mesh)
        op.body.append(Mesh.make(axes, devices))
        groups = dict(axes)
        parts = 1
        if self.kv_block < 1:
            raise TyirError(
                f"kv-block is {self.kv_block}: a block has at least 1 position", help="use kv-block=256"
            )
        if self.dies > 1:
            for function in [f for f in op.body if isinstance(f, Func)]:
                parts = max(parts, self._annotate(function, machine))
        if self.kv_split == "tokens" and parts == 1:
            what, helps = "there is no cache to cut by tokens", "use kv-split=heads, or auto"
            if self.dies // self.pp == 1:
                what = f"{self.dies} dies in {self.pp} stages: one die has a whole cache"
            raise TyirError(what, help=helps)
        by_tokens = {"kv_block": self.kv_block, "kv_parts": parts} if parts > 1 else {}
        record(
            op,
            **{
                "batch": 1,
                "output": "logits",
                "output_rows": "all",
                **recorded(op),
            },  # specialize-batch, select-output, select-rows cannot follow
            dies=self.dies,
            die_map=devices,
            pp=self.pp,
            mesh=(groups["group"], groups["die"]) if "group" in groups else (),
            machine=self.machine,
            kv_split="tokens" if by_tokens else "heads",
            **by_tokens,
        )

    def _annotate(self, function: Func, machine: Machine) -> int:
        """Write the cuts of a function; how many dies share the blocks of its caches, 1 without a cut by
        tokens.
        """
        blocks = blocks_of(function, self.dies, self.pp)
        parts = 1
        if not self._by_rows(function, blocks, machine):
            if (by_tokens := self._by_tokens(function, blocks, machine)) is not None:
                blocks, parts = by_tokens
            for block in blocks:
                self._decide(block, machine)
            if self.pp > 1:
                _name_dies(function, stages_of(function, self.dies, self.pp))
        return parts

    def _by_tokens(
        self, function: Func, blocks: Sequence[Block], machine: Machine
    ) -> tuple[list[Block], int] | None:
        """The blocks with caches that are cut by tokens, if they shall be, and how many dies share them."""
        found: dict[int, Block] = {}
        costs = [0.0, 0.0]
        group = stages_of(function, self.dies, self.pp)
        if self.kv_split == "heads" or (self.kv_split == "auto" and self.strategy != "cost"):
            return None
        for number, block in enumerate(blocks):
            if (attention := block.attention) is None:
                continue
            dies = group(attention)
            groups = TokenGroups(dies.size, attention.kv_heads)
            problem = refusal(attention, groups, self.kv_block)
            if block.normed is not None:
                problem = f"{path_of(block.normed)} is a norm over all heads", "use kv-split=heads, or auto"
            elif block.pin() == "replicated":
                problem = f"{path_of(attention)} is pinned to be replicated", "pin it to be split"
            if problem is not None:
                if self.kv_split == "auto":
                    return None
                raise TyirError(Diagnostic(problem[0], help=problem[1]))
            found[number] = other = attention_block(attention, dies, groups)
            costs[0] += self._attention_ns(block, machine)
            own = TokenBlocks(0, groups.parts, self.kv_block)
            costs[1] += other.split_ns(machine) + cache_ns(attention, 1 / groups.count, machine, own)
            costs[1] += groups.gathers_ns(attention, machine)
        if not found or (self.kv_split == "auto" and costs[0] <= costs[1]):
            return None
        heads, tokens = (cost / len(found) / 1000 for cost in costs)
        why = f"tokens: {tokens:.1f} us with a half-full cache cut by tokens against {heads:.1f} us by heads"
        why += " (pinned)" if self.kv_split == "tokens" else ""
        parts = 1
        for block in found.values():
            assert block.attention is not None
            block.by_tokens = why
            parts = TokenGroups(block.dies, block.attention.kv_heads).parts
            write_blocks(block.attention, parts, self.kv_block)
        return [found.get(number, block) for number, block in enumerate(blocks)], parts

    def _attention_ns(self, block: Block, machine: Machine) -> float:
        """A token's attention cut as it would be by heads, with a half-full cache."""
        assert block.attention is not None
        caches = next(p for p in block.caches.values() if isinstance(p, Split))
        most, heads = max(size for _, size in caches.ranges), max(o + size for o, size in caches.ranges)
        split = block.split_ns(machine) + cache_ns(block.attention, most / heads, machine)
        if self.strategy == "split" or self.pp > 1 or block.pin() == "split":
            return split
        return min(split, block.replicated_ns(machine) + cache_ns(block.attention, 1, machine))

    def _by_rows(self, function: Func, blocks: Sequence[Block], machine: Machine) -> bool:
        """Whether a tower is cut by rows, which is annotated then, and not by heads."""
        rows = rows_cut(function, self.dies) if self.pp == 1 and self.strategy != "split" else None
        if rows is None:
            if self.strategy == "rows":
                raise TyirError(
                    f"@{function.sym_name} cannot be cut by rows over {self.dies} dies",
                    help="towers with as many windows (or rows of tokens) as dies can; use strategy=cost",
                )
            return False
        counted = {op for block in blocks for op in block.counted}
        constants = ConstantExpressions()
        by_heads = sum(min(b.split_ns(machine), b.replicated_ns(machine)) for b in blocks) + sum(
            weight_ns(weight_bytes(op), rows_of(op.out), machine)
            for op in function.body
            if isinstance(op, LINEAR) and op not in counted and not constants.is_constant(op.out)
        )
        rows = _with_channels(rows, function, blocks, machine)
        by_rows = rows.ns(function, machine)
        pins = {p for op in function.body if (p := op.attributes.get("tyir.pin")) is not None}
        pinned = StringAttr("rows") in pins
        if not pinned and (pins or (self.strategy == "cost" and by_heads <= by_rows)):
            return False
        why = f"rows: {by_rows / 1e6:.2f} ms by rows against {by_heads / 1e6:.2f} ms by heads"
        rows.first.set_attribute("tyir.choice", StringAttr(why + (" (pinned)" if pinned else "")))
        for op, cut in [(rows.first, rows.cut), *rows.channels.items()]:
            written = to_attribute(cut)
            assert written is not None
            op.set_attribute("tyir.sharding", written)
        return True

    def _leave_whole(self, norm: Op) -> None:
        """Attention whose queries or keys are normed over all heads (OLMo 2) is computed by every die."""
        if self.pp > 1:
            what = (
                f"{path_of(norm)} is a norm over all heads, which the dies of a pipeline stage cannot share"
            )
            raise TyirError(Diagnostic(what, help=f"use pp={self.dies}, one die a stage, or pp=1"))
        norm.set_attribute("tyir.choice", StringAttr("replicated: the norm reads all heads"))

    def _decide(self, block: Block, machine: Machine) -> None:
        if block.dies == 1:
            return  # a stage of one die
        if block.normed is not None:
            self._leave_whole(block.normed)
            return
        split, replicated = block.split_ns(machine), block.replicated_ns(machine)
        pin = block.pin()
        forced = bool(
            self.strategy == "split" or self.pp > 1 or block.by_tokens
        )  # stages are for models that do not fit otherwise
        chosen = pin or ("split" if forced or split <= replicated else "replicated")
        why = f"{chosen}: {split / 1000:.1f} us split against {replicated / 1000:.1f} us replicated" + (
            " (pinned)" if pin else ""
        )
        why = block.by_tokens or why
        for op, placement in block.cuts.items():
            op.set_attribute("tyir.choice", StringAttr(why))
            if chosen == "split" and (written := to_attribute(placement)) is not None:
                op.set_attribute("tyir.sharding", written)
        if chosen == "split":
            for cache, placement in block.caches.items():
                _annotate_argument(cache, placement)


def _with_channels(rows: RowsCut, function: Func, blocks: Sequence[Block], machine: Machine) -> RowsCut:
    """The same cut with those blocks behind all attention by channels that are faster so: large weights that
    few rows, merged ones, are multiplied with.
    """
    ops = list(function.body)
    behind = set(ops[1 + max(number for number, op in enumerate(ops) if isinstance(op, Attention)) :])
    for block in blocks:
        if block.counted and block.counted <= behind:
            other = replace(rows, channels={**rows.channels, **block.cuts})
            if other.ns(function, machine) < rows.ns(function, machine):
                rows = other
    return rows


def _axes(dies: int, stages: int, package: int, mesh: tuple[int, ...]) -> list[tuple[str, int]]:
    """The mesh: stages of groups of dies, an axis only where there is more than one; `dies` are a stage's."""
    own = mesh or ((dies // package, package) if dies > package and dies % package == 0 else (dies,))
    return [
        *([("stage", stages)] if stages > 1 else []),
        *([("group", own[0])] if len(own) == 2 else []),
        ("die", own[-1]),
    ]


def _name_dies(function: Func, group: Callable[[Op], DieGroup]) -> None:
    """Say which dies execute each op of a layer and hold its caches."""
    constants = ConstantExpressions()
    for op in function.body:
        stage = group(op)
        if stage.size < stage.total and op.results and not constants.is_constant(op.results[0]):
            dies = DenseArrayAttr.i64(range(stage.first, stage.first + stage.size))
            op.set_attribute("tyir.dies", dies)
            if isinstance(op, Append):
                _set_arg_attr(op.cache, "tyir.dies", dies)


def _annotate_argument(value: Value, placement: Placement) -> None:
    written = to_attribute(placement)
    assert written is not None
    _set_arg_attr(value, "tyir.sharding", written)


def _set_arg_attr(value: Value, name: str, attribute: Attribute) -> None:
    function = value.block.parent_op if value.block is not None else None
    assert isinstance(function, Func)
    attrs = [function.arg_attr(i) for i in range(len(function.args))]
    attrs[value.index] = attrs[value.index].with_entry(name, attribute)
    function.set_arg_attrs(attrs)
