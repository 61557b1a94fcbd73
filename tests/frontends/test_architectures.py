"""Architectures that differ from Llama by more than sizes, compiled for three dies: they decode what Hugging
Face decodes.

Multipliers (Granite), packed projections (Phi-3), norms of heads before and after the rotation (EXAONE 4,
HunYuan) and of all heads together (OLMo 2), layers without rotation (SmolLM3), rotations of neighbouring
channels (Ernie 4.5, GLM-4) and of some channels (GLM-4, Phi-4-mini); layer norms with a bias, without one and
of single heads, MLPs without a gate, attention beside the MLP, learned positions, soft caps (GPT-2 and what
came of it, Gemma, Cohere).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.frontends.quantized import KINDS, write_quantized
from tyir.diagnostics import TyirError
from tyir.dialects import ty
from tyir.dialects.builtin import Module
from tyir.execution.constexpr import ConstantExpressions
from tyir.execution.weights import CheckpointReader
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.manifest import BuildOptions
from tyir.pipeline import run_pipeline
from tyir.runtime_sim.session.sampling import logsumexp
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.tools.api import compile_path
from tyir.tools.verify.compare import LayerStates, Reference, check_prompt, dense_model

GRANITE: dict[str, Any] = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.05,
    "logits_scaling": 8.0,
    "tie_word_embeddings": True,
}
SIZES = {
    "vocab_size": 512,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
ALTERNATING = ["sliding_attention", "full_attention"]
MODELS: dict[str, dict[str, Any]] = {
    "granite": {**SIZES, **GRANITE},
    "phi3": SIZES,
    "exaone4": {**SIZES, "head_dim": 32},
    "hunyuan_v1_dense": {**SIZES, "head_dim": 32},
    "smollm3": {**SIZES, "no_rope_layers": [1, 0]},
    "olmo": SIZES,
    "olmo2": SIZES,
    "glm4": {**SIZES, "head_dim": 32},
    "ernie4_5": {**SIZES, "head_dim": 32},
    "phi3-partial": {**SIZES, "partial_rotary_factor": 0.75},
    "gpt2": {"vocab_size": 512, "n_embd": 192, "n_head": 6, "n_positions": 128},
    "gpt_neox": {**SIZES, "num_key_value_heads": 6},
    "phi": SIZES,
    "starcoder2": {**SIZES, "sliding_window": None},
    "opt": {**SIZES, "ffn_dim": 512, "word_embed_proj_dim": 192, "max_position_embeddings": 128},
    "stablelm": SIZES,
    "stablelm-heads": {**SIZES, "qk_layernorm": True, "use_parallel_residual": True},
    "gemma": {**SIZES, "head_dim": 32},
    "gemma2": {**SIZES, "head_dim": 32, "sliding_window": 8},
    "gemma3_text": {**SIZES, "head_dim": 32, "sliding_window": 8, "layer_types": ALTERNATING},
    "cohere": SIZES,
    "cohere-heads": {**SIZES, "use_qk_norm": True},
    "cohere2": {**SIZES, "sliding_window": 8, "layer_types": ALTERNATING},
}

QUICK = ("granite", "phi3-partial", "gpt2", "gemma2", "cohere-heads")


@pytest.fixture(scope="module")
def folders(save_model: Callable[..., Path]) -> dict[str, Path]:
    return {
        name: save_model(name.partition("-")[0], dtype="float16", **config) for name, config in MODELS.items()
    }


def raised(folder: Path) -> Module:
    module = import_model(folder)
    run_pipeline(module, "to-ty")
    return module


def test_multipliers_are_scales(folders: dict[str, Path]) -> None:
    module = raised(folders["granite"])
    scales = [op.factor for op in module.walk_type(ty.Scale)]
    assert scales == [12.0, *[0.22] * 4, 0.125]
    assert {op.scale for op in module.walk_type(ty.Attention)} == {0.05}
    main = module.lookup("main")
    assert main is not None
    (logits,) = main.body.terminator.operands
    head = (
        logits.op
    )  # the factor is applied before the head: fewer channels, and the head's sums can stay unrounded
    assert isinstance(head, ty.Linear) and isinstance(head.x.op, ty.Scale)


def test_packed_projections_become_separate_ones(folders: dict[str, Path]) -> None:
    """qkv and gate_up: one linear per part, whose weight is a slice of the stored one."""
    module = raised(folders["phi3"])
    widths = [ty.tensor_type(op.out).dims[-1] for op in module.walk_type(ty.Linear)]
    assert widths == [192, 96, 96, 192, 512, 512, 192] * 2 + [512]
    constants, slices = ConstantExpressions(), list(module.walk_type(ty.Slice))
    assert len(slices) == 10 and all(constants.is_constant(op.out) for op in slices)


@pytest.mark.parametrize(
    "kind",
    [
        "awq",
        pytest.param("gptq", marks=pytest.mark.slow),
        pytest.param("ct-symmetric", marks=pytest.mark.slow),
    ],
)
def test_quantised_heads_in_another_order(save_model: Callable[..., Path], tmp_path: Path, kind: str) -> None:
    """Rows of words, scales and zero points are reordered alike: the logits are those of the de-quantised
    weights.
    """
    import torch

    sizes = {
        "hidden_size": 128,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
    }
    write_quantized(
        save_model("ernie4_5", dtype="float16", tie_word_embeddings=False, **sizes),
        tmp_path / "q",
        KINDS[kind],
    )
    module = import_model(tmp_path / "q", dtype="f32")
    run_pipeline(module, "to-ty")
    assert len(list(module.walk_type(ty.QuantizedLinear))) == 14
    ids = np.arange(3, 20)[None]
    (got,) = run_function(module, "main", (ids, np.arange(17)[None]), CheckpointReader(tmp_path / "q"))
    with torch.no_grad():
        wanted = dense_model(tmp_path / "q", None)(torch.from_numpy(ids)).logits.numpy()
    assert np.linalg.norm(got - wanted) / np.linalg.norm(wanted) < 1e-4


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MODELS]
)
@pytest.mark.parametrize("weights", ["fp16", pytest.param("int4", marks=pytest.mark.slow)])
def test_on_three_dies(folders: dict[str, Path], tmp_path: Path, name: str, weights: str) -> None:
    options = BuildOptions(dies=3, seqlens=(1, 8), max_kv=48, weights=weights, group_size=64)
    folder = compile_path(folders[name], tmp_path, options)
    states = LayerStates()
    result = check_prompt(
        Session(folder, probe=states), Reference(folders[name], options), list(np.arange(5, 30)), 12, states
    )
    assert result.differing == []
    assert float(result.logit_cosine.min()) >= 0.9999
    assert min(result.layer_cosine) >= 0.9999
    commands = check_prompt(
        Session(folder, "edge10"), Reference(folders[name], options), list(np.arange(5, 16)), 2, LayerStates()
    )
    assert commands.differing == [] and float(commands.logit_cosine.min()) >= 0.9999


def test_learned_positions(save_model: Callable[..., Path], tmp_path: Path) -> None:
    """The host looks up the tokens, the step the positions; a cache cannot be longer than what is learned."""
    config = {"vocab_size": 512, "n_embd": 192, "n_head": 6, "n_positions": 40, "max_position_embeddings": 40}
    folder = save_model("gpt2", dtype="float16", **config)
    with pytest.raises(TyirError, match="max-kv is 48, but the model has learned 40 positions"):
        compile_path(folder, tmp_path, BuildOptions(dies=1, seqlens=(1,), max_kv=48))
    options = BuildOptions(dies=2, seqlens=(1, 4), max_kv=40, embedding_as_input=True)
    states = LayerStates()
    session = Session(compile_path(folder, tmp_path, options), probe=states)
    result = check_prompt(session, Reference(folder, options), list(np.arange(5, 30)), 10, states)
    assert result.differing == [] and float(result.logit_cosine.min()) >= 0.9999


@pytest.mark.parametrize("engine", [pytest.param("host", marks=pytest.mark.slow), "edge10"])
def test_the_best_tokens_are_capped_like_the_logits(
    save_model: Callable[..., Path], tmp_path: Path, engine: EngineName
) -> None:
    folder = save_model(
        "gemma2", dtype="float16", **SIZES, head_dim=32, final_logit_softcapping=2.0, initializer_range=0.2
    )
    ids = [5, 17, 300, 42, 9]
    sessions = [
        Session(
            compile_path(
                folder, tmp_path / output, BuildOptions(dies=2, seqlens=(4,), max_kv=16, output=output)
            ),
            engine,
        )
        for output in ("topk=3", "logits")
    ]
    best, logits = sessions[0].next_tokens(ids), sessions[1].feed(ids)
    assert 1.9 < float(np.abs(logits).max()) <= 2.0
    np.testing.assert_allclose(best.values, -np.sort(-logits, axis=-1)[:, :3], rtol=1e-5)
    np.testing.assert_allclose(np.take_along_axis(logits, best.ids, axis=-1), best.values, rtol=1e-5)
    np.testing.assert_allclose(best.logsumexp, logsumexp(logits), rtol=0, atol=1e-5)
