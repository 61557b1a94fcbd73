"""The reference meaning of each `aten` op against PyTorch's own operator, in f32 and f16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tyir.attributes import DictAttr
from tyir.dialects import aten
from tyir.frontends.aten_table import ROWS
from tyir.ir import Block
from tyir.types import TensorType, f32, from_dtype

Case = tuple[type[Any], dict[str, Any], tuple[tuple[int, ...], ...], Callable[..., Any]]


def cases() -> dict[str, Case]:
    import torch
    from torch.nn.functional import gelu, layer_norm, linear, silu

    x, y = (2, 3, 4), (3, 1)
    return {
        "add": (aten.Add, {}, (x, y), torch.add),
        "add_scalar": (aten.Add, {"scalar": 1e-3}, (x,), lambda a: a + 1e-3),
        "sub": (aten.Sub, {}, (x, y), torch.sub),
        "sub_scalar": (aten.Sub, {"scalar": 0.3}, (x,), lambda a: a - 0.3),
        "mul": (aten.Mul, {}, (x, y), torch.mul),
        "mul_scalar": (aten.Mul, {"scalar": 0.3}, (x,), lambda a: a * 0.3),
        "div": (aten.Div, {}, (x, y), torch.div),
        "div_scalar": (aten.Div, {"scalar": 8.0}, (x,), lambda a: a / 8.0),
        "neg": (aten.Neg, {}, (x,), torch.neg),
        "pow": (aten.Pow, {"exponent": 2.0}, (x,), lambda a: a.pow(2)),
        "rsqrt": (aten.Rsqrt, {}, (x,), lambda a: torch.rsqrt(a)),
        "cos": (aten.Cos, {}, (x,), torch.cos),
        "sin": (aten.Sin, {}, (x,), torch.sin),
        "silu": (aten.Silu, {}, (x,), silu),
        "gelu": (aten.Gelu, {}, (x,), gelu),
        "gelu_tanh": (aten.Gelu, {"approximate": "tanh"}, (x,), lambda a: gelu(a, approximate="tanh")),
        "relu": (aten.Relu, {}, (x,), lambda a: torch.relu(a)),
        "tanh": (aten.Tanh, {}, (x,), torch.tanh),
        "sigmoid": (aten.Sigmoid, {}, (x,), torch.sigmoid),
        "layer_norm": (
            aten.LayerNorm,
            {"normalized_shape": (4,), "eps": 1e-5},
            (x, (4,), (4,)),
            lambda a, w, b: layer_norm(a, (4,), w, b, 1e-5),
        ),
        "layer_norm_alone": (
            aten.LayerNorm,
            {"normalized_shape": (4,), "eps": 1e-5},
            (x,),
            lambda a: layer_norm(a, (4,), eps=1e-5),
        ),
        "addmm": (aten.Addmm, {}, ((5,), (3, 4), (4, 5)), torch.addmm),
        "mean": (aten.Mean, {"dim": (-1,), "keepdim": True}, (x,), lambda a: a.mean(-1, keepdim=True)),
        "mean_of_two": (aten.Mean, {"dim": (0, 2)}, (x,), lambda a: a.mean((0, 2))),
        "to": (aten.To, {"element": f32}, (x,), lambda a: a.float()),
        "linear": (aten.Linear, {}, (x, (5, 4)), linear),
        "linear_bias": (aten.Linear, {}, (x, (5, 4), (5,)), linear),
        "view": (aten.View, {"shape": (6, -1)}, (x,), lambda a: a.view(6, -1)),
        "reshape": (aten.Reshape, {"shape": (4, 6)}, (x,), lambda a: a.reshape(4, 6)),
        "expand": (aten.Expand, {"shape": (2, -1, 4)}, (y,), lambda a: a.expand(2, -1, 4)),
        "unsqueeze": (aten.Unsqueeze, {"dim": -1}, (x,), lambda a: a.unsqueeze(-1)),
        "transpose": (aten.Transpose, {"dim0": 0, "dim1": -1}, (x,), lambda a: a.transpose(0, -1)),
        "slice": (aten.Slice, {"dim": -1, "start": -3, "end": 2**63 - 1}, (x,), lambda a: a[..., -3:]),
        "slice_step": (
            aten.Slice,
            {"dim": -1, "start": 1, "end": 2**63 - 1, "step": 2},
            (x,),
            lambda a: a[..., 1::2],
        ),
        "repeat_interleave": (
            aten.RepeatInterleave,
            {"repeats": 2, "dim": -1},
            (x,),
            lambda a: a.repeat_interleave(2, dim=-1),
        ),
        "stack": (aten.Stack, {"dim": -1}, (x, x), lambda a, b: torch.stack([a, b], -1)),
        "cat": (aten.Cat, {"dim": 1}, (x, (2, 1, 4)), lambda a, b: torch.cat([a, b], 1)),
    }


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_op_is_pytorchs(dtype: str) -> None:
    import torch

    for name, (op_class, properties, shapes, function) in cases().items():
        arrays = [
            np.random.default_rng(i).uniform(0.5, 2, shape).astype(dtype) for i, shape in enumerate(shapes)
        ]
        wanted = function(*map(torch.tensor, arrays)).numpy()
        block = Block([TensorType(a.shape, from_dtype(a.dtype)) for a in arrays])
        fields = {
            f.name: f.codec.encode(properties[f.name]) for f in op_class.attr_fields if f.name in properties
        }
        op = op_class.create(
            block.args, (TensorType(wanted.shape, from_dtype(wanted.dtype)),), DictAttr(fields)
        )
        found = op.evaluate(*arrays)
        assert found.dtype == wanted.dtype and found.shape == wanted.shape, name
        np.testing.assert_allclose(
            found.astype("f4"),
            wanted.astype("f4"),
            rtol=1e-3 if dtype == "f2" else 1e-6,
            atol=1e-3 if dtype == "f2" and name in ("sub", "sub_scalar", "layer_norm_alone") else 1e-6,
            err_msg=name,
        )


def test_embedding() -> None:
    import torch

    table, ids = np.arange(12, dtype="f4").reshape(4, 3), np.array([[3, 0, 3]])
    block = Block([TensorType((4, 3), f32), TensorType((1, 3), from_dtype("i8"))])
    op = aten.Embedding.create(block.args, (TensorType((1, 3, 3), f32),))
    assert np.array_equal(
        op.evaluate(table, ids), torch.nn.functional.embedding(torch.tensor(ids), torch.tensor(table)).numpy()
    )


def test_every_op_has_a_row() -> None:
    """The dialect holds nothing the front end never makes."""
    declared = {getattr(aten, name) for name in aten.__all__}
    assert declared == {
        row.op for row in ROWS.values() if row.op is not None and row.op.name.startswith("aten.")
    }


def test_rows_name_arguments_that_exist() -> None:
    """Every argument a row speaks of is one of the operator's schema, and every property one of the op's."""
    import torch

    from tyir.frontends import attention_hook, layer_reuse

    attention_hook.install()
    assert layer_reuse.LAYER_BEGIN in ROWS
    for target, row in ROWS.items():
        namespace, name, overload = target.split(".")
        schema = getattr(getattr(getattr(torch.ops, namespace), name), overload)._schema
        known = {a.name for a in schema.arguments}
        named = {
            *row.operands,
            *row.ignored,
            *row.required,
            *(v for v in row.properties.values() if isinstance(v, str)),
        }
        assert named <= known, (target, named - known)
        if row.op is not None:
            assert set(row.properties) <= {f.name for f in row.op.attr_fields}, target
