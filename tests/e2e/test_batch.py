"""Artifacts for several sequences: each is computed as if it were alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.diagnostics import TyirError
from tyir.execution.artifacts import Artifacts as Opened
from tyir.manifest import BuildOptions
from tyir.runtime_sim.execution.check_accesses import check_programs
from tyir.runtime_sim.session.batch_session import BatchSession
from tyir.runtime_sim.session.session import ENGINES, EngineName, Session
from tyir.runtime_sim.timing.engine import Timing, simulate
from tyir.runtime_sim.timing.program import load_programs
from tyir.targets.machine import load_machine
from tyir.tools.api import compile_path
from tyir.tools.tyir_run import main as run
from tyir.tools.tyir_sim import main as sim
from tyir.tools.tyir_verify import main as verify

Artifacts = Callable[[int, str], Path]
PROMPTS = [[5, 17, 300, 42, 9, 1000, 77, 3, 8, 900, 11], [7], [12, 99, 4, 1]]


@pytest.fixture(scope="module")
def three(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_path(
        imported, tmp_path_factory.mktemp("three"), BuildOptions(dies=2, seqlens=(1, 8), max_kv=128, batch=3)
    )


def test_the_folder_is_named_after_the_batch(three: Path) -> None:
    assert (three / "batch_3" / "seqlen_8" / "llm_die1.so").is_file()
    assert (three / "batch_3" / "seqlen_8" / "llm_die1.edge10").is_file()


@pytest.mark.parametrize("engine", ENGINES)
def test_prompts_of_different_lengths(artifacts: Artifacts, three: Path, engine: EngineName) -> None:
    session = BatchSession(three, engine)
    first, second = session.feed(PROMPTS), session.feed([[1], [], [2, 3]])
    for number, (prompt, more) in enumerate(zip(PROMPTS, ([1], [], [2, 3]))):
        alone = Session(artifacts(2, "fp16"), engine)
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
    with pytest.raises(TyirError, match=r"there is no sequence 3(.|\n)*runs 3, numbered from 0"):
        Session(three, sequence=3)
    prompts = [argument for n in range(4) for argument in ("--prompt", str(n))]
    assert run([str(three), *prompts]) == 1
    assert re.search(
        r"4 prompts, and .* runs 3 at once\nhelp: compile with --batch 4, or give fewer",
        capsys.readouterr().err,
    )
    session = BatchSession(three)
    with pytest.raises(TyirError, match=r"2 sequences were given, the artifacts run 3"):
        session.feed([[1], [2]])
    with pytest.raises(TyirError, match="all lists of tokens are empty"):
        session.feed([[], [], []])
    with pytest.raises(TyirError, match=r"sequence 1: 129 tokens do not fit(.|\n)*--max-kv 129"):
        session.feed([[], [1] * 129, []])
    with pytest.raises(TyirError, match="sequence 2: token 4096 is not in the vocabulary of 4096"):
        session.feed([[1], [1], [4096]])


@pytest.mark.parametrize("options", [{"kv_dtype": "int8", "output": "topk=4"}, {"weights": "int4", "pp": 2}])
def test_command_programs_agree_with_host_code(
    imported: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """8-bit caches, top-k, 4-bit weights and pipeline stages, two sequences of different lengths and
    positions; the memory plans hold.
    """
    folder = compile_path(
        imported, tmp_path, BuildOptions(dies=2, seqlens=(1, 8), max_kv=64, batch=2, **options)
    )
    sessions = [BatchSession(folder, engine) for engine in ("host", "edge10")]
    if "output" in options:
        host, edge10 = (s.generate(PROMPTS[:2], 6) for s in sessions)
        assert host == edge10
    else:
        for _ in range(2):
            for a, b in zip(*(s.feed([PROMPTS[0], PROMPTS[1]]) for s in sessions)):
                np.testing.assert_allclose(a, b, atol=0.05)
    for seqlen in (1, 8):
        check_programs(
            load_programs(Opened.open(folder), seqlen), load_machine("edge10"), (0, (3, 40), (56, 0))
        )


def test_weights_are_read_once_for_the_batch(artifacts: Artifacts, three: Path) -> None:
    """A decode step of three sequences moves the weights of one: what more it reads are caches and rows."""

    def step(folder: Path) -> Timing:
        return simulate(load_programs(Opened.open(folder), 1), load_machine("edge10"), 64)

    one, batch = step(artifacts(2, "fp16")), step(three)
    caches = 2 * 6 * 64 * 4 * 32 * 2  # k and v, layers, positions, heads of both dies and their size, f16
    assert batch.dram_bytes[0] < one.dram_bytes[0] + 2 * caches
    assert batch.total_ns < 2 * one.total_ns, "three tokens in less than the time of two"


def test_tools_take_batches(three: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify([str(three), "--against", str(model), "--prompts", "4", "--tokens", "8"]) == 0
    assert "OK: host engine" in capsys.readouterr().out
    assert run([str(three), "--prompt", "The old house", "--prompt", "A", "--max-tokens", "5"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("The old house") and "\nA" in out and "2 prompts, 10 tokens" in err
    assert run([str(three), "--prompt", "The old house", "--max-tokens", "5", "--engine", "edge10"]) == 0
    assert capsys.readouterr().out.startswith(out.splitlines()[0])
    assert sim([str(three)]) == 0
    lines = re.findall(
        r"^collectives: (.*?);.* the closed form is (.*)$", capsys.readouterr().out, re.MULTILINE
    )
    assert len(lines) == 2 and lines[0][0] == lines[0][1]
    assert lines[1][0].split(" with ")[1] == lines[1][1].split(" with ")[1], (
        "24 rows go in blocks: more collectives, the same bytes"
    )
