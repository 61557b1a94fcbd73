"""Nothing heavy is loaded before it is needed: `import tyir` and every tool's `--help` leave torch,
transformers and tvm alone.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

HEAVY = ("torch", "transformers", "tvm", "tvm_ffi", "safetensors", "pydantic")
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


def test_host_code_is_made_without_torch(tmp_path: Path) -> None:
    """TVM would load it; a process that has it keeps it, and any may load it later."""
    code = "import tyir.backends.host.tvm_host"
    assert loaded_heavy(code, tmp_path) == ["tvm", "tvm_ffi"]
    assert "torch" in loaded_heavy(f"{code}\nimport torch", tmp_path)
    assert "torch" in loaded_heavy(f"import torch\n{code}", tmp_path)


def test_the_guard_sees_a_heavy_import(tmp_path: Path) -> None:
    assert loaded_heavy("import safetensors", tmp_path) == ["safetensors"]


def test_help_of_tyir_opt_loads_its_options_and_nothing_else(tmp_path: Path) -> None:
    """What makes it quick: neither numpy nor the IR is imported before there is a file to read."""
    code = """
import sys
from tyir.tools.tyir_opt import main
try:
    main(["--help"])
finally:
    print(*(name for name in sys.modules if name.split(".")[0] in ("tyir", "numpy", "lark", "networkx")), file=sys.stderr)
"""  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    tools = {
        "tyir.tools",
        "tyir.tools.cli",
        "tyir.tools.opt",
        "tyir.tools.opt.options",
        "tyir.tools.tyir_opt",
    }
    assert set(done.stderr.split()) <= {"tyir", "tyir.diagnostics", *tools}
    assert "tyir.tools.tyir_opt" in done.stderr
