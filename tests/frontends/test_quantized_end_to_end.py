"""Quantised checkpoints compiled for several dies decode what Hugging Face decodes, in fp32 on the same
de-quantised weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.frontends.quantized import KINDS, write_quantized
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.session.session import Session
from tyir.tools.api import compile_path
from tyir.tools.tokenizer import load_tokenizer
from tyir.tools.verify.compare import PROMPTS, LayerStates, Reference, check_prompt

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen2"
QUICK = {("awq", 3)}
CASES = [
    pytest.param(name, dies, marks=() if (name, dies) in QUICK else pytest.mark.slow)
    for name in KINDS
    for dies in (1, 3, 4)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("quantized")
    for name, kind in KINDS.items():
        write_quantized(TINY, root / name, kind)
    return {name: root / name for name in KINDS}


@pytest.mark.parametrize(("name", "dies"), CASES)
def test_compiled(folders: dict[str, Path], tmp_path: Path, name: str, dies: int) -> None:
    folder = compile_path(folders[name], tmp_path, BuildOptions(dies=dies, seqlens=(1, 8), max_kv=64))
    options = Manifest.load(folder).options
    assert options.weights == "checkpoint"
    reference, states = Reference(folders[name], options), LayerStates()
    session = Session(folder, probe=states)
    tokenizer = load_tokenizer(folder)
    for prompt in PROMPTS[:2]:
        result = check_prompt(session, reference, tokenizer(prompt)["input_ids"], 24, states)
        assert result.differing == []
        assert float(result.logit_cosine.min()) >= 0.9999
        assert min(result.layer_cosine) >= 0.9999


@pytest.mark.slow
def test_int4_of_a_quantised_checkpoint_quantises_the_rest(folders: dict[str, Path], tmp_path: Path) -> None:
    """What the checkpoint quantised stays as it is: the same tensors, bit by bit."""
    from tyir.execution.weights import read_safetensors

    stored, asked = (
        compile_path(folders["awq"], tmp_path / w, BuildOptions(dies=2, seqlens=(1,), max_kv=16, weights=w))
        for w in ("fp16", "int4")
    )
    assert Manifest.load(asked).options.weights == "int4"
    a, b = (read_safetensors(f / "batch_1" / "common_die1.params") for f in (stored, asked))
    assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
