"""`tyir-validate`: the H200's table stays within its limits, absent data is skipped with a word, whole models
are never trained on.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tyir.runtime_sim.gpu.accelerator import load_accelerator
from tyir.tools.gpu.validate import main
from tyir.tools.gpu.validation_data import Row, read_rows
from tyir.tools.gpu.validation_fit import fit, is_training
from tyir.tools.gpu.validation_floor import neighbour_floor

DATA = Path(__file__).resolve().parents[1] / "data"

# Per cent MAPE: what is reached now and a little room.
LIMITS = {
    "gemm bf16": 5.0,
    "attention decode": 6.0,
    "attention prefill": 6.0,
    "all-reduce": 6.0,
    "model decode": 3.0,
    "model prefill": 3.0,
    "add+norm": 8.0,
    "silu*mul": 8.0,
    "gemm bf16 (new)": 6.0,
    "attention decode (new)": 8.0,
    "attention prefill (new)": 6.0,
    "all-reduce (new)": 10.0,
    "model decode (new)": 3.0,
    "model prefill (new)": 4.0,
    "model decode (blind)": 4.0,
    "model prefill (blind)": 4.0,
    "model decode (repeat)": 3.0,
    "model prefill (repeat)": 4.0,
}


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str], dict[str, Any]]:
    import contextlib
    import io

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["--machine", "h200", "--data", str(DATA), "--json"]) == 0
    return {(line["kind"], line["bucket"]): line for line in json.loads(out.getvalue())["h200"]}


def test_h100_within_limits(capsys: pytest.CaptureFixture[str]) -> None:
    """Two constants are fitted to products, none to whole models."""
    assert main(["--machine", "h100", "--data", str(DATA), "--json"]) == 0
    table = {
        (line["kind"], line["bucket"]): line["mape"] for line in json.loads(capsys.readouterr().out)["h100"]
    }
    limits = {
        "gemm bf16": 6.0,
        "attention decode": 6.0,
        "attention prefill": 7.0,
        "model decode (new)": 2.0,
        "model prefill (new)": 3.0,
    }
    assert all(table[kind, "all"] <= limit for kind, limit in limits.items()), table
    assert set(load_accelerator("h100").fitted) == {"power.sustained_share", "power.window_us"}


@pytest.mark.parametrize("kind", LIMITS)
def test_h200_within_limits(kind: str, table: dict[tuple[str, str], dict[str, Any]]) -> None:
    assert table[kind, "all"]["mape"] <= LIMITS[kind]


def test_better_than_roofline_and_affine(table: dict[tuple[str, str], dict[str, Any]]) -> None:
    kinds = (
        "gemm bf16",
        "attention decode",
        "attention prefill",
        "all-reduce",
        "model decode",
        "model prefill",
    )
    for kind in (*kinds, *(f"{k} (new)" for k in kinds)):
        line = table[kind, "all"]
        assert line["mape"] < min(line["roofline"], line["affine"])


def test_buckets_partition_the_rows(table: dict[tuple[str, str], dict[str, Any]]) -> None:
    parts = [
        line["count"] for (kind, bucket), line in table.items() if kind == "gemm bf16" and bucket != "all"
    ]
    assert sum(parts) == table["gemm bf16", "all"]["count"] == 195


def test_held_out_is_no_worse_than_reported(table: dict[tuple[str, str], dict[str, Any]]) -> None:
    line = table["gemm bf16", "all"]
    assert line["held_out"] is not None and line["held_out"] <= line["mape"] + 1.5


def test_models_and_new_rows_are_never_trained_on() -> None:
    rows = read_rows(DATA / "h200")
    trained = [r for r in rows if is_training(r)]
    assert trained and not any("model" in r.kind or "new" in r.kind for r in trained)
    assert 0.3 < len(trained) / sum("model" not in r.kind and "new" not in r.kind for r in rows) < 0.6


def test_a_file_is_read_once(tmp_path: Path) -> None:
    """Two folders with the same file: the first one's."""
    (tmp_path / "collectives.jsonl").write_text(
        '{"kind": "collective", "what": "all_reduce", "world": 2, "bytes": 2048, "us": 8}\n'
    )
    rows = [r for r in read_rows(tmp_path, DATA / "h200") if r.kind == "all-reduce"]
    assert len(rows) == 1 and rows[0].us == 8


