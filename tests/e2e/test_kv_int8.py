"""An 8-bit key/value cache on the embedded model: near the f16 cache, the same on every engine, visible in
what a host must allocate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.session.session import ENGINES, Session
from tyir.tools.api import compile_path
from tyir.tools.tyir_verify import main

Artifacts = Callable[[int, str], Path]
TOKENS = [(37 * i * i + 11 * i + 5) % 4096 for i in range(100)]


@pytest.fixture(scope="module")
def int8(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    options = BuildOptions(dies=3, seqlens=(1, 8), max_kv=128, kv_dtype="int8")
    return compile_path(imported, tmp_path_factory.mktemp("int8"), options)


def cosines(a: npt.NDArray[np.float32], b: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.array(
        [
            float(x @ y) / float(np.linalg.norm(x) * np.linalg.norm(y))
            for x, y in zip(a.astype(np.float64), b.astype(np.float64))
        ]
    )


def test_logits_stay_near_those_of_the_f16_cache(
    artifacts: Artifacts, int8: Path, record_property: Callable[..., None]
) -> None:
    """100 tokens, the later ones over a cache of 8-bit rows only."""
    got, wanted = Session(int8).feed(TOKENS), Session(artifacts(3, "fp16")).feed(TOKENS)
    found = cosines(got, wanted)
    record_property("min_logit_cosine", float(found.min()))
    assert 0.999 <= found.min() < 1.0
    assert (got.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= 0.95


def test_three_executions(int8: Path) -> None:
    """A value that rounding moves across the border between two of the 255 steps moves by a step, so that
    engines agree less tightly than with f16.
    """
    logits = {}
    for engine in ENGINES:
        session = Session(int8, engine)
        logits[engine] = np.concatenate([session.feed(TOKENS[:11]), session.feed([7])])
    worst = {engine: float(np.abs(logits[engine] - logits["interpreter"]).max()) for engine in logits}
    assert max(worst.values()) < 0.12, worst
    assert min(cosines(logits[e], logits["interpreter"]).min() for e in ENGINES) >= 0.9999


def test_saved_caches_hold_the_scales(int8: Path, tmp_path: Path) -> None:
    first, second = Session(int8), Session(int8)
    first.feed(TOKENS[:13])
    first.save(tmp_path / "cache.npz")
    second.restore(tmp_path / "cache.npz")
    np.testing.assert_array_equal(second.feed(TOKENS[13:20]), first.feed(TOKENS[13:20]))


def test_the_buffer_config_shows_what_to_allocate(int8: Path) -> None:
    caches = json.loads((int8 / "buffer_config.json").read_text())["dies"]["0"]["kv_cache"]
    assert len(caches) == 24
    assert caches["k0"] == {"dtype": "i8", "shape": [1, 1, 128, 32]}
    assert caches["k_scales0"] == {"dtype": "f16", "shape": [1, 1, 128]}
    assert Manifest.load(int8).options.kv_dtype == "int8"


def test_verification_reads_the_layers_states(int8: Path, model: Path) -> None:
    """Scales have as many axes as the hidden state; the state after each layer is compared all the same."""
    assert main([str(int8), "--against", str(model), "--prompts", "1", "--tokens", "8"]) == 0
