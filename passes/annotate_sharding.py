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
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from tyir.artifacts.token_blocks import BLOCK, TokenBlocks
from tyir.attributes import Attribute, DenseArrayAttr, StringAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.kv import Append, CachedAttention, QuantizeRows, head_axis
from tyir.dialects.sdy import Mesh
from tyir.dialects.ty import (
    Attention,
    Embedding,
    Linear,
    Norm,
    QuantizedLinear,
    Reshape,
    Rope,
    SelectRow,
    Softcap,
    TopK,
    record_words,
    tensor_type,
)
from tyir.execution.constexpr import ConstantExpressions
from tyir.ir import Op, Value
from tyir.layers import layer_of, path_of
from tyir.manifest import MAX_DIES, record, recorded
from tyir.passes._placement import LINEAR, through_reshape
from tyir.passes._rows_cut import RowsCut, rows_cut
from tyir.passes._tokens_cut import TokenGroups, cache_ns, refusal, write_blocks
from tyir.passes._weight_times import weight_bytes, weight_ns
from tyir.pipeline import Pass, PassContext
from tyir.sharding import (
    PARTIAL,
    Placement,
    Range,
    Split,
    even_ranges,
    head_ranges,
    to_attribute,
    vocabulary_ranges,
)
from tyir.targets.collectives import all_gather_ns, all_reduce_ns
from tyir.targets.machine import Machine, load_machine
from tyir.traits import Elementwise
from tyir.types import f16

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
        blocks = _blocks(function, self.dies, self.pp)
        parts = 1
        if not self._by_rows(function, blocks, machine):
            if (by_tokens := self._by_tokens(function, blocks, machine)) is not None:
                blocks, parts = by_tokens
            for block in blocks:
                self._decide(block, machine)
            if self.pp > 1:
                _name_dies(function, _stages(function, self.dies, self.pp))
        return parts

    def _by_tokens(
        self, function: Func, blocks: Sequence[_Block], machine: Machine
    ) -> tuple[list[_Block], int] | None:
        """The blocks with caches that are cut by tokens, if they shall be, and how many dies share them."""
        found: dict[int, _Block] = {}
        costs = [0.0, 0.0]
        group = _stages(function, self.dies, self.pp)
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
            found[number] = other = _attention_block(attention, dies, groups)
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

    def _attention_ns(self, block: _Block, machine: Machine) -> float:
        """A token's attention cut as it would be by heads, with a half-full cache."""
        assert block.attention is not None
        caches = next(p for p in block.caches.values() if isinstance(p, Split))
        most, heads = max(size for _, size in caches.ranges), max(o + size for o, size in caches.ranges)
        split = block.split_ns(machine) + cache_ns(block.attention, most / heads, machine)
        if self.strategy == "split" or self.pp > 1 or block.pin() == "split":
            return split
        return min(split, block.replicated_ns(machine) + cache_ns(block.attention, 1, machine))

    def _by_rows(self, function: Func, blocks: Sequence[_Block], machine: Machine) -> bool:
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
            weight_ns(weight_bytes(op), _rows(op.out), machine)
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

    def _decide(self, block: _Block, machine: Machine) -> None:
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


def _with_channels(rows: RowsCut, function: Func, blocks: Sequence[_Block], machine: Machine) -> RowsCut:
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


def _name_dies(function: Func, group: Callable[[Op], _Group]) -> None:
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


# ----------------------------------------------------------------------------------------------------- blocks


