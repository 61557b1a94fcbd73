"""One program per die, with its own shapes and slices of the weights.  The last step of partition-dies.

    @main                                                          module @die0 {
      %h = ty.linear(%x, %w) {tyir.sharding = {axis = 2, ..}}        %s = ty.slice(%w) {axis = 0, offset = 0, ...}
                                                                     %h = ty.linear(%x, %s) {tyir.shard = [2, 0]} }
                                                            -->    module @die1 { the same with the other rows }

A die left without a share (more dies than heads) has no op for it, and takes part in the all-reduce with
nothing.  A die of another pipeline stage has nothing of a layer at all; what is handed on between stages
becomes a `dist.send` and a `dist.recv`.  `tyir.shard = [axis, offset]` and `tyir.partial` say which part
of the whole a result is: verification compares by them.  Attention whose cache is cut by tokens becomes what
`_tokens_cut` says.
"""  # noqa: E501

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tyir.attributes import DenseArrayAttr, DictAttr, IntegerAttr, UnitAttr
from tyir.diagnostics import TyirError
from tyir.dialects.builtin import Module
from tyir.dialects.dist import AllGather, AllReduce, CollectivePermute, Recv, Send
from tyir.dialects.func import Func, Return
from tyir.dialects.kv import Append, CachedAttention, position_axis
from tyir.dialects.sdy import Mesh
from tyir.dialects.ty import (
    Attention,
    Embedding,
    Linear,
    QuantizedLinear,
    Repeat,
    Reshape,
    Slice,
    TopKCandidates,
    tensor_type,
)
from tyir.execution.constexpr import ConstantExpressions
from tyir.execution.entry_points import alias_of, aliasing
from tyir.ir import Block, Op, Region, Value
from tyir.layers import carry
from tyir.passes._placement import executing_dies, holding_dies, placement_of, rule_for
from tyir.passes._tokens_cut import BLOCKS, attend_by_tokens, token_blocks_of
from tyir.passes.dce import eliminate_dead_code
from tyir.passes.specialize_seqlen import Inferred, infer_results
from tyir.pipeline import Pass, PassContext
from tyir.sharding import PARTIAL, REPLICATED, Split, vocabulary_ranges
from tyir.types import FunctionType, TensorType, i64

__all__ = ["LocalizeDies"]


@dataclass(frozen=True)
class LocalizeDies(Pass):
    """A module `@die{i} {tyir.die = i}` for each die of the mesh."""

    stage: ClassVar[tuple[str, ...]] = ("sharded",)
    to_stage: ClassVar[str | None] = "dist"

    def run(self, op: Op, context: PassContext) -> None:
        mesh = next(op.walk_type(Mesh), None)
        if mesh is None:
            raise TyirError(
                "the module has no sdy.mesh",
                help="run annotate-sharding first, or partition-dies, which runs all four steps",
            )
        assert isinstance(op, Module)
        functions = [f for f in op.body if isinstance(f, Func)]
        constants, known = ConstantExpressions(), Inferred()
        for die in range(mesh.dies):
            module = Module.empty(f"die{die}")
            module.set_attribute("tyir.die", IntegerAttr(die, i64))
            for function in functions:
                module.body.append(_Localizer(function, mesh.dies, die, constants, known).run())
            op.body.append(module)
        for function in functions:
            function.erase()


