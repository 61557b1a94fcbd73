"""Artifacts for several sequences: each is computed as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.manifest import BuildOptions
from tyir.runtime_sim.batch_session import BatchSession
from tyir.runtime_sim.session import Session
from tyir.tools.api import compile_path
from tyir.tools.tyir_sim import main as simulate

Artifacts = Callable[[int, str], Path]
PROMPTS = [[5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11], [7], [12, 99, 4, 1]]


@pytest.fixture(scope="module")
def three(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_path(imported, tmp_path_factory.mktemp("three"), BuildOptions(dies=2, seqlens=(1, 8), max_kv=128, batch=3))


def test_the_folder_is_named_after_the_batch(three: Path) -> None:
    assert (three / "batch_3" / "seqlen_8" / "llm_die1.so").is_file()
    assert not list(three.rglob("*.edge10"))


@pytest.mark.parametrize("compiled", [True, False])
def test_prompts_of_different_lengths(artifacts: Artifacts, three: Path, compiled: bool) -> None:
    session = BatchSession(three, compiled=compiled)
    first, second = session.feed(PROMPTS), session.feed([[1], [], [2, 3]])
    for number, (prompt, more) in enumerate(zip(PROMPTS, ([1], [], [2, 3]))):
        alone = Session(artifacts(2, "fp16"), "host" if compiled else "interpreter")
        np.testing.assert_allclose(first[number], alone.feed(prompt), atol=0.03)
        assert second[number].shape[0] == len(more)
        if more:
            np.testing.assert_allclose(second[number], alone.feed(more), atol=0.03)


def test_each_sequence_generates_what_it_would_alone(artifacts: Artifacts, three: Path) -> None:
    wanted = [list(Session(artifacts(2, "fp16")).generate(p, 12)) for p in PROMPTS]
    assert BatchSession(three).generate(PROMPTS, 12) == wanted
    stop = wanted[1][3]
    ended = BatchSession(three).generate(PROMPTS, 12, stop=lambda token: token == stop)
    assert ended[1] == wanted[1][: wanted[1].index(stop) + 1]


def test_what_cannot_be_is_explained(three: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(TyirError, match=r"compiled for 3 sequences at once(.|\n)*BatchSession"):
        Session(three)
    assert simulate([str(three)]) == 1
    assert "compiled for batch 3, they run one sequence" in capsys.readouterr().err
    session = BatchSession(three)
    with pytest.raises(TyirError, match=r"2 sequences were given, the artifacts run 3"):
        session.feed([[1], [2]])
    with pytest.raises(TyirError, match="all lists of tokens are empty"):
        session.feed([[], [], []])
    with pytest.raises(TyirError, match=r"sequence 1: 129 tokens do not fit(.|\n)*--max-kv 129"):
        session.feed([[], [1] * 129, []])
    with pytest.raises(TyirError, match="sequence 2: token 4096 is not in the vocabulary of 4096"):
        session.feed([[1], [1], [4096]])
