"""Who may import whom: all arrows point at `tyir`, neighbours meet in a printable dialect and never in each
other's Python.

The table is enforced on the syntax trees, so an import inside a function counts too.  Where a heavy library
may stand, and whether it may stand at the top of a module, is part of the table: `import tyir` and `tyir-opt
--help` must stay light (`test_imports.py`).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("tyir", "passes", "frontends", "backends", "runtime_sim", "tools")

# What a package may import of the project, besides itself.
FIRST_PARTY: dict[str, set[str]] = {
    "tyir": set(),
    "passes": {"tyir"},
    "frontends": {"tyir"},
    "backends": {"tyir", "passes"},
    "runtime_sim": {"tyir"},
    "tools": set(PACKAGES),
}

# Libraries a package may import, at the top of a module or inside a function.
THIRD_PARTY: dict[str, set[str]] = {
    "tyir": {"numpy", "lark", "networkx"},
    "passes": {"numpy", "networkx"},
    "frontends": {"numpy", "torch", "transformers", "gguf", "safetensors"},
    "backends": {"numpy", "tqdm"},  # writing artifacts takes minutes and shows that it moves
    "runtime_sim": {"numpy"},
    "tools": {"numpy", "tqdm"},
}

# Libraries a package may import inside functions only.
LAZY: dict[str, set[str]] = {
    "tools": {
        "torch",
        "transformers",
        "safetensors",
        "scipy",
    },  # scipy: fitting the constants of a machine file, dev only
}

# Files and folders that may import a library nobody else may.
SPECIAL: dict[str, tuple[str, ...]] = {
    "tvm": ("backends/host/tvm_host.py", "backends/host/kernels/", "runtime_sim/session/host_runtime.py"),
    "tvm_ffi": ("backends/host/tvm_host.py", "backends/host/kernels/", "runtime_sim/session/host_runtime.py"),
}


@dataclass(frozen=True)
class Import:
    """One imported module, by absolute name; `lazy` when it stands in a function, `typing_only` under `if
    TYPE_CHECKING`.
    """

    module: str
    line: int
    lazy: bool = False
    typing_only: bool = False

    @property
    def package(self) -> str | None:
        """The package of the project that is meant, or None for a library."""
        first, _, rest = self.module.partition(".")
        if first != "tyir":
            return None
        second = rest.partition(".")[0]
        return second if second in PACKAGES else "tyir"


def imports(node: ast.AST, lazy: bool = False, typing_only: bool = False) -> Iterator[Import]:
    """Every import below `node`, `importlib.import_module("a.literal")` included."""
    for child in ast.iter_child_nodes(node):
        for module in _imported(child):
            yield Import(module, child.lineno, lazy, typing_only)
        inside = lazy or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test) and not child.orelse:
            yield from imports(child, inside, True)
        else:
            yield from imports(child, inside, typing_only)


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        return [
            f"{base}.{alias.name}" for alias in node.names
        ]  # `from tyir import backends` means tyir.backends
    if isinstance(node, ast.Call) and ast.unparse(node.func) in (
        "importlib.import_module",
        "import_module",
        "__import__",
    ):
        return [a.value for a in node.args[:1] if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    return []


def violations(path: str, source: str) -> list[str]:
    """What `path` (relative to the checkout) imports against the table, one message each."""
    package = path.partition("/")[0]
    found = []
    for item in imports(ast.parse(source)):
        reason = _refused(path, package, item)
        if reason:
            found.append(f"{path}:{item.line}: imports {item.module}: {reason}")
    return found


def _refused(path: str, package: str, item: Import) -> str:
    library = item.module.partition(".")[0]
    if item.module.startswith("."):
        return "imports are absolute here"
    if item.package is not None:
        allowed = FIRST_PARTY[package] | {package}
        return "" if item.package in allowed else f"{package} may import {', '.join(sorted(allowed))}"
    if library in sys.stdlib_module_names or library in THIRD_PARTY[package]:
        return ""
    if library in SPECIAL:
        return (
            ""
            if path.startswith(SPECIAL[library])
            else f"only {', '.join(SPECIAL[library])} may import {library}"
        )
    if library in LAZY.get(package, ()):
        return (
            "" if item.lazy or item.typing_only else f"{package} may import {library} inside functions only"
        )
    return f"{package} may import the standard library and {', '.join(sorted(THIRD_PARTY[package]))}"


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_table(package: str) -> None:
    found = []
    for file in sorted((ROOT / package).rglob("*.py")):
        found += violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    assert not found, "\n".join(["imports against the table in tests/test_layering.py:", *found])


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tyir/a.py", "import tyir.passes.dce"),
        ("tyir/a.py", "def f():\n    from tyir.tools import cli"),
        ("passes/a.py", "from tyir import backends"),
        ("passes/a.py", "def f():\n    import tvm"),
        ("passes/a.py", "import passes.dce"),
        ("passes/a.py", "from .dce import Dce"),
        ("passes/a.py", "import importlib\nimportlib.import_module('tyir.frontends.huggingface')"),
        ("passes/a.py", "if TYPE_CHECKING:\n    from tyir.runtime_sim import engine"),
        ("frontends/a.py", "import tvm"),
        ("backends/edge10/a.py", "import tvm"),
        ("runtime_sim/a.py", "from tyir.backends.edge10 import compile"),
        ("tools/a.py", "import torch"),
        ("tools/a.py", "class A:\n    import torch"),
        ("tools/a.py", "import tvm"),
    ],
)
def test_the_table_refuses(path: str, source: str) -> None:
    assert violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tyir/a.py", "import json, numpy\nfrom tyir.dialects import ty"),
        ("passes/a.py", "from tyir.ir import Op\nfrom tyir.passes.dce import Dce"),
        ("frontends/a.py", "def f():\n    import torch"),
        ("backends/host/tvm_host.py", "from tvm import relax"),
        ("backends/host/kernels/gemv.py", "import tvm"),
        ("runtime_sim/session/host_runtime.py", "import tvm"),
        ("tools/a.py", "def f():\n    import torch\n    from tyir.runtime_sim import engine"),
        ("tools/a.py", "if TYPE_CHECKING:\n    import torch"),
    ],
)
def test_the_table_allows(path: str, source: str) -> None:
    assert violations(path, source) == []
