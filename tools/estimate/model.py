"""A model of given sizes with a few decoder layers, in `ty` ops.

What `--plan` runs the real passes on, so that its cuts and bytes are the compiler's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tyir.artifacts.json_attributes import to_attribute
from tyir.artifacts.long_rope import FACT as LONG_ROPE
from tyir.artifacts.long_rope import LongRope
from tyir.attributes import DenseElementsAttr, StringAttr, SymbolRefAttr
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.ir import Op, Value
from tyir.layers import place
from tyir.location import NameLoc
from tyir.types import TensorType, Type, f16, i64, ui4

__all__ = ["ModelShape", "few_layers"]


@dataclass(frozen=True)
class ModelShape:
    """A decoder's sizes; the flags say which small tensors exist.

    `norms`: in a layer (one where attention and MLP stand side by side); `layer_norm`: they subtract the
    mean, `norm_bias`: and add a bias; `head_norms`: each head of q and k has a norm of its own.
    `rotary_tables`: how many different ones, 0 for learned positions; `short_positions`: positions of a
    second part of each, of short frequencies (`tyir.artifacts.long_rope`).  `group`: input channels per scale
    of a quantised checkpoint, 0 for one scale a row, None for fp16; `quantised_head`: its head is quantised
    too.
    """

    name: str
    layers: int
    hidden: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    gated: bool = True
    layer_norm: bool = False
    norm_bias: bool = False
    norms: int = 2
    head_norms: bool = False
    head_bias: bool = False
    rotary_tables: int = 1
    short_positions: int = 0
    group: int | None = None
    quantised_head: bool = False

    @property
    def linears(self) -> list[tuple[str, int, int, bool]]:
        """(name, N, K, bias) of a layer's linears."""
        q, kv, h, w = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.width
        attention = [
            ("q_proj", q, h, self.qkv_bias),
            ("k_proj", kv, h, self.qkv_bias),
            ("v_proj", kv, h, self.qkv_bias),
            ("o_proj", h, q, self.o_bias),
        ]
        return [
            *attention,
            *((n, w, h, self.mlp_bias) for n in ("gate_proj", "up_proj") if self.gated or n == "up_proj"),
            ("down_proj", h, w, self.mlp_bias),
        ]

    @property
    def parameters(self) -> int:
        """Numbers the model is made of, tied ones once."""
        norm = self.hidden * (1 + self.norm_bias)
        heads = self.head_dim * (self.heads + self.kv_heads if self.head_norms else 2 * self.qk_norm)
        layer = sum(n * k + n * bias for _, n, k, bias in self.linears) + self.norms * norm + heads
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2) + self.vocabulary * self.head_bias
        positions = 0 if self.rotary_tables else self.positions * self.hidden
        return self.layers * layer + norm + tables + positions


