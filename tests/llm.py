"""A small random language model as a `ty` module, built without torch: what pass tests run on.

`build(Shape(...))` gives the module and an in-memory `WeightSource`; it is the structure raise-aten makes of
a Qwen2 graph.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.attributes import DenseElementsAttr, StringAttr, SymbolRefAttr
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func, Return
from tyir.execution.weights import TensorReference
from tyir.interpreter import Interpreter, run_lockstep
from tyir.ir import Op, Value
from tyir.layers import place
from tyir.location import FileLoc, NameLoc
from tyir.types import TensorType, f16, i64, storage_dtype

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of the model; `hidden` is the width of the residual stream, `width` that of the MLP."""

    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    width: int = 96
    vocabulary: int = 80
    bias: bool = True
    tied: bool = True


class ArrayWeights(dict[str, Array]):
    """A `WeightSource` over arrays by symbol name."""

    def read(self, ref: TensorReference) -> Array:
        return self[str(ref.sym_name)]


class _Builder:
    def __init__(self, shape: Shape, seed: int, draw: bool) -> None:
        self.shape = shape
        self.draw = draw
        self.named: set[str] = set()
        self.rng = np.random.default_rng(seed)
        self.module = Module.empty()
        self.module.set_attribute("tyir.stage", StringAttr("ty"))
        self.weights = ArrayWeights()
        tokens = TensorType((1, None), i64)
        self.function = Func.make("main", [tokens, tokens], ["input_ids", "position_ids"])

    def add(self, op: Op) -> Value:
        if isinstance(op.loc, NameLoc) and not isinstance(op, ty.GetGlobal):
            place(op, op.loc.name)
        return self.function.body.append(op).results[0]

    def weight(self, name: str, *dims: int, scale: float, offset: float = 0.0) -> Value:
        if name not in self.named:
            self.named.add(name)
            if self.draw:
                self.weights[name] = (offset + scale * self.rng.standard_normal(dims)).astype(np.float16)
            self.module.body.append(
                ty.Global(
                    sym_name=name,
                    type=TensorType(dims, f16),
                    file="memory",
                    key=name,
                    offset=0,
                    nbytes=2 * math.prod(dims),
                )
            )
        return self.add(
            ty.GetGlobal(symbol=SymbolRefAttr(name), result_types=[TensorType(dims, f16)], loc=self.loc(name))
        )

    def loc(self, path: str) -> NameLoc:
        return NameLoc(path.removesuffix(".weight").removesuffix(".bias"), FileLoc("llm.py", 1, 1))

    def linear(self, path: str, x: Value, n: int, k: int, bias: bool = False) -> Value:
        weight = self.weight(f"{path}.weight", n, k, scale=k**-0.5)
        extra = self.weight(f"{path}.bias", n, scale=0.1) if bias else None
        return self.add(ty.Linear(x, weight, extra, loc=self.loc(path)))

    def norm(self, path: str, x: Value) -> Value:
        weight = self.weight(f"{path}.weight", self.shape.hidden, scale=0.05, offset=1.0)
        return self.add(ty.RmsNorm(x, weight, eps=1e-6, loc=self.loc(path)))

    def layer(self, index: int, x: Value, cos: Value, sin: Value) -> Value:
        s, path = self.shape, f"model.layers.{index}"
        h = self.norm(f"{path}.input_layernorm", x)
        parts = []
        for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
            y = self.linear(f"{path}.self_attn.{name}_proj", h, heads * s.head_dim, s.hidden, s.bias)
            y = self.add(ty.Reshape(y, shape=(1, -1, heads, s.head_dim), loc=self.loc(f"{path}.self_attn")))
            parts.append(
                y if name == "v" else self.add(ty.Rope(y, cos, sin, loc=self.loc(f"{path}.self_attn")))
            )
        a = self.add(ty.Attention(*parts, scale=s.head_dim**-0.5, loc=self.loc(f"{path}.self_attn")))
        a = self.add(ty.Reshape(a, shape=(1, -1, s.heads * s.head_dim), loc=self.loc(f"{path}.self_attn")))
        x = self.add(
            ty.Add(
                x,
                self.linear(f"{path}.self_attn.o_proj", a, s.hidden, s.heads * s.head_dim),
                loc=self.loc(path),
            )
        )
        h = self.norm(f"{path}.post_attention_layernorm", x)
        gate, up = (self.linear(f"{path}.mlp.{n}_proj", h, s.width, s.hidden) for n in ("gate", "up"))
        act = self.add(ty.SiluMul(gate, up, loc=self.loc(f"{path}.mlp")))
        return self.add(
            ty.Add(x, self.linear(f"{path}.mlp.down_proj", act, s.hidden, s.width), loc=self.loc(path))
        )

    def build(self) -> tuple[Module, ArrayWeights]:
        s = self.shape
        ids, positions = self.function.args
        table = self.weight("model.embed_tokens.weight", s.vocabulary, s.hidden, scale=1.0)
        x = self.add(ty.Embedding(table, ids, loc=self.loc("model.embed_tokens")))
        inv_freq = (10000.0 ** (-np.arange(0, s.head_dim, 2) / s.head_dim)).astype(np.float32)
        angles = ty.RopeAngles(
            positions, inv_freq=DenseElementsAttr.from_numpy(inv_freq), loc=self.loc("model.rotary_emb")
        )
        self.add(angles)
        for index in range(s.layers):
            x = self.layer(index, x, angles.cos, angles.sin)
        x = self.norm("model.norm", x)
        head = (
            table if s.tied else self.weight("lm_head.weight", s.vocabulary, s.hidden, scale=s.hidden**-0.5)
        )
        logits = self.add(ty.Linear(x, head, loc=self.loc("lm_head")))
        self.function.body.append(Return(values=[logits]))
        self.function.refresh_type()
        self.module.body.append(self.function)
        return self.module, self.weights


