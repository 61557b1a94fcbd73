"""A decoder layer, quantised, run by the interpreter with the reference evaluator and with compiled kernels:
prefill, then tokens one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tyir.backends.host.tvm_host import HostTarget, assign_kernels, build_library
from tyir.dialects import func, kv, ty
from tyir.dialects.builtin import Module
from tyir.execution.storage import pack
from tyir.interpreter import Interpreter, evaluate_op, run_lockstep
from tyir.ir import Value
from tyir.runtime_sim.session.host_runtime import HostLibrary
from tyir.types import TensorType, Type, f16, i32, storage_dtype, ui4

Array = npt.NDArray[Any]

HIDDEN, HEADS, KV_HEADS, WIDTH, INNER, CAPACITY, GROUP = 96, 6, 2, 32, 224, 48, 32


def t(*shape: int, e: Type = f16) -> TensorType:
    return TensorType(shape, e)


class LayerBuilder:
    """Builds `@layer_s{s}`; the weights become arguments, in order of use, so that both lengths take the same
    list.
    """

    def __init__(self, s: int) -> None:
        cache = t(1, KV_HEADS, CAPACITY, WIDTH)
        self.s = s
        self.function = func.Func.make(f"layer_s{s}", (t(1, s, HIDDEN), cache, cache, t(1, e=i32)))

    def argument(self, type: TensorType) -> Value:
        return self.function.body.add_arg(type)

    def add(self, op: Any) -> Value:
        self.function.body.append(op)
        out: Value = op.out
        return out

    def project(self, x: Value, k: int, n: int) -> Value:
        q, scales, zeros = (
            self.argument(t(n, k, e=ui4)),
            self.argument(t(n, k // GROUP)),
            self.argument(t(n, k // GROUP, e=ui4)),
        )
        return self.add(ty.QuantizedLinear(x, q, scales, zeros, self.argument(t(n)), group_size=GROUP))

    def norm(self, x: Value) -> Value:
        return self.add(ty.RmsNorm(x, self.argument(t(HIDDEN)), eps=1e-6))

    def heads(self, x: Value, heads: int) -> Value:
        return self.add(ty.Reshape(self.project(x, HIDDEN, heads * WIDTH), shape=(1, self.s, heads, WIDTH)))

    def build(self) -> func.Func:
        x, k_cache, v_cache, pos = self.function.args
        n = self.norm(x)
        q, k, v = (self.heads(n, count) for count in (HEADS, KV_HEADS, KV_HEADS))
        tables = [self.argument(t(CAPACITY, WIDTH // 2)) for _ in range(2)]
        cos, sin = (self.add(kv.Rows(table, pos, x)) for table in tables)
        q, k = (self.add(ty.Rope(value, cos, sin)) for value in (q, k))
        k_cache, v_cache = self.add(kv.Append(k_cache, k, pos)), self.add(kv.Append(v_cache, v, pos))
        groups = tuple(h * KV_HEADS // HEADS for h in range(HEADS))
        a = self.add(kv.CachedAttention(q, k_cache, v_cache, pos, scale=WIDTH**-0.5, kv_heads=groups))
        a = self.add(ty.Reshape(a, shape=(1, self.s, HEADS * WIDTH)))
        x = self.add(ty.Add(x, self.project(a, HEADS * WIDTH, HIDDEN)))
        n = self.norm(x)
        gated = self.add(ty.SiluMul(self.project(n, HIDDEN, INNER), self.project(n, HIDDEN, INNER)))
        x = self.add(ty.Add(x, self.project(gated, INNER, HIDDEN)))
        self.function.body.append(func.Return((x, k_cache, v_cache)))
        self.function.refresh_type()
        return self.function


def random_weights(types: Sequence[TensorType]) -> list[Array]:
    rng = np.random.default_rng(0)
    return [
        rng.integers(0, 16, x.static_shape).astype(np.uint8)
        if x.element is ui4
        else (rng.standard_normal(x.static_shape) * 0.02).astype(storage_dtype(x.element))
        for x in types
    ]


def decode(module: Module, evaluator: Any, weights: Sequence[Array], tokens: Array) -> list[Array]:
    """The layer's outputs for a prompt of 8 and the tokens after it, over one pair of caches."""
    interpreter = Interpreter(module, evaluator=evaluator)
    caches = [np.zeros((1, KV_HEADS, CAPACITY, WIDTH), np.float16) for _ in range(2)]
    outputs, start = [], 0
    for s in (8, 1, 1, 1, 8, 1):
        arguments = [tokens[:, start : start + s], *caches, np.array([start], np.int32), *weights]
        x, *caches = run_lockstep([interpreter.run(f"layer_s{s}", arguments)])[0]
        outputs.append(x)
        start += s
    return [*outputs, *caches]


def test_compiled_layer_agrees_with_the_reference(tmp_path: Path) -> None:
    module = Module.empty()
    for s in (1, 8):
        module.body.append(LayerBuilder(s).build())
    functions = [f for f in module.body if isinstance(f, func.Func)]
    build_library(assign_kernels(functions), HostTarget(), tmp_path / "layer.so")
    types = [ty.tensor_type(v) for v in functions[0].args[4:]]
    weights = random_weights(types)
    tokens = np.random.default_rng(1).standard_normal((1, 20, HIDDEN)).astype(np.float16)
    expected = decode(module, evaluate_op, weights, tokens)
    got = decode(
        module,
        HostLibrary(tmp_path / "layer.so").evaluator(),
        [pack(w, x) for w, x in zip(weights, types)],
        tokens,
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), rtol=4e-3, atol=2e-3)
