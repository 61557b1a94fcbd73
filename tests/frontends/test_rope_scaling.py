"""Rotary scaling given at import: the frequencies are those of transformers for the same config.json, the
folder stays as it is, and what cannot be scaled is refused.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.artifacts.dual_chunk import CONFIG_KEY
from tyir.artifacts.json_attributes import to_json
from tyir.artifacts.rope_scaling import RECORDED, scaled_config
from tyir.diagnostics import TyirError
from tyir.dialects.ty import RopeAngles
from tyir.frontends.huggingface import import_model
from tyir.pipeline import run_pipeline
from tyir.tools.verify.compare import scale_model

MODEL = Path(__file__).parents[1] / "models" / "tiny-copy"
PLAIN: dict[str, Any] = {"max_position_embeddings": 128, "rope_theta": 10000.0}


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_the_frequencies_are_those_of_transformers(kind: str, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    del config[CONFIG_KEY]
    (folder / "config.json").write_text(json.dumps(config))
    module = import_model(folder, rope_scaling=f"{kind}=4")
    run_pipeline(module, "to-ty")
    (angles,) = module.walk_type(RopeAngles)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    before = model.model.rotary_emb.inv_freq.numpy().copy()
    scale_model(model, f"{kind}=4")
    wanted = model.model.rotary_emb
    np.testing.assert_array_equal(angles.inv_freq.to_numpy(), wanted.inv_freq.numpy())
    assert angles.scale == pytest.approx(wanted.attention_scaling)
    assert not np.array_equal(before, wanted.inv_freq.numpy())
    facts = to_json(module.attributes["tyir.model"])
    assert facts["max_position_embeddings"] == 512 and facts[RECORDED] == f"{kind}=4"
    assert json.loads((folder / "config.json").read_text()) == config


def test_an_entry_of_the_same_kind_gets_another_factor() -> None:
    entry = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 16}
    found = scaled_config({**PLAIN, "max_position_embeddings": 131072, "rope_scaling": entry}, "yarn=2")
    assert found["rope_scaling"] == {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 2.0,
        "original_max_position_embeddings": 32768,
        "beta_fast": 16,
    }
    assert found["max_position_embeddings"] == 65536


@pytest.mark.parametrize(
    ("config", "text", "said"),
    [
        (PLAIN, "yarn", "'yarn' is not yarn or linear with a factor"),
        (PLAIN, "yarn=0.5", "factor from 1 on"),
        (PLAIN, "yarn=nan", "factor from 1 on"),
        (PLAIN, "yarn= 4", "factor from 1 on"),
        (PLAIN, "dynamic=2", "is not yarn or linear"),
        ({**PLAIN, "rope_scaling": {"rope_type": "llama3"}}, "yarn=2", "of type 'llama3', not yarn"),
        ({**PLAIN, CONFIG_KEY: {}}, "yarn=2", "says how long prompts are computed"),
        ({"rope_theta": 1e4}, "yarn=2", "no max_position_embeddings"),
    ],
)
def test_refused(config: dict[str, Any], text: str, said: str) -> None:
    with pytest.raises(TyirError, match=said):
        scaled_config(config, text)
