"""Schedules of host code: what is measured decides, and results are the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from tests.once import once
from tyir.backends.edge10.compile import CompileContext
from tyir.backends.host.kernels.tir import DEFAULT_SCHEDULE, Schedule
from tyir.backends.host.tuning import candidates, fastest
from tyir.manifest import BuildOptions
from tyir.runtime_sim.session.session import Session
from tyir.tools.api import compile_path, load_module
from tyir.tools.tyir_compile import main as tyir_compile

IDS = [5, 17, 300, 42, 9, 80, 7, 11, 23]
INT4 = BuildOptions(dies=1, seqlens=(1, 8), max_kv=64, weights="int4")


@pytest.mark.parametrize("wide", [True, False])
def test_candidates_differ_in_one_setting(wide: bool) -> None:
    start = Schedule(streams=16, block_bytes=3)
    for found in candidates(start, wide):
        assert len(asdict(found).items() - asdict(start).items()) == 1


def clock(cost: Callable[[Schedule], float]) -> Callable[[Schedule], Callable[[], float]]:
    """Runs that take what `cost` says, now and then some per cent more or less."""
    noise: Iterator[float] = iter(np.random.default_rng(0).uniform(0.97, 1.03, 10_000))
    return lambda schedule: lambda: cost(schedule) * next(noise)


def test_the_fastest_is_found_from_one_setting_to_the_next() -> None:
    def cost(schedule: Schedule) -> float:
        return (1.5 if schedule.streams == 4 else 2.0) + (0.0 if schedule.block_bytes == 1 << 20 else 0.5)

    best, gain = fastest(DEFAULT_SCHEDULE, lambda s: candidates(s, True), clock(cost), 60)
    assert best == Schedule(streams=4, block_bytes=1 << 20)
    assert gain == pytest.approx(2.5 / 1.5 - 1, rel=0.05)


def test_what_is_no_faster_changes_nothing() -> None:
    best, gain = fastest(DEFAULT_SCHEDULE, lambda s: candidates(s, True), clock(lambda s: 1.0), 60)
    assert (best, gain) == (DEFAULT_SCHEDULE, 0.0)


def test_no_time_is_no_change() -> None:
    best, _ = fastest(DEFAULT_SCHEDULE, lambda s: candidates(s, True), clock(lambda s: s.block_bytes), 0)
    assert best == DEFAULT_SCHEDULE


@pytest.mark.parametrize("schedule", [Schedule(4, 1 << 16), Schedule(2, 1 << 10), Schedule(8, 1 << 22)])
def test_results_are_the_same_bits(
    imported: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, schedule: Schedule
) -> None:
    from tyir.backends.edge10.compile import compile_module

    plain = once(tmp_path_factory, "untuned", lambda out: compile_path(imported, out, INT4))
    compile_module(load_module(imported), tmp_path, INT4, replace(CompileContext(), schedule=schedule))
    one, other = (Session(folder / "1die").feed(IDS) for folder in (plain, tmp_path))
    np.testing.assert_array_equal(one, other)


def test_the_manifest_says_what_was_found(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(imported), "-o", str(tmp_path), "--dies", "1", "--seqlens", "1", "--max-kv", "64"]
    assert tyir_compile([*command, "--weights", "int4", "--tune", "1"]) == 0
    host = json.loads((tmp_path / "1die" / "manifest.json").read_text())["build"]["host"]
    assert host["schedule"].startswith("streams=") and f"tuned: {host['schedule']}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tune", "0"], "--tune 0 leaves no time to measure"),
        (["--tune", "5", "--mcpu", "x86-64-v3"], "--tune measures on this processor"),
        (["--tune", "soon"], "argument --tune"),
    ],
)
def test_what_cannot_be_tuned(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    command = [str(imported), "-o", str(tmp_path), "--dies", "1", "--seqlens", "1", "--max-kv", "64"]
    assert tyir_compile([*command, *options]) != 0
    assert said in capsys.readouterr().err
