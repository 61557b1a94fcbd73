"""What an import loads of transformers, in the process of a command and elsewhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tyir.frontends.huggingface import import_model
from tyir.printer import print_op

MODEL = Path(__file__).resolve().parents[1] / "models" / "tiny-qwen2"
COMMAND = """
from tyir.tools.tyir_import import main
code = main()
print("scipy.optimize" in sys.modules)
sys.exit(code)
"""
# transformers that decides by something else than what is importable
DECIDED_OTHERWISE = """
import importlib.util
find_spec = importlib.util.find_spec
def found(name, package=None):
    hidden = name == "scipy" and name in sys.modules and sys.modules[name] is None
    return importlib.machinery.ModuleSpec(name, None) if hidden else find_spec(name, package)
importlib.util.find_spec = found
"""
LOADED_BEFORE = """
import transformers.utils
assert transformers.utils.is_scipy_available()
"""


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", f"import sys\n{code}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


@pytest.mark.parametrize(
    ("before", "loaded"),
    [("", "False"), (DECIDED_OTHERWISE, "True"), (LOADED_BEFORE, "True")],
    ids=["alone", "decided otherwise", "loaded before"],
)
def test_a_command_imports_the_same_without_scipy(before: str, loaded: str, tmp_path: Path) -> None:
    pytest.importorskip("scipy")
    out = tmp_path / "model.ir"
    assert run(before + COMMAND, str(MODEL), "-o", str(out), "--no-cache") == loaded
    assert out.read_text() == print_op(import_model(MODEL))


def test_elsewhere_transformers_finds_what_is_installed() -> None:
    pytest.importorskip("scipy")
    said = run(f"""
from tyir.frontends.huggingface import import_model
import_model({str(MODEL)!r})
from transformers.loss import loss_for_object_detection
print(hasattr(loss_for_object_detection, "linear_sum_assignment"))
""")
    assert said == "True"
