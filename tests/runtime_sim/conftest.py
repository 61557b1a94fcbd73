"""A small decoder, built by hand at stage `program`: what the lowering and both engines are tested on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.attributes import DictAttr, IntegerAttr, StringAttr, SymbolRefAttr
from tyir.backends.edge10.lowering.die import lower_die
from tyir.backends.edge10.lowering.search import Search
from tyir.dialects import dist, kv, ty
from tyir.dialects.builtin import Module
from tyir.dialects.func import Call, Func, Return
from tyir.execution.entry_points import aliasing, argument, mark_entry
from tyir.execution.storage import pack
from tyir.interpreter import Interpreter, run_lockstep
from tyir.ir import Value
from tyir.location import NameLoc
from tyir.runtime_sim.execution.functional import FunctionalDie, run_step
from tyir.runtime_sim.timing.program import EdgeProgram
from tyir.targets.machine import Machine, load_machine
from tyir.types import TensorType, f16, f32, i32, i64, ui4

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class ModelSpec:
    """Sizes of one die's share; `heads[i]` and so on are die i's."""

    dies: int = 1
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    inter: int = 96
    vocab: int = 80
    capacity: int = 40
    group: int = 0  # 0: f16 weights
    bias: bool = True
    tokens: int = 1
    window: int = 0
    data: bool = True  # False: all weights are zeros that take no memory, for models that are only timed


class DieBuilder:
    """Builds one die's module and random weights for it."""

    def __init__(self, spec: ModelSpec, die: int, rng: np.random.Generator, shared: dict[str, Array]) -> None:
        self.spec, self.die, self.rng, self.shared = spec, die, rng, shared
        self.module = Module.empty(f"die{die}")
        self.module.attributes = DictAttr(
            {"tyir.die": IntegerAttr(die, i64), "tyir.stage": StringAttr("program")}
        )
        self.constants: dict[str, Array] = {}
        self.types: dict[str, TensorType] = {}

    def weight(self, name: str, shape: tuple[int, ...], *, shared: bool = False, scale: float = 0.2) -> Array:
        key = name if shared else f"{name}@{self.die}"
        if key not in self.shared:
            self.shared[key] = (
                (self.rng.standard_normal(shape) * scale).astype(np.float16)
                if self.spec.data
                else np.broadcast_to(np.float16(0), shape)
            )
        self.constants[name], self.types[name] = self.shared[key], TensorType(shape, f16)
        return self.constants[name]

    def linear_weights(self, name: str, n: int, k: int) -> list[tuple[str, TensorType]]:
        s = self.spec
        names = []
        if s.group:
            q, scales, zeros = self.quantized(n, k)
            for suffix, value, element in (("q", q, ui4), ("scales", scales, f16), ("zeros", zeros, ui4)):
                self.constants[f"{name}.{suffix}"], self.types[f"{name}.{suffix}"] = (
                    value,
                    TensorType(value.shape, element),
                )
                names.append(f"{name}.{suffix}")
        else:
            self.weight(f"{name}.weight", (n, k))
            names.append(f"{name}.weight")
        return [(x, self.types[x]) for x in names]

    def quantized(self, n: int, k: int) -> tuple[Array, Array, Array]:
        groups = (n, k // self.spec.group)
        if not self.spec.data:
            return (
                np.broadcast_to(np.uint8(0), (n, k)),
                np.broadcast_to(np.float16(0), groups),
                np.broadcast_to(np.uint8(0), groups),
            )
        scales = (self.rng.random(groups) * 0.05 + 0.01).astype(np.float16)
        return (
            self.rng.integers(0, 16, (n, k)).astype(np.uint8),
            scales,
            self.rng.integers(0, 16, groups).astype(np.uint8),
        )

    def linear(
        self, x: Value, values: Sequence[Value], bias: Value | None, path: str
    ) -> ty.Linear | ty.QuantizedLinear:
        loc = NameLoc(f"model.layers.*.{path}")
        if self.spec.group:
            q, scales, zeros = values
            return ty.QuantizedLinear(x, q, scales, zeros, bias, group_size=self.spec.group, loc=loc)
        return ty.Linear(x, values[0], bias, loc=loc)

    # -- the layer
    # -----------------------------------------------------------------------------------------------
    def layer_weights(self, number: int) -> list[list[str]]:
        s, p = self.spec, f"model.layers.{number}."
        q, g = s.heads * s.dim, s.kv_heads * s.dim
        self.weight(p + "norm1", (s.hidden,), shared=True, scale=1.0)
        self.weight(p + "norm2", (s.hidden,), shared=True, scale=1.0)
        groups = [[p + "norm1"]]
        for name, n, k, has_bias in (
            ("q", q, s.hidden, s.bias), ("k", g, s.hidden, s.bias), ("v", g, s.hidden, s.bias), ("o", s.hidden, q, False),  # noqa: E501
            ("gate", s.inter, s.hidden, False), ("up", s.inter, s.hidden, False), ("down", s.hidden, s.inter, False),  # noqa: E501
        ):  # fmt: skip
            names = [x for x, _ in self.linear_weights(p + name, n, k)]
            if has_bias:
                self.weight(p + name + ".bias", (n,))
                names.append(p + name + ".bias")
            groups.append(names)
            if name == "o":
                groups.append([p + "norm2"])
        return groups

    def layer(self, groups: Sequence[Sequence[str]]) -> Func:
        s = self.spec
        half, cache = (
            TensorType((1, s.tokens, s.dim // 2), f16),
            TensorType((1, s.kv_heads, s.capacity, s.dim), f16),
        )
        hidden = TensorType((1, s.tokens, s.hidden), f16)
        flat = [n for g in groups for n in g]
        types = [hidden, *(self.types[n] for n in flat), half, half, cache, cache, TensorType((1,), i32)]
        names = ["hidden", *(n.split(".", 3)[-1] for n in flat), "cos", "sin", "k", "v", "pos"]
        f = Func.make(f"layer_s{s.tokens}", types, names)
        x, *weights = f.args
        *weights, cos, sin, k_cache, v_cache, pos = weights
        given = iter(weights)
        sets = [[next(given) for _ in g] for g in groups]
        add = f.body.append

        def linear(value: Value, group: Sequence[Value], path: str) -> Value:
            count = 3 if s.group else 1
            return add(
                self.linear(value, group[:count], group[count] if len(group) > count else None, path)
            ).result

        h = add(ty.RmsNorm(x, sets[0][0], eps=1e-6, loc=NameLoc("model.layers.*.input_layernorm"))).result
        q, k, v = (
            linear(h, sets[i], n)
            for i, n in ((1, "self_attn.q_proj"), (2, "self_attn.k_proj"), (3, "self_attn.v_proj"))
        )
        q, k, v = (
            add(ty.Reshape(t, shape=(1, s.tokens, n, s.dim))).result
            for t, n in ((q, s.heads), (k, s.kv_heads), (v, s.kv_heads))
        )
        q, k = add(ty.Rope(q, cos, sin)).result, add(ty.Rope(k, cos, sin)).result
        k_new, v_new = add(kv.Append(k_cache, k, pos)).result, add(kv.Append(v_cache, v, pos)).result
        heads = ty.default_kv_heads(s.heads, s.kv_heads)
        a = add(
            kv.CachedAttention(
                q,
                k_new,
                v_new,
                pos,
                scale=s.dim**-0.5,
                kv_heads=heads,
                window=s.window,
                loc=NameLoc("model.layers.*.self_attn"),
            )
        ).result
        a = add(ty.Reshape(a, shape=(1, s.tokens, s.heads * s.dim))).result
        o = self.reduce(f, linear(a, sets[4], "self_attn.o_proj"))
        x2 = add(ty.Add(x, o)).result
        h2 = add(ty.RmsNorm(x2, sets[5][0], eps=1e-6)).result
        m = add(ty.SiluMul(linear(h2, sets[6], "mlp.gate_proj"), linear(h2, sets[7], "mlp.up_proj"))).result
        d = self.reduce(f, linear(m, sets[8], "mlp.down_proj"))
        add(Return(values=[add(ty.Add(x2, d)).result, k_new, v_new]))
        f.refresh_type()
        f.set_res_attrs(
            [
                DictAttr(),
                *(aliasing(DictAttr(), f.args.index(c)) for c in (k_cache, v_cache)),
            ]
        )
        return f

    def reduce(self, f: Func, value: Value) -> Value:
        return (
            f.body.append(dist.AllReduce(value, result_types=[value.type])).result
            if self.spec.dies > 1
            else value
        )

    # -- main
    # ----------------------------------------------------------------------------------------------------
    def build(self) -> Module:
        s = self.spec
        cache = TensorType((1, s.kv_heads, s.capacity, s.dim), f16)
        caches = [(f"{c}{i}", cache) for i in range(s.layers) for c in "kv"]
        types = [TensorType((1, s.tokens), i32), TensorType((1,), i32), *(t for _, t in caches)]
        f = Func.make(f"main_s{s.tokens}", types, ["ids", "pos", *(n for n, _ in caches)])
        mark_entry(f, s.tokens)
        ids, pos, *states = f.args

        def get(name: str) -> Value:
            return f.body.append(
                ty.GetGlobal(symbol=SymbolRefAttr(name), result_types=[self.types[name]])
            ).result

        self.weight("embed", (s.vocab, s.hidden), shared=True, scale=1.0)
        angles = np.arange(s.capacity)[:, None] * (100.0 ** -(np.arange(s.dim // 2) / (s.dim // 2)))
        for name, table in (("rope.cos", np.cos(angles)), ("rope.sin", np.sin(angles))):
            self.constants[name], self.types[name] = table.astype(np.float16), TensorType(table.shape, f16)
        x = f.body.append(ty.Embedding(get("embed"), ids)).result
        cos, sin = (f.body.append(kv.Rows(get(n), pos, ids)).result for n in ("rope.cos", "rope.sin"))
        layer = None
        for number in range(s.layers):
            groups = self.layer_weights(number)
            layer = layer or self.layer(groups)
            weights = [get(n) for g in groups for n in g]
            args = [x, *weights, cos, sin, *states[2 * number : 2 * number + 2], pos]
            call = Call(
                args=args,
                callee=SymbolRefAttr(layer.sym_name),
                result_types=[x.type, cache, cache],
                attributes=DictAttr({"tyir.layer": IntegerAttr(number, i64)}),
            )
            f.body.append(call)
            x, states[2 * number], states[2 * number + 1] = call.results
        self.weight("norm", (s.hidden,), shared=True, scale=1.0)
        x = f.body.append(ty.RmsNorm(x, get("norm"), eps=1e-6)).result
        self.weight("lm_head", (s.vocab + 16 * self.die, s.hidden))
        logits = f.body.append(ty.Linear(x, get("lm_head"), element=f32)).result
        if s.dies > 1:
            sizes = tuple(s.vocab + 16 * d for d in range(s.dies))
            logits = f.body.append(
                dist.AllGather(
                    logits, axis=2, sizes=sizes, result_types=[TensorType((1, s.tokens, sum(sizes)), f32)]
                )
            ).result
        f.body.append(Return(values=[logits, *states]))
        f.refresh_type()
        f.set_arg_attrs(
            [
                argument("ids", "tokens"),
                argument("pos", "position"),
                *(argument(n, "cache") for n, _ in caches),
            ]
        )
        f.set_res_attrs([DictAttr(), *(aliasing(DictAttr(), 2 + i) for i in range(len(states)))])
        if layer is not None:
            self.module.body.append(layer)
        self.module.body.append(f)
        return self.module


class Model:
    """The model on all dies, with both ways to run it."""

    def __init__(self, spec: ModelSpec, machine: Machine | None = None, seed: int = 0) -> None:
        self.spec, self.machine = spec, machine or load_machine()
        rng, shared = np.random.default_rng(seed), dict[str, Array]()
        self.builders = [DieBuilder(spec, d, rng, shared) for d in range(spec.dies)]
        self.modules = [b.build() for b in self.builders]
        self.caches = [
            [
                np.zeros((1, spec.kv_heads, spec.capacity, spec.dim), np.float16)
                for _ in range(2 * spec.layers)
            ]
            for _ in self.modules
        ]
        search = Search()
        self.lowered = [lower_die(m, spec.tokens, self.machine, search=search) for m in self.modules]
        self.programs = [EdgeProgram(m) for m in self.lowered]

    def functional(self, *, check: bool = True) -> list[FunctionalDie]:
        return [
            FunctionalDie(
                p, {n: pack(a, b.types[n]) for n, a in b.constants.items()}, self.machine, check=check
            )
            for p, b in zip(self.programs, self.builders)
        ]

    def interpret(self, ids: Array, pos: int) -> Array:
        """One step of the reference; the caches advance."""
        runs = [
            Interpreter(m, constants=b.constants).run(
                f"main_s{self.spec.tokens}", [ids, np.array([pos], np.int32), *c]
            )
            for m, b, c in zip(self.modules, self.builders, self.caches)
        ]
        return run_lockstep(runs)[0][0]

    def fill_caches(self, dies: Sequence[FunctionalDie], tokens: int) -> None:
        """Random contents for the first `tokens` positions, the same in both."""
        rng = np.random.default_rng(7)
        for die, caches in zip(dies, self.caches):
            for number, cache in enumerate(caches):
                cache[:, :, :tokens] = rng.standard_normal(cache[:, :, :tokens].shape)
                die.memory.dram.write_buffer("kv"[number % 2] + str(number // 2), cache)

    def step(self, dies: Sequence[FunctionalDie], ids: Array, pos: int) -> Array:
        return run_step(dies, {"ids": ids}, pos)["logits"]


@pytest.fixture
def make_model() -> Callable[..., Model]:
    def make(machine: Machine | None = None, **sizes: int | bool) -> Model:
        return Model(ModelSpec(**sizes), machine)  # type: ignore[arg-type]

    return make
