"""The embedded model through real artifact folders: on every number of dies, in fp16 and int4, both engines
give one die's logits, and the memory plans hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tyir.execution.artifacts import Artifacts as Opened
from tyir.manifest import Manifest
from tyir.runtime_sim.execution.check_accesses import check_programs
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.runtime_sim.timing.program import load_programs
from tyir.targets.machine import load_machine

Artifacts = Callable[[int, str], Path]
PROMPT, NEXT = [5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11], [7]  # 8 + 3 padded, then one token
FEW = (2, 3, 4)  # what other tests compile too


@pytest.fixture(scope="module")
def one_die(artifacts: Artifacts) -> Callable[[str], npt.NDArray[Any]]:
    known: dict[str, npt.NDArray[Any]] = {}

    def logits(weights: str) -> npt.NDArray[Any]:
        if weights not in known:
            known[weights] = run(artifacts(1, weights), "host")
        return known[weights]

    return logits


def run(folder: Path, engine: EngineName) -> npt.NDArray[Any]:
    session = Session(folder, engine)
    return np.concatenate([session.feed(PROMPT), session.feed(NEXT)]).astype(np.float64)


@pytest.mark.parametrize("weights", [pytest.param("fp16", marks=pytest.mark.slow), "int4"])
@pytest.mark.parametrize(
    "dies", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in range(1, 17)]
)
def test_equal_to_one_die(
    artifacts: Artifacts, one_die: Callable[[str], npt.NDArray[Any]], dies: int, weights: str
) -> None:
    wanted = one_die(weights)
    norm = np.linalg.norm(wanted, axis=1)
    cosines = {}
    for engine in ("host", "edge10"):
        got = run(artifacts(dies, weights), engine)
        cosines[engine] = float(((got * wanted).sum(axis=1) / (np.linalg.norm(got, axis=1) * norm)).min())
    print(
        f"{weights} {dies:>2} dies: 1 - cosine {1 - cosines['host']:.1e} host, {1 - cosines['edge10']:.1e}"
        " edge10"
    )
    assert min(cosines.values()) >= 0.9999


@pytest.mark.parametrize("weights", ["fp16", "int4"])
@pytest.mark.parametrize(
    "dies", [pytest.param(n, marks=() if n in FEW else pytest.mark.slow) for n in range(1, 17)]
)
def test_memory_plans_hold(artifacts: Artifacts, dies: int, weights: str) -> None:
    folder = artifacts(dies, weights)
    manifest = Manifest.load(folder, check=False)
    for seqlen in manifest.options.seqlens:
        check_programs(
            load_programs(Opened.open(folder), seqlen),
            load_machine("edge10"),
            (0, 60, manifest.options.max_kv - seqlen),
        )
