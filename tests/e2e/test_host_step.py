"""A step as one call of compiled code gives what its ops give one by one, bit for bit."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.once import once
from tyir.backends.host.tvm_host import HostTarget
from tyir.diagnostics import TyirError
from tyir.execution.processor import TILES
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.session import host_steps
from tyir.runtime_sim.session.chunks import Chunk
from tyir.runtime_sim.session.host_engine import HostEngine, _threads
from tyir.runtime_sim.session.host_runtime import _ffi
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.tools.api import compile_path

Artifacts = Callable[[int, str], Path]
IDS = [5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11]  # a chunk of 8, and single tokens


def ignore(*seen: object) -> None:
    """A probe, so that ops are walked."""


@pytest.mark.parametrize(("dies", "weights"), [(1, "int4"), (3, "int4"), (2, "fp16")])
def test_a_step_is_what_its_ops_are(artifacts: Artifacts, dies: int, weights: str) -> None:
    folder = artifacts(dies, weights)
    called, walked = Session(folder), Session(folder, probe=ignore)
    assert isinstance(called.engine, HostEngine)
    np.testing.assert_array_equal(called.feed(IDS), walked.feed(IDS))
    mine, theirs = called.engine.caches(), walked.engine.caches()
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        np.testing.assert_array_equal(array, theirs[name])


@pytest.mark.parametrize("weights", ["fp16", "int4"])
def test_how_many_tokens_are_in_a_step_changes_none_of_them(artifacts: Artifacts, weights: str) -> None:
    """Bit for bit: what a server answers does not depend on who else is served."""
    folder = artifacts(1, weights)
    together, alone = Session(folder).feed(IDS), Session(folder)
    np.testing.assert_array_equal(together, np.concatenate([alone.feed([token]) for token in IDS]))


def test_steps_give_back_what_they_take(artifacts: Artifacts) -> None:
    """Kernels take memory for sums that are too large for the stack: all of it is back when they return."""
    session = Session(artifacts(1, "int4"))

    def steps(count: int) -> int:
        for _ in range(count):
            session.rewind(0)
            session.feed(IDS[:8])
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = steps(20)
    assert steps(200) - before < 16 << 20  # 0.5 MB a step were lost once


def test_threads_do_not_change_a_step(artifacts: Artifacts) -> None:
    folder = artifacts(1, "int4")
    np.testing.assert_array_equal(Session(folder, threads=1).feed(IDS), Session(folder).feed(IDS))


def test_every_thread_that_steps_has_all_workers(artifacts: Artifacts) -> None:
    """A server measures steps in one thread and runs them in another; TVM's own count is half of the
    processors.
    """
    session, counts = Session(artifacts(1, "fp16")), []

    def step() -> None:
        session.feed([5])
        counts.append(_ffi().get_global_func("runtime.NumThreads")())

    for _ in range(2):
        thread = threading.Thread(target=step)
        thread.start()
        thread.join()
    assert counts == [_threads()] * 2


@pytest.mark.parametrize("count", [-1, 0, len(os.sched_getaffinity(0)) + 1, 10**9])
def test_threads_that_there_are_not_are_refused(artifacts: Artifacts, count: int) -> None:
    with pytest.raises(TyirError, match=f"{count} threads were asked for, this process may use 1 to"):
        Session(artifacts(1, "int4"), threads=count)


@pytest.mark.parametrize("engine", ["interpreter", "edge10"])
def test_other_engines_take_no_threads(artifacts: Artifacts, engine: EngineName) -> None:
    with pytest.raises(TyirError, match=f"the engine '{engine}' runs in one thread"):
        Session(artifacts(1, "int4"), engine, threads=1)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dies run in threads of their own, as they do when some of them are in other processes."""
    monkeypatch.setattr(host_steps, "can_meet", lambda programs: False)


