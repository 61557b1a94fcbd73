"""docs/ops.md, docs/passes.md and docs/json.md say what the declarations say."""

from __future__ import annotations

from pathlib import Path

from tyir.tools.commands.json_page import json_reference
from tyir.tools.reference import HEAD, ops_reference, passes_reference

DOCS = Path(__file__).resolve().parents[1] / "docs"
HELP = "run python -m tyir.tools.reference and commit docs/"


def test_reference_is_up_to_date() -> None:
    assert (DOCS / "ops.md").read_text(encoding="utf-8") == ops_reference(), HELP
    assert (DOCS / "passes.md").read_text(encoding="utf-8") == passes_reference(), HELP
    assert (DOCS / "json.md").read_text(encoding="utf-8") == HEAD + json_reference(), HELP
