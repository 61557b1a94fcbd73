"""The issue's centre: compiled dies decode what Hugging Face decodes, in fp32 on the same (de-quantised)
weights.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tyir.runtime_sim.session.session import Session
from tyir.tools.tokenizer import load_tokenizer
from tyir.tools.tyir_verify import main as verify
from tyir.tools.verify.compare import PROMPTS, LayerStates, Reference, check_prompt


@pytest.fixture(scope="module")
def tokens(request: pytest.FixtureRequest) -> int:
    return 64 if request.config.getoption("--slow") else 20


@pytest.mark.parametrize("weights", ["fp16", "int4"])
@pytest.mark.parametrize("dies", [1, 2, 3, 4])
def test_greedy_tokens_and_logits(
    artifacts: Callable[[int, str], Path],
    reference: Callable[[str], Reference],
    dies: int,
    weights: str,
    tokens: int,
    record_property: Callable[..., None],
) -> None:
    """Greedy tokens (64 with `--slow`) on each of 8 prompts are Hugging Face's; a differing one must be a
    near tie of Hugging Face's own logits.
    """
    folder = artifacts(dies, weights)
    states = LayerStates()
    session = Session(folder, probe=states)
    tokenizer = load_tokenizer(folder)
    results = [
        check_prompt(session, reference(weights), tokenizer(p)["input_ids"], tokens, states) for p in PROMPTS
    ]
    record_property("ties", sum(len(r.ties) for r in results))
    assert [r.differing for r in results] == [[]] * len(PROMPTS)
    assert sum(len(r.ties) for r in results) <= 2, "near ties of 160 positions, or 512"
    assert min(float(r.logit_cosine.min()) for r in results) >= 0.9999
    assert min(min(r.layer_cosine) for r in results) >= 0.9999


@pytest.mark.parametrize("what", ["all zero", "constant"])
def test_logits_that_tell_no_token_from_another_compare_nothing(
    artifacts: Callable[[int, str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """Their cosines are 1 with whatever is as flat; the artifacts' own logits do not matter."""
    model = Path(shutil.copytree(Path(__file__).parents[1] / "models" / "tiny-qwen2", tmp_path / "model"))
    weights = load_file(model / "model.safetensors")
    name = "model.norm.weight" if what == "all zero" else "lm_head.weight"
    table = weights.get(name, weights["model.embed_tokens.weight"])
    weights[name] = table * 0 if what == "all zero" else (table[:1] * 0 + 0.5).repeat(len(table), 1)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    if what == "constant":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    words = [str(artifacts(1, "fp16")), "--against", str(model), "--prompts", "1", "--tokens", "2"]
    assert verify(words) == 1
    told = capsys.readouterr()
    assert "nothing was compared" in told.err and "OK" not in told.out
