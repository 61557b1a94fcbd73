"""How the shapes of real models are cut over 3 to 16 dies: load balance and key/value replication.

Expected: query heads contiguous, on no die more key/value heads than must be, and as even as that allows;
the MLP in whole groups of 128. Shapes are those of the models' public config.json files; one layer each, no
weights.
"""

from __future__ import annotations

import pytest

from tests.llm import Shape, build, dies_of
from tyir.dialects.kv import CachedAttention
from tyir.dialects.ty import SiluMul, tensor_type
from tyir.pipeline import run_pipeline

# name: (query heads, key/value heads, head dimension, hidden, MLP width)
MODELS = {
    "Qwen1.5-1.8B": (16, 16, 128, 2048, 5504),
    "Qwen2.5-1.5B": (12, 2, 128, 1536, 8960),
    "Qwen2.5-3B": (16, 2, 128, 2048, 11008),
    "Qwen2.5-7B": (28, 4, 128, 3584, 18944),
    "Qwen2.5-32B": (40, 8, 128, 5120, 27648),
    "Qwen3-1.7B": (16, 8, 128, 2048, 6144),
    "Qwen3-8B": (32, 8, 128, 4096, 12288),
    "Llama3-8B": (32, 8, 128, 4096, 14336),
}

# (model, dies): query heads, key/value heads, MLP groups of 128 per die
EXPECTED = {
    ("Qwen1.5-1.8B", 3): ((6, 5, 5), (6, 5, 5), (15, 14, 14)),
    ("Qwen1.5-1.8B", 4): ((4, 4, 4, 4), (4, 4, 4, 4), (11, 11, 11, 10)),
    ("Qwen2.5-1.5B", 3): ((6, 3, 3), (1, 1, 1), (24, 23, 23)),
    ("Qwen2.5-1.5B", 4): ((3, 3, 3, 3), (1, 1, 1, 1), (18, 18, 17, 17)),
    ("Qwen2.5-3B", 3): ((8, 4, 4), (1, 1, 1), (29, 29, 28)),
    ("Qwen2.5-3B", 4): ((4, 4, 4, 4), (1, 1, 1, 1), (22, 22, 21, 21)),
    ("Qwen2.5-7B", 3): ((10, 9, 9), (2, 2, 2), (50, 49, 49)),
    ("Qwen2.5-7B", 4): ((7, 7, 7, 7), (1, 1, 1, 1), (37, 37, 37, 37)),
    ("Qwen2.5-32B", 3): ((15, 13, 12), (3, 3, 3), (72, 72, 72)),
    ("Qwen2.5-32B", 4): ((10, 10, 10, 10), (2, 2, 2, 2), (54, 54, 54, 54)),
    ("Qwen3-1.7B", 3): ((6, 5, 5), (3, 3, 3), (16, 16, 16)),
    ("Qwen3-8B", 3): ((12, 10, 10), (3, 3, 3), (32, 32, 32)),
    ("Llama3-8B", 3): ((12, 10, 10), (3, 3, 3), (38, 37, 37)),
    ("Qwen2.5-7B", 8): ((4, 3) * 4, (1,) * 8, (19,) * 4 + (18,) * 4),
    ("Qwen2.5-7B", 16): ((2, 2, 2, 1) * 4, (1,) * 16, (10,) * 4 + (9,) * 12),
    ("Llama3-8B", 4): ((8, 8, 8, 8), (2, 2, 2, 2), (28, 28, 28, 28)),
}


@pytest.mark.parametrize(("name", "dies"), EXPECTED)
def test_cuts(name: str, dies: int) -> None:
    heads, kv_heads, dim, hidden, width = MODELS[name]
    # Weights are only named here: build() draws none until they are read, so widths cost nothing but their
    # types.
    module, _ = build(
        Shape(1, hidden, heads, kv_heads, dim, width, vocabulary=64 * dies, bias=False), draw=False
    )
    run_pipeline(module, f"kv-materialize{{max-kv=8}},partition-dies{{dies={dies} strategy=split}}")
    attentions = [next(d.walk_type(CachedAttention)) for d in dies_of(module)]
    activations = [next(d.walk_type(SiluMul)) for d in dies_of(module)]
    queries, caches, groups = EXPECTED[name, dies]
    assert tuple(tensor_type(a.q).dims[2] for a in attentions) == queries
    assert tuple(tensor_type(a.k).dims[1] for a in attentions) == caches
    assert tuple((tensor_type(a.gate).dims[2] or 0) // 128 for a in activations) == groups
