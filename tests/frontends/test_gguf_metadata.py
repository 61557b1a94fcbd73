"""What the metadata of GGUF files say of a model (architectures, biases, kinds of layers, rotary
frequencies), and what is refused by its key.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.frontends.dense_state import dense_state
from tyir.frontends.gguf.files import gguf_model, read_gguf
from tyir.frontends.huggingface import import_model

gguf = pytest.importorskip("gguf")
from tests.frontends import gguf_writer  # noqa: E402 - it needs the package
from tests.frontends.gguf_models import Model, add_to, parameters, refusal  # noqa: E402


@pytest.mark.parametrize("architecture", ["gemma", "granite"])
def test_architectures_that_transformers_does_not_read_from_gguf(tmp_path: Path, architecture: str) -> None:
    config, state = parameters(architecture, head_dim=64)

    def extra(writer: Any) -> None:
        if architecture == "granite":
            writer.add_logit_scale(8.0)
            writer.add_embedding_scale(12.0)
            writer.add_residual_scale(0.22)
            writer.add_attention_scale(0.0156)

    held = gguf_writer.write(tmp_path / "m.gguf", architecture, config, state, lambda n: "Q4_1", extra)
    found = dict(dense_state(tmp_path))
    assert found.keys() == held.keys()
    for name, w in held.items():
        np.testing.assert_allclose(found[name], w, atol=1e-6, err_msg=name)
    (ours, _) = read_gguf(gguf_model(tmp_path))
    if architecture == "granite":
        names = ("logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier")
        assert [ours[n] for n in names] == pytest.approx([8.0, 12.0, 0.22, 0.0156])


BIASED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("llama", {"attention_bias": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"mlp_bias": True}),
    ("llama", {"attention_bias": True, "without": ("o_proj.bias",)}),
    ("llama", {"attention_bias": True, "num_hidden_layers": 2}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("qwen3", {"attention_bias": True, "head_dim": 64}),
    ("gemma", {"attention_bias": True, "head_dim": 64}),
)


@pytest.mark.parametrize(("model_type", "changes"), BIASED)
def test_biases_that_no_metadata_tell_of(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    """The config follows from the tensors; biases of q and k are interleaved as their weights are."""
    changes = dict(changes)
    without = changes.pop("without", ("no such",))
    config, state = parameters(model_type, **changes)
    state = {n: w for n, w in state.items() if not n.endswith(without)}
    held = gguf_writer.write(tmp_path / "m.gguf", model_type, config, state, lambda n: "Q8_0")
    found = dict(dense_state(tmp_path))
    assert found.keys() == held.keys() and sum(n.endswith(".bias") for n in found) >= 3
    for name, w in held.items():
        np.testing.assert_allclose(found[name], w, atol=1e-6, err_msg=name)
    names, _ = read_gguf([tmp_path / "m.gguf"])
    assert (names["architectures"] == ["Qwen2ForCausalLM"]) == (without == ("o_proj.bias",))


@pytest.mark.parametrize(
    ("model_type", "without", "said"),
    [
        ("llama", ("v_proj.bias", "o_proj.bias"), "lacks 2 of the model's"),
        ("llama", ("q_proj.bias", "k_proj.bias"), "no place for"),
        ("llama", ("0.self_attn.q_proj.bias",), "lacks 1 of the model's"),
        ("qwen2", ("q_proj.bias", "k_proj.bias", "v_proj.bias"), "lacks 6 of the model's"),
    ],
)
def test_biases_that_no_class_has_are_told_of_the_file(
    tmp_path: Path, model_type: str, without: tuple[str, ...], said: str
) -> None:
    """Without a word of a config.json that is not there, but to put one there."""
    changes = {"attention_bias": True} if model_type == "llama" else {}
    config, state = parameters(model_type, num_hidden_layers=2, **changes)
    state = {n: w for n, w in state.items() if not n.endswith(without)}
    gguf_writer.write(tmp_path / "m.gguf", model_type, config, state)
    with pytest.raises(TyirError) as caught:
        import_model(tmp_path)
    message = str(caught.value)
    assert said in message and "original model's config.json beside the file" in message
    assert "of config.json" not in message and "use the config.json" not in message


KEYS: tuple[tuple[str, Any], ...] = (
    ("attention.causal", False),
    ("attention.clamp_kqv", 8.0),
    ("attention.key_length", 0),
    ("attention.max_alibi_bias", 8.0),
    ("attention.scale", 0.5),
    ("attention.sliding_window", 4),
    ("attention.value_length", 32),
    ("attention.head_count_kv", [2, 4]),
    ("attention.of_tomorrow", 1),
    ("block_count", "two"),
    ("expert_count", 8),
    ("final_logit_softcapping", 30.0),
    ("logit_scale", 8.0),
    ("rope.dimension_count", 32),
    ("rope.dimension_sections", [16, 24, 24, 0]),
    ("rope.freq_base", [1.0, 2.0]),
    ("rope.scaling.alpha", 1000.0),
    ("rope.scaling.yarn_log_multiplier", 0.1),
    ("use_parallel_residual", True),
)


@pytest.mark.parametrize(("key", "value"), KEYS)
def test_metadata_that_change_what_is_computed_are_refused(
    tmp_path: Path, gguf_llama: Model, key: str, value: Any
) -> None:
    """By name and value; a config.json beside the file is believed instead."""
    gguf_writer.write(
        tmp_path / "m.gguf", "llama", *gguf_llama, extra=lambda w: add_to(w, f"llama.{key}", value)
    )
    message = refusal(tmp_path)
    assert f"llama.{key}" in message and "config.json beside the file" in message


def test_metadata_that_change_nothing(tmp_path: Path, gguf_llama: Model) -> None:
    def extra(writer: Any) -> None:
        for key, value in (
            ("attention.causal", True),
            ("attention.value_length", 64),
            ("attention.head_count_kv", [2, 2]),
            ("expert_count", 0),
            ("rope.dimension_count", 64),
            ("rope.scaling.finetuned", False),
            ("tensor_data_layout", "Meta AI original pth"),
            ("vocab_size", 96),
        ):
            add_to(writer, f"llama.{key}", value)

    gguf_writer.write(tmp_path / "m.gguf", "llama", *gguf_llama, extra=extra)
    config, _ = read_gguf([tmp_path / "m.gguf"])
    assert (config["num_key_value_heads"], config["head_dim"]) == (2, 64)
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("missing", ["attention.head_count", "block_count", "feed_forward_length"])
def test_metadata_that_are_missing(tmp_path: Path, gguf_llama: Model, missing: str) -> None:
    """Never transformers' default of another model."""
    gguf_writer.write(
        tmp_path / "m.gguf", "llama", *gguf_llama, extra=lambda w: w.kv_data[0].pop(f"llama.{missing}")
    )
    assert f"the file does not say llama.{missing}" in refusal(tmp_path)


