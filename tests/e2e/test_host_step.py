"""A step as one call of compiled code gives what its ops give one by one, bit for bit."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tyir.backends.host.tvm_host import HostTarget
from tyir.diagnostics import TyirError
from tyir.execution.processor import TILES
from tyir.manifest import BuildOptions, Manifest
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
