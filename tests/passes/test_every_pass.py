"""Every pass has its file of IR here, `<pass>.ir`, that runs it."""

from __future__ import annotations

from pathlib import Path

from tyir.pass_manager.registry import PassRegistry

FOLDER = Path(__file__).parent


def runs(name: str) -> bool:
    """Whether the pass's file has a RUN line with the pass in it."""
    path = FOLDER / f"{name.replace('-', '_')}.ir"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return any(line.startswith("// RUN:") and name in line for line in lines)


def test_every_pass_has_a_file_that_runs_it() -> None:
    names = PassRegistry().names()
    assert "kv-materialize" in names and "lower-edge10" in names
    assert [name for name in names if not runs(name)] == []
