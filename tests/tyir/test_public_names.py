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


def test_names_of_files_may_be_text(tmp_path: Path) -> None:
    """What `docs/python.md` lists takes them as `str` and as `Path`: refused for what they name."""
    from tyir.frontends.huggingface import import_model
    from tyir.tools.api import build_and_compile_llm, compile_path
    from tyir.tools.sim.sources import Choice, open_source
    from tyir.tools.tokenizer import load_tokenizer

    for missing in (str(tmp_path / "missing"), tmp_path / "missing"):
        for call in (
            lambda path: compile_path(path, str(tmp_path / "out"), {"dies": 1, "seqlens": [1], "max_kv": 16}),
            lambda path: compile_path(f"{path}.ir", str(tmp_path / "out"), {}),
            build_and_compile_llm,
            import_model,
            load_tokenizer,
            lambda path: open_source([path], Choice(None, {})),
            tyir.Session,
            tyir.BatchSession,
            tyir.parse_file,
        ):
            with pytest.raises(tyir.TyirError, match="missing"):
                call(missing)  # type: ignore[operator]
    model = Path(__file__).parents[1] / "models" / "tiny-qwen2"
    assert load_tokenizer(str(model))("old")["input_ids"] == load_tokenizer(model)("old")["input_ids"]
