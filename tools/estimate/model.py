"""A model of given sizes with a few decoder layers, in `ty` ops.

What `--plan` runs the real passes on, so that its cuts and bytes are the compiler's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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

    `group`: input channels per scale of a quantised checkpoint, 0 for one scale a row, None for fp16;
    `quantised_head`: its head is quantised too.
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
            *((n, w, h, self.mlp_bias) for n in ("gate_proj", "up_proj")),
            ("down_proj", h, w, self.mlp_bias),
        ]

    @property
    def parameters(self) -> int:
        """Numbers the model is made of, tied ones once."""
        layer = (
            sum(n * k + n * bias for _, n, k, bias in self.linears)
            + 2 * self.hidden
            + 2 * self.head_dim * self.qk_norm
        )
        return self.layers * layer + self.hidden + self.vocabulary * self.hidden * (1 if self.tied else 2)


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

    def norm(self, path: str, x: Value, size: int) -> Value:
        return self.add(ty.RmsNorm(x, self.weight(f"{path}.weight", (size,)), eps=1e-6, loc=NameLoc(path)))

    def layer(self, number: int, x: Value, cos: Value, sin: Value) -> Value:
        s, root = self.shape, f"model.layers.{number}"
        sizes = {name: (n, k, bias) for name, n, k, bias in s.linears}
        loc = NameLoc(f"{root}.self_attn")
        h = self.norm(f"{root}.input_layernorm", x, s.hidden)
        parts = []
        for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            y = self.linear(f"{root}.self_attn.{name}_proj", h, *sizes[f"{name}_proj"])
            y = self.add(ty.Reshape(y, shape=(1, -1, heads, s.head_dim), loc=loc))
            if s.qk_norm and name != "v":
                y = self.norm(f"{root}.self_attn.{name}_norm", y, s.head_dim)
            parts.append(y if name == "v" else self.add(ty.Rope(y, cos, sin, loc=loc)))
        a = self.add(ty.Attention(*parts, scale=s.head_dim**-0.5, loc=loc))
        a = self.add(ty.Reshape(a, shape=(1, -1, s.heads * s.head_dim), loc=loc))
        x = self.add(
            ty.Add(x, self.linear(f"{root}.self_attn.o_proj", a, *sizes["o_proj"]), loc=NameLoc(root))
        )
        h = self.norm(f"{root}.post_attention_layernorm", x, s.hidden)
        gate, up = (self.linear(f"{root}.mlp.{n}", h, *sizes[n]) for n in ("gate_proj", "up_proj"))
        act = self.add(ty.SiluMul(gate, up, loc=NameLoc(f"{root}.mlp")))
        return self.add(
            ty.Add(x, self.linear(f"{root}.mlp.down_proj", act, *sizes["down_proj"]), loc=NameLoc(root))
        )


def few_layers(shape: ModelShape, layers: int) -> Module:
    """`@main` at stage ty for a model of these sizes.

    Embedding, `layers` decoder layers, final norm and head.
    """
    module = Module.empty()
    module.set_attribute("tyir.stage", StringAttr("ty"))
    tokens = TensorType((1, None), i64)
    builder = _Builder(shape, module, Func.make("main", [tokens, tokens], ["input_ids", "position_ids"]))
    ids, positions = builder.function.args
    table = builder.weight("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))
    x = builder.add(ty.Embedding(table, ids, loc=NameLoc("model.embed_tokens")))
    frequencies = DenseElementsAttr.from_numpy(np.ones(shape.head_dim // 2, np.float32))
    angles = ty.RopeAngles(positions, inv_freq=frequencies, loc=NameLoc("model.rotary_emb"))
    builder.add(angles)
    for number in range(layers):
        x = builder.layer(number, x, angles.cos, angles.sin)
    x = builder.norm("model.norm", x, shape.hidden)
    if shape.quantised_head:
        logits = builder.linear("lm_head", x, shape.vocabulary, shape.hidden, bias=False)
    else:
        head = table if shape.tied else builder.weight("lm_head.weight", (shape.vocabulary, shape.hidden))
        logits = builder.add(ty.Linear(x, head, loc=NameLoc("lm_head")))
    builder.function.body.append(Return(values=[logits]))
    builder.function.refresh_type()
    module.body.append(builder.function)
    return module
