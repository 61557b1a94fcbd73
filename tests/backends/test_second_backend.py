"""The back end of docs/backends.md, installed beside tyir as a package of its own: it is found by name and
compiles, and nothing of tyir was edited for it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.llm import Shape, build
from tyir.backends.registry import backend_names, find_backend
from tyir.diagnostics import TyirError
from tyir.printer import print_op
from tyir.tools import tyir_compile

PAGE = (Path(__file__).resolve().parents[2] / "docs/backends.md").read_text(encoding="utf-8")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path that holds the example, as pip leaves a package; and a model beside it."""
    site = tmp_path / "site"
    site.mkdir()
    for name, text in re.findall(r"^```python file=(\S+)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL):
        (site / name).write_text(text, encoding="utf-8")
    (site / "broken.py").write_text("def check_target(folder): ...\n", encoding="utf-8")
    metadata = site / "listing-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: listing\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[tyir.backends]\nlisting = listing\nbroken = broken\n")
    monkeypatch.syspath_prepend(site)
    model, _ = build(Shape(layers=2), draw=False)
    (tmp_path / "model.ir").write_text(print_op(model))
    yield tmp_path
    for name in ("listing", "broken"):
        sys.modules.pop(name, None)


def test_a_back_end_of_another_package_compiles(installed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(installed / "model.ir"), "-o", str(installed / "out"), "--backend", "listing"]
    assert tyir_compile.main([*arguments, "--dies", "2", "--seqlens", "1,4", "--max-kv", "16", "-q"]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert folder == installed / "out" / "2die"
    die0, die1 = ((folder / f"die{i}.txt").read_text().splitlines() for i in (0, 1))
    assert die0 == die1
    assert "model.layers.1.mlp.up_proj.weight: tensor<96x64xf16>" in die0
    (main,) = (line for line in die0 if line.startswith("@main_s4"))
    assert "2 func.call" in main and "1 ty.embedding" in main
    (layer,) = (line for line in die0 if line.startswith("@layer_s4"))
    assert "7 ty.linear" in layer and "1 kv.attention" in layer
    assert tyir_compile.main([*arguments, "--dies", "2", "--seqlens", "1,4", "--max-kv", "16", "-q"]) == 1


def test_back_ends_are_found_by_name(installed: Path) -> None:
    assert backend_names() == ["broken", "edge10", "listing"]
    with pytest.raises(TyirError, match="there is no back end 'edge1'\nhelp: did you mean 'edge10'"):
        find_backend("edge1")
    with pytest.raises(TyirError, match="'broken' has no CompileContext, compile_module"):
        find_backend("broken")


def test_without_other_packages_there_is_one() -> None:
    assert backend_names() == ["edge10"]
