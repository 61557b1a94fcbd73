"""Prefix reuse, saved and restored caches: whatever way a text gets into the cache, the logits are the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.runtime_sim.session import EngineName, Session

Artifacts = Callable[[int, str], Path]
IDS = [5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11]


@pytest.mark.parametrize("engine", ["host", "edge10"])
def test_interrupted_and_restored_equals_continuous(artifacts: Artifacts, tmp_path: Path, engine: EngineName) -> None:
    folder = artifacts(3, "int4")
    continuous = Session(folder, engine)
    continuous.feed(IDS[:6])
    continuous.save(tmp_path / "cache.npz")
    wanted = continuous.feed(IDS[6:])
    restored = Session(folder, engine)
    restored.restore(tmp_path / "cache.npz")
    assert restored.tokens == IDS[:6]
    np.testing.assert_array_equal(restored.feed(IDS[6:]), wanted)


def test_a_second_turn_computes_only_its_new_tokens(artifacts: Artifacts) -> None:
    session = Session(artifacts(2, "fp16"))
    session.feed(IDS)
    computed = session.prefill([*IDS[:8], 50, 60])
    assert len(computed) == 2, "eight of the ten tokens were in the cache"
    assert len(session.prefill([*IDS[:8], 50, 60])) == 1, "the last token's logits are needed"
    fresh = Session(artifacts(2, "fp16"))
    np.testing.assert_allclose(computed, fresh.feed([*IDS[:8], 50, 60])[-2:], atol=0.05)


def test_generation_goes_on_in_the_same_session(artifacts: Artifacts) -> None:
    session = Session(artifacts(2, "fp16"))
    first = list(session.generate(IDS, 5))
    again = list(Session(artifacts(2, "fp16")).generate([*IDS, *first], 5))
    assert list(session.generate([*IDS, *first], 5)) == again


def test_caches_of_other_artifacts_and_damaged_files_are_refused(artifacts: Artifacts, tmp_path: Path) -> None:
    session = Session(artifacts(2, "fp16"))
    session.feed(IDS)
    path = tmp_path / "cache.npz"
    session.save(path)
    with pytest.raises(TyirError, match="was saved with other artifacts"):
        Session(artifacts(3, "int4")).restore(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(TyirError, match="cannot read the saved cache"):
        session.restore(path)
    with pytest.raises(TyirError, match="cannot rewind to 99 tokens"):
        session.rewind(99)
