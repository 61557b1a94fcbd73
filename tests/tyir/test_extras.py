"""Extras: what a module is named under is what pyproject.toml installs, and a message says so."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from tyir.diagnostics import TyirError
from tyir.process.extras import EXTRA_OF, missing_library, require

PROJECT = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]
DISTRIBUTION = {"PIL": "pillow", "prometheus_client": "prometheus-client"}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9_.-]+", r)[0].lower() for r in requirements}  # type: ignore[index]


def test_modules_are_in_their_extras_and_not_in_the_base() -> None:
    base = names(PROJECT["dependencies"])
    for module, extra in EXTRA_OF.items():
        distribution = DISTRIBUTION.get(module, module)
        assert distribution in names(EXTRAS[extra]), (module, extra)
        assert distribution not in base
    assert {"compile", "serve", "quantize", "dev"} <= set(EXTRAS)
    assert "torch" not in " ".join(EXTRAS["serve"]), "serving goes beside another torch"


def test_what_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    require("this test", "json", "numpy")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(TyirError, match=r"compiling needs torch, which is not(.|\n)*'tyir\[compile\]'"):
        require("compiling", "json", "torch")
    with pytest.raises(ModuleNotFoundError) as caught:
        import torch.nn  # noqa: F401
    found = missing_library(caught.value)
    assert found is not None and "tyir[compile]" in found.render()
    assert missing_library(ModuleNotFoundError("no", name="json")) is None
    assert missing_library(ValueError()) is None
