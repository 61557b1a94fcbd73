"""A board whose dies are grouped as the user says: the same numbers on every engine, and sums in two levels
in the artifacts and in the time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tyir.dialects.edge10 import AllReduce
from tyir.execution.artifacts import Artifacts as Opened
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.runtime_sim.timing.engine import simulate
from tyir.runtime_sim.timing.program import load_programs
from tyir.targets.machine import load_machine
from tyir.tools.api import compile_path

Artifacts = Callable[[int, str], Path]
IDS = [5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11]


@pytest.fixture(scope="module")
def grouped(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two groups of three dies."""
    return compile_path(
        imported, tmp_path_factory.mktemp("mesh"), BuildOptions(dies=6, mesh=(2, 3), max_kv=128)
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_to_one_die(artifacts: Artifacts, grouped: Path, engine: EngineName) -> None:
    wanted = Session(artifacts(1, "fp16")).feed(IDS).astype(np.float64)
    got = Session(grouped, engine).feed(IDS).astype(np.float64)
    cosine = (got * wanted).sum(axis=1) / (np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1))
    assert cosine.min() >= 0.9999


def test_the_artifacts_say_so(artifacts: Artifacts, grouped: Path) -> None:
    manifest = Manifest.load(grouped)
    assert manifest.options.mesh == (2, 3)
    assert Manifest.load(artifacts(4, "fp16")).options.mesh == (), "four dies are one package"
    programs = load_programs(Opened.open(grouped), 1)
    assert {op.group for program in programs for op in program.module.walk_type(AllReduce)} == {3}


def test_sums_between_groups_take_longer(imported: Path, grouped: Path, tmp_path: Path) -> None:
    flat = compile_path(imported, tmp_path, BuildOptions(dies=6, max_kv=128))
    machine = load_machine().with_overrides({"d2d.package_dies": 6})
    two, one = (simulate(load_programs(Opened.open(f), 1), machine, 9).total_ns for f in (grouped, flat))
    assert two > one + 12 * machine.c2c.hop_us * 1000, (
        "12 sums over the slower links, where without groups all six dies are one package"
    )
