"""What `tyir-compile --weights awq` refuses, and how."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.tools.small_qwen3 import save_small
from tyir.execution.awq_table import AwqSettings, AwqTable
from tyir.tools.tyir_compile import main
from tyir.tools.tyir_quantize import main as quantize

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


# ----------------------------------------------------------------------------------------------- in one step


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The old house stood at the end of the road, and nobody went there. " * 200)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of Qwen3's kind, with a tokenizer."""
    return save_small(tmp_path_factory.mktemp("models") / "small", layers=1, positions=512, seed=5)


BUILD = ["--dies", "2", "--seqlens", "1,4", "--max-kv", "32"]
SEARCH = ["--group-size", "32"]


@pytest.mark.slow
@pytest.mark.parametrize("calibrated", [True, False])
def test_one_step_is_two_steps(small: Path, text: Path, tmp_path: Path, calibrated: bool) -> None:
    given = ["--calibration", str(text)] if calibrated else []
    one, two, checkpoint = tmp_path / "one", tmp_path / "two", tmp_path / "checkpoint"
    assert main([str(small), "-o", str(one), *BUILD, *SEARCH, "--weights", "awq", *given]) == 0
    assert quantize([str(small), "-o", str(checkpoint), *SEARCH, *given]) == 0
    assert main([str(checkpoint), "-o", str(two), *BUILD]) == 0
    files = {f.relative_to(two) for f in two.rglob("*") if f.is_file()}
    assert files == {f.relative_to(one) for f in one.rglob("*") if f.is_file()} and len(files) > 10
    assert [f for f in sorted(files) if (one / f).read_bytes() != (two / f).read_bytes()] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "one", "two"]


@pytest.mark.parametrize("ended", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_nothing_is_left_of_a_step_that_failed(
    ended: BaseException | type[BaseException],
    small: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """While the search runs, its folder holding the first states already."""
    from tyir.tools.quantize import search

    seen = []

    def searching(*arguments: object) -> None:
        seen.extend(p.name for p in tmp_path.iterdir())
        raise ended

    monkeypatch.setattr(search, "search_layer", searching)
    given = ["--weights", "awq", "--calibration", str(text)]
    assert main([str(small), "-o", str(tmp_path / "out"), *BUILD, *SEARCH, *given]) != 0
    assert len(seen) == 1 and seen[0].endswith(".awq")
    assert not list(tmp_path.iterdir())
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--calibration", "TEXT"], "a calibration text is for weights awq"),
        (["--calibration", "TEXT", "--weights", "int4"], "a calibration text is for weights awq"),
        (["--calibration", "TEXT", "--weights", "awq", "--awq-table", "t"], "a table and a calibration text"),
        (["--calibration", "TEXT", "--weights", "awq", "--base", "b"], "not for adapters"),
        (["--calibration", "missing.txt", "--weights", "awq"], "cannot read missing.txt"),
        (["--calibration", "TEXT", "--weights", "awq", "--group-size", "60"], "does not divide"),
    ],
)
def test_what_one_step_refuses(
    arguments: list[str],
    message: str,
    small: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(text) if a == "TEXT" else a for a in arguments]
    given += SEARCH if "--group-size" not in given else []
    assert main([str(small), "-o", str(tmp_path / "out"), *BUILD, *given]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_module_is_not_calibrated(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--weights", "awq", "--calibration", str(text)]
    assert main([str(LAYER), "-o", str(tmp_path / "out"), *given]) == 1
    assert "is no checkpoint folder" in capsys.readouterr().err
