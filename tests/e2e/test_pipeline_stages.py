"""Pipeline stages through real artifact folders: the same numbers on every engine, with 8-bit caches and
top-k too; a die holds its stage's layers alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tyir.execution.artifacts import Artifacts as Opened
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.execution.check_accesses import check_programs
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.runtime_sim.timing.program import load_programs
from tyir.targets.machine import load_machine
from tyir.tools.api import compile_path
from tyir.tools.tyir_sim import main as simulate
from tyir.tools.tyir_verify import main

Artifacts = Callable[[int, str], Path]
IDS = [5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11]


@pytest.fixture(scope="module")
def logits(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of two dies."""
    return compile_path(imported, tmp_path_factory.mktemp("pp"), BuildOptions(dies=4, pp=2, max_kv=128))


@pytest.fixture(scope="module")
def tokens(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three stages of one die, 8-bit caches, the four best tokens."""
    options = BuildOptions(dies=3, pp=3, max_kv=128, kv_dtype="int8", output="topk=4")
    return compile_path(imported, tmp_path_factory.mktemp("pp_top"), options)


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_to_one_die(artifacts: Artifacts, logits: Path, engine: EngineName) -> None:
    wanted = Session(artifacts(1, "fp16")).feed(IDS).astype(np.float64)
    session = Session(logits, engine)
    got = np.concatenate([session.feed(IDS[:9]), session.feed(IDS[9:])]).astype(np.float64)
    cosine = (got * wanted).sum(axis=1) / (np.linalg.norm(got, axis=1) * np.linalg.norm(wanted, axis=1))
    assert cosine.min() >= 0.9999


@pytest.mark.parametrize("engine", ["interpreter", "edge10"])
def test_eight_bit_caches_and_top_k(tokens: Path, engine: EngineName) -> None:
    wanted, got = Session(tokens).next_tokens(IDS), Session(tokens, engine).next_tokens(IDS)
    np.testing.assert_allclose(got.values, wanted.values, atol=0.05)
    assert (got.ids[:, 0] == wanted.ids[:, 0]).mean() >= 0.9
    assert got.logsumexp is not None and wanted.logsumexp is not None
    np.testing.assert_allclose(got.logsumexp, wanted.logsumexp, atol=0.05)


def test_a_die_holds_its_stage(logits: Path, tokens: Path) -> None:
    for folder, own in ((logits, 3), (tokens, 2)):
        manifest = Manifest.load(folder)
        for program in manifest.programs:
            layers = {
                t.name.removeprefix("k").removeprefix("_scales")
                for t in program.inputs
                if t.name.startswith("k")
            }
            assert len(layers) == own, "of the model's six layers"
        for seqlen in manifest.options.seqlens:
            check_programs(load_programs(Opened.open(folder), seqlen), load_machine("edge10"), (0, 100))


def test_a_saved_cache_continues(logits: Path, tmp_path: Path) -> None:
    session = Session(logits)
    session.feed(IDS[:6])
    session.save(tmp_path / "cache.npz")
    other = Session(logits, "edge10")
    other.restore(tmp_path / "cache.npz")
    np.testing.assert_allclose(other.feed(IDS[6:]), session.feed(IDS[6:]), atol=0.05)


def test_verified_against_hugging_face(logits: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(logits), "--against", str(model), "--prompts", "2", "--tokens", "8"]) == 0
    assert "OK: host engine" in capsys.readouterr().out


@pytest.mark.parametrize("fixture", ["logits", "tokens"])
def test_the_report_shows_the_minimum(
    request: pytest.FixtureRequest, fixture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Counts and bytes of the collectives of every step are those of the closed form."""
    assert simulate([str(request.getfixturevalue(fixture))]) == 0
    lines = re.findall(
        r"^collectives: (.*?);.* the closed form is (.*)$", capsys.readouterr().out, re.MULTILINE
    )
    assert len(lines) == 2 and all(found == least for found, least in lines)
