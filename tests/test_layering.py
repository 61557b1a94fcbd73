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
    "tyir": {"numpy", "lark", "networkx", "annotated_types", "typing_extensions"},
    "passes": {"numpy", "networkx"},
    "frontends": {"numpy", "torch", "transformers", "gguf", "safetensors"},
    "backends": {"numpy"},
    "runtime_sim": {"numpy"},
    "tools": {"numpy"},
}

# Libraries a package may import inside functions only.
LAZY: dict[str, set[str]] = {
    "tyir": {
        *{"pydantic", "pydantic_core"},  # checks a manifest when one is read
        "gguf",  # what llama.cpp's block formats mean, when a weight of one is evaluated
        "tqdm",  # bars, on a terminal
    },
    "runtime_sim": {
        "PIL",  # decodes and resizes pictures, where one is given
        "torch",  # torch.distributed, where dies run in several processes
    },
    "tools": {
        "packaging",  # which versions a requirement allows
        "shtab",  # completion scripts, an extra
        "torch",
        "transformers",
        "safetensors",
        "scipy",
        "matplotlib",  # the plot of a quantisation's report, an extra
        "pyarrow",  # calibration text in Parquet files, an extra
        "ray",  # work on the machines of a cluster, an extra
        *{"fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"},  # tyir-serve, an extra
        "llguidance",  # text that is held to a schema, of the same extra
    },  # scipy: fitting the constants of a machine file, dev only
}

# Folders whose files may import a lazy library at their top, because commands import them inside functions.
LATE: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("torch", "safetensors"), ("tools/quantize/",)),
    **dict.fromkeys(("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client"), ("tools/serve/",)),
}

# Files and folders that may import a library nobody else may.
SPECIAL: dict[str, tuple[str, ...]] = {
    "pytest": ("tools/testing/",),
    "filecheck": ("tools/testing/",),
    # chat templates; where it is missing, no chat works
    "jinja2": ("tools/run/turn_ends.py", "tools/run/rendering.py"),
    "onnxruntime_genai": ("tools/bench/",),
    "llama_cpp": ("tools/bench/",),
    "openvino": ("tools/bench/",),
    "tvm": (
        "backends/host/tvm_host.py",
        "backends/host/meeting.py",
        "backends/host/tuning.py",
        "backends/host/kernels/",
        "runtime_sim/session/host_runtime.py",
    ),
    "tvm_ffi": (
        "backends/host/tvm_host.py",
        "backends/host/tuning.py",
        "backends/host/kernels/",
        "runtime_sim/session/host_runtime.py",
    ),
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
            ""
            if item.lazy or item.typing_only or path.startswith(LATE.get(library, ()) or "\0")
            else f"{package} may import {library} inside functions only"
        )
    return f"{package} may import the standard library and {', '.join(sorted(THIRD_PARTY[package]))}"


# ------------------------------------------------------------------------------------- the rooms of the core

# Modules of `tyir` from the bottom up: each may import its own level and those below.  What is named by the
# longest prefix counts; what is in no level (other dialects, the chip, its machines) may import all of it and
# is imported by none.
LEVELS: dict[str, tuple[str, ...]] = {
    "the IR": (
        "attribute",
        "artifacts",
        "attributes",
        "diagnostics",
        "dtypes",
        "ir",
        "layers",
        "location",
        "manifest",
        "opdef",
        "process",
        "registry",
        "sharding",
        "traits",
        "types",
    ),
    "modules and functions": (
        "artifacts.agreement",
        "dialects.builtin",
        "dialects.func",
        "execution.entry_points",
        "stages",
    ),
    "text": ("text", "parser", "printer", "vision"),
    "checking, rewriting, passes": ("checking", "pass_manager", "pipeline", "rewrite", "verifier"),
    "execution": ("execution", "interpreter"),
    "names of what is built on it": ("awq",),
}

# Imports inside functions, and those for annotations alone that point upwards: importing module -> imported.
PERMITTED: dict[tuple[str, str], str] = {
    ("attribute", "text.attribute_printer"): "an attribute prints itself",
    ("ir", "printer"): "an op prints itself",
    ("registry", "dialects"): "a dialect is found in the package's folder, when first asked for",
    ("pass_manager.registry", "pipeline"): "what a pass is, in a file of passes",
    ("opdef", "checking.symbols"): "an annotation: an op looks up the symbols it refers to",
    ("manifest", "execution.artifacts"): "a manifest alone is that of an opened folder",
    ("pipeline", "execution.weights"): "an annotation: a pass may be given weights",
}


def level_of(module: str) -> int | None:
    """The level of a module of the core (`text.lexer`); None for what is in none."""
    found = {
        prefix: number
        for number, prefixes in enumerate(LEVELS.values())
        for prefix in prefixes
        if f"{module}.".startswith(f"{prefix}.")
    }
    return found[max(found, key=len)] if found else None


