"""Every tool's module, run as a program, ends with the exit code of its `main`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"


def _guard(tree: ast.Module) -> ast.If | None:
    return next((s for s in tree.body if isinstance(s, ast.If) and "__main__" in ast.unparse(s.test)), None)


# Runs under the Python of another engine, which need not have tyir; only `bench/engines.py` starts it.
ELSEWHERE = TOOLS / "bench" / "engine_process.py"
PROGRAMS = sorted(
    path
    for path in {*TOOLS.rglob("*.py")} - {ELSEWHERE}
    if _guard(ast.parse(path.read_text(encoding="utf-8"))) is not None
)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.relative_to(TOOLS).as_posix())
def test_the_exit_code_is_that_of_main(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guard = _guard(tree)
    assert guard is not None
    assert [ast.unparse(s) for s in guard.body] in (["sys.exit(main())"], ["raise SystemExit(main())"])
    (main,) = (s for s in tree.body if isinstance(s, ast.FunctionDef) and s.name == "main")
    assert "run_tool" in map(ast.unparse, main.decorator_list)


@pytest.mark.parametrize("name", sorted(p.stem for p in {*(TOOLS / "bench").glob("[a-z]*.py")} - {ELSEWHERE}))
def test_a_benchmark_that_fails_says_so(name: str) -> None:
    command = [sys.executable, "-m", f"tyir.tools.bench.{name}", "--no-such-option"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and "--no-such-option" in done.stderr