def _rows(error: float) -> list[Row]:
    """256 rows on a line, each measured `error` times what is predicted, or that part of it, in turns of
    64.
    """
    return [
        Row("x", f"{i}", i, error if i // 64 % 2 else 1 / error, 1.0, 1.0, lambda a: 1000.0, (i + 1,))
        for i in range(256)
    ]


def test_floor_is_what_neighbours_cannot_explain() -> None:
    """Errors that neighbours share are explained but for the edges; errors that hash at random are not."""
    machine = load_accelerator("h200")
    smooth = neighbour_floor(_rows(1.2), machine)
    noise = [
        replace(r, us=1.2 if hash(i * 2654435761 % 4093) % 2 else 1 / 1.2) for i, r in enumerate(_rows(1.0))
    ]
    rough = neighbour_floor(noise, machine)
    assert smooth is not None and rough is not None and smooth < 5 < 12 < rough
    assert neighbour_floor(_rows(1.2)[:100], machine) is None


def test_absent_data_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("no measurements here, skipped") == 4


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
    rows = [r for r in read_rows(DATA / "h200") if r.kind == "attention prefill"]
    whole = load_accelerator("h200")
    name = "attention.efficiency"
    constants = {
        n: replace(c, label="assumed") if c.label == "fitted" and n != name else c
        for n, c in whole.constants.items()
    }
    moved = replace(whole, constants=constants).with_values({name: whole.constants[name].value * 0.6})
    assert fit(moved, rows).constants[name].value == pytest.approx(whole.constants[name].value, rel=0.1)


def test_a_layer_by_part(tmp_path: Path) -> None:
    """12 parts of which the file has seconds, and their sum; GELU of 8 * 2048 rows of 12,288: 2 * 2 *
    201,326,592 bytes at 1540 a ns, and 45 us of Python.
    """
    (tmp_path / "transformer_A100.csv").write_text("\n".join(["0.001"] * 12))
    rows = read_rows(tmp_path)
    machine = load_accelerator("a100")
    assert len(rows) == 13 and rows[-1].us == pytest.approx(12_000)
    assert rows[-1].predict(machine) == pytest.approx(sum(r.predict(machine) for r in rows[:-1]))
    assert rows[9].name == "gelu" and rows[9].predict(machine) == pytest.approx(
        4 * 201_326_592 / 1540 + 45_000
    )
    assert rows[0].flops == 2 * 8 * 2048 * 12288 * 9216 and not any(is_training(r) for r in rows)


def test_layers_of_another_library() -> None:
    """GPT-3 on four A100 by LLMCompass: nothing was fitted to any part of it."""
    folder = DATA.parents[1].parent / "shared" / "validation" / "a100"
    rows = [r for r in read_rows(folder) if r.name == "layer"] if folder.is_dir() else []
    if not rows:
        pytest.skip("the A100's measurements are not here")
    assert [abs(r.predict(load_accelerator("a100")) / 1000 / r.us - 1) < 0.05 for r in rows] == [True, True]


@pytest.mark.parametrize("part", ["head", "engine", "weak"])
def test_the_page_holds_the_prose_that_stands_beside_its_maker(part: str) -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "performance.md").read_text(encoding="utf-8")
    prose = (root / "tools" / "gpu" / f"performance.{part}.md").read_text(encoding="utf-8")
    pieces = prose.split("{table}")
    assert len(pieces) == (2 if part == "engine" else 1)
    assert [piece[:60] for piece in pieces if piece not in page] == []