def core_violations(path: str, source: str) -> list[str]:
    """What a file of `tyir` imports against the levels, one message each."""
    importer = path.removeprefix("tyir/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    level, names = level_of(importer), list(LEVELS)
    found = []
    for item in imports(ast.parse(source)):
        if item.package != "tyir" or path == "tyir/__init__.py":
            continue
        imported = item.module.removeprefix("tyir").removeprefix(".")
        if any(importer == a and f"{imported}.".startswith(f"{b}.") for a, b in PERMITTED):
            continue
        target = level_of(imported)
        if item.lazy:
            found.append(f"{path}:{item.line}: imports {item.module} inside a function")
        elif level is not None and (target is None or target > level):
            above = names[target] if target is not None else "what the core does not know"
            found.append(f"{path}:{item.line}: {names[level]} imports {item.module}, which is {above}")
    return found


def test_the_core_is_in_levels() -> None:
    found = []
    for file in sorted((ROOT / "tyir").rglob("*.py")):
        found += core_violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    assert not found, "\n".join(["imports against the levels in tests/test_layering.py:", *found])


def test_every_module_of_the_core_has_its_level() -> None:
    """Only these are outside: whoever adds a module says where it belongs."""
    outside = {"dialects", "edge10", "targets", "__main__"}
    files = [f.relative_to(ROOT / "tyir") for f in (ROOT / "tyir").rglob("*.py") if f.name != "__init__.py"]
    modules = [f.with_suffix("").as_posix().replace("/", ".") for f in files]
    unknown = [m for m in modules if level_of(m) is None and m.partition(".")[0] not in outside]
    assert not unknown, unknown


def test_what_is_permitted_is_done() -> None:
    for importer, imported in PERMITTED:
        source = (ROOT / "tyir" / f"{importer.replace('.', '/')}.py").read_text(encoding="utf-8")
        found = [item.module for item in imports(ast.parse(source)) if item.lazy or item.typing_only]
        assert any(f"{m}.".startswith(f"tyir.{imported}.") for m in found), (importer, imported)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tyir/ir.py", "from tyir.text import lexer"),
        ("tyir/ir.py", "def f():\n    from tyir.text.lexer import Scanner"),
        ("tyir/ir.py", "from tyir.dialects.builtin import Module"),
        ("tyir/text/a.py", "from tyir.verifier import verify"),
        ("tyir/rewrite.py", "from tyir.dialects.ty import Constant"),
        ("tyir/rewrite.py", "from tyir.dialects import func, ty"),
        ("tyir/checking/a.py", "if TYPE_CHECKING:\n    from tyir.interpreter import Interpreter"),
        ("tyir/interpreter.py", "from tyir.dialects.dist import Send"),
        ("tyir/execution/a.py", "import tyir.targets.machine"),
        ("tyir/execution/a.py", "from tyir.edge10.binary import encode"),
        ("tyir/dialects/kv/cache.py", "def f():\n    from tyir.ir import Op"),
    ],
)
def test_the_levels_refuse(path: str, source: str) -> None:
    assert core_violations(path, source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tyir/ir.py", "def __str__(self):\n    from tyir.printer import print_op"),
        ("tyir/text/a.py", "from tyir.dialects.func import Func\nfrom tyir.ir import Op"),
        ("tyir/checking/a.py", "from tyir.dialects import builtin, func"),
        ("tyir/dialects/dist.py", "from tyir.execution import lockstep\nfrom tyir.dialects import ty"),
        ("tyir/edge10/a.py", "from tyir.parser import parse_module\nfrom tyir.targets import machine"),
    ],
)
def test_the_levels_allow(path: str, source: str) -> None:
    assert core_violations(path, source) == []


# ------------------------------------------------------------------------------------------------ folders

MOST_FILES = 20
MORE_FILES = {"passes": "a file for each pass"}


def test_folders_can_be_looked_through() -> None:
    for package in PACKAGES:
        for folder in [ROOT / package, *(p for p in (ROOT / package).rglob("*") if p.is_dir())]:
            name = folder.relative_to(ROOT).as_posix()
            count = len([f for f in folder.glob("*.py") if f.stem not in ("__init__", "__main__")])
            assert count <= MOST_FILES or name in MORE_FILES, f"{name} holds {count} files"


LEAF, ITS_TOOLS = "tyir.runtime_sim.gpu", ("runtime_sim/gpu/", "tools/gpu/", "tools/silicon/")


def leaf_violations(path: str, source: str) -> list[str]:
    """Where a file outside of the GPU's own imports its models."""
    return [
        f"{path}:{item.line}: imports {item.module}"
        for item in imports(ast.parse(source))
        if f"{item.module}.".startswith(f"{LEAF}.") and not path.startswith(ITS_TOOLS)
    ]


def test_the_models_of_gpus_are_a_leaf() -> None:
    found = []
    for package in PACKAGES:
        for file in sorted((ROOT / package).rglob("*.py")):
            found += leaf_violations(file.relative_to(ROOT).as_posix(), file.read_text(encoding="utf-8"))
    assert not found, "\n".join(found)
    assert leaf_violations("runtime_sim/timing/a.py", "def f():\n    from tyir.runtime_sim import gpu")
    assert leaf_violations("tools/gpu/a.py", "from tyir.runtime_sim.gpu import steps") == []


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
