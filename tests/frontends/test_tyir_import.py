"""The command-line tool: a complete file or none, one line on stderr, text that parses back to the same
module.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tyir.dialects.builtin import Module
from tyir.parser import parse_file, parse_module
from tyir.printer import print_op
from tyir.tools.cli import write_output
from tyir.tools.tyir_import import main
from tyir.verifier import verify

TINY = Path(__file__).parents[1] / "models" / "tiny-qwen2"


@pytest.mark.parametrize(("options", "stage"), [([], "aten"), (["--raise", "--dtype", "f32"], "ty")])
def test_file_and_summary(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], stage: str
) -> None:
    out = tmp_path / "model.ir"
    assert main([str(llama), "-o", str(out), *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    wanted = (
        rf"LlamaForCausalLM: 2 layers, 80.2 k parameters in 4 files \(0.2 MiB\), \d+ ops at stage {stage}\n"
    )
    assert re.fullmatch(wanted, captured.err), captured.err
    assert [p.name for p in tmp_path.iterdir()] == ["model.ir"]
    module = parse_file(out)
    verify(module)
    assert isinstance(module, Module) and print_op(module) == out.read_text()


def test_standard_output(llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(llama), "--raise"]) == 0
    verify(parse_module(capsys.readouterr().out))


def test_refusals(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "nowhere"), "-o", str(tmp_path / "model.ir")]) == 1
    assert "nowhere does not exist" in capsys.readouterr().err
    assert main([str(llama), "-o", str(tmp_path)]) == 1
    assert "is a folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    assert main([str(llama), "-o", str(tmp_path / "file" / "model.ir")]) == 1
    assert f"{tmp_path / 'file'} is a file, not a folder" in capsys.readouterr().err


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.ir"
    path.write_text("old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_output("new", str(path))
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from tyir.tools.tyir_import import main; code = main(['--help']); sys.exit(code or"
        " 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--raise" in done.stdout


def test_explain_says_what_was_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(TINY), "--explain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Qwen2ForCausalLM: 6 layers, 340 graph operations recognised as"
    assert any("ty.attention (8 heads, 2 key/value heads)  6 = 6 layers x 1" in line for line in lines)
    assert any(line.startswith("  ty.rms_norm") and "13 = 6 layers x 2 + 1" in line for line in lines)
    assert lines[-2] == "weights: 74 tensors of f16"
