"""The scripts of `examples/` run as its README says and print what they promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
MODEL = ROOT / "tests" / "models" / "tiny-qwen2"
IDS = [5, 17, 300, 42, 9]


def run(*command: str | Path) -> str:
    """What a command prints, the prepared environment's Python being `python`."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def example(name: str, *arguments: str | Path) -> str:
    return run(sys.executable, EXAMPLES / name, *arguments)


def test_own_passes_and_their_test() -> None:
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "tyir.tools.testing.plugin"]
    out = run(*command, "--rootdir", EXAMPLES, "-p", "no:cacheprovider", EXAMPLES / "own_pass")
    assert "1 passed" in out


def test_the_readme_names_every_example() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = [p for p in EXAMPLES.iterdir() if p.suffix == ".py"]
    folders = [p for p in EXAMPLES.iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert len(files) >= 3 and len(folders) >= 2
    assert [p.name for p in (*files, *folders) if f"({p.name}" not in text] == []


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The artifacts of compile_and_generate.py, and what it printed."""
    out = tmp_path_factory.mktemp("example")
    return out / "1die", example("compile_and_generate.py", MODEL, out)


@pytest.mark.slow
def test_compile_and_generate(generated: tuple[Path, str]) -> None:
    greedy, sampled, best = generated[1].splitlines()[-3:]
    assert greedy.startswith("greedy:  The old house stood at the end of ")
    assert sampled.startswith("sampled: The old house stood at the end of") and sampled[9:] != greedy[9:]
    first = greedy.removeprefix("greedy:  The old house stood at the end of")
    assert any(first.startswith(token) for token in re.findall(r"'([^']*)'", best)[:1])


@pytest.mark.slow
def test_batch_and_cache(tmp_path: Path) -> None:
    lines = example("batch_and_cache.py", MODEL, tmp_path).splitlines()
    assert lines[0].startswith("The old house|") and lines[1].startswith("She looked at him for a moment|")
    shared, total = map(int, re.findall(r"\d+", next(line for line in lines if "in the cache" in line)))
    assert 8 < shared < total


@pytest.mark.slow
def test_compare_boards(generated: tuple[Path, str]) -> None:
    out = example("compare_boards.py", generated[0], "edge10", EXAMPLES / "boards" / "lpddr5.toml")
    rows = [line.split() for line in out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["edge10", "edge10-lpddr5"]
    assert float(rows[1][1]) < float(rows[0][1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_cpp(generated: tuple[Path, str], tmp_path: Path) -> None:
    """Tokens without Python are those of the session, on int4 weights."""
    from tyir.runtime_sim.session.session import Session

    folder = generated[0]
    (tmp_path / "step.txt").write_text(example("cpp/list_calls.py", folder, "1"))
    run(EXAMPLES / "cpp" / "build.sh", tmp_path / "generate")
    out = run(tmp_path / "generate", folder, tmp_path / "step.txt", "12", *map(str, IDS))
    assert [int(word) for word in out.split()] == list(Session(folder).generate(IDS, 12))
