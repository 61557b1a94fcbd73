"""Nothing heavy is loaded before it is needed: `import tyir` and every tool's `--help` leave torch,
transformers and tvm alone.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "tvm", "tvm_ffi", "safetensors")
PYPROJECT = tomllib.loads(
    (Path(__file__).resolve().parents[1] / "pyproject.toml").read_text(encoding="utf-8")
)
SCRIPTS: dict[str, str] = PYPROJECT["project"]["scripts"]

REPORT = f"import sys; print(*(name for name in {HEAVY!r} if name in sys.modules), file=sys.stderr)"


def loaded_heavy(code: str, folder: Path) -> list[str]:
    """The heavy libraries a fresh process has loaded after `code`; run away from the checkout."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{REPORT}"], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


def test_import_tyir_is_light(tmp_path: Path) -> None:
    assert loaded_heavy("import tyir", tmp_path) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_light(script: str, tmp_path: Path) -> None:
    module, _, function = SCRIPTS[script].partition(":")
    code = f"""
import sys
from {module} import {function}
sys.argv = [{script!r}, "--help"]
try:
    status = {function}()
except SystemExit as exit:
    status = exit.code
assert not status, status
"""
    assert loaded_heavy(code, tmp_path) == []


def test_the_guard_sees_a_heavy_import(tmp_path: Path) -> None:
    assert loaded_heavy("import safetensors", tmp_path) == ["safetensors"]


def test_help_time_of_tyir_opt(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted: a loaded machine would make it fail for no reason.  The aim is under 0.2 s."""
    command = [Path(sys.executable).parent / "tyir-opt", "--help"]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    with capsys.disabled():
        print(f" [tyir-opt --help: median {statistics.median(seconds):.3f} s of 5]", end=" ")
