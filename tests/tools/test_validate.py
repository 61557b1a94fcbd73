"""`tyir-validate`: the H200's table stays within its limits, absent data is skipped with a word, whole models are never trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tyir.targets.accelerator import load_accelerator
from tyir.tools.validate import main
from tyir.tools.validation_data import read_rows
from tyir.tools.validation_fit import fit, is_training

DATA = Path(__file__).resolve().parents[1] / "data"

# Per cent MAPE: what is reached now and a little room.
LIMITS = {
    "gemm bf16": 6.0, "attention decode": 8.0, "attention prefill": 8.0, "all-reduce": 15.0, "model decode": 4.0, "model prefill": 4.0,
    "add+norm": 15.0, "silu*mul": 40.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], dict[str, Any]]:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["--machine", "h200", "--data", str(DATA), "--json"]) == 0
    return {(line["kind"], line["bucket"]): line for line in json.loads(out.getvalue())["h200"]}


@pytest.mark.parametrize("kind", LIMITS)
def test_h200_within_limits(kind: str, table: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert table[kind, "all"]["mape"] <= LIMITS[kind]


def test_better_than_roofline_and_affine(table: dict[tuple[str, str], dict[str, Any]]) -> None:
    for kind in ("gemm bf16", "attention decode", "attention prefill", "all-reduce", "model decode", "model prefill"):
        line = table[kind, "all"]
        assert line["mape"] < min(line["roofline"], line["affine"])


def test_buckets_partition_the_rows(table: dict[tuple[str, str], dict[str, Any]]) -> None:
    parts = [line["count"] for (kind, bucket), line in table.items() if kind == "gemm bf16" and bucket != "all"]
    assert sum(parts) == table["gemm bf16", "all"]["count"] == 195


def test_held_out_is_no_worse_than_reported(table: dict[tuple[str, str], dict[str, Any]]) -> None:
    line = table["gemm bf16", "all"]
    assert line["held_out"] is not None and line["held_out"] <= line["mape"] + 1.5


def test_models_are_never_trained_on() -> None:
    rows = read_rows(DATA / "h200")
    trained = [r for r in rows if is_training(r)]
    assert trained and not any(r.kind.startswith("model") for r in trained)
    assert 0.3 < len(trained) / sum(not r.kind.startswith("model") for r in rows) < 0.6


def test_absent_data_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("no measurements here, skipped") == 3


def test_text_and_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--machine", "h200", "--data", str(DATA)]) == 0
    assert "roofline" in capsys.readouterr().out
    assert main(["--machine", "h200", "--data", str(DATA), "--markdown"]) == 0
    page = capsys.readouterr().out
    assert "| **model decode** | all | 18 |" in page
    assert all(name in page for name in load_accelerator("h200").fitted)


def test_fit_comes_back_from_a_wrong_start() -> None:
    """A fitted constant moved away by a half is found again from the training rows."""
    pytest.importorskip("scipy")
    rows = [r for r in read_rows(DATA / "h200") if r.kind == "all-reduce"]
    machine = load_accelerator("h200")
    only = {n: c for n, c in machine.constants.items() if n == "link.efficiency"}
    moved = machine.with_values({"link.efficiency": only["link.efficiency"].value * 0.6})
    found = fit(moved, rows).constants["link.efficiency"].value
    assert found == pytest.approx(only["link.efficiency"].value, rel=0.1)