class _Localizer:
    """Builds one die's function.  Values the die has no share of are absent from `local`.

    `constants`: which values of the functions are weight expressions; `known`: types inferred so far.
    """

    def __init__(
        self, function: Func, dies: int, die: int, constants: ConstantExpressions, known: Inferred
    ) -> None:
        self.function = function
        self.dies = dies
        self.die = die
        self.constants = constants
        self.known = known
        self.local: dict[Value, Value] = {}
        self.slices: dict[tuple[Value, int, int, int], Value] = {}
        self.block = Block()
        self.tags = {
            op: number
            for number, op in enumerate(o for o in function.body if isinstance(o, CollectivePermute))
        }

    def run(self) -> Func:
        source = self.function
        kept = [i for i, arg in enumerate(source.args) if not self._is_absent(arg)]
        for index in kept:
            arg = source.args[index]
            split = placement_of(arg)
            arg_type = tensor_type(arg)
            if isinstance(split, Split):
                arg_type = arg_type.with_shape(
                    self._range(split)[1] if i == split.axis else d for i, d in enumerate(arg_type.dims)
                )
            arg_type = self._own_blocks(arg, arg_type)
            self.local[arg] = self.block.add_arg(arg_type, arg.name)
        result = Func(
            sym_name=source.sym_name,
            function_type=FunctionType((), ()),
            body_region=Region([self.block]),
            loc=source.loc,
            attributes=source.attributes,
        )
        for op in source.body:
            self._localize(op)
        result.refresh_type()
        result.set_arg_attrs([source.arg_attr(i).without("tyir.sharding", "tyir.dies") for i in kept])
        result.set_res_attrs(
            [
                self._res_attr(i, kept)
                for i, v in enumerate(source.body.terminator.operands)
                if v in self.local
            ]
        )
        eliminate_dead_code(result)
        return result

    def _own_blocks(self, arg: Value, arg_type: TensorType) -> TensorType:
        """The type of an argument with the die's rows only, where it is a cache that is cut by tokens."""
        for op in arg.users:
            if isinstance(op, Append) and op.cache is arg and (found := token_blocks_of(op, arg, self.die)):
                axis = position_axis(op.layout)
                rows = found[0].rows(arg_type.dims[axis] or 0)
                return arg_type.with_shape(rows if i == axis else d for i, d in enumerate(arg_type.dims))
        return arg_type

    def _res_attr(self, index: int, kept: list[int]) -> DictAttr:
        attrs, alias = self.function.res_attr(index), alias_of(self.function, index)
        return attrs if alias is None else aliasing(attrs, kept.index(alias))

    def _range(self, split: Split) -> tuple[int, int]:
        return split.ranges[self.die]

    def _is_absent(self, value: Value) -> bool:
        split, dies = placement_of(value), holding_dies(value)
        return bool(dies and self.die not in dies) or (
            isinstance(split, Split) and self._range(split)[1] == 0
        )

    def _localize(self, op: Op) -> None:
        if isinstance(op, CollectivePermute):
            self._hand_on(op)
        elif isinstance(op, (AllReduce, AllGather)) and op.dies and self.die not in op.dies:
            return
        elif isinstance(op, (AllReduce, AllGather)) and op.dies == (self.die,):
            self.local[op.out] = self.local[op.operands[0]]  # a stage of one die
        elif isinstance(op, (AllReduce, AllGather)):
            self._copy(op, [self.local[v] for v in op.operands if v in self.local])
        elif isinstance(op, Return):
            self.block.append(
                Return(values=[self.local[v] for v in op.operands if v in self.local], loc=op.loc)
            )
        elif isinstance(op, CachedAttention) and BLOCKS in op.attributes:
            if self.die in (executing_dies(op) or range(self.dies)):
                self._attention_by_tokens(op)
        elif op.results and self.constants.is_constant(op.results[0]):
            self._copy(op, [self.local[v] for v in op.operands])
        elif all(v in self.local for v in op.operands) and not any(self._is_absent(r) for r in op.results):
            operands = self._operands(op)
            if isinstance(op, (Linear, QuantizedLinear)):
                self._linear(op, operands)
            elif isinstance(op, Embedding):
                self._embedding(op, operands)
            elif isinstance(op, Reshape):
                self._reshape(op, operands)
            else:
                copy = self._copy(op, operands)
                if copy.results:
                    self._adjust(copy, op)

    def _hand_on(self, op: CollectivePermute) -> None:
        """The die's part: it sends, receives, or has the value already and keeps it."""
        targets = tuple(target for source, target in op.routes if source == self.die)
        source = next((source for source, target in op.routes if target == self.die), None)
        if targets:
            send = Send(self.local[op.x], targets=targets, tag=self.tags[op], loc=op.loc)
            self.block.append(carry(send, op))
        if source is not None:
            received = Recv(source=source, tag=self.tags[op], loc=op.loc, result_types=[op.out.type])
            self.local[op.out] = self.block.append(carry(received, op)).results[0]
        elif not self._is_absent(op.out):
            self.local[op.out] = self.local[op.x]

    def _operands(self, op: Op) -> list[Value]:
        """The local operands, cut where the op wants a part of something whole."""
        operands = []
        for value, wanted in zip(op.operands, rule_for(op)[0]):
            local = self.local[value]
            if isinstance(wanted, Split) and placement_of(value) is REPLICATED:
                local = self._slice(local, wanted.axis, *self._range(wanted))
            operands.append(local)
        return operands

    def _copy(self, op: Op, operands: list[Value]) -> Op:
        new = type(op).create(
            operands,
            [r.type for r in op.results],
            op.properties,
            op.attributes,
            loc=op.loc,
            result_names=[r.name for r in op.results],
        )
        self.block.append(new)
        infer_results(new, self.known)
        self._annotate(new, op)
        self.local.update(zip(op.results, new.results))
        return new

    def _annotate(self, new: Op, op: Op) -> None:
        """Say which part of the whole a result is, in place of the annotations that the steps before
        needed.
        """
        placement = placement_of(op.results[0]) if op.results else None
        new.attributes = new.attributes.without(
            "tyir.sharding", "sdy.sharding", "tyir.choice", "tyir.pin", "tyir.dies", BLOCKS
        )
        if isinstance(placement, Split):
            new.set_attribute("tyir.shard", DenseArrayAttr.i64((placement.axis, self._range(placement)[0])))
        elif placement is PARTIAL:
            new.set_attribute("tyir.partial", UnitAttr())

    def _slice(self, value: Value, axis: int, offset: int, size: int) -> Value:
        if (offset, size) == (0, tensor_type(value).dims[axis]):
            return value
        key = (value, axis, offset, size)
        if key not in self.slices:
            new = Slice(
                value,
                axis=axis,
                offset=offset,
                size=size,
                loc=value.op.loc if value.op is not None else self.function.loc,
            )
            self.slices[key] = self.block.append(carry(new, value.op)).results[0]
        return self.slices[key]

    def _adjust(self, new: Op, op: Op) -> None:
        """Properties that name sizes or heads of the whole."""
        split = placement_of(op.results[0])
        if not isinstance(split, Split):
            return
        offset, size = self._range(split)
        if isinstance(new, Append) and (found := token_blocks_of(op, op.operands[0], self.die)):
            new.blocks = (found[0].number, found[0].count, found[0].size)
        elif isinstance(new, CachedAttention):
            caches = placement_of(op.operands[1])
            first = self._range(caches)[0] if isinstance(caches, Split) else 0
            new.kv_heads = tuple(g - first for g in new.kv_heads[offset : offset + size])
        elif isinstance(new, Attention) and new.segments and split.axis == 1:
            own = [bound - offset for bound in new.segments if offset <= bound <= offset + size]
            new.segments = tuple(own) if len(new.segments) > 2 else None
        elif isinstance(new, TopKCandidates):
            new.offset = sum(new.sizes[: self.die])
            new.sizes = (new.sizes[self.die],)
        infer_results(new)

    def _attention_by_tokens(self, op: CachedAttention) -> None:
        """Of all query heads of the dies that share the cache; the die goes on with its own."""
        whole, first = attend_by_tokens(op, self.die, self.local, self.block.append)
        split = placement_of(op.out)
        assert isinstance(split, Split)
        offset, size = self._range(split)
        if size:
            own = self._slice(whole, 2, offset - first, size)
            assert own.op is not None
            own.op.set_attribute("tyir.shard", DenseArrayAttr.i64((2, offset)))
            self.local[op.out] = own

    def _reshape(self, op: Reshape, operands: list[Value]) -> None:
        """To the shape of the die's part."""
        split = placement_of(op.out)
        size = self._range(split)[1] if isinstance(split, Split) else None
        shape = tuple(
            size if size is not None and isinstance(split, Split) and axis == split.axis else d
            for axis, d in enumerate(op.shape)
        )
        new = Reshape(operands[0], shape=shape, attributes=op.attributes, loc=op.loc)
        new.out.name = op.out.name
        self._annotate(new, op)
        self.local[op.out] = self.block.append(new).results[0]

    def _embedding(self, op: Embedding, operands: list[Value]) -> None:
        """Rows of the vocabulary; ids outside give zeros, the all-reduce that follows adds the one die that
        has the row.
        """
        table, ids = operands
        if placement_of(op.out) is not PARTIAL:
            self._copy(op, operands)
            return
        offset, size = vocabulary_ranges(tensor_type(table).static_shape[0], self.dies)[self.die]
        if size:
            new = Embedding(self._slice(table, 0, offset, size), ids, offset=op.offset + offset, loc=op.loc)
            self._annotate(new, op)
            self.local[op.out] = self.block.append(carry(new, op)).results[0]

    def _linear(self, op: Linear | QuantizedLinear, operands: list[Value]) -> None:
        x_split, out = placement_of(op.x), placement_of(op.out)
        if out is PARTIAL and isinstance(x_split, Split):
            self._row_parallel(op, operands, x_split)
        elif isinstance(out, Split) and out.axis == tensor_type(op.out).rank - 1:
            offset, size = self._range(out)
            self._copy(op, [operands[0], *(self._slice(v, 0, offset, size) for v in operands[1:])])
        else:
            self._copy(op, operands)

    def _row_parallel(self, op: Linear | QuantizedLinear, operands: list[Value], split: Split) -> None:
        """A range of input channels; the addends are reduced later, so only one die adds the bias."""
        offset, size = self._range(split)
        tail = operands[4:] if isinstance(op, QuantizedLinear) else operands[2:]
        bias = tail if self.die == next(d for d, (_, s) in enumerate(split.ranges) if s) else []
        if isinstance(op, Linear):
            self._copy(op, [operands[0], self._slice(operands[1], 1, offset, size), *bias])
            return
        x, q, scales, zeros = operands[:4]
        group = math.gcd(
            op.group_size, *(o for o, s in split.ranges if s), *(s for _, s in split.ranges if s)
        )
        if (
            group != op.group_size
        ):  # a cut inside a group: finer groups with repeated scales are exactly the same weights
            times = op.group_size // group
            scales, zeros = (
                self.block.append(carry(Repeat(v, axis=1, times=times, loc=op.loc), op)).results[0]
                for v in (scales, zeros)
            )
        parts = [
            self._slice(q, 1, offset, size),
            *(self._slice(v, 1, offset // group, size // group) for v in (scales, zeros)),
        ]
        new = self._copy(op, [x, *parts, *bias])
        new.set_property("group_size", IntegerAttr(group, i64))