@dataclass
class _Block:
    """Ops that are split together over `dies` dies: their cuts, the weights' bytes per unit of the cut, and
    what the joining collective moves for one token.
    """

    dies: int
    cuts: dict[Op, Placement] = field(default_factory=dict)
    caches: dict[Value, Placement] = field(default_factory=dict)
    # bytes, largest die's share, rows that are multiplied with them
    weights: list[tuple[int, float, int]] = field(default_factory=list)
    joined_bytes: int = 0
    gathers: bool = False  # the head's columns are gathered, everything else is reduced
    counted: set[Op] = field(default_factory=set)  # the ops whose weights these are
    normed: Op | None = None  # a norm over what would be cut: every die needs all of it
    attention: CachedAttention | None = None
    by_tokens: str = ""  # why its caches are cut by tokens, if they are

    def replicated_ns(self, machine: Machine) -> float:
        return sum(weight_ns(b, rows, machine) for b, _, rows in self.weights)

    def split_ns(self, machine: Machine) -> float:
        """The largest share of the weights, and a collective's latency and bytes."""
        share = sum(weight_ns(b * s, rows, machine) for b, s, rows in self.weights)
        if self.gathers:
            return share + all_gather_ns(1, [self.joined_bytes // self.dies] * self.dies, machine)
        return share + all_reduce_ns(self.joined_bytes, f16, self.dies, machine)

    def pin(self) -> str | None:
        found = {p.value for op in self.cuts if isinstance(p := op.attributes.get("tyir.pin"), StringAttr)}
        if len(found) > 1 or found - {"split", "replicated"}:
            raise TyirError(
                Diagnostic(
                    f"tyir.pin of {path_of(next(iter(self.cuts)))} is {' and '.join(sorted(found))}",
                    help='pin "split" or "replicated"',
                )
            )
        return next(iter(found), None)

    def add(self, op: Op, cut: Split) -> None:
        """A linear whose rows (or, for the consumer, columns) are cut."""
        total = max(offset + size for offset, size in cut.ranges)  # several dies may have the same
        share = max(s for _, s in cut.ranges) / max(total, 1)
        self.weights.append((weight_bytes(op), share, _rows(op.results[0])))
        self.counted.add(op)


def _blocks(function: Func, dies: int, stages: int) -> list[_Block]:
    constants = ConstantExpressions()
    group = _stages(function, dies, stages)
    blocks = [_attention_block(a, group(a)) for a in function.walk_type(CachedAttention)]
    blocks += [_tower_attention_block(a, group(a)) for a in function.walk_type(Attention)]
    taken = {op for block in blocks for op in block.cuts}
    for linear in [op for op in function.body if isinstance(op, LINEAR)]:
        sources = _gated_sources(linear.x, constants)
        if sources and linear not in taken and not taken & set(sources):
            blocks.append(_mlp_block(linear, group(linear)))
    lookups = [e for e in function.walk_type(Embedding) if not constants.is_constant(e.out)]
    blocks += [_embedding_block(e, dies) for e in lookups]
    result = _before_cap(next((value.op for value in function.body.terminator.operands), None))
    head = _before_cap(result.x.op) if isinstance(result, TopK) else result
    if isinstance(head, LINEAR) and head not in taken:
        blocks.append(_head_block(head, dies))
        if isinstance(result, TopK):
            blocks[-1].joined_bytes = 4 * record_words(result.k) * dies
    return blocks


def _before_cap(op: Op | None) -> Op | None:
    """What makes the values that a soft cap takes; the op itself when it is none."""
    return _before_cap(op.x.op) if isinstance(op, Softcap) else op


def _stages(function: Func, dies: int, stages: int) -> Callable[[Op], _Group]:
    """Which dies share an op: those of its layer's stage, layers being dealt out evenly; all of them outside
    the layers.
    """
    layers = sorted({layer for op in function.body if (layer := layer_of(op)) is not None})
    if stages > max(len(layers), 1):
        fitting = [k for k in range(1, len(layers) + 1) if dies % k == 0]
        raise TyirError(
            f"pp={stages} stages for a decoder of {len(layers)} layers: every stage needs one",
            help=f"use pp={fitting[-1] if fitting else 1}",
        )
    shares = even_ranges(len(layers), stages)
    stage_of = {
        layer: next(s for s, (o, n) in enumerate(shares) if o <= i < o + n) for i, layer in enumerate(layers)
    }

    def group(op: Op) -> _Group:
        if isinstance(op, SelectRow) and op.x.op is not None:
            return group(op.x.op)  # the last stage selects: what it hands on is one row
        layer = layer_of(op)
        return (
            _Group(dies, 0, dies)
            if layer is None
            else _Group(dies, stage_of[layer] * (dies // stages), dies // stages)
        )

    return group


@dataclass(frozen=True)
class _Group:
    """`size` neighbouring dies of `total`, from die `first`."""

    total: int
    first: int
    size: int

    def ranges(self, units: int, unit: int = 1) -> tuple[Range, ...]:
        """An even cut over the group's dies; the others get nothing."""
        return self.placed(even_ranges(units, self.size, unit))

    def placed(self, own: tuple[Range, ...]) -> tuple[Range, ...]:
        """The group's ranges with those of the other dies, which get nothing."""
        return ((0, 0),) * self.first + own + ((0, 0),) * (self.total - self.first - self.size)


def _attention_block(
    attention: CachedAttention, dies: _Group, by_tokens: TokenGroups | None = None
) -> _Block:
    """Query heads inside the groups that read one key/value head; of those what a die's query heads read, or
    with caches that are cut by tokens those of its group of dies.
    """
    block = _Block(dies.size, attention=attention)
    heads = attention.kv_heads
    if by_tokens is None:
        queries = dies.placed(head_ranges(heads, dies.size))
        groups = tuple((heads[o], heads[o + s - 1] - heads[o] + 1) if s else (0, 0) for o, s in queries)
    else:
        queries, groups = dies.placed(by_tokens.queries()), dies.placed(by_tokens.caches())
    _demand(attention.q, Split(2, queries), block)  # further rotations are of the same product
    for cache in (attention.k, attention.v, *attention.scales):
        append = cache.op
        assert isinstance(append, Append)
        if append.rows.index == 0:  # scales come from where the 8-bit rows come from
            _demand(append.rows, Split(2, groups), block)
        block.caches[append.cache] = Split(head_axis(append.layout), groups)
    _consumers(attention.out, Split(2, queries), block)
    return block


def _tower_attention_block(attention: Attention, dies: _Group) -> _Block:
    """Heads evenly, of a tower's attention, where each has its own keys and values."""
    block = _Block(dies.size)
    heads = Split(2, dies.ranges(tensor_type(attention.q).dims[2] or 0))
    for value in (attention.q, attention.k, attention.v):
        _demand(value, heads, block)
    _consumers(attention.out, heads, block)
    return block


def _mlp_block(down: Linear | QuantizedLinear, dies: _Group) -> _Block:
    block = _Block(dies.size)
    width = tensor_type(down.x).dims[-1] or 0
    unit = mlp_unit(width, down.group_size if isinstance(down, QuantizedLinear) else 128, dies.size)
    split = Split(tensor_type(down.x).rank - 1, dies.ranges(width, unit))
    _demand(down.x, split, block)
    block.add(down, split)
    block.joined_bytes = _row_bytes(down.out)
    return block


def _embedding_block(embedding: Embedding, dies: int) -> _Block:
    """The table is read one row a token, so what counts is its place in memory: it is split whenever
    something else is.
    """
    block = _Block(dies, cuts={embedding: PARTIAL})
    block.joined_bytes = _row_bytes(embedding.out)
    rows = tensor_type(embedding.table).static_shape[0]
    share = max(s for _, s in vocabulary_ranges(rows, dies)) / rows
    block.weights.append((weight_bytes(embedding), share, 1))
    return block


def _head_block(head: Linear | QuantizedLinear, dies: int) -> _Block:
    split = Split(
        tensor_type(head.out).rank - 1, vocabulary_ranges(tensor_type(head.out).dims[-1] or 0, dies)
    )
    block = _Block(dies, cuts={head: split}, gathers=True)
    block.add(head, split)
    block.joined_bytes = _row_bytes(head.out)
    return block


def mlp_unit(width: int, group_size: int, dies: int) -> int:
    """The granule of an MLP cut: whole quantisation groups where there is one for every die, else the largest
    halving of them that gives one.
    """
    unit = math.gcd(width, group_size)
    while width // unit < dies and unit % 2 == 0 and unit > 16:
        unit //= 2
    return unit


def _rows(value: Value) -> int:
    """Rows of a value: one token's where the length is not known, all patches of a vision tower."""
    t = tensor_type(value)
    return math.prod(d or 1 for d in t.dims[:-1]) if t.is_static else 1


def _row_bytes(value: Value) -> int:
    """Bytes of those rows."""
    t = tensor_type(value)
    return t.with_shape([_rows(value), t.dims[-1]]).nbytes


def _demand(value: Value, split: Split, block: _Block) -> None:
    """Ask for a value cut this way: followed back to the linears that can produce it so."""
    op = value.op
    if isinstance(op, LINEAR):
        if split.axis == tensor_type(op.out).rank - 1:
            block.cuts[op] = split
            block.add(op, split)
    elif isinstance(op, QuantizeRows):
        _demand(op.rows, split, block)
    elif isinstance(op, Rope) or (isinstance(op, Norm) and split.axis != tensor_type(op.x).rank - 1):
        _demand(op.x, split, block)
    elif isinstance(op, Norm):
        block.normed = op
    elif isinstance(op, Reshape):
        if (back := through_reshape(split, tensor_type(op.out).dims, tensor_type(op.x).dims)) is not None:
            _demand(op.x, back, block)
    elif op is not None and op.has_trait(Elementwise):
        for operand in op.operands:
            _demand(operand, split, block)


def _consumers(value: Value, split: Split, block: _Block) -> None:
    """The linears that take the cut value as addends, for their bytes."""
    for user in value.users:
        if isinstance(user, Reshape):
            after = through_reshape(split, tensor_type(user.x).dims, tensor_type(user.out).dims)
            if after is not None:
                _consumers(user.out, after, block)
        elif isinstance(user, LINEAR):
            block.add(user, split)
            block.joined_bytes = _row_bytes(user.out)


def _gated_sources(value: Value, constants: ConstantExpressions) -> list[Op]:
    """The linears that feed a value through elementwise ops only; empty when it has other sources or none."""
    op = value.op
    if isinstance(op, LINEAR):
        return [op]
    if op is None or not op.has_trait(Elementwise):
        return []
    sources: list[Op] = []
    for operand in op.operands:
        if constants.is_constant(operand):
            continue
        found = _gated_sources(operand, constants)
        if not found:
            return []
        sources += found
    return sources
