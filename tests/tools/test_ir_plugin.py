"""The pytest plugin as users have it: in folders of their own, loaded by its name, without this project's
conftest.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PLUGIN = "tyir.tools.testing.plugin"
SAME = """// RUN: tyir-opt %s | same
// OUT: old

// RUN: tyir-opt --dce %s | same
ty.global @w {file = "f", key = "k", nbytes = 4, offset = 0, type = tensor<2xf16>}
"""
DIALECT = """
from tyir.opdef import DeclaredOp, operand, result
from tyir.ir import Value

class Twice(DeclaredOp, name="own.twice"):
    \"\"\"out = 2 x\"\"\"
    x: Value = operand()
    out: Value = result()

    def infer(self):
        return self.x.type
"""
PASSES = """
from dataclasses import dataclass
from own import Twice
from tyir.pipeline import Pass

@dataclass(frozen=True)
class FindTwice(Pass):
    def run(self, op, context):
        for twice in op.walk_type(Twice):
            context.warning(twice, "twice")

@dataclass(frozen=True)
class EraseTwice(Pass):
    def run(self, op, context):
        for twice in list(op.walk_type(Twice)):
            twice.out.replace_all_uses_with(twice.x)
            twice.erase()
"""
BODY = """
func.func @f(%x: tensor<4xf16>) -> tensor<4xf16> {
  // expected-warning @below {{twice}}
  %y = own.twice %x : tensor<4xf16>
  return %y : tensor<4xf16>
}
"""
LOAD = "tyir-opt %s --load-dialect=%S/own.py --load-pass=%S/passes_of_mine.py"


def run_pytest(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    """pytest in a folder, with the plugin alone: `-p` does what the entry point of that name does."""
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", PLUGIN]
    return subprocess.run(
        [*command, "--rootdir", str(folder), *flags, str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # others' plugins take a second to load
    )


def test_bless(tmp_path: Path) -> None:
    file = tmp_path / "a.ir"
    file.write_text(SAME)
    failed = run_pytest(tmp_path)
    assert failed.returncode == 1 and "-old" in failed.stdout and "pytest --bless-ir" in failed.stdout
    assert file.read_text() == SAME
    assert run_pytest(tmp_path, "--bless-ir").returncode == 0
    lines = file.read_text().splitlines()
    assert (
        lines[1] == '// OUT: "builtin.module"() ({'
        and lines.count(lines[1]) == 2
        and "// OUT: old" not in lines
    )
    assert run_pytest(tmp_path).returncode == 0


def test_own_dialect_and_two_passes_of_one_file(tmp_path: Path) -> None:
    """Several files in one process, each loading the same plug-ins; one of them fails as it should."""
    (tmp_path / "own.py").write_text(DIALECT)
    (tmp_path / "passes_of_mine.py").write_text(PASSES)
    for name in ("a", "b"):
        (tmp_path / f"{name}.ir").write_text(f"// RUN: {LOAD} --find-twice --verify-diagnostics\n{BODY}")
    (tmp_path / "c.ir").write_text(
        f"// RUN: {LOAD} --erase-twice --find-twice | filecheck %s\n// CHECK-NOT: own.twice\n"
        + BODY.replace("// expected-warning", "// no warning")
    )
    done = run_pytest(tmp_path)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    (tmp_path / "d.ir").write_text(f"// RUN: {LOAD} --erase-twice --find-twice --verify-diagnostics\n{BODY}")
    done = run_pytest(tmp_path)
    assert "1 failed, 3 passed" in done.stdout
    assert 'd.ir:4: error: expected warning "twice" on line 5 was not produced' in done.stdout


def test_only_tests_of_tyir_are_taken(tmp_path: Path) -> None:
    texts = {
        "llvm": "; RUN: opt -S < %s | FileCheck %s\n",  # files of that ending are LLVM's first of all
        "mlir": "// RUN: mlir-opt %s | FileCheck %s\n",
        "plain": "module {}\n",
        "fails_as_it_should": "// RUN: not tyir-opt --no-such-pass %s\nmodule {}\n",
        "filter": "// RUN: tyir-opt %s | sort\nmodule {}\n",
        "command": "// RUN: tyir-nothing %s\nmodule {}\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.ir").write_text(text)
    out = run_pytest(tmp_path).stdout
    assert "2 failed, 1 passed" in out
    assert "sort is not a command of tyir" in out and "tyir-nothing is not a command of tyir" in out


def test_an_unrelated_run_loads_nothing_of_it(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text(
        "import sys\n\ndef test_nothing_heavy():\n"
        f"    assert {PLUGIN!r} in sys.modules\n"
        "    names = {n for n in sys.modules if n.partition('.')[0] in ('tyir', 'numpy', 'torch', 'tvm')}\n"
        f"    assert names == {{'tyir', 'tyir.tools', 'tyir.tools.testing', {PLUGIN!r}}}, names\n"
    )
    done = run_pytest(tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout


def test_the_entry_point_is_declared() -> None:
    import tomllib

    text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert tomllib.loads(text)["project"]["entry-points"]["pytest11"] == {PLUGIN: PLUGIN}
