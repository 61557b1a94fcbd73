"""The step over a whole sequence becomes a step over new tokens and a key/value cache.

    @main(%input_ids: tensor<1x?xi64>, %position_ids: tensor<1x?xi64>)
      %cos, %sin = ty.rope_angles(%position_ids)
      %a = ty.attention(%q, %k, %v)
    -->
    @main(%ids: tensor<1x?xi32>, %pos: tensor<1xi32>, %k0: tensor<1xGxCAPxDxf16>, %v0: ...) -> (logits, %k0 updated, %v0 updated)
      %table_cos, %table_sin = ty.rope_table {positions = CAP}
      %cos = kv.rows(%table_cos, %pos, %ids)
      %k0n = kv.append(%k0, %k, %pos)
      %a = kv.attention(%q, %k0n, %v0n, %pos)

`layout=NHD` makes the caches `tensor<1xCAPxGxDxf16>`: a token's heads lie together, not a head's tokens.

With `dtype=int8` the new rows are quantised before they are appended (`kv.quantize_rows`); the scales are
two more caches of the layer.  So with `dtype=int4` (`kv.quantize_groups`), but for the keys of attention that
says `tyir.keys = "int8"` (`scale-keys`).

`pos` is the number of tokens already cached.  Caches are arguments that the function returns updated
(`tyir.alias`): state, never copied. With `embedding-as-input` the embedded tokens [1, ?, h] are the
argument instead of the ids, and the table becomes the module's `ty.param @embedding`. Logits leave the
accumulators unrounded (f32), so that near ties are decided by the sums and not by f16 rounding. A table of
learned positions is read like the rotary ones: `ty.embedding(%table, %position_ids)` becomes `kv.rows`.

Where a token has positions on several axes (%position_ids: tensor<3x1x?xi64>) a row of the rotary tables
does not follow from its slot in the cache.  The tables are then arguments `rope_cos` and `rope_sin` [CAP,
D/2], row = slot, which the caller fills once per request; slots and chunks stay what they are.  (Of a module without
towers, `tyir.vision`, all positions of a token are its slot.)  Further
arguments of the step (addends of a picture's features) stay arguments.

A model with two sets of frequencies (`tyir.artifacts.long_rope`) whose cache holds more tokens than the short ones
are for has both in one table, and a step is told which rows, each sequence its own:

      %table_cos, %table_sin = ty.rope_table {positions = CAP, short_positions = T}
      %cos = kv.take_rows(%table_cos, %rope_rows: tensor<1x?xi32>)

A model whose facts (`tyir.model`) have a `dual_chunk_attention_config` is compiled with dual chunk attention where
the cache holds more tokens than it was trained for (`tyir.artifacts.dual_chunk`); up to there plain attention is
the same.  The step then takes a `temperature` [1] f32:

      %q = ty.rope(%x, %cos, %sin);  %k = ty.rope(%y, %cos, %sin);  %a = ty.attention(%q, %k, %v)
    -->
      %k = ty.rope(%y, rows at pos mod s);  %q = ty.rope(%x, the same rows)
      %q1 = ty.rope(%x, rows at pos mod s + s);  %q2 = ty.rope(%x, the last row)
      %a = kv.dual_chunk_attention(%q, %k0n, %v0n, %pos, %q1, %q2, %temperature) {step = s}
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from tyir.artifacts.dual_chunk import DualChunk
from tyir.artifacts.json_attributes import to_json
from tyir.artifacts.long_rope import LongRope
from tyir.attributes import DenseElementsAttr, DictAttr
from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.func import Func
from tyir.dialects.kv import (
    Append,
    CachedAttention,
    DualChunkAttention,
    QuantizeGroups,
    QuantizeRows,
    Rows,
    TakeRows,
    cache_shape,
    channel_groups,
)
from tyir.dialects.ty import (
    Attention,
    Embedding,
    Linear,
    Param,
    QuantizedLinear,
    Rope,
    RopeAngles,
    RopeTable,
    Softcap,
    Yield,
    default_kv_heads,
    tensor_type,
)
from tyir.execution.constexpr import clone_expression
from tyir.execution.entry_points import Role, argument, result
from tyir.ir import Block, Op, Region, Value
from tyir.layers import carry, layer_of
from tyir.manifest import record, recorded
from tyir.passes._key_spread import KEYS_ATTRIBUTE
from tyir.pipeline import Pass, PassContext
from tyir.types import TensorType, f32, i32
from tyir.vision.graphs import VISION, graph_kind

__all__ = ["KvMaterialize"]


@dataclass(frozen=True)
class KvMaterialize(Pass):
    """Key/value caches of fixed capacity as aliased arguments, one pair per attention; `dtype` is what they
    hold, `layout` what follows what: a head's tokens (HND) or a token's heads (NHD).
    """

    stage: ClassVar[tuple[str, ...]] = ("ty",)
    to_stage: ClassVar[str | None] = "kv"

    max_kv: int = 1024
    embedding_as_input: bool = False
    dtype: Literal["fp16", "int8", "int4"] = "fp16"
    layout: Literal["HND", "NHD"] = "HND"

    def run(self, op: Op, context: PassContext) -> None:
        if self.max_kv < 1:
            raise TyirError(
                f"max-kv is {self.max_kv}; a cache holds at least 1 token", help="use max-kv=1024"
            )
        for function in list(op.walk_type(Func)):
            if any(True for _ in function.walk_type(Attention)):
                if graph_kind(function) == VISION:
                    raise TyirError(
                        f"@{function.sym_name} is a vision tower, which keeps no cache",
                        help="run extract-graph{graph=main} first, or static-step on a tower alone",
                    )
                self._convert(function)
                context.statistics["caches"] = sum(1 for _ in function.walk_type(Append))
        if "weights" not in recorded(op):  # quantize-weights cannot follow
            stored = any(True for _ in op.walk_type(QuantizedLinear))
            record(op, weights="checkpoint" if stored else "fp16")
        record(
            op,
            max_kv=self.max_kv,
            embedding_as_input=self.embedding_as_input,
            kv_dtype=self.dtype,
            kv_layout=self.layout,
        )

    def _convert(self, function: Func) -> None:
        block = function.body
        if len(block.args) < 2 or tensor_type(block.args[0]).rank != 2:
            taken = ", ".join(str(a.type) for a in block.args)
            raise TyirError(
                f"@{function.sym_name} must take input ids [batch, tokens] and position ids, it takes"
                f" {taken or 'nothing'}",
                help="tyir-import writes such a function",
            )
        input_ids, position_ids, *addends = block.args
        batch, tokens = tensor_type(input_ids).dims
        entry = (
            self._embeddings(function)
            if self.embedding_as_input
            else block.add_arg(TensorType((batch, tokens), i32), "ids")
        )
        pos = block.add_arg(TensorType((batch,), i32), "pos")
        names, caches = [str(entry.name), "pos"], []
        roles: list[Role] = ["embeddings" if self.embedding_as_input else "tokens", "position"]
        tables: list[Value] = []
        seeing = function.parent_op is not None and "tyir.vision" in function.parent_op.attributes
        for angles in [a for a in function.walk_type(RopeAngles) if a.axis and seeing]:
            self._take_tables(angles, pos, entry, tables)
        names += [str(t.name) for t in tables]
        roles += ["rope"] * len(tables)
        for number, addend in enumerate(addends):
            given = block.add_arg(addend.type, f"deepstack{number}")
            addend.replace_all_uses_with(given)
            names.append(str(given.name))
            roles.append("addend")
        facts = _model_facts(function)
        chunks = DualChunk.used(facts, self.max_kv)
        far = _Far(chunks, block.add_arg(TensorType((batch,), f32), "temperature")) if chunks else None
        if far is not None:
            names.append("temperature")
            roles.append("temperature")
        both = LongRope.of_model(facts)
        numbers = None
        if both is not None and LongRope.used(facts, self.max_kv) is not None:
            numbers = block.add_arg(TensorType((batch, tokens), i32), "rope_rows")
            names.append("rope_rows")
            roles.append("rope_rows")
        for angles in list(function.walk_type(RopeAngles)):
            if both is None:
                self._tabulate(angles, pos, entry, far)
            else:
                self._tabulate_both(angles, pos, entry, both, numbers)
        for lookup in [e for e in function.walk_type(Embedding) if e.ids is position_ids]:
            self._learned_positions(lookup, pos, entry)
        for number, attention in enumerate(list(function.walk_type(Attention))):
            layer = layer_of(attention)
            caches += self._cache(attention, pos, number if layer is None else layer, names, far)
        if not self.embedding_as_input:
            input_ids.replace_all_uses_with(entry)
        if position_ids.uses:
            raise TyirError(
                f"'{position_ids.uses[0].name}' still uses the position ids",
                help="only rotary embeddings and learned positions may; run raise-aten and dce first",
            )
        first_cache = len(names) - len(caches)
        for index in reversed(range(2 + len(addends))):
            block.erase_arg(index)
        terminator = block.terminator
        logits = terminator.operands[0]
        _leave_unrounded(logits)
        terminator.operands = [logits, *caches]
        function.refresh_type()
        roles += ["cache"] * len(caches)
        function.set_arg_attrs([argument(name, role) for name, role in zip(names, roles)])
        aliases = [result(names[first_cache + i], alias=first_cache + i) for i in range(len(caches))]
        function.set_res_attrs([result("logits"), *aliases])

    def _embeddings(self, function: Func) -> Value:
        """Take the embedded tokens as argument `embeddings`; the table leaves the step as the outermost
        module's `ty.param @embedding`.
        """
        lookups = [e for e in function.walk_type(Embedding) if e.ids is function.body.args[0]]
        if len(lookups) != 1 or function.parent_op is None:
            raise TyirError(
                f"embedding-as-input needs exactly one embedding in @{function.sym_name}, there are"
                f" {len(lookups)}"
            )
        (lookup,) = lookups
        block = Block()
        block.append(Yield(clone_expression(lookup.table, block)))
        function.parent_op.body.insert(
            carry(
                Param(
                    sym_name="embedding",
                    type=tensor_type(lookup.table),
                    initializer=Region([block]),
                    loc=lookup.loc,
                ),
                lookup,
            ),
            before=function,
        )
        entry = function.body.add_arg(lookup.out.type, "embeddings")
        lookup.replace_with([entry])
        return entry

    def _tabulate(self, angles: RopeAngles, pos: Value, like: Value, far: _Far | None) -> None:
        table = RopeTable(
            inv_freq=angles.inv_freq,
            positions=far.chunks.last + 1 if far is not None else self.max_kv,
            scale=angles.scale,
            element=angles.element,
            loc=angles.loc,
        )
        carry(table, angles).insert_before(angles)

        def rows(modulo: int | None = None, offset: int | None = None) -> list[Value]:
            found = [Rows(t, pos, like, modulo=modulo, offset=offset, loc=angles.loc) for t in table.results]
            return [carry(op, angles).insert_before(angles).result for op in found]

        if far is None:
            angles.replace_with(rows())
            return
        step = far.chunks.step
        near = rows(step)
        far.angles[near[0]] = (rows(step, step), rows(1, far.chunks.last))
        angles.replace_with(near)

    def _tabulate_both(
        self, angles: RopeAngles, pos: Value, like: Value, both: LongRope, numbers: Value | None
    ) -> None:
        """The long and the short frequencies' table, of which the rows `numbers` are taken; without these
        the short ones' alone.
        """
        long = angles.inv_freq.to_numpy()
        turned = len(both.short)
        if len(long) < turned or long[turned:].any():
            raise TyirError(
                Diagnostic(
                    f"the model says {turned} short rotary frequencies, the graph has {len(long)} of another"
                    " kind",
                    where=str(angles.loc),
                    help="import the model again for no more tokens than its short frequencies are for",
                )
            )
        short = np.zeros_like(long)
        short[:turned] = both.short
        kept: dict[str, Any] = {"scale": angles.scale, "element": angles.element, "loc": angles.loc}
        if numbers is None:
            table = RopeTable(inv_freq=DenseElementsAttr.from_numpy(short), positions=self.max_kv, **kept)
        else:
            table = RopeTable(
                inv_freq=angles.inv_freq,
                positions=self.max_kv,
                short=DenseElementsAttr.from_numpy(short),
                short_positions=both.original,
                **kept,
            )
        carry(table, angles).insert_before(angles)
        rows = [
            Rows(t, pos, like, loc=angles.loc) if numbers is None else TakeRows(t, numbers, loc=angles.loc)
            for t in table.results
        ]
        angles.replace_with([carry(op, angles).insert_before(angles).result for op in rows])

    def _take_tables(self, angles: RopeAngles, pos: Value, like: Value, tables: list[Value]) -> None:
        """Rows of tables that the caller gives, for positions on several axes; all layers share them."""
        if tables:
            raise TyirError(
                "the model has two kinds of rotary tables of positions on several axes",
                help="models with one can be compiled",
            )
        kind = TensorType((self.max_kv, tensor_type(angles.cos).dims[-1]), angles.element)
        assert angles.block is not None
        tables += [angles.block.add_arg(kind, name) for name in ("rope_cos", "rope_sin")]
        rows = [
            carry(Rows(t, pos, like, loc=angles.loc), angles).insert_before(angles).result for t in tables
        ]
        angles.replace_with(rows)

    def _learned_positions(self, lookup: Embedding, pos: Value, like: Value) -> None:
        """The rows of a table of positions that follow those in the cache."""
        rows = tensor_type(lookup.table).dims[0] or 0
        if self.max_kv > rows:
            raise TyirError(
                f"max-kv is {self.max_kv}, but the model has learned {rows} positions",
                help=f"use max-kv={rows}",
            )
        found = carry(Rows(lookup.table, pos, like, loc=lookup.loc), lookup).insert_before(lookup)
        lookup.replace_with([found.result])

    def _cache(
        self, attention: Attention, pos: Value, layer: int, names: list[str], far: _Far | None
    ) -> list[Value]:
        """Append and attend for one layer; adds the cache arguments and returns the updated caches."""
        keys, values = (
            [
                self._append(rows, pos, f"{name}{layer}", attention, names)
                for name, rows in self._rows(letter, x, attention)
            ]
            for letter, x in (("k", attention.k), ("v", attention.v))
        )
        heads = default_kv_heads(tensor_type(attention.q).dims[2] or 0, tensor_type(attention.k).dims[2] or 0)
        operands = (attention.q, keys[0], values[0], pos, tuple(keys[1:] + values[1:]))
        kept: dict[str, Any] = {
            "scale": attention.scale,
            "window": attention.window,
            "softcap": attention.softcap,
            "kv_heads": heads,
            "layout": self.layout,
            "loc": attention.loc,
        }
        if far is None:
            cached = CachedAttention(*operands, **kept)
        else:
            successive, inter = far.queries(attention)
            cached = DualChunkAttention(
                *operands,
                successive=successive,
                inter=inter,
                temperature=far.temperature,
                step=far.chunks.step,
                **kept,
            )
        attention.replace_with(carry(cached, attention).insert_before(attention))
        return [*keys, *values]

    def _rows(self, letter: str, x: Value, attention: Attention) -> list[tuple[str, Value]]:
        """What is appended for the keys or the values: the rows themselves, or rows of 8 or of 4 bits and
        their scales.
        """
        if self.dtype == "fp16":
            return [(letter, x)]
        wide = self.dtype == "int8" or (letter == "k" and KEYS_ATTRIBUTE in attention.attributes)
        dim = tensor_type(x).dims[-1] or 0
        if not wide and not channel_groups(dim):
            raise TyirError(
                Diagnostic(
                    f"a 4-bit cache has groups of 32 or 16 channels, which do not divide heads of {dim}",
                    where=str(attention.loc),
                    help="use dtype=int8, --kv-dtype int8 of tyir-compile",
                )
            )
        quantized = (QuantizeRows if wide else QuantizeGroups)(x, loc=attention.loc)
        carry(quantized, attention).insert_before(attention)
        return [(letter, quantized.q), (f"{letter}_scales", quantized.scales)]

    def _append(self, rows: Value, pos: Value, name: str, attention: Attention, names: list[str]) -> Value:
        block = attention.block
        assert block is not None
        names.append(name)
        t = tensor_type(rows)
        batch, _, groups, *width = t.dims
        cache = block.add_arg(
            TensorType(cache_shape(self.layout, batch, groups, self.max_kv, *width), t.element), name
        )
        append = Append(cache, rows, pos, layout=self.layout, loc=attention.loc)
        return carry(append, attention).insert_before(attention).results[0]


@dataclass(frozen=True)
class _Far:
    """What keys of chunks before the queries' own are met with: the `temperature`, and by the cosines of a
    query's own chunk the tables for one chunk before and for those further away.
    """

    chunks: DualChunk
    temperature: Value
    angles: dict[Value, tuple[list[Value], list[Value]]] = field(default_factory=dict)

    def queries(self, attention: Attention) -> list[Value]:
        """The attention's queries as those keys meet them; `TyirError` unless queries and keys are turned by
        the same angles and see everything before them.
        """
        q, k = attention.q.op, attention.k.op
        where = str(attention.loc)
        if attention.window:
            raise TyirError(
                Diagnostic(
                    f"dual chunk attention has no sliding window, this one has {attention.window}",
                    where=where,
                    help="compile with a max-kv up to the trained length, where it is not used",
                )
            )
        if (
            not isinstance(q, Rope)
            or not isinstance(k, Rope)
            or q.cos is not k.cos
            or q.cos not in self.angles
        ):
            raise TyirError(
                Diagnostic(
                    "dual chunk attention needs queries and keys that one rotary embedding turns last",
                    where=where,
                    help="compile with a max-kv up to the trained length, where it is not used",
                )
            )
        turned = (Rope(q.x, *angles, loc=q.loc) for angles in self.angles[q.cos])
        return [carry(op, q).insert_before(attention).result for op in turned]


def _model_facts(function: Func) -> Mapping[str, Any]:
    """What the module says of the model that the function is of."""
    module = function.parent_op
    said = module.attributes.get("tyir.model") if module is not None else None
    facts: Mapping[str, Any] = to_json(said) if isinstance(said, DictAttr) else {}
    return facts


def _leave_unrounded(logits: Value) -> None:
    """Let the head give its sums in f32, through a soft cap."""
    if isinstance(logits.op, Softcap):
        _leave_unrounded(logits.op.x)
        logits.type = logits.op.x.type
    elif isinstance(logits.op, (Linear, QuantizedLinear)):
        logits.op.element = f32
        logits.type = tensor_type(logits).with_element(f32)
