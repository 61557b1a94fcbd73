"""Caches with a token's heads together (NHD): what the other layout computes, on every engine, with 8-bit
rows, batches, long prompts and saved caches.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.tools.api import compile_path
from tyir.tools.tyir_sim import main as simulate

TOKENS = [(37 * i * i + 11 * i + 5) % 4096 for i in range(60)]
Compile = Callable[..., Path]


@pytest.fixture(scope="module")
def compiled(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """A folder for each combination of options, on three dies: heads 4/2/2 or so, key/value heads that two
    dies share.
    """
    done: dict[BuildOptions, Path] = {}

    def make(layout: str, **options: object) -> Path:
        chosen = BuildOptions(dies=3, max_kv=128, kv_layout=layout, **options)  # type: ignore[arg-type]
        if chosen not in done:
            done[chosen] = compile_path(imported, tmp_path_factory.mktemp(layout), chosen)
        return done[chosen]

    return make


@pytest.mark.parametrize("dtype", [pytest.param("fp16", marks=pytest.mark.slow), "int8", "int4"])
@pytest.mark.parametrize("engine", ENGINES)
def test_equal_to_the_other_layout(compiled: Compile, engine: EngineName, dtype: str) -> None:
    """The same sums in the same order: bit for bit, but for the host's kernels, which may be vectorised
    otherwise.
    """
    logits = []
    for layout in ("HND", "NHD"):
        session = Session(compiled(layout, kv_dtype=dtype), engine)
        logits.append(np.concatenate([session.feed(TOKENS[:19]), session.feed(TOKENS[19:20])]))
    np.testing.assert_allclose(logits[1], logits[0], atol=0.02 if engine == "host" else 0)


def test_the_shapes_say_so(compiled: Compile) -> None:
    for layout, dims in (("HND", (1, 128)), ("NHD", (128, 1))):
        manifest = Manifest.load(compiled(layout))
        assert manifest.options.kv_layout == layout and manifest.options.max_kv == 128
        caches = [t for t in manifest.program(0, 8).inputs if t.name.startswith(("k", "v"))]
        assert caches and all(t.shape == (1, *dims, 32) for t in caches)


def test_saved_caches_are_for_their_layout(compiled: Compile, tmp_path: Path) -> None:
    first, second = Session(compiled("NHD")), Session(compiled("NHD"))
    first.feed(TOKENS[:13])
    first.save(tmp_path / "cache.npz")
    second.restore(tmp_path / "cache.npz")
    np.testing.assert_array_equal(second.feed(TOKENS[13:20]), first.feed(TOKENS[13:20]))
    with pytest.raises(TyirError, match="kv-layout NHD there, HND here"):
        Session(compiled("HND")).restore(tmp_path / "cache.npz")


def test_batches(compiled: Compile) -> None:
    feeds = [TOKENS[:9], TOKENS[20:25]]
    one, two = (BatchSession(compiled(layout, batch=2)).feed(feeds) for layout in ("HND", "NHD"))
    for a, b in zip(one, two):
        np.testing.assert_allclose(a, b, atol=0.02)


def test_memory_plan_and_time(compiled: Compile, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ({}, {"kv_dtype": "int8"}, {"kv_dtype": "int4"}, {"seqlens": (1, 100)}):
        folder = compiled("NHD", **options)
        assert simulate([str(folder), "--check-plan"]) == 0
    programs = sorted(map(str, folder.glob("batch_1/seqlen_1/*.edge10")))
    assert simulate([*programs, "--pos", "128"]) == 1
    assert "cache of 128" in capsys.readouterr().err, "the capacity is known from the programs alone"
