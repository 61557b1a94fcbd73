"""A wrong scale, which no cosine sees, is blamed on the op that has it: faults put into a small model, found
by comparing it with the model as it was.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.llm import ArrayWeights, Shape, build
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.interpreter import Interpreter, run_lockstep
from tyir.ir import Op
from tyir.layers import path_of
from tyir.runtime_sim.session.chunks import Chunk
from tyir.tools.verify.compare import cosine, size_ratio
from tyir.tools.verify.locate import Agreement, Divergence, Recorder, first_off, reference_results

IDS = [3, 77, 12, 40, 8, 5]
SHAPE = Shape(layers=3)
L0, L1, L2 = (f"model.layers.{i}" for i in range(3))
Fault = Callable[[Module, ArrayWeights], None]


def at(module: Module, kind: type[Op], path: str) -> Op:
    return next(op for op in module.walk_type(kind) if path_of(op) == path)


def epsilon(path: str, value: float) -> Fault:
    def change(module: Module, weights: ArrayWeights) -> None:
        norm = at(module, ty.RmsNorm, path)
        assert isinstance(norm, ty.RmsNorm)
        norm.eps = value

    return change


def weight(name: str, factor: float, rows: slice = slice(None)) -> Fault:
    def change(module: Module, weights: ArrayWeights) -> None:
        weights[name] = weights[name].copy()
        weights[name][rows] *= np.float16(factor)

    return change


def attention(path: str, factor: float) -> Fault:
    def change(module: Module, weights: ArrayWeights) -> None:
        op = at(module, ty.Attention, path)
        assert isinstance(op, ty.Attention)
        op.scale *= factor

    return change


def located(fault: Fault) -> Divergence | None:
    """Where the model with the fault leaves the model without."""
    module, weights = build(SHAPE)
    expected = reference_results(module, IDS, weights)
    broken, values = build(SHAPE)
    fault(broken, values)
    recorder = Recorder()
    chunk = Chunk(seqlen=len(IDS), start=0, count=len(IDS))
    run = Interpreter(broken, values, probe=lambda stack, op, out: recorder(chunk, 0, stack, op, out))
    run_lockstep([run.run("main", [np.array([IDS]), np.arange(len(IDS))[None]])])
    return first_off(expected, recorder)


@pytest.mark.parametrize(
    ("fault", "op", "path", "size"),
    [
        (epsilon(f"{L0}.input_layernorm", 1.0), "ty.rms_norm", f"{L0}.input_layernorm", 0.7),
        (
            epsilon(f"{L2}.post_attention_layernorm", 1.0),
            "ty.rms_norm",
            f"{L2}.post_attention_layernorm",
            None,
        ),
        (epsilon("model.norm", 3.0), "ty.rms_norm", "model.norm", None),
        (weight(f"{L1}.input_layernorm.weight", 1.03), "ty.rms_norm", f"{L1}.input_layernorm", 1.03),
        (weight(f"{L1}.mlp.up_proj.weight", 0.5), "ty.linear", f"{L1}.mlp.up_proj", 0.5),
        (weight(f"{L2}.mlp.down_proj.weight", 1.02), "ty.linear", f"{L2}.mlp.down_proj", 1.02),
        (weight(f"{L0}.self_attn.o_proj.weight", -1.0), "ty.linear", f"{L0}.self_attn.o_proj", 1.0),
        # one of the embedding's rows: 80 tokens of which the prompt has six
        (weight("model.embed_tokens.weight", 1.2, slice(12, 13)), "ty.embedding", "model.embed_tokens", 1.2),
        (attention(f"{L1}.self_attn", 3.0), "ty.attention", f"{L1}.self_attn", None),
    ],
)  # fmt: skip
def test_a_wrong_scale_is_blamed_on_its_op(fault: Fault, op: str, path: str, size: float | None) -> None:
    found = located(fault)
    assert found is not None and (found.op, found.path) == (op, path)
    if size is not None:
        assert found.size == pytest.approx(size, abs=0.1 if size < 1 else 0.005)
    assert f"{found.size:.4g} times the size" in str(found)


def test_without_a_fault_nothing_is_off() -> None:
    assert located(lambda module, weights: None) is None
    assert located(weight(f"{L1}.mlp.up_proj.weight", 1.0005)) is None  # less than fp16 rounds


def test_rounding_is_not_a_wrong_scale() -> None:
    wanted = np.random.default_rng(1).standard_normal((1, 7, 4, 16)).astype(np.float32)
    assert not Agreement.of(wanted.astype(np.float16), wanted).off
    wanted[0, 3, 2] = 1e-6  # a row of nothing may come out as anything of that size
    other = wanted.copy()
    other[0, 3, 2] = 5e-6
    assert not Agreement.of(other, wanted).off
    other[0, 2, 1] *= 1.2  # one head of one position
    found = Agreement.of(other, wanted)
    assert found.off and found.size == pytest.approx(1.2) and found.cosine > 0.999


@pytest.mark.parametrize(
    ("got", "wanted", "ratio"),
    [
        ([0.0, 0.0], [0.0, 0.0], 1.0),
        ([3.0, 4.0], [0.0, 0.0], np.inf),
        ([6.0, 8.0], [3.0, 4.0], 2.0),
        ([np.nan, 1.0], [1.0, 1.0], np.inf),
    ],
)
def test_sizes(got: list[float], wanted: list[float], ratio: float) -> None:
    assert size_ratio(np.array(got), np.array(wanted)) == ratio
    assert cosine(np.array([6.0, 8.0]), np.array([3.0, 4.0])) == pytest.approx(1)  # sees no size
