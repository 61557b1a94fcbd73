"""The simulator's benchmark runs, on one layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tyir.tools.bench.simulator import main


@pytest.mark.slow
def test_one_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--layers",
        "1",
        "--dies",
        "2",
        "--repeat",
        "1",
        "--prompt",
        "200",
        "--programs",
        str(tmp_path),
        "--json",
    ]
    assert main(arguments) == 0
    first = json.loads(capsys.readouterr().out)
    assert [s["seqlen"] for s in first["steps"]] == [1, 96] and all(
        s["engine_s"] > 0 and s["commands"] > 100 for s in first["steps"]
    )
    assert (tmp_path / "s96" / "llm_die1.bin").is_file()
    assert main(arguments) == 0  # from the kept programs
    assert [s["step_ms"] for s in json.loads(capsys.readouterr().out)["steps"]] == [
        s["step_ms"] for s in first["steps"]
    ]
