"""Pipeline stages that work on several chunks of a prompt at a time: with the bits of one after the other."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.e2e.small_models import save_llama
from tests.e2e.test_not_finite import CAUSES, HARMLESS, blow_up
from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts
from tyir.manifest import BuildOptions
from tyir.runtime_sim.processes.group import DieGroup
from tyir.runtime_sim.session import host_steps
from tyir.runtime_sim.session.chunks import Chunk, pad, plan_chunks
from tyir.runtime_sim.session.host_engine import HostEngine
from tyir.runtime_sim.session.session import Session
from tyir.tools.api import compile_path

IDS = [(37 * i * i + 11 * i + 5) % 4096 for i in range(90)]
ROWS = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def folder(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages of one die, whose dies meet at the stages' borders alone before a prompt's last chunk."""
    options = BuildOptions(
        dies=3, pp=3, seqlens=(1, 8), max_kv=128, embedding_as_input=True, output_rows="last"
    )
    return compile_path(imported, tmp_path_factory.mktemp("stages"), options)


def in_turn(session: Session, ids: Sequence[int]) -> ROWS:
    """Logits of the last token, of steps that are each waited for."""
    table = session._embedding_table
    for chunk in plan_chunks(len(ids), 0, (1, 8), 128):
        part = pad(ids[chunk.start : chunk.start + chunk.count], chunk.seqlen)
        inputs = {"embeddings": table[np.array([part])], "pos": np.array([chunk.start], np.int32)}
        if chunk.seqlen > 1:
            last = chunk.start + chunk.count == len(ids)
            inputs["row"] = np.array([chunk.count - 1 if last else -1], np.int32)
        outputs = session.engine.step(inputs, chunk)
    return np.array(outputs["logits"][0, -1:])


def held(session: Session, count: int) -> dict[tuple[int, str], npt.NDArray[np.generic]]:
    return {name: cache[:, :, :count].copy() for name, cache in session.engine.caches().items()}


@pytest.mark.parametrize("way", ["in compiled code", "in threads of their own"])
def test_the_bits_are_those_of_one_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "in threads of their own":
        monkeypatch.setattr(host_steps, "can_meet", lambda programs: False)
    session, other = Session(folder), Session(folder)
    assert session.manifest.options.steps_ahead == 3
    for count in (90, 64, 7, 8, 9, 17):
        session.reset(), other.reset()
        np.testing.assert_array_equal(session.prefill(IDS[:count]), in_turn(other, IDS[:count]))
        wanted = held(other, count)
        for name, cache in held(session, count).items():
            np.testing.assert_array_equal(cache, wanted[name])
        assert session.tokens == IDS[:count]


def test_a_stage_goes_on_while_the_next_is_at_work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stage is held up: the others do their parts of three chunks all the same."""
    monkeypatch.setattr(host_steps, "can_meet", lambda programs: False)
    session = Session(folder)
    session.prefill(IDS[:9])
    engine = session.engine
    assert isinstance(engine, HostEngine)
    go_on = threading.Event()
    workers = engine._workers
    workers._pools[2].submit(go_on.wait)
    ends, parts = [], []
    for start in (0, 8, 16):
        inputs = {
            "embeddings": session._embedding_table[np.array([IDS[start : start + 8]])],
            "pos": np.array([start], np.int32),
            "row": np.array([-1], np.int32),
        }
        before = set(workers._running)
        ends.append(engine.begin(inputs, Chunk(start, 8, 8)))
        parts.append([part for part in workers._running if part not in before])
    try:
        for first, second, last in parts:
            first.result(timeout=60), second.result(timeout=60)
            assert not last.done()
    finally:
        go_on.set()
    for end, (*_, last) in zip(ends, parts):
        end()
        assert last.done()


def test_sparse_steps_measure_the_same(imported: Path, tmp_path: Path) -> None:
    options = BuildOptions(
        dies=2,
        pp=2,
        seqlens=(1, 4, 8),
        max_kv=160,
        embedding_as_input=True,
        output_rows="last",
        sparse_prefill=(2, 16, 16, 2),
    )
    folder = compile_path(imported, tmp_path, options)
    ids = [(41 * i * i + 7 * i + 3) % 4096 for i in range(150)]
    session, other = Session(folder), Session(folder)
    chunks = list(plan_chunks(len(ids), 0, (1, 4), 160, sparse=8))
    in_turn = [rows for _, rows in other._in_turn(chunks, ids, False)]
    np.testing.assert_array_equal(session.prefill(ids), in_turn[-1]["logits"])
    assert session.recall.steps >= 2 and session.recall.low < 1
    assert session.recall.text() == other.recall.text()
    wanted = held(other, 150)
    for name, cache in held(session, 150).items():
        np.testing.assert_array_equal(cache, wanted[name])


def test_who_stops_keeps_whole_steps(folder: Path) -> None:
    session, other = Session(folder), Session(folder)
    with closing(session._advance(IDS)) as steps:  # type: ignore[type-var]
        next(steps)
    count = len(session.tokens)
    assert 8 <= count < 90 and count % 8 == 0 and session.tokens == IDS[:count]
    np.testing.assert_array_equal(session.prefill(IDS), other.prefill(IDS))


def test_what_is_behind_a_step_that_fails_is_not_kept(tmp_path: Path) -> None:
    options = BuildOptions(
        dies=2, pp=2, seqlens=(1, 4), max_kv=32, embedding_as_input=True, output_rows="last"
    )
    folder = compile_path(save_llama(tmp_path / "model", blow_up), tmp_path / "out", options)
    session = Session(folder)
    with pytest.raises(TyirError) as caught:
        session.prefill([*HARMLESS[:6], 10, *HARMLESS, *HARMLESS])
    assert "of step 2 are not finite" in str(caught.value) and "from position 6 on" in str(caught.value)
    assert f"{CAUSES[10]}on die 0" in str(caught.value)
    assert session.tokens == HARMLESS[:4]
    np.testing.assert_array_equal(session.prefill(HARMLESS), Session(folder).prefill(HARMLESS))


def test_stages_in_processes_of_their_own(folder: Path) -> None:
    wanted = list(Session(folder).generate(IDS, 4))
    with DieGroup.start(Artifacts.open(folder), processes=3, say=lambda text: None) as group:
        session = Session(group.artifacts, group=group)
        assert list(session.generate(IDS, 4)) == wanted
        session.reset()
        other = Session(folder)
        np.testing.assert_array_equal(session.prefill(IDS[:50]), other.prefill(IDS[:50]))
        wanted_caches = held(other, 50)
        for name, cache in held(session, 50).items():
            np.testing.assert_array_equal(cache, wanted_caches[name])
