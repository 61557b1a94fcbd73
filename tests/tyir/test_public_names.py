"""Every name that `tyir` offers is what it says, in whatever order things are imported."""

from __future__ import annotations

import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import tyir

KINDS = {name: "class" if name[0].isupper() else "function" for name in tyir.__all__}


@pytest.mark.parametrize("name", tyir.__all__)
def test_a_name_is_a_class_or_a_function_of_that_name(name: str) -> None:
    found = getattr(tyir, name)
    assert not inspect.ismodule(found)
    assert inspect.isclass(found) if KINDS[name] == "class" else callable(found)
    assert found.__name__ == name


def test_no_module_takes_the_place_of_a_name() -> None:
    """Importing a submodule makes it an attribute of the package, over a name looked up when asked."""
    modules = {m.name for m in pkgutil.iter_modules(tyir.__path__)}
    modules |= {"passes", "frontends", "backends", "runtime_sim", "tools"}
    assert "verifier" in modules and modules.isdisjoint(tyir.__all__)


@pytest.mark.parametrize(
    "first", ["tyir.verifier", "tyir.pipeline", "tyir.tools.api", "tyir.printer, tyir.parser"]
)
def test_names_survive_the_import_of_modules(first: str, tmp_path: Path) -> None:
    code = (
        f"import {first}, inspect, tyir\n"
        "print([n for n in tyir.__all__ if inspect.ismodule(getattr(tyir, n))])\n"
        "tyir.verify(tyir.parse_module(''))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")