@pytest.mark.parametrize("pattern", [None, 2, [True, True, False]])
def test_the_kinds_of_layers_of_gemma(tmp_path: Path, pattern: Any) -> None:
    config, state = parameters("gemma3_text", head_dim=64, num_hidden_layers=3)

    def extra(writer: Any) -> None:
        writer.add_sliding_window(32)
        writer.add_final_logit_softcapping(30.0)
        if pattern is not None:
            add_to(writer, "gemma3.attention.sliding_window_pattern", pattern)

    gguf_writer.write(tmp_path / "m.gguf", "gemma3", config, state, extra=extra)
    found, _ = read_gguf([tmp_path / "m.gguf"])
    local, full = "sliding_attention", "full_attention"
    kinds = {2: [local, full, local], None: None}.get(pattern if type(pattern) is int else None)
    assert found.get("layer_types") == ([local, local, full] if isinstance(pattern, list) else kinds)
    assert found["final_logit_softcapping"] == 30.0


def test_gemma_computes_as_transformers(tmp_path: Path) -> None:
    """The whole way: norms less one, the four norms of a layer, soft caps and the query's scale."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config

    from tyir.execution.weights import CheckpointReader
    from tyir.interpreter import run_function
    from tyir.passes.raise_aten import raise_aten

    config, state = parameters("gemma2", head_dim=64, query_pre_attn_scalar=64, sliding_window=32)

    def extra(writer: Any) -> None:
        writer.add_sliding_window(32)
        writer.add_attn_logit_softcapping(50.0)
        writer.add_final_logit_softcapping(30.0)

    held = gguf_writer.write(tmp_path / "m.gguf", "gemma2", config, state, lambda n: "Q5_1", extra)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**config), dtype=torch.float32).eval()
    ids = np.arange(5, 17)[None]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(held[name].copy()))
        wanted = model(torch.tensor(ids)).logits.numpy()
    module = import_model(tmp_path, dtype="f32")
    raise_aten(module)
    (got,) = run_function(module, "main", (ids, np.arange(12)[None]), CheckpointReader(tmp_path))
    assert float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted)) < 1e-5


def rope_of(tmp_path: Path, gguf_llama: Model, extra: Callable[[Any], None]) -> Any:
    gguf_writer.write(tmp_path / "m.gguf", "llama", *gguf_llama, extra=extra)
    return read_gguf([tmp_path / "m.gguf"])[0]["rope_parameters"]


def test_scaled_rotary_frequencies(tmp_path: Path, gguf_llama: Model) -> None:
    """Llama 3's divisors (computed by transformers), linear and yarn; what is not known is refused."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for factor in (8.0, 32.0):
        rope = {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
        config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=rope)
        scaled = ROPE_INIT_FUNCTIONS["llama3"](config, None)[0].numpy()
        freqs = (10000.0 ** (-np.arange(32) / 32) / scaled).astype(np.float32)
        assert rope_of(tmp_path, gguf_llama, lambda w, f=freqs: w.add_tensor("rope_freqs.weight", f)) == rope

    def yarn(writer: Any) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(32)
        writer.add_rope_scaling_yarn_attn_factor(0.5)
        writer.add_rope_scaling_yarn_beta_slow(2.0)

    assert rope_of(tmp_path, gguf_llama, yarn) == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.5,
        "beta_slow": 2.0,
    }
    for key in (
        "llama.rope.scaling.factor",
        "llama.rope.scale_linear",
    ):  # llama.cpp: without a type it is linear
        found = rope_of(tmp_path, gguf_llama, lambda w, k=key: w.add_float32(k, 4.0))
        assert (found["rope_type"], found["factor"]) == ("linear", 4.0)
    with pytest.raises(TyirError, match="in another way than Llama 3 does"):
        rope_of(
            tmp_path,
            gguf_llama,
            lambda w: w.add_tensor("rope_freqs.weight", np.linspace(1, 9, 32, dtype="f4")),
        )
    with pytest.raises(TyirError, match="scales its rotary frequencies as 'longrope'"):
        rope_of(tmp_path, gguf_llama, lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE))