@dataclass
class _Builder:
    shape: ModelShape
    module: Module
    function: Func

    def add(self, op: Op) -> Value:
        if isinstance(op.loc, NameLoc) and not isinstance(op, ty.GetGlobal):
            place(op, op.loc.name)
        return self.function.body.append(op).results[0]

    def weight(self, name: str, dims: Sequence[int], element: Type = f16) -> Value:
        type = TensorType(tuple(dims), element)
        if self.module.lookup(name) is None:
            self.module.body.append(
                ty.Global(sym_name=name, type=type, file="", key=name, offset=0, nbytes=type.nbytes)
            )
        return self.add(ty.GetGlobal(symbol=SymbolRefAttr(name), result_types=[type], loc=NameLoc(name)))

    def linear(self, path: str, x: Value, n: int, k: int, bias: bool) -> Value:
        extra = self.weight(f"{path}.bias", (n,)) if bias else None
        if self.shape.group is None:
            return self.add(ty.Linear(x, self.weight(f"{path}.weight", (n, k)), extra, loc=NameLoc(path)))
        group = self.shape.group or k
        q = self.weight(f"{path}.q", (n, k), ui4)
        scales, zeros = (
            self.weight(f"{path}.scales", (n, k // group)),
            self.weight(f"{path}.zeros", (n, k // group), ui4),
        )
        return self.add(ty.QuantizedLinear(x, q, scales, zeros, extra, group_size=group, loc=NameLoc(path)))

    def norm(self, path: str, x: Value, *sizes: int) -> Value:
        weight, loc = self.weight(f"{path}.weight", sizes), NameLoc(path)
        if not self.shape.layer_norm:
            return self.add(ty.RmsNorm(x, weight, eps=1e-6, loc=loc))
        bias = self.weight(f"{path}.bias", sizes) if self.shape.norm_bias else None
        return self.add(ty.LayerNorm(x, weight, bias, eps=1e-6, loc=loc))

    def attention(self, root: str, h: Value, tables: Sequence[ty.RopeAngles]) -> Value:
        s, path = self.shape, f"{root}.self_attn"
        sizes = {name: (n, k, bias) for name, n, k, bias in s.linears}
        loc, parts = NameLoc(path), list[Value]()
        for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            y = self.linear(f"{path}.{name}_proj", h, *sizes[f"{name}_proj"])
            y = self.add(ty.Reshape(y, shape=(1, -1, heads, s.head_dim), loc=loc))
            if s.qk_norm and name != "v":
                y = self.norm(f"{path}.{name}_norm", y, *([heads] if s.head_norms else []), s.head_dim)
            if tables and name != "v":
                table = tables[len(parts) % len(tables)]
                y = self.add(ty.Rope(y, table.cos, table.sin, loc=loc))
            parts.append(y)
        a = self.add(ty.Attention(*parts, scale=s.head_dim**-0.5, loc=loc))
        a = self.add(ty.Reshape(a, shape=(1, -1, s.heads * s.head_dim), loc=loc))
        return self.linear(f"{path}.o_proj", a, *sizes["o_proj"])

    def mlp(self, root: str, h: Value) -> Value:
        sizes = {name: (n, k, bias) for name, n, k, bias in self.shape.linears}
        loc = NameLoc(f"{root}.mlp")
        names = ("gate_proj", "up_proj") if self.shape.gated else ("up_proj",)
        inner = [self.linear(f"{root}.mlp.{n}", h, *sizes[n]) for n in names]
        act = self.add(ty.SiluMul(*inner, loc=loc) if self.shape.gated else ty.Gelu(*inner, loc=loc))
        return self.linear(f"{root}.mlp.down_proj", act, *sizes["down_proj"])

    def layer(self, number: int, x: Value, tables: Sequence[ty.RopeAngles]) -> Value:
        s, root = self.shape, f"model.layers.{number}"
        h = self.norm(f"{root}.input_layernorm", x, s.hidden)
        attended = self.attention(root, h, tables)
        if s.norms == 4:
            attended = self.norm(f"{root}.post_attention_layernorm", attended, s.hidden)
        x = self.add(ty.Add(x, attended, loc=NameLoc(root)))
        if s.norms > 1:
            h = self.norm(f"{root}.pre_feedforward_layernorm", x, s.hidden)
        out = self.mlp(root, h)
        if s.norms == 4:
            out = self.norm(f"{root}.post_feedforward_layernorm", out, s.hidden)
        return self.add(ty.Add(x, out, loc=NameLoc(root)))

    def positions(self, x: Value) -> tuple[Value, list[ty.RopeAngles]]:
        """The embedded tokens with learned positions added, or the rotary tables of the layers."""
        s, ids = self.shape, self.function.args[1]
        if not s.rotary_tables:
            table = self.weight("model.embed_positions.weight", (s.positions, s.hidden))
            loc = NameLoc("model.embed_positions")
            return self.add(ty.Add(x, self.add(ty.Embedding(table, ids, loc=loc)), loc=loc)), []
        tables = []
        for number in range(s.rotary_tables):
            frequencies = DenseElementsAttr.from_numpy(np.full(s.head_dim // 2, number + 1, np.float32))
            tables.append(ty.RopeAngles(ids, inv_freq=frequencies, loc=NameLoc("model.rotary_emb")))
            self.add(tables[-1])
        return x, tables


def few_layers(shape: ModelShape, layers: int, *, head: bool = True) -> Module:
    """`@main` at stage ty for a model of these sizes.

    Embedding, `layers` decoder layers, final norm and head.  Without `head` what is returned does not depend
    on the layers: the step of a prompt's chunk that is not the last, of which only the caches are wanted.
    """
    module = Module.empty()
    module.set_attribute("tyir.stage", StringAttr("ty"))
    if shape.short_positions:
        both = LongRope(shape.short_positions, (1.0,) * (shape.head_dim // 2))
        module.set_attribute("tyir.model", to_attribute({LONG_ROPE: both.facts()}))
    tokens = TensorType((1, None), i64)
    builder = _Builder(shape, module, Func.make("main", [tokens, tokens], ["input_ids", "position_ids"]))
    table = builder.weight("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))
    x = builder.add(ty.Embedding(table, builder.function.args[0], loc=NameLoc("model.embed_tokens")))
    x, tables = builder.positions(x)
    embedded = x
    for number in range(layers):
        x = builder.layer(number, x, tables)
    if head:
        x = builder.norm("model.norm", x, shape.hidden)
    if not head:
        logits = builder.add(ty.Add(embedded, embedded, loc=NameLoc("model.embed_tokens")))
    elif shape.quantised_head:
        logits = builder.linear("lm_head", x, shape.vocabulary, shape.hidden, bias=False)
    else:
        weight = table if shape.tied else builder.weight("lm_head.weight", (shape.vocabulary, shape.hidden))
        bias = builder.weight("lm_head.bias", (shape.vocabulary,)) if shape.head_bias else None
        logits = builder.add(ty.Linear(x, weight, bias, loc=NameLoc("lm_head")))
    builder.function.body.append(Return(values=[logits]))
    builder.function.refresh_type()
    module.body.append(builder.function)
    return module
