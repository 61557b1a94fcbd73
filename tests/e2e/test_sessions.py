"""Prefix reuse, saved and restored caches: whatever way a text gets into the cache, the logits are the
same.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.tools.tyir_run import main

Artifacts = Callable[[int, str], Path]
IDS = [5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11]


@pytest.mark.parametrize("engine", ["host", "edge10"])
def test_interrupted_and_restored_equals_continuous(
    artifacts: Artifacts, tmp_path: Path, engine: EngineName
) -> None:
    folder = artifacts(3, "int4")
    continuous = Session(folder, engine)
    continuous.feed(IDS[:6])
    continuous.save(tmp_path / "cache.npz")
    wanted = continuous.feed(IDS[6:])
    restored = Session(folder, engine)
    restored.restore(tmp_path / "cache.npz")
    assert restored.tokens == IDS[:6]
    np.testing.assert_array_equal(restored.feed(IDS[6:]), wanted)


def test_a_longer_cache_is_restored_into_a_session_that_has_run(artifacts: Artifacts, tmp_path: Path) -> None:
    """Both lengths' programs are loaded by then; each must know that the host has filled the caches."""
    folder = artifacts(2, "fp16")
    longer = Session(folder, "edge10")
    longer.feed([*IDS, 6])
    longer.save(tmp_path / "cache.npz")
    wanted = longer.feed(IDS[:8])
    used = Session(folder, "edge10")
    used.feed(IDS[:8])
    used.feed([2])
    used.restore(tmp_path / "cache.npz")
    np.testing.assert_array_equal(used.feed(IDS[:8]), wanted)


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


def test_caches_of_other_artifacts_and_damaged_files_are_refused(
    artifacts: Artifacts, tmp_path: Path
) -> None:
    session = Session(artifacts(2, "fp16"))
    session.feed(IDS)
    path = tmp_path / "cache.npz"
    session.save(path)
    other = Session(artifacts(3, "int4"))
    with pytest.raises(
        TyirError,
        match=(
            r"was saved with other artifacts: dies 2 there, 3 here; weights fp16 there, int4"
            r" here(.|\n)*restore it with"
        ),
    ):
        other.restore(path)
    assert other.tokens == []
    for damaged in (path.read_bytes()[:1000], b"hello", b""):
        (tmp_path / "damaged.npz").write_bytes(damaged)
        with pytest.raises(
            TyirError, match=r"is not a saved cache, or is cut off or damaged(.|\n)*run the prompt again"
        ):
            session.restore(tmp_path / "damaged.npz")
    np.savez(tmp_path / "foreign.npz", x=np.zeros(3))
    with pytest.raises(TyirError, match="is not a saved cache"):
        session.restore(tmp_path / "foreign.npz")
    with pytest.raises(TyirError, match=r"cannot read the saved cache .*none\.npz: No such file"):
        session.restore(tmp_path / "none.npz")
    with pytest.raises(TyirError, match="cannot rewind to 99 tokens"):
        session.rewind(99)


def test_a_cache_that_cannot_be_written_leaves_the_old_one(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(artifacts(2, "fp16"))
    session.feed(IDS)
    session.save(tmp_path / "cache.npz")
    before = (tmp_path / "cache.npz").read_bytes()
    with pytest.raises(TyirError, match=r"cannot write the cache .*File exists(.|\n)*choose another file"):
        session.save(tmp_path / "cache.npz" / "inside.npz")
    with pytest.raises(TyirError, match="it is not a file"):
        session.save(tmp_path)

    def full(file: IO[bytes], **arrays: object) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(TyirError, match=r"cannot write the cache .*No space left on device"):
        session.save(tmp_path / "cache.npz")

    def interrupted(file: IO[bytes], **arrays: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.save(tmp_path / "cache.npz")
    assert (tmp_path / "cache.npz").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_tyir_run_goes_on_from_a_file(
    artifacts: Artifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two turns in two processes' worth of calls: the second computes its new tokens only, and says the same
    as one that starts anew.
    """
    command = [str(artifacts(2, "fp16")), "--max-tokens", "6"]
    cached = [*command, "--cache", str(tmp_path / "chat.npz")]
    assert main([*cached, "--prompt", "The old house stood at the end of"]) == 0
    first, notes = capsys.readouterr()
    assert "from the cache" not in notes
    second = first.strip() + " the road, and"
    assert main([*cached, "--prompt", second]) == 0
    continued, notes = capsys.readouterr()
    assert "of them from the cache" in notes
    assert main([*command, "--prompt", second]) == 0
    assert capsys.readouterr().out == continued