def build(shape: Shape, seed: int = 0, draw: bool = True) -> tuple[Module, ArrayWeights]:
    """The module at stage `ty` and its weights (none unless `draw`)."""
    return _Builder(shape, seed, draw).build()


def run_ty(module: Module, weights: ArrayWeights, ids: list[int]) -> Array:
    """Logits [n, V] of a `ty` module."""
    n = len(ids)
    return run_lockstep([Interpreter(module, weights).run("main", [np.array([ids]), np.arange(n)[None]])])[0][
        0
    ][0]


def dies_of(module: Module) -> list[Module]:
    return [op for op in module.body if isinstance(op, Module)] or [module]


class Step:
    """Runs a module at stage kv or later over tokens, dies in lockstep, keeping its caches."""

    def __init__(self, module: Module, weights: ArrayWeights) -> None:
        self.dies = dies_of(module)
        self.weights = weights
        self.caches: list[list[Array]] | None = None
        self.position = 0
        self.outputs: tuple[Array, ...] = ()

    def feed(self, ids: list[int], function: str = "main", padded: int | None = None) -> Array:
        """Logits [len(ids), V] for tokens after those fed before."""
        functions = [f for d in self.dies if isinstance(f := d.lookup(function), Func)]
        if self.caches is None:
            self.caches = [
                [np.zeros(a.type.static_shape, storage_dtype(a.type.element)) for a in f.args[2:]]
                for f in functions
            ]
        tokens = np.array([ids + [0] * ((padded or len(ids)) - len(ids))], np.int32)
        pos = np.array([self.position], np.int32)
        runs = [
            Interpreter(d, self.weights).run(function, [tokens, pos, *c])
            for d, c in zip(self.dies, self.caches)
        ]
        self.outputs = run_lockstep(runs)[0]
        logits = self.outputs[0][0, : len(ids)]
        self.position += len(ids)
        return logits
