"""docs/ops.md and docs/passes.md say what the declarations say."""

from __future__ import annotations

from pathlib import Path

from tyir.tools.reference import ops_reference, passes_reference

DOCS = Path(__file__).resolve().parents[1] / "docs"
HELP = "run python -m tyir.tools.reference and commit docs/"


def test_reference_is_up_to_date() -> None:
    assert (DOCS / "ops.md").read_text(encoding="utf-8") == ops_reference(), HELP
    assert (DOCS / "passes.md").read_text(encoding="utf-8") == passes_reference(), HELP
