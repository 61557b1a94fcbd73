"""The embedded model with caches that are cut by tokens, through artifact folders: one die's answers on every
engine, in batches and from saved caches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pytest

from tests.once import once
from tyir.artifacts.consistency import problems_of
from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts as Opened
from tyir.manifest import BuildOptions, Manifest
from tyir.runtime_sim.execution.check_accesses import check_programs
from tyir.runtime_sim.processes.group import DieGroup
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.runtime_sim.timing.program import load_programs
from tyir.targets.machine import load_machine
from tyir.tools.api import compile_path
from tyir.tools.tyir_verify import main

Artifacts = Callable[[int, str], Path]
Compile = Callable[..., Path]
TOKENS: Final = [(37 * i * i + 11 * i + 5) % 4096 for i in range(70)]


@pytest.fixture(scope="session")
def by_tokens(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """`by_tokens(dies, **options)`: artifacts whose caches are dealt out in blocks of 16 tokens."""

    def compiled(dies: int, **options: Any) -> Path:
        given = {"seqlens": (1, 8), "max_kv": 128, "kv_split": "tokens", "kv_block": 16} | options
        name = "by-tokens-" + "-".join(map(str, (dies, *options.values())))
        made = BuildOptions(dies=dies, **given)
        return once(tmp_path_factory, name, lambda out: compile_path(imported, out, made)) / f"{dies}die"

    return compiled


def off(got: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    """The largest 1 - cosine of a row."""
    a, b = got.astype(np.float64), wanted.astype(np.float64)
    cosines = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(1 - cosines.min())


@pytest.mark.parametrize("dies", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (4, 6))])
def test_equal_to_one_die(artifacts: Artifacts, by_tokens: Compile, dies: int) -> None:
    """Prompt and tokens over the first borders of blocks: with three dies both heads are on each, with six
    two have
    no query head of their own.
    """
    wanted = Session(artifacts(1, "fp16")).feed(TOKENS)
    options = Manifest.load(by_tokens(dies)).options
    assert (options.kv_split, options.kv_parts) == ("tokens", {3: 3, 4: 2, 6: 3}[dies])
    for engine in ENGINES:
        session = Session(by_tokens(dies), engine)
        found = [session.feed(TOKENS[:13]), *(session.feed([t]) for t in TOKENS[13:19])]
        found.append(session.feed(TOKENS[19:]))
        assert off(np.concatenate(found), wanted) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{}, *({"kv_dtype": kind, "kv_layout": "NHD"} for kind in ("int8", "int4"))],
    ids=["fp16", "int8", "int4"],
)
def test_a_saved_cache_goes_on(by_tokens: Compile, tmp_path: Path, options: dict[str, Any]) -> None:
    """Each die's file has the rows of its own blocks; of the last of three dies none yet after 20 tokens."""
    for count in (20, 39):
        first, second = (Session(by_tokens(3, **options)) for _ in range(2))
        first.feed(TOKENS[:count])
        first.save(tmp_path / "cache.npz")
        second.restore(tmp_path / "cache.npz")
        assert abs((tmp_path / "cache.npz").stat().st_size - first.saved_bytes) < 64 * 1024
        np.testing.assert_array_equal(second.feed(TOKENS[count:]), first.feed(TOKENS[count:]))
    with np.load(tmp_path / "cache.npz") as file:
        axis = 1 if options else 2
        rows = [file[f"die{die}/k0"].shape[axis] for die in range(3)]
    assert rows == [16, 16, 7]


def test_a_saved_cache_is_of_its_cut(artifacts: Artifacts, by_tokens: Compile, tmp_path: Path) -> None:
    session = Session(by_tokens(3))
    session.feed(TOKENS[:5])
    session.save(tmp_path / "cache.npz")
    with pytest.raises(TyirError, match="saved with other artifacts"):
        Session(artifacts(3, "fp16")).restore(tmp_path / "cache.npz")
    Session(artifacts(3, "fp16")).save(tmp_path / "heads.npz")
    with pytest.raises(TyirError, match="kv-parts none there, 3 here"):
        session.restore(tmp_path / "heads.npz")


def test_what_is_taken_back_is_overwritten(by_tokens: Compile) -> None:
    """A session that goes on from a shared beginning, as servers and chats do."""
    once_more, fresh = Session(by_tokens(3)), Session(by_tokens(3))
    once_more.feed(TOKENS[:60])
    prompt = [*TOKENS[:21], *range(7, 40)]
    assert list(once_more.generate(prompt, 8)) == list(fresh.generate(prompt, 8))


@pytest.mark.parametrize("engine", ["host", pytest.param("edge10", marks=pytest.mark.slow)])
def test_several_sequences(by_tokens: Compile, engine: EngineName) -> None:
    """Each at a position of its own: their rows go to different dies."""
    prompts = [TOKENS[:37], TOKENS[5:8], TOKENS[9:27]]
    session = BatchSession(by_tokens(3, batch=3, seqlens=(1, 8)), engine)
    for found, prompt in zip(session.feed(prompts), prompts, strict=True):
        assert off(found, Session(by_tokens(3), engine).feed(prompt)) < 1e-5


@pytest.mark.parametrize("dies", [3, 4])
def test_memory_plans_hold(by_tokens: Compile, dies: int) -> None:
    folder = by_tokens(dies)
    for seqlen in (1, 8):
        programs = load_programs(Opened.open(folder), seqlen)
        check_programs(programs, load_machine("edge10"), (0, 15, 16, 60, 128 - seqlen))


def test_it_agrees_with_hugging_face(
    by_tokens: Compile, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(by_tokens(4)), "--against", str(model), "--prompts", "1", "--tokens", "4"]) == 0
    assert "OK" in capsys.readouterr().out


def test_in_several_processes(by_tokens: Compile) -> None:
    """Dies that share a cache lie in different processes."""
    folder = by_tokens(3)
    wanted = list(Session(folder).generate(TOKENS[:20], 12))
    with DieGroup.start(Opened.open(folder), processes=2, say=lambda _: None) as group:
        assert list(Session(group.artifacts, group=group).generate(TOKENS[:20], 12)) == wanted


def test_what_a_manifest_says_of_it_must_fit(by_tokens: Compile) -> None:
    manifest = Manifest.load(by_tokens(3))
    wrong = {
        "where the options say k0: 1x?x128x?xf16": {"kv_parts": 1, "kv_split": "heads"},
        "kv_parts 2 does not divide the dies of a stage": {"kv_parts": 2},
        "kv_parts 3 does not fit options.kv_split heads": {"kv_split": "heads"},
    }
    assert not list(problems_of(manifest))
    for said, changed in wrong.items():
        options = replace(manifest.options, **changed)
        assert any(said in problem for problem in problems_of(replace(manifest, options=options)))
