"""`// OUT:` lines of .ir tests: compared exactly, rewritten by `--bless`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

TEXT = """// RUN: tyir-opt %s | same
// OUT: old

// RUN: tyir-opt --dce %s | same
ty.global @w {file = "f", key = "k", nbytes = 4, offset = 0, type = tensor<2xf16>}
"""


def _pytest(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(folder),
        *flags,
        str(folder),
    ]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def test_bless(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).parent / "conftest.py", tmp_path)
    file = tmp_path / "a.ir"
    file.write_text(TEXT)
    failed = _pytest(tmp_path)
    assert failed.returncode == 1 and "-old" in failed.stdout and "pytest --bless" in failed.stdout
    assert file.read_text() == TEXT
    assert _pytest(tmp_path, "--bless").returncode == 0
    lines = file.read_text().splitlines()
    assert (
        lines[1] == '// OUT: "builtin.module"() ({'
        and lines.count(lines[1]) == 2
        and "// OUT: old" not in lines
    )
    assert _pytest(tmp_path).returncode == 0
