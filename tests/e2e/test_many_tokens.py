"""Programs of many tokens: what only they do (sums, logits and top-k by blocks of columns, MLPs in parts)
computes what one die's host code computes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tyir.execution.artifacts import Artifacts as Opened
from tyir.manifest import BuildOptions
from tyir.runtime_sim.execution.check_accesses import check_programs
from tyir.runtime_sim.session.session import EngineName, Session
from tyir.runtime_sim.timing.program import load_programs
from tyir.targets.machine import load_machine
from tyir.tools.api import compile_path

ENGINES: tuple[EngineName, ...] = ("interpreter", "edge10")
PROMPT = [(7 * i * i + 3 * i + 11) % 4000 for i in range(75)]  # two chunks of 40, the second padded


@pytest.mark.parametrize(
    ("dies", "weights", "output"),
    [(1, "int4", "logits"), (3, "int4", "logits"), (3, "fp16", "topk=5"), pytest.param(4, "int4", "argmax", marks=pytest.mark.slow),  # noqa: E501
     pytest.param(6, "fp16", "logits", marks=pytest.mark.slow)],
)  # fmt: skip
def test_equal_to_the_interpreter(
    imported: Path, tmp_path: Path, dies: int, weights: str, output: str
) -> None:
    folder = compile_path(
        imported,
        tmp_path,
        BuildOptions(dies=dies, seqlens=(1, 40), max_kv=96, weights=weights, output=output),
    )
    check_programs(load_programs(Opened.open(folder), 40), load_machine("edge10"), (0, 40, 56))
    sessions = [Session(folder, engine) for engine in ENGINES]
    if output == "logits":
        wanted, got = (session.feed(PROMPT) for session in sessions)
        np.testing.assert_allclose(got, wanted, atol=5e-3 * np.abs(wanted).max(), rtol=0)
    else:
        wanted, got = (list(session.generate(PROMPT, 3)) for session in sessions)
        assert got == wanted
