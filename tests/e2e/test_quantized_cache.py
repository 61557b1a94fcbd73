"""Key/value caches of 8 and of 4 bits on the embedded model: near the f16 cache, the same on every engine,
visible in what a host must allocate.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.tools.api import compile_path
from tyir.tools.tyir_verify import main

Artifacts = Callable[[int, str], Path]
TOKENS = [(37 * i * i + 11 * i + 5) % 4096 for i in range(100)]


@pytest.fixture(scope="module")
def caches(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Artifacts by what their caches hold."""
    found = {}
    for kind in ("int8", "int4"):
        options = BuildOptions(dies=3, seqlens=(1, 8), max_kv=128, kv_dtype=kind)
        found[kind] = compile_path(imported, tmp_path_factory.mktemp(kind), options)
    return found


@pytest.fixture(params=["int8", "int4"])
def quantized(request: pytest.FixtureRequest, caches: dict[str, Path]) -> Path:
    return caches[request.param]


@pytest.fixture
def int8(caches: dict[str, Path]) -> Path:
    return caches["int8"]


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


def test_the_4_bit_cache_beside_the_f16_one(artifacts: Artifacts, caches: dict[str, Path]) -> None:
    """Random tokens, of which the model is sure of none: most guesses are the same."""
    got, wanted = Session(caches["int4"]).feed(TOKENS), Session(artifacts(3, "fp16")).feed(TOKENS)
    found = cosines(got, wanted)
    assert 0.96 <= found.min() < 0.9999 and found.mean() >= 0.99
    assert (got.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= 0.75


@pytest.mark.parametrize("engine", ENGINES)
def test_three_executions_of_4_bits(caches: dict[str, Path], engine: EngineName) -> None:
    """The same codes but where rounding moves a value across the border between two of 16 steps."""
    kept, logits = {}, {}
    for name in (engine, "interpreter"):
        session = Session(caches["int4"], name)
        logits[name] = np.concatenate([session.feed(TOKENS[:11]), session.feed([7])])
        kept[name] = session.engine.caches()
    assert cosines(logits[engine], logits["interpreter"]).min() >= 0.995
    for (die, name), mine in kept[engine].items():
        theirs = kept["interpreter"][die, name]
        if name in ("k0", "v0"):  # of the first layer: nothing before it has been rounded to 4 bits
            assert ((mine & 15) == (theirs & 15)).mean() > 0.99 and (mine == theirs).mean() > 0.98


def test_a_token_alone_and_in_company(caches: dict[str, Path]) -> None:
    """Steps of one write to the cache what a step of eight does, where products are the same."""
    together, alone = (Session(caches["int4"], "interpreter") for _ in range(2))
    together.feed(TOKENS[:8])
    for token in TOKENS[:8]:
        alone.feed([token])
    for key, mine in together.engine.caches().items():
        if key[1] in ("k0", "v0"):
            assert (mine == alone.engine.caches()[key]).mean() > 0.99


def test_saved_caches_are_of_their_kind(caches: dict[str, Path], tmp_path: Path) -> None:
    session = Session(caches["int4"])
    session.feed(TOKENS[:13])
    session.save(tmp_path / "cache.npz")
    with pytest.raises(TyirError, match="kv-dtype int4 there, int8 here"):
        Session(caches["int8"]).restore(tmp_path / "cache.npz")


def test_saved_caches_hold_the_scales(quantized: Path, tmp_path: Path) -> None:
    first, second = Session(quantized), Session(quantized)
    first.feed(TOKENS[:13])
    first.save(tmp_path / "cache.npz")
    second.restore(tmp_path / "cache.npz")
    np.testing.assert_array_equal(second.feed(TOKENS[13:20]), first.feed(TOKENS[13:20]))


def test_the_buffer_config_shows_what_to_allocate_of_4_bits(caches: dict[str, Path]) -> None:
    said = json.loads((caches["int4"] / "buffer_config.json").read_text())["dies"]["0"]["kv_cache"]
    assert len(said) == 24
    assert said["k0"] == {"dtype": "ui8", "shape": [1, 1, 128, 16]}
    assert said["v_scales0"] == {"dtype": "ui16", "shape": [1, 1, 128, 1]}


def test_the_buffer_config_shows_what_to_allocate(int8: Path) -> None:
    caches = json.loads((int8 / "buffer_config.json").read_text())["dies"]["0"]["kv_cache"]
    assert len(caches) == 24
    assert caches["k0"] == {"dtype": "i8", "shape": [1, 1, 128, 32]}
    assert caches["k_scales0"] == {"dtype": "f16", "shape": [1, 1, 128]}
    assert Manifest.load(int8).options.kv_dtype == "int8"


def test_verification_reads_the_layers_states(quantized: Path, model: Path) -> None:
    """Scales have as many axes as the hidden state; the state after each layer is compared all the same."""
    assert main([str(quantized), "--against", str(model), "--prompts", "1", "--tokens", "8"]) == 0


def test_sequences_of_a_batch_are_as_alone(imported: Path, caches: dict[str, Path], tmp_path: Path) -> None:
    """Two sequences of different lengths, then a token of each; a slot that is used again."""
    options = BuildOptions(dies=2, seqlens=(1, 8), max_kv=128, batch=2, kv_dtype="int4")
    session = BatchSession(compile_path(imported, tmp_path, options))
    prompts = [TOKENS[:19], TOKENS[30:37]]
    for _ in range(2):
        for found, prompt in zip(session.feed(prompts), prompts, strict=True):
            wanted = Session(caches["int4"]).feed(prompt)
            assert cosines(found, wanted).min() > 0.99
        session.reset()