@pytest.mark.usefixtures("apart")
def test_what_fails_where_dies_meet_is_reported(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of one die's exchange comes through compiled code, and no other die waits for ever."""
    from tyir.dialects.dist import AllReduce

    def broken(*parts: object) -> None:
        raise TyirError("a sum that cannot be")

    session = Session(artifacts(3, "int4"))
    monkeypatch.setattr(AllReduce, "combine", broken)
    with pytest.raises(TyirError, match="a sum that cannot be"):
        session.feed(IDS)


@pytest.mark.usefixtures("apart")
def test_dies_in_threads_of_their_own_compute_the_same(artifacts: Artifacts) -> None:
    folder = artifacts(3, "int4")
    called, walked = Session(folder), Session(folder, probe=ignore)
    np.testing.assert_array_equal(called.feed(IDS), walked.feed(IDS))
    assert _way(called) == {"_Apart"}


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(dies=4, pp=2, seqlens=(1, 8), max_kv=128),  # hand-overs from stage to stage
        BuildOptions(dies=3, seqlens=(1, 8), max_kv=128, kv_split="tokens", kv_block=16),
        BuildOptions(dies=4, seqlens=(1, 8), max_kv=128, weights="int4", output="topk=4"),
        BuildOptions(dies=7, seqlens=(1,), max_kv=128),  # more dies than heads: some have nothing to add
    ],
    ids=["pp", "kv-split", "top-k", "7 dies"],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_dies_in_compiled_code_are_what_their_ops_are(
    imported: Path, tmp_path_factory: pytest.TempPathFactory, options: BuildOptions, threads: int
) -> None:
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("this process may use one core")
    name = f"together-{options.dies}-{options.pp}-{options.kv_split}"
    folder = once(tmp_path_factory, name, lambda out: compile_path(imported, out, options))
    folder = folder / f"{options.dies}die"
    called, walked = Session(folder, threads=threads), Session(folder, probe=ignore)
    for name, array in called.engine.step(*_step()).items():
        np.testing.assert_array_equal(array, walked.engine.step(*_step())[name])
    assert _way(called) == {"_Together"}
    mine, theirs = called.engine.caches(), walked.engine.caches()
    for key, cache in mine.items():
        np.testing.assert_array_equal(cache, theirs[key])


def _way(session: Session) -> set[str]:
    """How the session's steps have been run."""
    assert isinstance(session.engine, HostEngine)
    return {type(steps).__name__ for _, steps in session.engine._steps.values()}


def _step() -> tuple[dict[str, Any], Chunk]:
    """One token at the beginning of a sequence."""
    return {"ids": np.array([[5]], np.int32), "pos": np.array([0], np.int32)}, Chunk(0, 1, 1)


def test_a_die_that_fails_lets_the_others_go(artifacts: Artifacts) -> None:
    """A step that returns at once never comes to where the others wait for it."""
    engine = Session(artifacts(3, "int4")).engine
    assert isinstance(engine, HostEngine)
    before = engine.step(*_step())
    _, steps = engine._steps[1]
    assert isinstance(steps, host_steps._Together)
    steps._ask("meeting_step", 1, steps.calls[1].function, ctypes.c_void_p(0), 0)
    with pytest.raises(TyirError, match=r"the step of die 1 failed: step takes \d+ arguments, 0 are given"):
        engine.step(*_step())
    np.testing.assert_array_equal(engine.step(*_step())["logits"], before["logits"])


def test_threads_that_the_system_refuses_leave_the_walk(
    artifacts: Artifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One thread has begun its dies' steps when the other cannot be started."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("dies share one thread where there is one core")
    folder = artifacts(2, "fp16")
    wanted, session = Session(folder).feed(IDS), Session(folder, threads=2)
    start, started = threading.Thread.start, []

    def refused(thread: threading.Thread) -> None:
        if thread.name.startswith("dies"):
            started.append(thread)
            if len(started) > 1:
                raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refused)
    np.testing.assert_array_equal(session.feed(IDS), wanted)
    assert len(started) == 2


def test_rounded_activations_are_recorded_and_near(
    imported: Path, artifacts: Artifacts, tmp_path: Path
) -> None:
    options = BuildOptions(dies=1, seqlens=(1, 8), max_kv=128, weights="int4")
    folders = {
        name: compile_path(imported, tmp_path / name, options, host_activations=name)
        for name in ("fp32", "int8")
    }
    preferred = "int16" if HostTarget().cpu().byte_products else "fp32"
    folders[preferred] = artifacts(1, "int4")
    exact = Session(folders["fp32"]).feed(IDS)
    for name, most in (("int8", 0.03), ("int16", 0.002)):
        if name in folders:
            assert Manifest.load(folders[name]).build["host"]["activations"] == name
            error = np.linalg.norm(Session(folders[name]).feed(IDS) - exact) / np.linalg.norm(exact)
            assert 0 < error < most


def test_without_weights_of_4_bits_nothing_is_rounded(artifacts: Artifacts) -> None:
    """Nor is a processor asked for what that needs."""
    host = Manifest.load(artifacts(2, "fp16")).build["host"]
    assert host["activations"] == "fp32" and set(TILES).isdisjoint(host["features"])
