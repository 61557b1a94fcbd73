"""What `tyir-compile --weights awq` refuses, and how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tyir.execution.awq_table import AwqSettings, AwqTable
from tyir.tools.tyir_compile import main

MODEL = Path(__file__).parents[1] / "models" / "tiny-qwen2"
LAYER = Path(__file__).parents[1] / "passes" / "layer.ir"


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = tmp_path / "awq.safetensors"
    AwqTable(AwqSettings(bits=3), {"model.norm": np.ones(16, np.float32)}).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "awq"], "weights awq are made with an AWQ table, and none has been folded in"),
        (["--weights", "int4", "--awq-table", "TABLE"], "weights int4 are asked for"),
        (["--weights", "awq", "--awq-table", "TABLE"], "was made for 3 bits"),
        (["--awq-table", "nowhere.safetensors"], "cannot read the AWQ table"),
    ],
)
def test_what_is_refused(
    arguments: list[str], message: str, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [table if a == "TABLE" else a for a in arguments]
    ir = tmp_path / "layer.ir"
    ir.write_text(
        LAYER.read_text().replace('tyir.stage = "ty"', f'tyir.checkpoint = "{MODEL}", tyir.stage = "ty"')
    )
    assert main([str(ir), "-o", str(tmp_path / "out"), "--dies", "1", "--max-kv", "32", *given]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and "help: " in captured.err and not captured.out
    assert not (tmp_path / "out").exists()
