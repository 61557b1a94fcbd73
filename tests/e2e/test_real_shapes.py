"""Two layers of real models' shapes with random weights, over 1 to 16 dies: every partitioning gives the unpartitioned logits.  Minutes: --slow."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.llm import ArrayWeights, Shape, build, dies_of
from tyir.backends.edge10.params import ParamEvaluator
from tyir.dialects.builtin import Module
from tyir.dialects.func import Func
from tyir.dialects.ty import Param, tensor_type
from tyir.interpreter import Interpreter, run_lockstep
from tyir.pipeline import run_pipeline

Array = npt.NDArray[Any]

# query heads, key/value heads, head dimension, hidden, MLP width (public config.json files); the vocabulary is cut to keep the test in memory
SHAPES = {
    "Qwen1.5-1.8B": (16, 16, 128, 2048, 5504),
    "Qwen2.5-1.5B": (12, 2, 128, 1536, 8960),
    "Qwen2.5-7B": (28, 4, 128, 3584, 18944),
    "Qwen3-8B": (32, 8, 128, 4096, 12288),
    "Llama3-8B": (32, 8, 128, 4096, 14336),
    "DeepSeek-R1-Distill-Qwen-32B": (40, 8, 128, 5120, 27648),
}
IDS = np.array([[5, 17, 300, 42, 9, 1000, 77, 3]], np.int32)


def logits(name: str, weights: ArrayWeights, module: Module, dies: int, int4: bool) -> Array:
    quantize = "quantize-weights{group-size=128}," if int4 else ""
    run_pipeline(module, f"{quantize}kv-materialize{{max-kv=16}},partition-dies{{dies={dies} strategy=split}}")
    run_pipeline(module, "specialize-seqlen{seqlens=8},to-program")
    parts = dies_of(module)
    constants: list[dict[str, Array]] = [{} for _ in parts]
    evaluator = ParamEvaluator(weights)
    params = sorted(
        ((str(p.sym_name), i, p) for i, d in enumerate(parts) for p in d.body if isinstance(p, Param)), key=lambda item: item[:2]
    )
    for key, die, param in params:  # by tensor, so that a whole weight is quantised once for all dies
        constants[die][key] = evaluator.evaluate(param)
    runs = []
    for die, values in zip(parts, constants):
        main = die.lookup("main_s8")
        assert isinstance(main, Func)
        caches = [np.zeros(tensor_type(a).static_shape, np.float16) for a in main.args[2:]]
        runs.append(Interpreter(die, constants=values).run("main_s8", [IDS, np.zeros(1, np.int32), *caches]))
    return run_lockstep(runs)[0][0][0].astype(np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("int4", [False, True], ids=["fp16", "int4"])
@pytest.mark.parametrize("name", SHAPES)
def test_every_die_count(name: str, int4: bool) -> None:
    heads, kv_heads, dim, hidden, width = SHAPES[name]
    shape = Shape(2, hidden, heads, kv_heads, dim, width, vocabulary=4099, bias=name.startswith("Qwen2"), tied=False)
    module, weights = build(shape)
    wanted = logits(name, weights, module, 1, int4)
    norm = np.linalg.norm(wanted, axis=1)
    for dies in range(2, 17):
        got = logits(name, weights, build(shape, draw=False)[0], dies, int4)
        cosine = (got * wanted).sum(axis=1) / (np.linalg.norm(got, axis=1) * norm)
        assert cosine.min() >= 0.9999, (dies, cosine.min())
        drift = abs(float((got - wanted).mean())) / float(np.abs(got - wanted).mean() + 1e-12)
        assert drift < 0.2, f"{dies} dies: errors lean to one side ({drift:.3f} of their size)"
