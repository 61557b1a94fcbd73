"""The scripts of `examples/` run as its README says and print what they promise."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tyir.manifest import BuildOptions
from tyir.tools.api import compile_path

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


@pytest.fixture(scope="module")
def generate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program, built as its script says."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    program = tmp_path_factory.mktemp("cpp") / "generate"
    run(EXAMPLES / "cpp" / "build.sh", program)
    return program


@pytest.mark.parametrize(
    "options",
    [
        BuildOptions(dies=1, seqlens=(1, 8), max_kv=64, weights="int4"),
        BuildOptions(dies=4, seqlens=(1, 8), max_kv=64, output_rows="last"),
        pytest.param(BuildOptions(dies=4, pp=2, seqlens=(1, 8), max_kv=64), marks=pytest.mark.slow),
        pytest.param(
            BuildOptions(dies=3, seqlens=(1,), max_kv=64, kv_split="tokens", kv_block=16),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            BuildOptions(dies=2, seqlens=(1, 8), max_kv=64, output="topk=4", output_rows="last"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            BuildOptions(dies=7, seqlens=(1, 8), max_kv=64, kv_dtype="int8"), marks=pytest.mark.slow
        ),
    ],
    ids=["1 die", "4 dies", "pp", "kv-split", "top-k", "7 dies"],
)
def test_cpp(generate: Path, tmp_path: Path, options: BuildOptions) -> None:
    """Tokens without Python are those of the session: a prompt of a full step and a part of one, and on."""
    from tyir.runtime_sim.session.session import Session

    compile_path(MODEL, tmp_path, options)
    folder, prompt = tmp_path / f"{options.dies}die", [*IDS, *IDS, 300]
    out = run(generate, folder, "12", *map(str, prompt))
    assert [int(word) for word in out.split()] == list(Session(folder).generate(prompt, 12))


def test_cpp_refuses_what_it_cannot_run(generate: Path, tmp_path: Path) -> None:
    compile_path(MODEL, tmp_path, BuildOptions(dies=1, seqlens=(1,), max_kv=8))
    folder = tmp_path / "1die"
    assert refused(generate, folder, "1", "5", "99999") == "error: token 99999 is none of 4096\n"
    assert refused(generate, folder, "1", "five") == "error: 'five' is no number of a token or of tokens\n"
    full = "1 tokens do not fit: 8 of the cache's 8 positions are taken"
    assert full in refused(generate, folder, "9", "5")
    assert refused(generate, tmp_path, "1", "5").startswith(
        f"error: cannot read {tmp_path}/manifest.json: No such"
    )
    params = folder / "batch_1" / "common_die0.params"
    params.write_bytes(params.read_bytes()[:-64])
    assert refused(generate, folder, "1", "5") == f"error: {params} is cut short\n"
    text = (folder / "manifest.json").read_text()
    features = text.index('"features": [') + len('"features": [')
    (folder / "manifest.json").write_text(text[:features] + '"avx4096", ' + text[features:])
    assert "and need avx4096, which this one does not have" in refused(generate, folder, "1", "5")


def refused(*command: str | Path) -> str:
    """What a command says when it ends with an error."""
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 1
    return done.stderr
