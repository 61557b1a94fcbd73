"""Prefix reuse, saved and restored caches: whatever way a text gets into the cache, the logits are the
same.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.host_engine import HostEngine
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
    computed, fed = [], session.engine.step
    session.engine.step = lambda inputs, chunk: computed.append(chunk.count) or fed(inputs, chunk)  # type: ignore[func-returns-value,method-assign]
    logits = session.prefill([*IDS[:8], 50, 60])
    assert computed == [2], "eight of the ten tokens were in the cache"
    session.prefill([*IDS[:8], 50, 60])
    assert computed == [2, 1], "the last token's logits are needed"
    fresh = Session(artifacts(2, "fp16"))
    np.testing.assert_allclose(logits, fresh.feed([*IDS[:8], 50, 60])[-1:], atol=0.05)


def test_a_prompt_keeps_the_last_logits_only(artifacts: Artifacts) -> None:
    """Whatever its length: all rows of 120 tokens would be two megabytes."""
    session, prompt = Session(artifacts(2, "fp16")), [(37 * i * i + 5) % 4096 for i in range(120)]
    rows = session.feed(prompt)
    session.reset()
    tracemalloc.start()
    last = session.prefill(prompt)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last.shape == (1, rows.shape[1]) and peak < rows.nbytes / 2
    np.testing.assert_array_equal(last, rows[-1:])


@pytest.mark.parametrize("dies", [2, 3])
def test_an_interrupt_keeps_the_chunks_that_are_done(
    artifacts: Artifacts, tmp_path: Path, capsys: pytest.CaptureFixture[str], dies: int
) -> None:
    """Ctrl-C within the second step of three: it is finished, the cache is written, the next run goes on."""
    folder = artifacts(dies, "fp16" if dies == 2 else "int4")
    cache, prompt = tmp_path / "cache.npz", [*IDS, *IDS]
    command = [str(folder), "--ids", ",".join(map(str, prompt)), "--cache", str(cache), "--max-tokens", "3"]
    steps: list[int] = []
    real = HostEngine.step

    def struck(engine: HostEngine, inputs: Any, chunk: Chunk) -> Any:
        steps.append(chunk.count)
        if len(steps) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(engine, inputs, chunk)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HostEngine, "step", struck)
        assert main(command) == 130
        said = capsys.readouterr().err
        assert "writing the cache of 16 tokens" in said and "after 16 of 22 prompt tokens" in said
        assert steps == [8, 8]
        assert main(command) == 0
    assert steps[2] == 6 and "16 of them from the cache" in capsys.readouterr().err
    whole = Session(folder)
    restored = Session(folder)
    restored.restore(cache)
    assert restored.tokens[:22] == prompt
    restored.rewind(22)
    whole.feed(prompt)
    np.testing.assert_array_equal(restored.feed([5]), whole.feed([5]))


def test_the_size_of_a_saved_cache_is_known_before(
    artifacts: Artifacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(artifacts(3, "int4"))
    session.feed(IDS)
    path = tmp_path / "cache.npz"
    said = session.saved_bytes
    session.save(path)
    assert said <= path.stat().st_size <= said + 20_000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(TyirError, match=r"it takes .* MB, and 0\.0 MB are free"):
        session.save(tmp_path / "other.npz")
    assert not (tmp_path / "other.npz").exists()


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


def test_a_command_that_answers_a_prompt_loads_no_torch(artifacts: Artifacts) -> None:
    """transformers would, for models that nobody asks it for; and it says nothing of that."""
    script = (
        "import sys; sys.argv = ['tyir-run', *sys.argv[1:]]; from tyir.tools.tyir_run import main;"
        " code = main(); print(code, 'torch' in sys.modules)"
    )
    asked = [str(artifacts(1, "int4")), "--prompt", "The old", "--max-tokens", "1"]
    command = [sys.executable, "-c", script, *asked]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert run.stdout.endswith("0 False\n")
    assert "PyTorch" not in run.stderr
