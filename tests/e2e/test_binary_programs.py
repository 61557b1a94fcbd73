"""Command programs as bytes instead of text, and for a machine of the user's own: every reader takes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tyir.edge10.binary import read_program
from tyir.manifest import BuildOptions, Manifest
from tyir.printer import print_op
from tyir.runtime_sim.session.session import Session
from tyir.tools.api import compile_path
from tyir.tools.tyir_dis import main as disassemble
from tyir.tools.tyir_sim import main as simulate

Artifacts = Callable[[int, str], Path]


@pytest.fixture(scope="module")
def binary(imported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same compile as `artifacts(2, "int4")`, with `--binary`."""
    options = BuildOptions(dies=2, seqlens=(1, 8), max_kv=128, weights="int4")
    return compile_path(imported, tmp_path_factory.mktemp("binary"), options, binary=True)


def report(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert simulate([str(folder), "--report", "json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return {name: value for name, value in found.items() if name != "artifacts"}


def test_bytes_stand_for_the_text(artifacts: Artifacts, binary: Path, tmp_path: Path) -> None:
    text, manifest = artifacts(2, "int4"), Manifest.load(binary)
    assert not list(binary.rglob("*.edge10"))
    for mine, other in zip(manifest.programs, Manifest.load(text).programs):
        assert mine.program == other.program.replace(".edge10", ".bin") and mine.program in manifest.files
        printed = (text / other.program).read_text()
        assert (
            print_op(read_program(binary / mine.program))
            == printed
            == print_op(read_program(text / other.program))
        )
        assert manifest.files[mine.program]["size"] < len(printed) // 3
    assert disassemble([str(binary / manifest.programs[0].program), "-o", str(tmp_path / "a.edge10")]) == 0
    assert (tmp_path / "a.edge10").read_text() == (text / "batch_1/seqlen_1/llm_die0.edge10").read_text()


def test_both_engines_take_them(
    artifacts: Artifacts, binary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = (artifacts(2, "int4"), binary)
    logits = [Session(folder, "edge10").feed([5, 6, 7, 8, 9, 10, 11, 12, 13]) for folder in folders]
    assert np.array_equal(*logits)
    assert report(folders[0], capsys) == report(folders[1], capsys)


def test_a_folder_is_no_program_but_holds_some(binary: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert disassemble([str(binary)]) == 1
    assert "did you mean" in (said := capsys.readouterr().err) and "llm_die0.bin" in said


def test_a_machine_file_goes_with_the_artifacts(
    imported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A die with half of the on-chip memory and twice the bandwidth: scheduled for it, executed within it,
    simulated on it.
    """
    shipped = (resources.files("tyir.targets") / "edge10.toml").read_text()
    mine = tmp_path / "mine.toml"
    mine.write_text(
        shipped.replace("value = 3145728", "value = 1572864").replace(
            "value = 30.4, low = 17.1, high = 34.1", "value = 60.8, low = 34.2, high = 68.2"
        )
    )
    folder = compile_path(
        imported, tmp_path / "out", BuildOptions(dies=1, seqlens=(1,), max_kv=64), machine=mine
    )
    mine.unlink()
    assert (
        Manifest.load(folder).build["machine"] == "machine.toml"
        and "machine.toml" in Manifest.load(folder).files
    )
    assert Session(folder, "edge10").feed([5, 6]).shape[-1] == 4096
    own, shipped_report = report(folder, capsys), report(folder, capsys, "--machine", "edge10")
    assert own["decode_step"]["device_ms"] < shipped_report["decode_step"]["device_ms"]
