"""Transformers' own models, tiny and random: those that import agree with transformers, the others are
refused by name; docs/models.md is the table.

`python -m pytest tests/frontends/test_models.py --slow` compares the table; it is written anew when
docs/models.md is deleted.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import Diagnostic, TyirError
from tyir.dialects.func import Func
from tyir.dialects.ty import SelectRow, tensor_type
from tyir.execution.weights import CheckpointReader
from tyir.frontends.huggingface import import_model
from tyir.interpreter import run_function
from tyir.passes.raise_aten import raise_aten
from tyir.pipeline import run_pipeline

DOC = Path(__file__).parents[2] / "docs" / "models.md"
ROPE = {"rope_theta": 1e4}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, **ROPE}}),
    "Llama, dynamic rope": (
        "llama",
        {"max_position_embeddings": 20, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, **ROPE}},
    ),
    "Llama, yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                **ROPE,
            }
        },
    ),
    "Llama, llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
                **ROPE,
            }
        },
    ),
    "Llama, longrope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.1] * 8,
                "long_factor": [3.0] * 8,
                "factor": 4.0,
                "original_max_position_embeddings": 20,
                **ROPE,
            }
        },
    ),
    "Llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "Mistral, sliding window": ("mistral", {"sliding_window": 8}),
    "Qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen2, sliding window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "Qwen3": ("qwen3", {"head_dim": 32}),
    "SmolLM3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "Ministral": ("ministral", {"head_dim": 16}),
    "Seed-OSS": ("seed_oss", {"head_dim": 16}),
    "Phi-3": ("phi3", {}),
    "OLMo 2": ("olmo2", {}),
    "Phi-4-mini": (
        "phi3",
        {
            "partial_rotary_factor": 0.75,
            "max_position_embeddings": 128,
            "original_max_position_embeddings": 20,
            "rope_parameters": {
                "rope_type": "longrope",
                "short_factor": [1.1] * 6,
                "long_factor": [3.0] * 6,
                **ROPE,
            },
        },
    ),
    "GLM": ("glm", {"head_dim": 16}),
    "GLM-4": ("glm4", {"head_dim": 16}),
    "Ernie 4.5": ("ernie4_5", {"head_dim": 16}),
    "Helium": ("helium", {"head_dim": 16}),
    "OLMo 3": ("olmo3", {}),
    "EXAONE 4": ("exaone4", {"head_dim": 16}),
    "HunYuan": ("hunyuan_v1_dense", {"head_dim": 16}),
    "CWM": ("cwm", {"head_dim": 16}),
    "Granite": (
        "granite",
        {
            "logits_scaling": 8.0,
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.05,
        },
    ),
    "StarCoder2": ("starcoder2", {}),
    "OLMo": ("olmo", {}),
    "StableLM": ("stablelm", {}),
    "StableLM 2, norms of heads": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "GPT-NeoX, one after the other": ("gpt_neox", {"use_parallel_residual": False, "rotary_pct": 1.0}),
    "Phi": ("phi", {}),
    "Phi, norms of heads": ("phi", {"qk_layernorm": True}),
    "OPT": ("opt", {"ffn_dim": 112}),
    "OPT, norms after": (
        "opt",
        {"ffn_dim": 112, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
    "Gemma": ("gemma", {"head_dim": 16}),
    "Gemma 2": ("gemma2", {"head_dim": 16, "sliding_window": 8}),
    "Gemma 3": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Cohere": ("cohere", {}),
    "Cohere, norms of heads": ("cohere", {"use_qk_norm": True}),
    "Cohere 2": (
        "cohere2",
        {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "BLOOM": ("bloom", {}),
    "Qwen2-MoE": (
        "qwen2_moe",
        {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    ),
    "Mixtral": ("mixtral", {"num_local_experts": 4}),
}
REFUSED = ("BLOOM", "Qwen2-MoE", "Mixtral")
QUICK = (
    "Granite",
    "Phi-3",
    "Llama, dynamic rope",
    "Llama, longrope",
    "SmolLM3",
    "Gemma 2",
    "GPT-2",
    "GPT-NeoX",
    "Cohere, norms of heads",
    "OPT, norms after",
    "GLM",
    "Phi-4-mini",
)
IDS = np.random.default_rng(0).integers(3, 96, (1, 33))


def verdict(folder: Path) -> tuple[str, float]:
    """("agrees", relative error) or (why it is refused, 1)."""
    import torch
    from transformers import AutoModelForCausalLM

    notes: list[Diagnostic] = []
    try:
        module = import_model(folder, dtype="f32", note=notes.append, positions=IDS.shape[1])
        raise_aten(module)
    except TyirError as error:
        return reason(str(error)), 1.0
    with torch.no_grad():
        wanted = (
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            .eval()(torch.tensor(IDS))
            .logits.numpy()
        )
    (got,) = run_function(module, "main", (IDS, np.arange(IDS.shape[1])[None]), CheckpointReader(folder))
    limit = re.search(r"beyond (\d+) tokens", " ".join(n.message for n in notes))
    return "agrees" + (
        f", beyond {limit[1]} tokens with the frequencies of `--max-kv`" if limit else ""
    ), float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


def reason(message: str) -> str:
    """The operations a refusal names, or its first line."""
    operations = re.findall(
        r"^  (\S+?)(?:\.default)?(?: with .*?)?: (?:once|\d+ times)", message, re.MULTILINE
    )
    if operations:
        return "refused: " + ", ".join(f"`{name}`" for name in dict.fromkeys(operations))
    return "refused: " + re.sub(r"^.*?error: ", "", message.splitlines()[0])[:120]


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_agrees_or_is_refused(save_model: Callable[..., Path], name: str) -> None:
    model_type, config = CASES[name]
    found, error = verdict(save_model(model_type, dtype="float32", **config))
    rows[name] = found
    if name not in REFUSED:
        assert found.startswith("agrees") and error < 1e-4, (found, error)
    else:
        assert found.startswith("refused: "), (found, error)


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES if n not in REFUSED]
)
def test_one_row_is_enough_for_what_follows_the_layers(save_model: Callable[..., Path], name: str) -> None:
    """Last norm, scales, head, soft cap: of every model they are of each row alone, outside the layers."""
    model_type, config = CASES[name]
    module = import_model(save_model(model_type, **config), positions=16)
    last = "to-ty,kv-materialize{max-kv=16},select-rows,partition-dies{dies=2}"
    run_pipeline(module, f"{last},specialize-seqlen{{seqlens=1,4}},to-program")
    functions = [f for f in module.walk_type(Func) if f.sym_name in ("main_s1", "main_s4")]
    taken = [[tensor_type(op.x).dims[1] for op in f.walk_type(SelectRow)] for f in functions]
    assert taken == [[], [4]] * 2
    assert all(f.function_type.results[0].static_shape[:2] == (1, 1) for f in functions)


@pytest.mark.parametrize("name", ["Qwen2-MoE", "Mixtral"])
def test_a_mixture_of_experts_is_refused_by_name(save_model: Callable[..., Path], name: str) -> None:
    """Before any tensor is blamed: checkpoints name the experts' tensors in another way than the model."""
    model_type, config = CASES[name]
    with pytest.raises(TyirError) as caught:
        import_model(save_model(model_type, **config))
    message = str(caught.value)
    assert "is a mixture of experts (model.layers.0.mlp.experts)" in message and "tensors" not in message


rows: dict[str, str] = {}


@pytest.mark.slow
def test_the_table_in_the_documentation() -> None:
    if rows.keys() != CASES.keys():
        pytest.skip("needs the results of all models")
    lines = [
        "# Models",
        "",
        (
            "Tiny random models of transformers, imported in f32 and compared with transformers on 33 tokens"
            " (relative error of the"
        ),
        "logits below 1e-4), or refused. Written by `tests/frontends/test_models.py`.",
        "",
        "| model | `model_type` | result |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | `{CASES[name][0]}` | {rows[name]} |" for name in CASES]
    text = "\n".join(lines) + "\n"
    if not DOC.exists():
        DOC.write_text(text)
    assert DOC.read_text() == text
