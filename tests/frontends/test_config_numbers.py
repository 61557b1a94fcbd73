"""Numbers of config.json that are not finite or not what their key means are refused by key and value,
whatever the family; those of real models are not.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.frontends.config_numbers import config_problems
from tyir.frontends.huggingface import import_model

BAD: list[tuple[str, Any, str]] = [
    ("rms_norm_eps", math.nan, "'rms_norm_eps' is NaN, a number between 0 and 1 is needed"),
    ("rms_norm_eps", -1, "'rms_norm_eps' is -1,"),
    ("rms_norm_eps", 0.0, "'rms_norm_eps' is 0.0,"),
    ("rms_norm_eps", "1e-6", "'rms_norm_eps' is \"1e-6\","),
    ("rms_norm_eps", True, "'rms_norm_eps' is true,"),
    ("layer_norm_epsilon", math.inf, "'layer_norm_epsilon' is Infinity,"),
    ("layer_norm_eps", 1e-400, "'layer_norm_eps' is 0.0,"),
    ("rope_theta", 0, "'rope_theta' is 0, a number above 0"),
    ("rope_theta", -math.inf, "'rope_theta' is -Infinity,"),
    ("rope_local_base_freq", -1e4, "'rope_local_base_freq' is -10000.0,"),
    ("rotary_emb_base", math.nan, "'rotary_emb_base' is NaN,"),
    (
        "rope_parameters",
        {"rope_type": "default", "rope_theta": math.nan},
        "'rope_parameters.rope_theta' is NaN",
    ),
    (
        "rope_parameters",
        {"full_attention": {"rope_theta": -1}},
        "'rope_parameters.full_attention.rope_theta' is -1",
    ),
    ("rope_scaling", {"type": "linear", "factor": 0}, "'rope_scaling.factor' is 0"),
    (
        "rope_scaling",
        {"type": "longrope", "short_factor": [1.0, 0.0]},
        "'rope_scaling.short_factor[1]' is 0.0",
    ),
    (
        "rope_scaling",
        {"rope_type": "llama3", "low_freq_factor": 4.0, "high_freq_factor": 4.0},
        "'rope_scaling.high_freq_factor' is 4.0, a number above low_freq_factor, 4.0, is needed",
    ),
    ("partial_rotary_factor", 1.5, "'partial_rotary_factor' is 1.5"),
    ("rotary_pct", 0, "'rotary_pct' is 0"),
    ("attn_logit_softcapping", 0.0, "'attn_logit_softcapping' is 0.0, a number above 0, or null for no cap"),
    ("final_logit_softcapping", -30, "'final_logit_softcapping' is -30"),
    ("query_pre_attn_scalar", 0, "'query_pre_attn_scalar' is 0"),
    ("attention_multiplier", math.nan, "'attention_multiplier' is NaN"),
    ("embedding_multiplier", -math.inf, "'embedding_multiplier' is -Infinity"),
    ("residual_multiplier", -0.22, "'residual_multiplier' is -0.22"),
    ("logits_scaling", 0, "'logits_scaling' is 0"),
    ("logit_scale", math.nan, "'logit_scale' is NaN"),
    ("hidden_size", -64, "'hidden_size' is -64, a whole number from 1 to 2^31 - 1"),
    ("num_hidden_layers", 0, "'num_hidden_layers' is 0"),
    ("vocab_size", 2.5, "'vocab_size' is 2.5"),
    ("n_embd", math.nan, "'n_embd' is NaN"),
    ("max_position_embeddings", 10**400, "'max_position_embeddings' is 1000"),
    ("sliding_window", 0, "'sliding_window' is 0"),
    ("num_layers_of_a_family", 5000, "'num_layers_of_a_family' is 5000, more than the 1000 that a model"),
    ("decoder_layers", 10**12, "'decoder_layers' is 1000000000000, more than the 1000 that a model"),
    ("n_layer", 2**31 - 1, "'n_layer' is 2147483647, more than the 1000 that a model"),
    ("num_experts", 10**9, "'num_experts' is 1000000000, more than the 100000"),
    ("decoder", {"sizes": [1, 10**300]}, "'decoder.sizes[1]' has more than 63 bits"),
    (
        "a_key_of_one_family",
        [1.0, {"scale": math.nan}],
        "'a_key_of_one_family[1].scale' is NaN, a finite number",
    ),
    ("quantization_config", {"damp_percent": math.inf}, "'quantization_config.damp_percent' is Infinity"),
]


@pytest.mark.parametrize(("key", "value", "wanted"), BAD)
def test_bad_numbers(key: str, value: Any, wanted: str) -> None:
    config = json.loads(json.dumps({"hidden_size": 64, key: value}))
    problems = list(config_problems(config, "config.json"))
    assert len(problems) == 1 and problems[0].message.startswith(wanted) and problems[0].help


@pytest.mark.parametrize(("key", "value", "wanted"), BAD)
def test_a_plan_refuses_them_too(tmp_path: Path, key: str, value: Any, wanted: str) -> None:
    """Before it makes anything of their sizes."""
    from tyir.tools.estimate.shape import read_shape

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 64, key: value}))
    with pytest.raises(TyirError) as caught:
        read_shape(tmp_path)
    (problem,) = caught.value.diagnostics
    assert problem.message.startswith(wanted) or "a number of 401 digits" in problem.message


GOOD: list[dict[str, Any]] = [
    {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "sliding_window": None, "head_dim": None},
    {"sliding_window": 0, "use_sliding_window": False},
    {"attn_logit_softcapping": None, "final_logit_softcapping": 30, "query_pre_attn_scalar": 256},
    {
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 0,
            "beta_fast": 32,
        }
    },
    {"vision_config": {"hidden_size": 0, "eps": 0}, "quantization_config": {"group_size": -1, "eps": 0}},
    {"logit_scale": "inv_sqrt_d_model", "use_logits_scaling": False, "vocab_size": 64.0},
    {"initializer_range": 0, "attention_dropout": 0.0, "router_aux_loss_coef": 0},
    {"vocab_size_per_layer_input": 262_144, "per_layer_config": {"02": {"kv_lora_rank": 1024}}},
]


@pytest.mark.parametrize("config", GOOD)
def test_good_numbers(config: dict[str, Any]) -> None:
    assert list(config_problems(config, "")) == []


@pytest.mark.slow
def test_every_configuration_of_transformers_is_good() -> None:
    """All causal language models' own defaults, which real configs are made of."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    seen = 0
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[kind]()
        except Exception:  # some have no defaults that are a model
            continue
        found = list(config_problems(json.loads(config.to_json_string(use_diff=False)), kind))
        assert not found, (kind, found)
        seen += 1
    assert seen > 100


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("llama", "rms_norm_eps", math.nan),
        ("gpt_neox", "layer_norm_eps", math.inf),
        ("gemma2", "attn_logit_softcapping", math.nan),
        ("granite", "residual_multiplier", math.inf),
        ("cohere", "logit_scale", math.nan),
    ],
)
def test_families_are_refused_at_import(save_model: Any, family: str, key: str, value: Any) -> None:
    folder: Path = save_model(family)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(TyirError) as caught:
        import_model(folder)
    (problem,) = caught.value.diagnostics
    assert f"'{key}' is " in problem.message and problem.where == str(path) and problem.help


def test_what_follows_from_the_config_is_finite_too(save_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a family computes from numbers that are each in order."""
    from tyir.frontends import torch_export

    folder: Path = save_model("llama")
    monkeypatch.setattr(torch_export, "real_buffer", lambda meta, name: np.array([1.0, np.inf], np.float32))
    with pytest.raises(TyirError, match=r"which follows from config.json, holds 1 infinite value"):
        import_model(folder)
